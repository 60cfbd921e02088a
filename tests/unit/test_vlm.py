"""Vision-language models: the language model's blocks are compressed, towers are kept, stock transformers agrees."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import compressor
from compressor.checkpoint.blocks import BlockSequence
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import Source
from compressor.errors import UnsupportedError
from compressor.plan import OUTSIDE, Kind, Plan
from compressor.planner import make_plan
from compressor.recipe import Recipe
from compressor.runtime import dequantized
from compressor.testing import vlm
from compressor.testing.tools import save_checkpoint, write_text
from compressor.verify import check

FAMILIES: dict[Callable[[], PreTrainedModel], tuple[str, set[str]]] = {
    vlm.tiny_llava: ("model.language_model", {"model.vision_tower", "model.multi_modal_projector"}),
    vlm.tiny_qwen_vl: ("model.language_model", {"model.visual"}),
    vlm.tiny_smolvlm: ("model.text_model", {"model.vision_model", "model.connector"}),
    vlm.tiny_gemma3: ("model.language_model", {"model.vision_tower", "model.multi_modal_projector"}),
}

STOCK = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
answers = {}
for name, (folder, dtype, inputs, out) in json.load(sys.stdin).items():
    cls = transformers.AutoModelForImageTextToText
    model, info = cls.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
    with torch.no_grad():
        logits = model(**load_file(inputs)).logits  # the reader decompresses on the first forward
    weights = {k: v.clone().contiguous() for k, v in model.state_dict().items()}
    save_file({"logits": logits, **weights}, out)
    answers[name] = {k: sorted(map(str, v)) for k, v in info.items()}
assert "compressor" not in sys.modules
print(json.dumps(answers))
"""


@pytest.fixture(autouse=True)
def _verify_inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.verify.verify", check)
    gc.freeze()  # the engine collects garbage after every block: it need not look at the libraries each time


def plan_of(model: PreTrainedModel, folder: Path, **recipe: object) -> Plan:
    model.save_pretrained(folder)
    skeleton = Skeleton.build(folder)
    fields = {"model": str(folder), "method": "rtn", "format": "int4", **recipe}
    return make_plan(Recipe(**fields), Source.open(folder), skeleton, BlockSequence.find(skeleton.model))  # type: ignore[arg-type]


@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
def test_plan(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    language, parts = FAMILIES[build]
    model = build()
    plan = plan_of(model, tmp_path)
    assert plan.blocks == (f"{language}.layers.0", f"{language}.layers.1")
    assert len(plan.compressed) == 2 * 7
    assert all(layer.ref.param.startswith(f"{language}.layers.") for layer in plan.compressed)
    beside = {layer.ref.part for layer in plan.layers} - {None}
    assert beside == parts
    for layer in plan.layers:
        if layer.ref.part:
            assert layer.ref.block == OUTSIDE
            assert (
                layer.kept_because == f"{layer.ref.part}: only the language model of a multimodal model is compressed"
            )
    towers = {name for name, _ in model.named_parameters() if any(name.startswith(f"{part}.") for part in parts)}
    assert {layer.ref.param for layer in plan.layers if layer.ref.part} == towers
    heads = [layer for layer in plan.layers if layer.ref.param == "lm_head.weight"]
    assert all("output head" in (layer.kept_because or "") for layer in heads)
    assert {site.block for site in plan.sites} == {0, 1}


def test_a_tower_larger_than_the_language_model_changes_nothing(tmp_path: Path) -> None:
    model = vlm.tiny_llava(vision_width=256)
    sizes = {name: sum(p.numel() for p in model.get_submodule(f"model.{name}").parameters())
             for name in ("vision_tower", "language_model")}  # fmt: skip
    assert sizes["vision_tower"] > 2 * sizes["language_model"]
    plan = plan_of(model, tmp_path)
    assert plan.blocks[0] == "model.language_model.layers.0"
    assert plan.peak_bytes < plan_of(vlm.tiny_llava(), tmp_path / "small").peak_bytes * 1.01, (
        "the tower is never resident"
    )


def test_two_encoders_stay_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="are both stacks of blocks"):
        plan_of(vlm.tiny_clip(), tmp_path)


