"""Rounded inputs from the command to the readers: planned, calibrated, stored, loaded, scored, and read elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import compressor
import compressor.check.reload as reloading
import compressor.verify
from compressor.api import prepare
from compressor.check import check
from compressor.cli.app import app
from compressor.errors import CompressorError, RecipeError, UnsupportedError
from compressor.evals.activations import check_activations
from compressor.formats.activations import INPUT_FORMATS
from compressor.recipe import Recipe
from compressor.report import RunReport
from compressor.runtime import PackedExperts, PackedLinear, dequantized, execution_path
from compressor.testing import models
from compressor.testing.stock import Case, Loaded, load_stock
from compressor.testing.tools import save_checkpoint, tree_hash, write_text

PAIRS: dict[str, dict[str, object]] = {
    "w8a8-token": {"inputs": "int8-token"},
    "w8a8-token-asym": {"inputs": "int8-token-asym", "format": "int8", "group_size": 32},
    "w8a8-tensor": {"inputs": "int8-tensor"},
    "fp8-token": {"inputs": "fp8-token"},
    "fp8-tensor": {"inputs": "fp8-tensor", "format": "fp8-tensor"},
    "fp8-block": {"inputs": "fp8-group", "format": "fp8-block"},
    "w4a8": {"inputs": "int8-token", "format": "int4"},
    "w6a6": {"inputs": "int6-tensor", "format": "int6", "group_size": "channel"},
    "some": {"inputs": "int8-token", "skip_inputs": ["*.down_proj"]},
    "nvfp4": {"inputs": "nvfp4"},
    "mxfp4": {"inputs": "mxfp4"},
    "mxfp8": {"inputs": "mxfp8"},
}
BF16_ONLY = ("nvfp4", "mxfp4", "mxfp8")
"""What stock transformers decompresses to bf16 whatever it is asked for."""


def run(model: PreTrainedModel, root: Path, **options: Any) -> RunReport:
    source = root / "source"
    if not source.exists():
        source.mkdir(parents=True)
        save_checkpoint(model.to(torch.bfloat16), source)
        write_text(root / "text.txt")
    wanted = {"method": "rtn", "output": root / "out", "data": str(root / "text.txt"), "n_samples": 4, "seq_len": 32}
    return compressor.quantize(str(source), **{**wanted, **options})


def logits(folder: Path, tokens: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = compressor.load(folder, **options)(tokens).logits.float()
    return out


def text_tokens(root: Path) -> Tensor:
    """Return tokens `[1, 48]` of the calibration text: static scales per channel know no other."""
    ids = models.tiny_tokenizer()((root / "text.txt").read_text(encoding="utf-8")[2000:2400]).input_ids
    return torch.tensor([ids[:48]])


def simulated(folder: Path, tokens: Tensor) -> Tensor:
    """Return the logits of the decoded weights with compressed-tensors' own rounding of inputs, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder.parent / "source", dtype=torch.float32)
    stored = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    args = QuantizationArgs(**config["config_groups"]["group_0"]["input_activations"])
    for name, weight in dequantized(folder):
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale" not in stored:
            continue
        linear = model.get_submodule(module)
        linear.weight.data = weight
        shared = stored.get(f"{module}.input_global_scale")

        def hook(_: Any, inputs: tuple[Tensor], shared: Tensor | None = shared) -> Tensor:
            scale, zero = compute_dynamic_scales_and_zp(inputs[0], args, model, global_scale=shared)
            return fake_quantize(inputs[0], scale, zero, args, global_scale=shared)

        linear.register_forward_pre_hook(hook)
    with torch.no_grad():
        out: Tensor = model(tokens).logits
    return out


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Loaded, RunReport]]:
    """Write every pair of weights and inputs, and load all of them in one stock process."""
    root = tmp_path_factory.mktemp("pairs")
    reports, cases = {}, {}
    model = models.tiny_llama(hidden_size=128, intermediate_size=128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.verify.verify", compressor.verify.check)
        for name, options in PAIRS.items():
            reports[name] = run(model, root, output=root / name, **options)
            cases[name] = Case(root / name, dtype="bfloat16" if name in BF16_ONLY else "float32")
    loaded = load_stock(cases, root)
    return {name: (root / name, loaded[name], reports[name]) for name in PAIRS}


@pytest.mark.parametrize("name", PAIRS)
def test_stock_transformers_computes_the_same(name: str, pairs: dict[str, tuple[Path, Loaded, RunReport]]) -> None:
    """Bit-equal in float32. Where it runs in bf16 alone, its rounding is run on our weights in float32."""
    folder, loaded, _ = pairs[name]
    assert loaded.error is None, loaded.error
    assert not loaded.wrong_keys
    assert loaded.output is not None
    tokens = torch.tensor([[5, 3]])
    if name not in BF16_ONLY:
        assert torch.equal(logits(folder, tokens)[0], loaded.output.reshape(2, -1))
        return
    assert distance(loaded.output.reshape(2, -1).float(), logits(folder, tokens)[0]) < 0.5
    assert torch.equal(logits(folder, tokens), simulated(folder, tokens))


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_reported_stored_and_checked(
    name: str, pairs: dict[str, tuple[Path, Loaded, RunReport]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, report = pairs[name]
    fmt = INPUT_FORMATS[str(PAIRS[name]["inputs"])]
    rows = [row for row in report.rows if row.inputs]
    assert {row.inputs for row in rows} == {fmt.name}
    assert len(rows) == (12 if name == "some" else 14)
    stored = {key: value for key, value in load_file(folder / "model.safetensors").items() if "proj.input_" in key}
    assert len(stored) == (14 if fmt.static else 0)
    assert all(key.endswith(str(fmt.suffix)) and float(value) > 0 for key, value in stored.items())
    if fmt.static:
        assert all(row.input_error is not None and 0 < row.input_error < 0.3 for row in rows)
        q, k = (stored[f"model.layers.0.self_attn.{leaf}.{fmt.suffix}"] for leaf in ("q_proj", "k_proj"))
        assert torch.equal(q, k), "layers that read one tensor share its scale"
    assert report.bytes_after == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    asked = [group["input_activations"] for group in groups]
    assert sorted(asked, key=str) == sorted([fmt.arguments(), *([None] if name == "some" else [])], key=str)
    model = compressor.load(folder)
    check_activations(model, folder)
    assert f"inputs {fmt.name}" in execution_path(model)
    monkeypatch.setattr("compressor.check.on_reload.reload_fresh", reloading.reload)
    checked = check(folder)
    assert checked.ok, [str(finding) for _, finding in checked.findings()]
    assert any("differs from that of the decoded weights" in str(f) for f in checked.checks[-1].findings)


@pytest.mark.parametrize("method", ["gptq", "smoothquant", "awq"])
@pytest.mark.parametrize("inputs", ["int8-token", "int8-tensor", "fp8-tensor"])
def test_methods_write_both(method: str, inputs: str, tmp_path: Path) -> None:
    model = models.tiny_llama()
    options = {"group_size": "channel", "format": "int8"} if inputs == "fp8-tensor" else {}
    report = run(model, tmp_path, method=method, inputs=inputs, **options)
    assert report.verification["ok"]
    tokens = models.sample_tokens(model)
    with torch.no_grad():
        expected = compressor.load(tmp_path / "source")(tokens).logits
    assert 0 < distance(logits(tmp_path / "out", tokens), expected) < 0.2
    assert check(tmp_path / "out", quick=True).ok
    if inputs.endswith("tensor") or method == "gptq":
        assert all(row.input_error for row in report.rows if row.inputs)


def outliers(model: PreTrainedModel, factor: float = 30.0) -> PreTrainedModel:
    """Make a few channels behind every norm loud without changing what the model computes."""
    body: Any = model.model
    for layer in body.layers:
        for norm, readers in (
            (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):
            norm.weight.data[[1, 17]] *= factor
            for reader in readers:
                reader.weight.data[:, [1, 17]] /= factor
    return model


def test_smoothquant_undoes_outliers_of_inputs(tmp_path: Path) -> None:
    model = outliers(models.tiny_llama())
    tokens = models.sample_tokens(model)
    errors = {}
    for method in ("rtn", "smoothquant"):
        run(model, tmp_path, method=method, inputs="int8-tensor", output=tmp_path / method)
        with torch.no_grad():
            expected = compressor.load(tmp_path / "source")(tokens).logits
        errors[method] = distance(logits(tmp_path / method, tokens), expected)
    assert errors["smoothquant"] < 0.5 * errors["rtn"], errors


def test_static_scales_cover_what_the_compressed_model_meets(tmp_path: Path) -> None:
    """Ranges come from the compressed prefix with this block's weights rounded; a second run writes the same bytes."""
    model = models.tiny_llama()
    run(model, tmp_path, inputs="int8-tensor", format="int3", group_size="channel")
    run(model, tmp_path, inputs="int8-tensor", format="int3", group_size="channel", output=tmp_path / "again")
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "again")
    run(model, tmp_path, inputs="int8-tensor", format="int8", output=tmp_path / "other")
    ours, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    name = "model.layers.{}.{}.input_scale"
    assert torch.equal(ours[name.format(0, "self_attn.q_proj")], other[name.format(0, "self_attn.q_proj")])
    assert not torch.equal(ours[name.format(1, "mlp.down_proj")], other[name.format(1, "mlp.down_proj")])


def test_later_blocks_see_rounded_inputs(tmp_path: Path) -> None:
    """GPTQ's statistics of the second block differ once the first one rounds its inputs."""
    model = models.tiny_llama()
    run(model, tmp_path, method="gptq", format="int4", group_size=32)
    run(model, tmp_path, method="gptq", format="int4", group_size=32, inputs="int4-token", output=tmp_path / "rounded")
    plain, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "rounded"))
    first, second = (f"model.layers.{index}.self_attn.q_proj.weight_packed" for index in (0, 1))
    assert torch.equal(plain[first], rounded[first])
    assert not torch.equal(plain[second], rounded[second])


def test_native_results_round_inputs_too(tmp_path: Path) -> None:
    run(models.tiny_llama(), tmp_path, format="fp4", inputs="int8-tensor", skip_inputs=["*.o_proj"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["inputs"] == [[INPUT_FORMATS["int8-tensor"].describe()]]
    assert len(config["module_inputs"]) == 12
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert sum(bool(m.inputs) for m in model.modules() if isinstance(m, PackedLinear)) == 12
    tokens = models.sample_tokens(model)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, logits(tmp_path / "out", tokens))
    report = check(tmp_path / "out", quick=True)
    assert report.ok
    assert {"fp4, inputs int8-tensor", "fp4"} == set(report.stored)


def test_experts_round_their_inputs_as_the_checkpoint_says(tmp_path: Path) -> None:
    report = run(models.tiny_olmoe(), tmp_path, format="int4", inputs="int8-token", group_size=32)
    rows = [row for row in report.rows if ".experts." in row.name]
    assert {row.inputs for row in rows} == {"int8-token"}
    assert any("stock transformers rounds no inputs inside experts" in event for event in report.events)
    model = compressor.load(tmp_path / "out")
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert all(layer.inputs for layer in experts.modules() if isinstance(layer, PackedLinear))
    run(models.tiny_olmoe(), tmp_path, format="int4", group_size=32, output=tmp_path / "plain")
    tokens = models.sample_tokens(model)
    assert not torch.equal(logits(tmp_path / "out", tokens), logits(tmp_path / "plain", tokens))
    found = check(tmp_path / "out", quick=False)
    assert found.ok
    assert "not decoded" not in str(found.to_json())
    report = run(models.tiny_olmoe(), tmp_path, inputs="int8-token", output=tmp_path / "bytes")
    assert any("stock transformers raises on int8-bytes experts" in event for event in report.events)
    loaded = load_stock({"": Case(tmp_path / "bytes")}, tmp_path)[""]
    assert loaded.error is not None


def test_rounded_inputs_of_experts_equal_explicit_arithmetic(tmp_path: Path) -> None:
    """A static scale per projection, measured; the loaded experts round and multiply as written out here."""
    run(models.tiny_olmoe(), tmp_path, format="int8", inputs="int8-tensor", group_size=32)
    experts = compressor.load(tmp_path / "out").get_submodule("model.layers.1.mlp.experts")
    assert isinstance(experts, PackedExperts)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    index, share = torch.tensor([[3]] * 5), torch.full((5, 1), 0.5)

    def project(role: str, rows: torch.Tensor) -> torch.Tensor:
        layer = experts.projection(3, role)
        scale = layer.inputs[0].tensors()["input_scale"]
        assert scale.item() > 1e-4  # one that calibration data gave
        return ((rows / scale).clamp(-128, 127).round() * scale) @ layer.dequantize().T

    middle = torch.nn.functional.silu(project("gate", x)) * project("up", x)
    assert torch.allclose(experts(x, index, share), 0.5 * project("down", middle), atol=1e-5)


@pytest.mark.parametrize(
    ("build", "options", "error", "said"),
    [
        (models.tiny_llama, {"inputs": "int9"}, RecipeError, "unknown format of inputs 'int9'"),
        (models.tiny_llama, {"inputs": "int8-token", "skip_inputs": ["*.nose"]}, RecipeError, "matches no compressed"),
        (models.tiny_llama, {"skip_inputs": ["*.o_proj"]}, RecipeError, "without --inputs"),
        (models.tiny_llama, {"inputs": "fp8-group"}, UnsupportedError, "do not divide into groups of 128"),
        (models.tiny_llama, {"inputs": "int8-token", "skip_inputs": ["*"]}, UnsupportedError, "no layer's inputs"),
        (models.tiny_llama, {"inputs": "int8-token", "skip_inputs": ["*.q_proj"]}, RecipeError, "runtimes fuse them"),
    ],
)  # fmt: skip
def test_what_is_refused(
    build: Callable[[], PreTrainedModel],
    options: dict[str, Any],
    error: type[CompressorError],
    said: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=said) as caught:
        run(build(), tmp_path, **options)
    assert caught.value.hint


def test_the_plan_names_inputs_before_anything_runs(tmp_path: Path) -> None:
    source = save_checkpoint(models.tiny_llama(), tmp_path / "source")
    job = prepare(Recipe(model=str(source), method="rtn", inputs="int8-token"), tmp_path / "out")
    assert job.plan.format == "int8-bytes"
    assert {layer.inputs for layer in job.plan.compressed} == {"int8-token"}
    assert prepare(Recipe(model=str(source), method="rtn", inputs="fp8-token")).out.name == "source-rtn-fp8-fp8-token"
    assert prepare(Recipe(model=str(source), method="rtn", inputs="int8-token", format="int4")).plan.format == "int4"


def biased(model: PreTrainedModel) -> PreTrainedModel:
    """Give every norm's output an offset, and every layer's output one: random models have none."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_opt() -> PreTrainedModel:
    """A pre-norm decoder whose norms and layers have biases."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=64, pad_token_id=2, bos_token_id=0, eos_token_id=1,
        init_std=0.2,
    )  # fmt: skip
    return biased(OPTForCausalLM(config).eval())


STATIC = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1")


@pytest.mark.parametrize(
    ("build", "options", "native"),
    [
        (models.tiny_llama, {}, False),
        (models.tiny_llama, {"format": "int6"}, False),
        (models.tiny_llama, {"options": {"shift": "all"}}, True),
        (tiny_opt, {}, False),
        (tiny_opt, {"options": {"shift": "none"}}, False),
    ],
    ids=["llama", "llama-w6a6", "llama-shift", "opt-shift", "opt"],
)
def test_outliertune_end_to_end(
    build: Callable[[], PreTrainedModel], options: dict[str, Any], native: bool, tmp_path: Path
) -> None:
    model = build()
    if build is tiny_opt:  # biases in 16 bits would round the shift
        save_checkpoint(model, tmp_path / "source")
        write_text(tmp_path / "text.txt")
    report = run(model, tmp_path, method="outliertune", n_samples=24, **options)
    bits = 6 if options.get("format") == "int6" else 8
    for row in report.rows:
        leaf = row.name.split(".")[-2]
        if row.inputs:
            assert row.inputs == (f"int{bits}-tensor" if leaf in STATIC else f"int{bits}-token"), row
    assert sum(row.inputs == f"int{bits}-tensor" for row in report.rows) == (10 if build is models.tiny_llama else 8)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["quantization_config"]["quant_method"] == "compressor") == native
    rewritten = {row.name.split(".")[-2] for row in report.rows if row.action == "rewritten"}
    shifted = build is tiny_opt and "options" not in options
    assert ("q_proj" in rewritten) == shifted
    tokens = text_tokens(tmp_path)
    with torch.no_grad():
        expected = compressor.load(tmp_path / "source")(tokens).logits
    assert distance(logits(tmp_path / "out", tokens), expected) < (0.4 if bits == 6 else 0.2)
    if not native:
        loaded = load_stock({"": Case(tmp_path / "out", dtype="float32")}, tmp_path)[""]
        assert loaded.error is None, loaded.error
        assert loaded.output is not None
        if build is models.tiny_llama:  # OPT hands its layers matrices: one scale for all tokens there
            assert torch.equal(logits(tmp_path / "out", torch.tensor([[5, 3]]))[0], loaded.output.reshape(2, -1))
    else:
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(again(tokens).logits, logits(tmp_path / "out", tokens))
        assert check(tmp_path / "out", quick=True).ok


