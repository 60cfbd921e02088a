"""Sources that are quantized already: what they show, what they decode to, and that nothing behind them can tell."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import compressor
from compressor.checkpoint.source import DTYPE_NAMES, Source
from compressor.errors import CheckpointError, CompressorError, UnsupportedError
from compressor.formats import get_format
from compressor.testing import models
from compressor.testing.checkpoints import dense_twin, write_compressed
from compressor.testing.tools import save_checkpoint, write_text
from compressor.verify import check

FORMATS = ["int4", "int3-channel", "int8", "nvfp4", "mxfp4", "fp8", "fp8-tensor", "fp8-block", "mxfp8"]
MORE_INTS = ["int4-asym", "int3-asym-channel", "int8-asym", "int8-tensor", "int6-asym-tensor"]


@pytest.fixture(autouse=True)
def _verify_inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.verify.verify", check)
    gc.freeze()  # the engine collects garbage after every block: it need not look at the libraries each time


def edit_config(folder: Path, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return config


def compressed(model: PreTrainedModel, folder: Path, name: str) -> list[str]:
    if name.startswith("int") and name.endswith("-tensor"):
        return write_compressed(model, folder, get_format(name.removesuffix("-tensor"), "tensor", model.dtype))
    kind, _, channel = name.partition("-c")
    size = None if channel or kind.removesuffix("-asym") not in ("int4", "int8") else 32
    return write_compressed(model, folder, get_format(kind, size, model.dtype))


def block_fp8(
    model: PreTrainedModel, folder: Path, block: tuple[int, int] | None = (32, 48), scale: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Write linear layers as DeepSeek-V3 does; returns what their weights are worth, computed tile by tile."""
    save_checkpoint(model, folder)
    tensors = load_file(folder / "model.safetensors")
    worth = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        rows, columns = block or weight.shape
        grid = [[weight[i : i + rows, j : j + columns] for j in range(0, weight.shape[1], columns)]
                for i in range(0, weight.shape[0], rows)]  # fmt: skip
        scales = torch.tensor([[float(tile.abs().max()) / 448 for tile in row] for row in grid]).log2().ceil().exp2()
        codes = [
            torch.cat([(t / s).to(torch.float8_e4m3fn).float() for t, s in zip(row, line, strict=True)], 1)
            for row, line in zip(grid, scales, strict=True)
        ]
        worth[name] = torch.cat(
            [
                torch.cat([(t / s).to(torch.float8_e4m3fn).float() * s for t, s in zip(row, line, strict=True)], 1)
                for row, line in zip(grid, scales, strict=True)
            ]
        )
        tensors[name] = torch.cat(codes).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = (scales if block else scales.reshape(())).to(scale)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    section = {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic", "fmt": "e4m3"}
    edit_config(folder, quantization_config=section)
    return worth


def one_line(error: CompressorError) -> None:
    assert error.exit_code == 4
    assert "\n" not in error.message + error.hint
    assert error.hint


# --- what a source shows and reads ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [*FORMATS, *MORE_INTS])
def test_compressed_tensors_reads_as_the_dense_checkpoint(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = models.tiny_llama(kv_heads=2).to(dtype)
    modules = compressed(model, tmp_path, name)
    source = Source.open(tmp_path)
    assert "quantization_config" not in source.config
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    assert source.tensors.keys() == state.keys()
    read = source.read(source.tensors)
    for tensor, value in state.items():
        info = source.tensors[tensor]
        assert (info.dtype, info.shape, info.nbytes) == (DTYPE_NAMES[dtype], tuple(value.shape), value.nbytes)
        assert (read[tensor].dtype, read[tensor].shape) == (dtype, value.shape)
        if tensor.removesuffix(".weight") in modules:
            error = (read[tensor].float() - value.float()).norm() / value.float().norm()
            assert 0 < error < (0.35 if name.endswith("-channel") else 0.15), tensor
        else:
            assert torch.equal(read[tensor], value), tensor
    assert len(source.notes) == 1
    assert "14 weights are dequantized" in source.notes[0]


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("block", [(32, 48), (128, 128), None])
def test_block_fp8_reads_as_the_dense_checkpoint(
    block: tuple[int, int] | None, scale: torch.dtype, tmp_path: Path
) -> None:
    model = models.tiny_llama().to(torch.bfloat16)
    worth = block_fp8(model, tmp_path, block, scale)  # powers of two: exact in either dtype
    source = Source.open(tmp_path)
    assert not [name for name in source.tensors if name.endswith("_scale_inv")]
    read = source.read(source.tensors)
    assert len(worth) == 14
    for name, value in worth.items():
        assert torch.equal(read[name], value.to(torch.bfloat16)), name
    assert "fp8" in source.notes[0]


def test_reads_single_tensors_and_parts_from_other_shards(tmp_path: Path) -> None:
    model = models.tiny_llama()
    compressed(model, tmp_path, "nvfp4")
    whole = Source.open(tmp_path).read(Source.open(tmp_path).tensors)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    shards = {"a.safetensors": {}, "b.safetensors": {}}  # type: dict[str, dict[str, Tensor]]
    for index, name in enumerate(sorted(tensors)):
        shards["ab"[index % 2] + ".safetensors"][name] = tensors[name]
    for file, content in shards.items():
        save_file(content, tmp_path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, content in shards.items() for name in content}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = Source.open(tmp_path)
    for name, value in whole.items():
        assert torch.equal(source.read([name])[name], value), name


def test_activation_scales_are_left_out_with_a_word(tmp_path: Path) -> None:
    compressed(models.tiny_llama(), tmp_path, "nvfp4")
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        tensors[name.replace(".weight_packed", ".input_global_scale")] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    weights = section["config_groups"]["group_0"]["weights"]
    section["config_groups"]["group_0"]["input_activations"] = {**weights, "dynamic": "local"}
    section["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    edit_config(tmp_path, quantization_config=section)
    source = Source.open(tmp_path)
    assert not [name for name in source.tensors if "scale" in name]
    assert source.notes[1].startswith("14 scales of quantized activations")


# --- the whole way ---


def equal_results(a: Path, b: Path) -> None:
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize(
    ("name", "result"),
    [("int4", {"method": "rtn", "format": "int3"}), ("nvfp4", {"method": "fp4"}), ("mxfp4", {"method": "rtn"}),
     ("fp8-block", {"method": "rtn", "format": "int4"}), ("native-fp8", {"method": "fp4"})],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_quantizing_equals_quantizing_the_dense_twin(name: str, result: dict[str, Any], tmp_path: Path) -> None:
    model = models.tiny_llama(kv_heads=2).to(torch.bfloat16)
    packed, twin = tmp_path / "packed", tmp_path / "twin"
    save_checkpoint(model, packed)
    if name == "native-fp8":
        block_fp8(model, packed)
    else:
        compressed(model, packed, name)
    source = Source.open(packed)
    save_checkpoint(model, twin)
    dense_twin(model, source.read(source.tensors), twin)
    data = write_text(tmp_path / "text.txt")
    for folder, out in ((packed, "a"), (twin, "b")):
        report = compressor.quantize(
            str(folder), output=tmp_path / out, data=str(data), n_samples=2, seq_len=16, **result
        )
        assert any("dequantized" in event for event in report.events) == (folder == packed)
    equal_results(tmp_path / "a", tmp_path / "b")
    section = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "compressed-tensors"


def test_experts_equal_those_of_the_dense_twin(tmp_path: Path) -> None:
    model = models.tiny_olmoe().to(torch.bfloat16)
    save_checkpoint(model, tmp_path / "packed")
    compressed(model, tmp_path / "packed", "int8")
    source = Source.open(tmp_path / "packed")
    assert sum(".experts." in name for name in source.decoders) == 2 * 4 * 3
    dense_twin(model, source.read(source.tensors), tmp_path / "twin")
    for folder, out in (("packed", "a"), ("twin", "b")):
        compressor.quantize(str(tmp_path / folder), method="rtn", format="mxfp4", output=tmp_path / out)
    equal_results(tmp_path / "a", tmp_path / "b")


def test_block_fp8_loads_as_a_baseline(tmp_path: Path) -> None:
    worth = block_fp8(models.tiny_llama(), tmp_path)
    loaded = compressor.load(tmp_path)
    for name, value in worth.items():
        assert torch.equal(loaded.get_parameter(name), value), name


# --- refusals ---


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("gptq", "GPTQ"),
        ("awq", "AWQ"),
        ("bitsandbytes", "bitsandbytes"),
        ("quanto", "made from"),
    ],
)
def test_other_methods_are_refused_by_name(method: str, words: str, tmp_path: Path) -> None:
    save_checkpoint(models.tiny_llama(), tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedError, match=f"quantized already .*{method!r}") as caught:
        Source.open(tmp_path)
    one_line(caught.value)
    assert words in caught.value.hint


@pytest.mark.parametrize("section", [{"load_in_4bit": True}, [1], "fp8"])
def test_sections_without_a_method(section: Any, tmp_path: Path) -> None:
    save_checkpoint(models.tiny_llama(), tmp_path)
    edit_config(tmp_path, quantization_config=section)
    with pytest.raises(UnsupportedError, match="quantized already") as caught:
        Source.open(tmp_path)
    one_line(caught.value)


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_dense_weights_under_a_quantized_config(method: str, tmp_path: Path) -> None:
    compressed(models.tiny_llama(), tmp_path, "int4")
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    save_checkpoint(models.tiny_llama(), tmp_path)
    edit_config(tmp_path, quantization_config={**section, "quant_method": method})
    with pytest.raises(CheckpointError, match="no tensor is stored that way") as caught:
        Source.open(tmp_path)
    one_line(caught.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no-scale", "is stored in FP8 without a scale"),
        ("grid", "needs [4, 2]"),
        ("block-size", "weight_block_size is [128]"),
        ("nan", "values are NaN or Inf"),
    ],
)
def test_damaged_block_fp8(damage: str, words: str, tmp_path: Path) -> None:
    block_fp8(models.tiny_llama(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    scale = "model.layers.1.mlp.up_proj.weight_scale_inv"
    if damage == "no-scale":
        del tensors[scale]
    elif damage == "grid":
        tensors[scale] = torch.ones(2, 2)
    elif damage == "nan":
        tensors[scale][0, 1] = float("nan")
    else:
        section = {"quant_method": "fp8", "weight_block_size": [128]}
        edit_config(tmp_path, quantization_config=section)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        Source.open(tmp_path).read(["model.layers.1.mlp.up_proj.weight"])
    assert words in caught.value.message
    one_line(caught.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no-matrix", "weight_packed: is missing"),
        ("shape", "needs F32 [128, 2]"),
        ("both", "has both weight and weight_packed"),
        ("zero-point", "weight_zero_point: is missing, int4-asym needs it"),
        ("widths", "weight_packed: is I32"),
        ("unknown", "'sparse-24' is not supported"),
    ],
)
def test_damaged_compressed_tensors(damage: str, words: str, tmp_path: Path) -> None:
    compressed(models.tiny_llama(), tmp_path, "int4")
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    up = "model.layers.1.mlp.up_proj"
    if damage == "no-matrix":
        del tensors[f"{up}.weight_packed"]
    elif damage == "shape":
        tensors[f"{up}.weight_scale"] = torch.ones(128, 5)
    elif damage == "both":
        tensors[f"{up}.weight"] = torch.ones(128, 64)
    elif damage == "zero-point":
        group["weights"]["symmetric"] = False
    elif damage == "widths":
        group["weights"]["num_bits"] = 3
    else:
        group["format"] = config["quantization_config"]["format"] = "sparse-24"
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    edit_config(tmp_path, **config)
    with pytest.raises(CompressorError) as caught:
        Source.open(tmp_path)
    assert words in caught.value.message
    one_line(caught.value)


def test_quantized_text_model_inside_another(tmp_path: Path) -> None:
    worth = block_fp8(models.tiny_llama(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    section = config.pop("quantization_config")
    config["text_config"] = {"quantization_config": section, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = Source.open(tmp_path)
    assert len(source.decoders) == len(worth)
    assert source.config["text_config"] == {"hidden_size": 64}