def test_patterns_mean_the_language_model(tmp_path: Path) -> None:
    overrides = ({"match": "*.self_attn.*", "format": "int8"},)
    plan = plan_of(vlm.tiny_llava(), tmp_path, overrides=overrides)
    vision = [
        layer for layer in plan.layers if layer.ref.part == "model.vision_tower" and layer.ref.kind is Kind.LINEAR
    ]
    assert len(vision) == 2 * 6
    assert sum(".self_attn." in layer.ref.name for layer in vision) == 2 * 4
    assert not [layer for layer in vision if layer.format]
    assert sum(layer.format == "int8" for layer in plan.layers) == 2 * 4


def stock(cases: dict[str, tuple[Path, str, dict[str, Tensor]]], scratch: Path) -> dict[str, dict[str, Tensor]]:
    """Load and run folders with stock transformers, in one process that never imports this package."""
    job = {}
    for name, (folder, dtype, inputs) in cases.items():
        save_file(inputs, scratch / f"{name}-in.st")
        job[name] = [str(folder), dtype, str(scratch / f"{name}-in.st"), str(scratch / f"{name}-out.st")]
    done = subprocess.run(
        [sys.executable, "-c", STOCK], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, info in json.loads(done.stdout.splitlines()[-1]).items():
        assert not any(info.values()), (name, info)
    return {name: load_file(scratch / f"{name}-out.st") for name in cases}


def test_loads_bit_equal_here_and_in_stock_transformers(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    options = {"method": "fp4", "format": "nvfp4", "data": str(text), "n_samples": 4, "seq_len": 32}
    runs = {
        "llava-int4": (vlm.tiny_llava, "float32", {"method": "rtn", "format": "int4"}),
        "llava-nvfp4": (vlm.tiny_llava, "bfloat16", options),
        "qwen-int4": (vlm.tiny_qwen_vl, "float32", {"method": "rtn", "format": "int4"}),
        "qwen-nvfp4": (vlm.tiny_qwen_vl, "bfloat16", options),
        "smolvlm-int4": (vlm.tiny_smolvlm, "float32", {"method": "rtn", "format": "int4"}),
        "gemma-nvfp4": (vlm.tiny_gemma3, "bfloat16", options),
    }
    cases = {}
    for name, (build, dtype, chosen) in runs.items():
        model = build().to(getattr(torch, dtype))
        source = save_checkpoint(model, tmp_path / name / "source")
        report = compressor.quantize(str(source), output=tmp_path / name / "out", **chosen)  # type: ignore[arg-type]
        assert report.verification["relative_error"] < 1e-5
        inputs = {"input_ids": torch.arange(10, 30)[None]}
        if "llava" in name:
            inputs = vlm.image_inputs(model)
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        cases[name] = (tmp_path / name / "out", dtype, inputs)
    for name, theirs in stock(cases, tmp_path).items():
        folder, dtype, inputs = cases[name]
        ours = dict(dequantized(folder))
        targets = Skeleton.build(folder).targets({key: tuple(value.shape) for key, value in ours.items()})
        assert len(ours) > 50
        for key, value in ours.items():
            param = targets[key].param
            assert param is not None, (name, key)
            assert torch.equal(value.to(theirs[param].dtype), theirs[param]), (name, key)
        with torch.no_grad():
            logits = compressor.load(folder, dtype=getattr(torch, dtype))(**inputs).logits.float()
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        assert (logits - theirs["logits"].float()).norm() < tolerance * logits.norm(), name


def test_ignore_names_the_towers_as_on_disk_and_as_in_memory(tmp_path: Path) -> None:
    model = vlm.tiny_llava()
    compressor.quantize(
        str(save_checkpoint(model, tmp_path / "in")), method="rtn", format="int4", output=tmp_path / "out"
    )
    ignore = set(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"])
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = {name for name in linears if ".language_model.layers." not in name}
    assert len(kept) == 2 * 6 + 2 + 1
    assert kept <= ignore
    on_disk = {name.removesuffix(".weight") for name in load_file(tmp_path / "out" / "model.safetensors")}
    assert {name for name in on_disk if "vision_tower" in name and name.endswith(("_proj", "fc1", "fc2"))} <= ignore
    assert "language_model.lm_head" in ignore
