"""Every method that makes sense on experts, on every kind of mixture: nothing is lost, and the result loads."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import compressor
import compressor.verify
from compressor.check.reload import reference_output
from compressor.checkpoint.skeleton import Skeleton
from compressor.report import RunReport
from compressor.runtime import PackedExperts, dequantized
from compressor.testing import models
from compressor.testing.stock import Case, Loaded, load_stock
from compressor.testing.tools import save_checkpoint, write_text

EXPERTS = 4
Build = Callable[[], PreTrainedModel]
BUILDS: dict[str, Build] = {
    "mixtral": models.tiny_mixtral,
    "qwen3": models.tiny_qwen3_moe,
    "olmoe": models.tiny_olmoe,
    "deepseek": models.tiny_deepseek,
    "gpt-oss": models.tiny_gpt_oss,
}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"format": "int4", "group_size": 32},
    "rtn-mxfp4": {"format": "mxfp4"},
    "fp4": {"format": "mxfp4"},
    "gptq": {"format": "int4", "group_size": 32},
    "flexround": {"format": "int4", "group_size": 32, "options": {"iters": 12}},
    "nupes": {"format": "power4", "group_size": 32, "options": {"iters": 2}},
}
BETTER = {"gptq": "rtn", "fp4": "rtn-mxfp4"}
"""Methods whose experts must give less output error than rounding to nearest in the same format."""

OTHER_RUNS: list[tuple[str, str, dict[str, Any]]] = [
    ("mixtral", "rtn", {"format": "int4", "group_size": 32, "inputs": "int8-token"}),
    ("qwen3", "fp4", {"format": "mxfp4", "inputs": "mxfp8"}),
    ("qwen3", "gptq", {"format": "int4", "group_size": 32, "inputs": "int8-token"}),
    (
        "olmoe",
        "flexround",
        {"format": "int4", "group_size": "channel", "inputs": "int4-token", "options": {"iters": 2}},
    ),
    ("olmoe", "outliertune", {"format": "int8", "group_size": "channel"}),
    ("deepseek", "gptq", {"format": "int4", "group_size": 32, "inputs": "int8-tensor"}),
    ("gpt-oss", "gptq", {"format": "int4", "group_size": 32, "inputs": "int8-tensor"}),
    ("gpt-oss", "flexround", {"format": "int4", "group_size": 32, "inputs": "int8-token", "options": {"iters": 2}}),
    ("gpt-oss", "eaquant", {"format": "int4", "group_size": "channel", "inputs": "int4-token-asym"}),
    ("gpt-oss", "smoothquant", {"format": "int8", "group_size": "channel", "inputs": "int8-token"}),
]
"""Rounded inputs, and methods that move factors."""


@dataclass(frozen=True)
class Seen:
    """What passed one stack of experts of the original."""

    arguments: tuple[Tensor, ...]
    out: Tensor


class Workshop:
    """Tiny checkpoints, and what methods made of them; each is made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.text = write_text(root / "text.txt", 1500)
        self.originals: dict[str, PreTrainedModel] = {}
        self.made: dict[tuple[str, str], tuple[Path, RunReport]] = {}

    def original(self, name: str) -> PreTrainedModel:
        """Return the model in float32, with the values its checkpoint has."""
        if name not in self.originals:
            model = BUILDS[name]().to(torch.bfloat16)
            save_checkpoint(model, self.root / name)
            self.originals[name] = model.float()
        return self.originals[name]

    def quantize(self, name: str, method: str, settings: dict[str, Any]) -> tuple[Path, RunReport]:
        """Run a method on a model."""
        key = (name, f"{method}-{settings}")
        if key not in self.made:
            self.original(name)
            out = self.root / f"out-{len(self.made)}"
            report = compressor.quantize(
                str(self.root / name),
                method=method.partition("-")[0],
                output=out,
                data=str(self.text),
                n_samples=6,
                seq_len=32,
                **settings,
            )
            self.made[key] = out, report
        return self.made[key]

    def seen(self, name: str) -> dict[str, Seen]:
        """Return what passes every stack of experts where the original reads the beginning of the text."""
        model, out = self.original(name), {}
        handles = []
        for path, module in model.named_modules():
            if type(module).__name__.endswith("Experts"):

                def note(_: Any, args: tuple[Tensor, ...], value: Tensor, path: str = path) -> None:
                    out[path] = Seen(args, value)

                handles.append(module.register_forward_hook(note))
        tokens = models.tiny_tokenizer()(self.text.read_text())["input_ids"][:192]
        with torch.no_grad():
            model(torch.tensor(tokens).reshape(6, 32))
        for handle in handles:
            handle.remove()
        return out

    def error(self, name: str, folder: Path) -> float:
        """Return the relative error of what leaves the experts for the inputs and choices of the original."""
        loaded = compressor.load(folder)
        squares, norms = 0.0, 0.0
        for path, seen in self.seen(name).items():
            with torch.no_grad():
                got = loaded.get_submodule(path)(*seen.arguments)
            squares += float((got - seen.out).square().sum())
            norms += float(seen.out.square().sum())
        return float((squares / norms) ** 0.5)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """Verification in a fresh process takes longer than all else here; `test_verify.py` looks at it."""
    gc.freeze()  # the engine collects garbage after every block; what libraries hold need not be looked at each time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.verify.verify", compressor.verify.check)
        yield Workshop(tmp_path_factory.mktemp("experts"))
    gc.unfreeze()


