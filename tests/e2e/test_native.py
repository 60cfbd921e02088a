"""Native checkpoints: stock transformers refuses them loudly, and loads them packed once this package is imported."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import compressor
from compressor.checkpoint.ends import first_tensor
from compressor.errors import CheckpointError
from compressor.formats.native import NativeSchemes
from compressor.runtime import PackedLinear
from compressor.testing import models
from compressor.testing.tools import save_checkpoint, write_text

BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: models.tiny_llama(kv_heads=2),
    "untied": lambda: models.tiny_llama(tied=False),
    "bert": models.tiny_bert,
    "olmoe": models.tiny_olmoe,
    "mixtral": models.tiny_mixtral,
    "qwen2-moe": models.tiny_qwen2_moe,
}


def write(model: PreTrainedModel, root: Path, **options: object) -> Path:
    source = save_checkpoint(model, root / "source")
    wanted = {"method": "rtn", "format": "fp4", **options}
    compressor.quantize(str(source), output=root / "out", **wanted)  # type: ignore[arg-type]
    return root / "out"


@pytest.mark.parametrize("name", BUILDERS)
def test_auto_classes_load_it_packed(name: str, tmp_path: Path) -> None:
    out = write(BUILDERS[name]().to(torch.bfloat16), tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "compressor_" + config["base_model_type"]
    auto = AutoModel if name == "bert" else AutoModelForCausalLM
    for dtype in (torch.float32, torch.bfloat16):
        model, info = auto.from_pretrained(out, dtype=dtype, output_loading_info=True)
        assert not any(info.values()), info
        packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert len(packed) == len(config["quantization_config"]["modules"])
        ours = compressor.load(out, dtype=dtype)
        tokens = models.sample_tokens(ours)
        with torch.no_grad():
            assert torch.equal(first_tensor(model(tokens)), first_tensor(ours(tokens)))
    assert AutoConfig.from_pretrained(out).model_type == config["base_model_type"]
    assert AutoTokenizer.from_pretrained(out)("the cat").input_ids


def test_generation_and_refusal_to_save(tmp_path: Path) -> None:
    out = write(models.tiny_llama(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokens = models.sample_tokens(model, length=5)
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape[1] > 5
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")


STOCK = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
for auto in (AutoConfig, AutoModelForCausalLM):
    try:
        auto.from_pretrained(sys.argv[1])
    except ValueError as error:
        assert "compressor_llama" in str(error), error
    else:
        sys.exit(f"{auto.__name__} loaded it")
assert "compressor" not in sys.modules
"""
AFTER = """
import sys, transformers
from transformers import AutoModelForCausalLM
import compressor
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert any(type(module).__name__ == "PackedLinear" for module in model.modules())
"""
BEFORE = AFTER.replace(
    "import sys, transformers\nfrom", "import sys, compressor\nassert 'torch' not in sys.modules\nfrom"
)


@pytest.mark.parametrize("script", [STOCK, BEFORE, AFTER], ids=["stock", "import-before", "import-after"])
def test_other_processes(script: str, tmp_path: Path) -> None:
    out = write(models.tiny_llama(), tmp_path)
    done = subprocess.run([sys.executable, "-c", script, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_searched_native_format_beats_rounding(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    model = models.tiny_llama(layers=3)
    tokens = torch.randint(4, 300, (4, 64), generator=torch.Generator().manual_seed(5))
    errors = {}
    for method in ("rtn", "fp4"):
        out = write(model, tmp_path / method, method=method, data=str(text), seq_len=64)
        with torch.no_grad():
            expected, got = model(tokens).logits, compressor.load(out)(tokens).logits
        errors[method] = float((got - expected).norm() / expected.norm())
    assert errors["fp4"] < errors["rtn"], errors


def test_native_and_other_formats_mix(tmp_path: Path) -> None:
    out = write(models.tiny_llama(), tmp_path, overrides={"*.down_proj": "int8", "*.mlp.up_proj": "nvfp4",
                                                          "*.mlp.gate_proj": "nvfp4", "*.o_proj": "int3-asym:32",
                                                          "*.1.self_attn.o_proj": "int8-asym:tensor"})  # fmt: skip
    entries = json.loads((out / "config.json").read_text())["quantization_config"]["formats"]
    assert {(entry["name"], entry["group_size"]) for entry in entries} == {
        *(("fp4", None), ("int8", 64), ("nvfp4", 16)),
        *(("int3-asym", 32), ("int8-asym", "tensor")),
    }
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = models.sample_tokens(model)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, compressor.load(out)(tokens).logits)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"formats": [{"name": "fp99", "group_size": None, "scale_dtype": None}]},
        {"formats": [{"name": "fp4", "group_size": -1, "scale_dtype": None}]},
        {"formats": [{"name": "fp4", "group_size": "tensor", "scale_dtype": None}]},
        {"formats": [{"name": "int4", "group_size": "row", "scale_dtype": None}]},
        {"formats": [{"name": "int4", "group_size": 64, "scale_dtype": "object"}]},
        {"formats": "fp4"},
        {"modules": {"model.layers.0.mlp.up_proj": 7}},
        {"modules": None},
    ],
    ids=str,
)
def test_damaged_configs(change: dict[str, object]) -> None:
    config = {"version": 1, "formats": [{"name": "fp4", "group_size": None, "scale_dtype": None}], "modules": {"a": 0}}
    assert NativeSchemes.parse(config).find(("a",), torch.float32) is not None
    with pytest.raises(CheckpointError) as caught:
        NativeSchemes.parse({**config, **change})
    assert caught.value.hint


def test_module_list_must_match_what_is_stored(tmp_path: Path) -> None:
    out = write(models.tiny_llama(), tmp_path)
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj"):
        compressor.load(out)
