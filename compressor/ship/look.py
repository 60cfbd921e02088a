"""What the HTML page of `compress inspect` shows beyond the table: inputs of layers, sizes, and other runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.dataset import load_text, tokenize
from compressor.checkpoint.config import quiet
from compressor.checkpoint.source import read_json
from compressor.environment import load_tokenizer
from compressor.errors import CheckpointError
from compressor.evals.results import Evaluation
from compressor.evals.scores import Estimate
from compressor.inputs import Quantize
from compressor.measure import EVALUATION
from compressor.output import REPORT
from compressor.runtime import load
from compressor.runtime.modules import PackedLinear

TEXT = "python-docs"
TOKENS = 256
REACH = 1.05

COMPONENTS = ("embeddings", "attention", "feed-forward", "experts", "routers", "output head", "norms and others")
_PATTERNS = (
    ("experts", r"\.experts\.|shared_expert"),
    ("routers", r"router|(mlp|block_sparse_moe)\.gate\."),
    ("output head", r"(^|\.)lm_head\."),
    ("embeddings", r"embed|wte|wpe"),
    ("norms and others", r"norm|ln_|\.bias$"),
    ("attention", r"attn|attention|[qkvo]_proj"),
    ("feed-forward", r"mlp|feed_forward|ffn|intermediate|output\.dense|[gud]\w*_proj|fc\d"),
)


@dataclass(frozen=True)
class Inputs:
    """The distribution of what flows into a layer.

    Attributes:
        name: The layer.
        counts: Values in equally wide bins from -1.05 to 1.05 of what the scale covers: each token's largest value,
            or, of inputs with one static scale, what that reaches.
        grid: Values of the grid inputs are rounded to; empty if they are not.
        outlier: Loudest channel's largest value over the median channel's.
        tokens: Tokens behind the counts.
    """

    name: str
    counts: tuple[float, ...]
    grid: tuple[float, ...]
    outlier: float
    tokens: int


@dataclass(frozen=True)
class Size:
    """Bytes of a component before and after."""

    component: str
    before: int
    after: int


@dataclass(frozen=True)
class Run:
    """One result in a folder of results: its size, and what it costs.

    Attributes:
        name: Of its folder.
        nbytes: Of its weights.
        value: KL divergence to the original, or the perplexity where KL was not measured.
        error: Its standard error, or None.
        metric: `kl` or `perplexity`.
        what: Method and format.
    """

    name: str
    nbytes: int
    value: float
    error: float | None
    metric: str
    what: str


def look_at_inputs(folder: Path, names: Sequence[str], bins: int = 84, text: str = TEXT) -> tuple[Inputs, ...]:
    """Run a checkpoint on a little text and count what flows into some of its layers.

    Args:
        folder: The checkpoint.
        names: Modules; those that are no packed linear layers in memory (experts) are left out.
        bins: How many bins.
        text: Preset or file.

    Raises:
        CompressorError: It cannot be loaded, or has no tokenizer.
    """
    model: Any = load(folder, dtype=torch.float32)
    modules = dict(model.named_modules())
    chosen = {name: modules[name] for name in names if isinstance(modules.get(name), PackedLinear)}
    tokenizer = load_tokenizer(folder)
    tokens = tokenize(load_text(text), tokenizer, model.config.get_text_config().vocab_size, limit=TOKENS)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[name] = arguments[0].detach().float().flatten(0, -2)

        return hook

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in chosen.items()]
    try:
        with torch.no_grad(), quiet():
            model(input_ids=tokens[None])
    finally:
        for handle in handles:
            handle.remove()
    return tuple(count_inputs(name, seen[name], chosen[name].inputs, bins) for name in names if name in seen)


def count_inputs(name: str, x: Tensor, steps: Sequence[Any], bins: int) -> Inputs:
    """Count the values of `x` `[tokens, in]` in bins; see `Inputs`."""
    loud = x.abs().amax(0)
    for step in steps:
        if isinstance(step, Quantize):
            break
        x = step.apply(x)
    else:
        step = None
    grid: tuple[float, ...] = ()
    if step is not None and step.format.granularity == "tensor":
        units = step.apply(x) / step.steps(x)
        values = units.unique()
        reach = float(step.steps(x)) * max(float(values.abs().max()), 1.0)
        grid = tuple((values / max(float(values.abs().max()), 1.0)).tolist())
        shares = x / reach
    else:
        largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        shares = x / largest
        if step is not None and step.format.group_size is None:
            grid = tuple((step.apply(x) / largest).mul(1e4).round().div(1e4).unique().tolist())
    counts = torch.histc(shares.clamp(-REACH, REACH), bins, -REACH, REACH)
    outlier = float(loud.max() / loud.median().clamp(min=1e-30))
    return Inputs(name, tuple(counts.tolist()), grid if len(grid) <= 64 else (), outlier, len(x))


def sizes_of(folder: Path) -> tuple[Size, ...]:
    """Return bytes by component from the report; empty without a report."""
    if not (folder / REPORT).is_file():
        return ()
    totals = {component: [0, 0] for component in COMPONENTS}
    for row in read_json(folder / REPORT).get("rows", []):
        entry = totals[component_of(row["name"])]
        entry[0] += row["bytes_before"]
        entry[1] += row["bytes_after"]
    return tuple(Size(name, before, after) for name, (before, after) in totals.items() if before or after)


def component_of(name: str) -> str:
    """Return which part of a model a tensor belongs to, by its name."""
    return next((component for component, pattern in _PATTERNS if re.search(pattern, name)), COMPONENTS[-1])


def runs_in(folder: Path) -> tuple[tuple[Run, ...], tuple[str, ...]]:
    """Return the evaluated results among a folder's folders, smallest first, and what could not be read.

    Results of which only some have KL are compared by perplexity.
    """
    found: list[tuple[str, int, dict[str, Estimate], str]] = []
    notes = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        if not (place / REPORT).is_file() or not (place / EVALUATION).is_file():
            continue
        try:
            report, tasks = read_json(place / REPORT), Evaluation.read(place / EVALUATION).tasks
            what = " ".join(str(report["recipe"][key]) for key in ("method", "format"))
            scores = {name: tasks[name].metrics[name] for name in ("kl", "perplexity") if name in tasks}
            found.append((place.name, int(report["bytes_after"]), scores, what))
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            notes.append(f"{place.name}: left out: {error}")
    metric = "kl" if all("kl" in scores for _, _, scores, _ in found) else "perplexity"
    runs = [
        Run(name, nbytes, scores[metric].value, scores[metric].standard_error, metric, what)
        for name, nbytes, scores, what in found
        if metric in scores
    ]
    return tuple(sorted(runs, key=lambda run: (run.nbytes, run.value))), tuple(notes)


def frontier(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Return the runs that no other beats in both size and cost, smallest first."""
    best: list[Run] = []
    for run in sorted(runs, key=lambda one: (one.nbytes, one.value)):
        if not best or run.value < best[-1].value:
            best.append(run)
    return tuple(best)
