"""What we write and what stock transformers makes of it: exact, or a known upstream failure pinned here.

Every expectation is strict in both directions: if a reader gets better, this file notices, and the notes we print about
it can go.
"""

import json
from pathlib import Path

import pytest
import torch

import compressor
import compressor.verify
from compressor.runtime import dequantized
from compressor.testing import models
from compressor.testing.stock import Case, Loaded, load_stock
from compressor.testing.tools import save_checkpoint

DENSE: dict[str, dict[str, object]] = {
    "int4-g32": {"format": "int4", "group_size": 32},
    "int4-g64": {"format": "int4"},
    "int4-channel": {"format": "int4", "group_size": "channel"},
    "int3": {"format": "int3"},
    "int8": {"format": "int8"},
    "int4-tensor": {"format": "int4", "group_size": "tensor"},
    "int4-asym": {"format": "int4-asym"},
    "int3-asym-channel": {"format": "int3-asym", "group_size": "channel"},
    "int4-asym-tensor": {"format": "int4-asym", "group_size": "tensor"},
    "fp8-tensor": {"format": "fp8-tensor"},
    "fp8-channel": {"format": "fp8"},
    "fp8-block": {"format": "fp8-block"},
    "nvfp4": {"format": "nvfp4"},
    "mxfp4": {"format": "mxfp4"},
    "mxfp8": {"format": "mxfp8"},
    "int4+int8": {"format": "int4", "overrides": {"*.down_proj": "int8"}},
    "int4+fp8": {"format": "int4", "overrides": {"*.self_attn.*": "fp8"}},
    "int4-asym+int8": {"format": "int4-asym", "overrides": {"*.down_proj": "int8"}},
}
MOE: dict[str, dict[str, object]] = {
    "int4": {"format": "int4"},
    "int3": {"format": "int3"},
    "int8": {"format": "int8"},
    "int4-tensor": {"format": "int4", "group_size": "tensor"},
    "int4-asym": {"format": "int4-asym"},
    "int4-asym-tensor": {"format": "int4-asym", "group_size": "tensor"},
    "int4+int4-asym": {"format": "int4", "overrides": {"*.self_attn.*": "int4-asym"}},
    "fp8-channel": {"format": "fp8"},
    "fp8-tensor": {"format": "fp8-tensor"},
    "fp8-block": {"format": "fp8-block"},
    "nvfp4": {"format": "nvfp4"},
    "mxfp4": {"format": "mxfp4"},
    "mxfp8": {"format": "mxfp8"},
    "int4-experts+fp8": {"format": "int4", "overrides": {"*.self_attn.*": "fp8"}},
    "attention-only": {"format": "int4", "skip": ("*.experts.*",)},
}
UPSTREAM: dict[str, str] = {
    # Case -> how the reader fails; anything else must be exact. As of transformers 5.23, compressed-tensors 0.20.
    "dense int4-asym default": "error",  # its model expects zero points unpacked
    "dense int3-asym-channel default": "error",
    "dense int4-asym+int8 default": "error",
    "dense int4-asym+int8 dequantize": "error",
    "dense int4+int8 dequantize": "error",
    "dense int4+fp8 dequantize": "error",
    "moe int4-asym default": "error",
    "moe int4-asym dequantize": "error",
    "moe int4-asym-tensor default": "wrong",
    "moe int4-asym-tensor dequantize": "wrong",
    "moe int4+int4-asym default": "error",
    "moe fp8-block default": "error",
    "moe fp8-block dequantize": "error",
    "moe nvfp4 default": "wrong",
    "moe nvfp4 dequantize": "wrong",
    "moe mxfp8 default": "error",
    "moe mxfp8 dequantize": "error",
    "moe attention-only default": "error",
    "moe attention-only dequantize": "error",
}
CASES = [f"{kind} {name} {how}" for kind, rows in (("dense", DENSE), ("moe", MOE)) for name in rows
         for how in ("default", "dequantize")]  # fmt: skip


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Loaded]]:
    """Write every row once, and load all of them in one stock process."""
    root = tmp_path_factory.mktemp("matrix")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.verify.verify", compressor.verify.check)
        folders = {}
        for kind, build, rows in (("dense", models.tiny_llama, DENSE), ("moe", models.tiny_olmoe, MOE)):
            model = build(hidden_size=256, intermediate_size=256)  # several blocks of 128 in both directions
            source = save_checkpoint(model.to(torch.bfloat16), root / kind)
            for name, options in rows.items():
                out = root / f"{kind}-{name}"
                compressor.quantize(str(source), method="rtn", output=out, **options)  # type: ignore[arg-type]
                folders[f"{kind} {name}"] = out
    cases = {case: Case(folders[case.rpartition(" ")[0]], dequantize=case.endswith("dequantize")) for case in CASES}
    return {case: (cases[case].folder, loaded) for case, loaded in load_stock(cases, root).items()}


def outcome(folder: Path, loaded: Loaded) -> str:
    """Say what a reader made of a folder: `error`, `wrong`, or `exact`."""
    if loaded.error is not None:
        return "error"
    ours = dict(dequantized(folder))
    compared = 0
    for name, weight in ours.items():
        if name in loaded.weights and weight.ndim == 2:
            theirs = loaded.weights[name]
        elif ".experts." in name:
            prefix, _, rest = name.partition(".experts.")
            index, leaf = int(rest.split(".")[0]), rest.split(".")[1]
            fused = "down_proj" if leaf == "down_proj" else "gate_up_proj"
            theirs = loaded.weights[f"{prefix}.experts.{fused}"][index]
            if fused == "gate_up_proj":
                theirs = theirs.chunk(2)[0 if leaf == "gate_proj" else 1]
        else:
            continue
        compared += 1
        if theirs.shape != weight.shape or not torch.equal(weight.to(theirs.dtype), theirs):
            return "wrong"
    assert compared > 10
    return "exact"


@pytest.mark.parametrize("case", CASES)
def test_stock_transformers(case: str, matrix: dict[str, tuple[Path, Loaded]]) -> None:
    folder, loaded = matrix[case]
    found = outcome(folder, loaded)
    assert found == UPSTREAM.get(case, "exact"), loaded.error
    if found == "exact":
        assert not loaded.wrong_keys


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("default")])
def test_the_report_warns_of_what_fails(case: str, matrix: dict[str, tuple[Path, Loaded]]) -> None:
    """Exactly the results that plain `from_pretrained` does not read get a note, and it names the right failure."""
    events = json.loads((matrix[case][0] / "compress_report.json").read_text())["events"]
    notes = [event for event in events if event.startswith("stock transformers")]
    word = {"error": "raises", "wrong": "without a word"}.get(UPSTREAM.get(case, "exact"))
    assert len(notes) == (word is not None)
    assert all(str(word) in note for note in notes)
    if any("dequantize=True" in note for note in notes):
        assert case.replace("default", "dequantize") not in UPSTREAM
    else:
        assert case not in ("dense int4-asym default", "dense int3-asym-channel default")


@pytest.mark.parametrize("case", sorted({case.rpartition(" ")[0] for case in CASES}))
def test_our_loader(case: str, matrix: dict[str, tuple[Path, Loaded]]) -> None:
    """Ours loads all of them; quantizing verified the logits already."""
    model = compressor.load(matrix[f"{case} default"][0])
    with torch.no_grad():
        assert torch.isfinite(model(models.sample_tokens(model)).logits).all()