def test_outliertune_codes_do_not_see_planted_outliers(tmp_path: Path) -> None:
    """Section 2.7: weights' codes behind norms are the same with and without loud channels."""
    plain, loud = models.tiny_llama(), outliers(models.tiny_llama(), factor=32.0)
    run(plain, tmp_path / "plain", method="outliertune")
    run(loud, tmp_path / "loud", method="outliertune")
    ours, other = (load_file(tmp_path / name / "out" / "model.safetensors") for name in ("plain", "loud"))
    for leaf in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        assert torch.equal(ours[f"model.layers.0.{leaf}.weight"], other[f"model.layers.0.{leaf}.weight"]), leaf
    names = [name for name in ours if name.endswith("proj.weight") and name.split(".")[-2] in STATIC]
    same = sum(float((ours[name] == other[name]).float().mean()) for name in names) / len(names)
    assert same > 0.99


@pytest.mark.parametrize(
    ("method", "inputs", "options"),
    [
        ("rtn", "fpq4", {}),
        ("fp4", "fpq4", {"points": 5, "rounds": 1, "tokens": 64}),
        ("fp4", "fpq6", {"points": 5, "rounds": 1, "tokens": 64}),
        ("fp4", "fpq8", {"points": 5, "rounds": 1, "tokens": 64, "offsets": False}),
    ],
)
def test_llm_fp4_end_to_end(method: str, inputs: str, options: dict[str, Any], tmp_path: Path) -> None:
    report = run(models.tiny_llama(), tmp_path, method=method, inputs=inputs, options=options)
    weights = {"fpq4": "fp4", "fpq6": "fp6", "fpq8": "fp8-searched"}[inputs]  # as many bits
    assert {row.action for row in report.rows if row.inputs} == {weights}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    splits = {int(value) for name, value in stored.items() if name.endswith("input_mantissa")}
    offsets = [int(value.max()) for name, value in stored.items() if name.endswith("input_pow2")]
    assert len(offsets) == 14
    assert any(offsets) == (method == "fp4" and options.get("offsets", True))
    assert splits == {1} if method == "rtn" else splits <= set(range(7))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = text_tokens(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, logits(tmp_path / "out", tokens))
    checked = check(tmp_path / "out", quick=True)
    assert checked.ok
    reasons = {row.others["triton-int"] for row in checked.kernels}
    # As integers fpq4 fits a byte but for one split that has offsets, fpq8 in no split.
    assert any("CUDA" in reason for reason in reasons) or inputs != "fpq4"
    assert all("not rounded" in reason for reason in reasons) or inputs != "fpq8"