def check_complete(workshop: Workshop, name: str, method: str, settings: dict[str, Any]) -> None:
    """Every expert is compressed, counted and finite, and the loaded model computes with exactly these weights."""
    folder, report = workshop.quantize(name, method, settings)
    stacks = workshop.seen(name)
    rows = [row for row in report.rows if ".experts." in row.name and row.action != "kept"]
    assert len(rows) == len(stacks) * EXPERTS * 3
    for row in rows:
        assert row.action == ("int8-bytes" if method in ("outliertune", "smoothquant") else settings["format"])
        assert row.inputs == (settings.get("inputs") or ("int8-token" if method == "outliertune" else None))
        assert row.error is not None
        assert row.error < 0.2, row.name
    if not method.startswith("rtn"):  # looks at data: every expert saw its minimum, one token here, and most more
        units = [unit for unit in report.units if "expert_tokens_fewest" in unit]
        assert len(units) == len(stacks)
        assert all(row.routed is not None for row in rows)
        assert method == "flexround" or all(row.tokens for row in rows)
    for tensor, weight in dequantized(folder):
        assert torch.isfinite(weight).all()
        assert ".experts." not in tensor or weight.any()
    loaded = compressor.load(folder)
    assert sum(isinstance(module, PackedExperts) for module in loaded.modules()) == len(stacks)
    tokens = models.sample_tokens(loaded)
    with torch.no_grad():
        got = loaded(tokens).logits
    expected = reference_output(folder, {"input_ids": tokens})
    assert (got - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BUILDS)
def test_every_expert_is_compressed(workshop: Workshop, name: str, method: str) -> None:
    check_complete(workshop, name, method, METHODS[method])
    folder, report = workshop.quantize(name, method, METHODS[method])
    assert workshop.error(name, folder) < 0.25
    for unit in (unit for unit in report.units if "loss_after" in unit):
        assert unit["loss_after"] < unit["loss_before"]  # what leaves the block, on the calibration text


@pytest.mark.parametrize("method", BETTER)
@pytest.mark.parametrize("name", BUILDS)
def test_what_leaves_the_experts_is_closer_than_rounding_to_nearest(workshop: Workshop, name: str, method: str) -> None:
    own, nearest = (workshop.quantize(name, way, METHODS[way])[0] for way in (method, BETTER[method]))
    assert workshop.error(name, own) < workshop.error(name, nearest)


@pytest.mark.parametrize(("name", "method", "settings"), OTHER_RUNS, ids=lambda part: str(part)[:40])
def test_rounded_inputs_and_moved_factors(workshop: Workshop, name: str, method: str, settings: dict[str, Any]) -> None:
    check_complete(workshop, name, method, settings)


STOCK = [(name, method) for name in BUILDS if name != "gpt-oss" for method in ("gptq", "fp4")]
"""int4 and mxfp4 experts; those of GPT-OSS have no place in what stock transformers reads."""


@pytest.fixture(scope="module")
def loaded_by_stock(workshop: Workshop) -> dict[tuple[str, str], tuple[Path, Loaded]]:
    folders = {key: workshop.quantize(*key, METHODS[key[1]])[0] for key in STOCK}
    answers = load_stock({f"{name} {method}": Case(folders[name, method]) for name, method in STOCK}, workshop.root)
    return {(name, method): (folders[name, method], answers[f"{name} {method}"]) for name, method in STOCK}


@pytest.mark.parametrize(("name", "method"), STOCK)
def test_stock_transformers_has_the_same_weights_bit_for_bit(
    name: str, method: str, loaded_by_stock: dict[tuple[str, str], tuple[Path, Loaded]]
) -> None:
    folder, answer = loaded_by_stock[name, method]
    assert answer.error is None
    assert not answer.wrong_keys
    weights = {tensor: value for tensor, value in dequantized(folder) if ".experts." in tensor}
    targets = Skeleton.build(folder).targets({tensor: tuple(value.shape) for tensor, value in weights.items()})
    assert weights
    for tensor, value in weights.items():
        theirs = targets[tensor].where.of(answer.weights[str(targets[tensor].param)])
        assert torch.equal(theirs, value.to(theirs.dtype)), tensor


@pytest.mark.parametrize("name", BUILDS)
def test_nvfp4_experts_are_flagged_and_load_right_through_this_package(workshop: Workshop, name: str) -> None:
    check_complete(workshop, name, "rtn", {"format": "nvfp4"})
    _, report = workshop.quantize(name, "rtn", {"format": "nvfp4"})
    assert any("compressor.load" in event for event in report.events if "experts" in event)
