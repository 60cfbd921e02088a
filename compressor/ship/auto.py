"""`compress auto`: formats per layer, and a method, for a size; what was weighed and why, as plain data.

The formats come from `compressor.allocation` with what `sensitivity.py` measures. The method is the best one, in the
order of the project's own tables, that takes these formats and whose estimated time is within the user's limit.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compressor.allocation import Allocation, Choice, Group, allocate, make_groups, uniform
from compressor.api import Job, prepare
from compressor.calibration.dataset import build
from compressor.checkpoint.source import DTYPES
from compressor.environment import load_tokenizer
from compressor.errors import RecipeError, UnsupportedError, did_you_mean
from compressor.formats import get_format, parse_group_size
from compressor.formats.base import QuantFormat
from compressor.plan import Kind, LayerPlan
from compressor.recipe import CalibrationSpec, Recipe
from compressor.report import Progress, Silent
from compressor.runtime import load
from compressor.ship.auto_method import NOWHERE, recipe_of
from compressor.ship.sensitivity import choices_of, observe

READERS: dict[str, tuple[str, ...]] = {
    "vllm": ("int4:128", "int4:64", "int4:32", "int4:channel", "int8:128", "int8:channel", "nvfp4", "fp8"),
    "transformers": (
        *("int2:32", "int3:64", "int3:32", "int4:channel", "int4:64", "int4:32", "int5:64", "int6:64"),
        *("int8:64", "int8:channel", "nvfp4", "mxfp4", "fp8"),
    ),
}
"""Formats that each reader runs, as `--set` takes them: of vLLM, those its releases have fast kernels for."""

SAMPLES, LENGTH, ROWS = 4, 256, 128
"""Samples that sensitivities are measured on, tokens of each, and tokens kept of each."""

SLACK = 0.001
"""Bits per weight by which a size in bits may be exceeded: shapes are stored too, and 4.25bpw means int4:64."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(bpw|[kMGT]?B)", re.IGNORECASE)
_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}


@dataclass(frozen=True)
class Found:
    """What `compress auto` decided.

    Attributes:
        recipe: Carries it out.
        allocation: Group -> format.
        groups: What every group could have had.
        alternatives: Format -> (bytes, expected KL) if all layers had that one, where it fits.
        budget: Bytes for compressed weights.
        weights: Number of compressed weights.
        dense: Bytes of everything else.
        context: Tokens the model reads at once, 1024 at most: what the result is evaluated with.
        reasons: Sentences about formats and method.
    """

    recipe: Recipe
    allocation: Allocation
    groups: tuple[Group, ...]
    alternatives: dict[str, tuple[int, float]]
    budget: int
    weights: int
    dense: int
    context: int
    reasons: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """Return how many weight matrices got each format."""
        totals: Counter[str] = Counter()
        for group in self.groups:
            totals[self.allocation.chosen[group.name].format] += len(group.members)
        return dict(totals.most_common())

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "formats": {name: choice.format for name, choice in self.allocation.chosen.items()},
            "expected_kl": self.allocation.cost,
            "bound": self.allocation.bound,
            "bytes": self.allocation.nbytes,
            "budget": self.budget,
            "bits_per_weight": 8 * self.allocation.nbytes / self.weights,
            "alternatives": {name: {"bytes": n, "expected_kl": kl} for name, (n, kl) in self.alternatives.items()},
            "reasons": list(self.reasons),
        }


def parse_size(text: str) -> tuple[float, bool]:
    """Read `4.5bpw` or `2GB`; returns the number (bits, or bytes) and whether it is bits per weight.

    Raises:
        RecipeError: Neither.
    """
    found = _SIZE.fullmatch(text.strip())
    if not found or float(found[1]) <= 0:
        raise RecipeError(
            f"--size {text!r} is no size", "write 4.5bpw (bits per compressed weight) or 2GB (of weights)"
        )
    unit = found[2].lower()
    return (float(found[1]), True) if unit == "bpw" else (float(found[1]) * _UNITS[unit], False)