@pytest.mark.parametrize(
    ("suffix", "wrong"),
    [
        ("input_mantissa", torch.tensor([200], dtype=torch.uint8)),
        ("input_mantissa", torch.empty(0, dtype=torch.uint8)),
        ("input_mantissa", torch.tensor([torch.nan])),
        ("input_pow2", torch.empty(0, dtype=torch.int8)),
        ("input_pow2", torch.full((64,), -1, dtype=torch.int8)),
        ("input_pow2", torch.full((64,), 100, dtype=torch.int8)),
    ],
)
def test_damaged_small_floats_are_checked_to_the_end(suffix: str, wrong: torch.Tensor, tmp_path: Path) -> None:
    run(models.tiny_llama(), tmp_path, method="rtn", inputs="fpq4")
    file = tmp_path / "out" / "model.safetensors"
    stored = load_file(file)
    name = next(key for key in stored if key.endswith(f"q_proj.{suffix}"))
    save_file(stored | {name: wrong}, file, metadata={"format": "pt"})
    rows = [row for row in check(tmp_path / "out", quick=True).kernels if "q_proj" in row.pattern]
    assert sum(row.count for row in rows if row.m[0] == 1) == 2  # one layer is whole, one is not
    assert any("not rounded" in row.others.get("triton-int", "not rounded") for row in rows)


def test_llm_fp4_searches_what_other_programs_read(tmp_path: Path) -> None:
    """NVFP4 with searched global scales of inputs: one for the layers that runtimes fuse."""
    run(models.tiny_llama(), tmp_path, method="fp4", inputs="nvfp4", options={"tokens": 64})
    stored = load_file(tmp_path / "out" / "model.safetensors")
    scales = {name: float(value) for name, value in stored.items() if name.endswith("input_global_scale")}
    assert len(scales) == 14
    assert len({scales[f"model.layers.1.self_attn.{leaf}.input_global_scale"] for leaf in ("q_proj", "k_proj")}) == 1
    loaded = load_stock({"": Case(tmp_path / "out")}, tmp_path)[""]
    assert loaded.error is None, loaded.error
    assert not loaded.wrong_keys


def test_the_command_line_lists_and_plans(tmp_path: Path) -> None:
    source = save_checkpoint(models.tiny_llama(), tmp_path / "source")
    listed = CliRunner().invoke(app, ["list", "inputs", "--json"])
    assert json.loads(listed.stdout)["inputs"].keys() == INPUT_FORMATS.keys()
    asked = ["quantize", str(source), "--method", "rtn", "--inputs", "int8-tensor", "--skip-inputs", "*.o_proj"]
    planned = json.loads(CliRunner().invoke(app, [*asked, "--dry-run", "--json"]).stdout)
    inputs = {layer["ref"]["name"].split(".")[-2]: layer for layer in planned["layers"] if layer["format"]}
    assert inputs["q_proj"]["inputs"] == "int8-tensor"
    assert inputs["o_proj"]["inputs_kept_because"] == "left out by --skip-inputs *.o_proj"
    shown = CliRunner().invoke(app, [*asked, "--dry-run"])
    assert "inputs int8-tensor" in shown.stdout
    wrong = CliRunner().invoke(app, ["quantize", str(source), "--inputs", "int8"]).exception
    assert isinstance(wrong, RecipeError)
    assert "int8-token" in wrong.hint