def find(
    model: str,
    size: str,
    *,
    reader: str = "vllm",
    method: str | None = None,
    minutes: float = 60.0,
    calibration: CalibrationSpec | None = None,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Found:
    """Choose formats and a method for a size; nothing is written.

    The whole model is in memory once, in float32, with one backward pass through it.

    Args:
        model: What `compress quantize` takes.
        size: `4.5bpw`, bits per compressed weight with scales, or `2GB`, of all weights on disk.
        reader: A key of `READERS`.
        method: Takes the choice of method away; it has the options of `auto_method.METHODS`.
        minutes: What compressing may take on this machine, estimated.
        calibration: Text for both measuring and compressing.
        seed: Of everything random.
        device: Where the method runs.
        trust_remote_code: Run model code that comes with the checkpoint.
        progress: Who is told how far it is.

    Raises:
        RecipeError: A size that is none, or smaller than the smallest formats give.
        UnsupportedError: Experts, or no language model.
    """
    progress = progress or Silent()
    amount, is_bits = parse_size(size)
    if reader not in READERS:
        raise did_you_mean("reader", reader, READERS)
    calibration = calibration or CalibrationSpec()
    base = Recipe(
        model=model,
        method="rtn",
        format="int8",
        group_size="channel",
        calibration=calibration,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    job = prepare(base, NOWHERE, device=device)
    layers = {layer.ref.name: layer for layer in job.plan.compressed}
    _refuse(job, layers.values())
    weights = sum(layer.ref.numel for layer in layers.values())
    dense = sum(layer.bytes_after for layer in job.plan.layers if not layer.format)
    budget = int((amount + SLACK) * weights / 8) if is_bits else int(amount - dense)
    _fits(job, layers.values(), reader, budget)
    groups = measure(job, layers, reader, progress)
    allocation = allocate(mixable(groups), budget)
    alternatives = {
        found[0].format: (sum(one.nbytes for one in found), sum(one.cost for one in found))
        for found in uniform(groups, budget)
    }
    allocation, family = _best(groups, allocation, alternatives, budget)
    recipe, why = recipe_of(base, layers, groups, allocation, method, minutes, device)
    limit = getattr(job.skeleton.model.config.get_text_config(), "max_position_embeddings", None)
    context = min(limit or 1024, 1024)
    reasons = (*family, *_moved(groups, allocation), why)
    return Found(recipe, allocation, groups, alternatives, budget, weights, dense, context, reasons)


def _fits(job: Job, layers: Iterable[LayerPlan], reader: str, budget: int) -> None:
    """Refuse, before anything is measured, a budget that the smallest formats exceed.

    Raises:
        RecipeError: They do.
    """
    formats = [build_format(name, DTYPES[job.source.dtype]) for name in READERS[reader]]
    smallest = 0
    for layer in layers:
        shape = layer.ref.matrix
        assert shape is not None, "what is compressed is a matrix"
        sizes = [sum(slot.nbytes for slot in fmt.layout(shape).values()) for fmt in formats if not fmt.refuse(shape)]
        smallest += min(sizes, default=0)
    if smallest > budget:
        raise RecipeError(
            f"the smallest formats take {smallest:,} bytes of compressed weights, the budget leaves {budget:,}",
            "allow a larger size",
        )


def measure(job: Job, layers: Mapping[str, LayerPlan], reader: str, progress: Progress) -> tuple[Group, ...]:
    """Return the groups of layers a runtime fuses, each with what every format would cost it."""
    progress.stage("loading the original")
    trusted = job.recipe.trust_remote_code
    model: Any = load(job.source.path, dtype=torch.float32, trust_remote_code=trusted)
    spec = job.recipe.calibration.model_copy(update={"n_samples": SAMPLES, "seq_len": LENGTH})
    vocab_size = model.config.get_text_config().vocab_size
    tokenizer = load_tokenizer(job.source.path, trusted)
    tokens = build(spec, tokenizer, vocab_size, seed=job.recipe.seed).tokens
    modules = {name: layer.ref.param.removesuffix(".weight") for name, layer in layers.items()}
    progress.stage(f"one backward pass over {tokens.numel()} tokens")
    seen = observe(model, list(modules.values()), tokens, ROWS, job.recipe.seed)
    formats = {name: build_format(name, DTYPES[job.source.dtype]) for name in READERS[reader]}
    choices: dict[str, tuple[Choice, ...]] = {}
    for index, (name, module) in enumerate(modules.items(), 1):
        if index % 10 == 1:
            progress.stage(f"measuring layer {index} of {len(modules)}")
        choices[name] = choices_of(model.get_submodule(module).weight, seen.pop(module), formats)
    return make_groups(choices, lambda name: layers[name].ref.fused_with)


def build_format(name: str, dtype: torch.dtype) -> QuantFormat:
    """Return a format by the name that `--set` takes: `int4:32`."""
    kind, found, group = name.partition(":")
    return get_format(kind, parse_group_size(kind, group if found else None), dtype)


def mixable(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Return the groups with the formats that go together in one checkpoint for every reader: integers."""
    return tuple(
        Group(group.name, group.members, tuple(one for one in group.choices if one.format.startswith("int")))
        for group in groups
    )


def _refuse(job: Job, layers: Any) -> None:
    """Refuse models whose sensitivities are not measured here.

    Raises:
        UnsupportedError: Experts, or a model that predicts no tokens.
    """
    if any(layer.ref.kind is not Kind.LINEAR for layer in layers):
        raise UnsupportedError(
            f"{job.recipe.model}: has experts, whose sensitivities compress auto does not measure",
            "give formats with compress quantize --set",
        )
    if job.skeleton.model.get_output_embeddings() is None:
        raise UnsupportedError(
            f"{job.recipe.model}: predicts no tokens, so there is no KL divergence to keep small",
            "use compress quantize",
        )


def _best(
    groups: tuple[Group, ...], mixed: Allocation, alternatives: Mapping[str, tuple[int, float]], budget: int
) -> tuple[Allocation, tuple[str, ...]]:
    """Return the mixture of integers, or one other format for all if that is expected to cost less; and why."""
    if not alternatives:
        return mixed, ("no format fits if all layers have the same",)
    name, (_, cost) = min(alternatives.items(), key=lambda entry: entry[1][1])
    if cost < mixed.cost:
        same = next(one for one in uniform(groups, budget) if one[0].format == name)
        chosen = {group.name: choice for group, choice in zip(groups, same, strict=True)}
        nbytes = sum(choice.nbytes for choice in same)
        said = f"{name} for all layers: a mixture of integers would cost {mixed.cost / cost:.2f} times as much"
        return Allocation(chosen, nbytes, cost, min(mixed.bound, cost), 0.0), (said,)
    more = f"costs {cost / mixed.cost:.2f} times as much"
    said = f"a mixture of integers: {name} for all layers, the best single format that fits, {more}"
    return mixed, (said,)


def _moved(groups: tuple[Group, ...], allocation: Allocation, count: int = 3) -> list[str]:
    """Say which groups gained most from getting more than the most common format, and which lost least by less."""
    common = Counter(allocation.chosen[group.name].format for group in groups).most_common(1)[0][0]
    more: list[tuple[float, str]] = []
    less: list[tuple[float, str]] = []
    for group in groups:
        chosen, usual = allocation.chosen[group.name], {one.format: one for one in group.choices}.get(common)
        if usual is None or usual.nbytes == chosen.nbytes:
            continue
        entry = (abs(usual.cost - chosen.cost), f"{group.name}: {chosen.format} instead of {common}")
        (more if chosen.nbytes > usual.nbytes else less).append(entry)
    saved = [f"{said} saves {1000 * nats:.2f} thousandths of a nat" for nats, said in sorted(more)[::-1][:count]]
    return [*saved, *(f"{said} costs {1000 * nats:.2f} thousandths" for nats, said in sorted(less)[:count])]
