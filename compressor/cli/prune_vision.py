"""`compress prune` for image classifiers: filters are removed, and the model becomes smaller."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from compressor.cli.render import STDOUT, RichProgress, duration, print_json, size, table
from compressor.errors import RecipeError

if TYPE_CHECKING:
    from compressor.cli.prune import PruneFlags
    from compressor.vision.planning import CutJob

STAGES = ("before", "sparse", "pruned", "finetuned")


def run(flags: PruneFlags) -> None:
    """Remove filters as the flags say.

    Raises:
        CompressorError: See `compressor.errors`.
    """
    flags.refuse("pattern", "format", "group_size", "n_samples", "seq_len", "allow_pickle")
    if flags.data is None:
        raise RecipeError(
            f"method {flags.method} needs --data: labelled images to rank, train and measure on",
            "a folder with one folder per class, an .npz file, or a Hub dataset; see docs/vision.md",
        )
    from compressor.vision.job import execute
    from compressor.vision.planning import prepare
    from compressor.vision.recipe import make_recipe

    recipe = make_recipe(
        model=flags.model,
        method=flags.method,
        data=flags.data,
        sparsity=flags.sparsity,
        macs=flags.macs,
        finetune=flags.finetune or 0,
        skip=flags.skip,
        options=flags.options or {},
        seed=flags.seed,
    )
    flags.announce()
    job = prepare(
        recipe, flags.output, device=flags.device, force=flags.force, trust_remote_code=flags.trust_remote_code
    )
    if flags.dry_run:
        _show_plan(job, flags.json)
        return
    with RichProgress(flags.quiet or flags.json) as progress:
        report = execute(job, force=flags.force, progress=progress).to_json()
    if flags.json:
        print_json(report)
        return
    _show(report)


def _show(report: dict[str, Any]) -> None:
    """Print the figures before, after the cut, and after training, and the recall of every class."""
    measured = report["measured"]
    stages = [stage for stage in STAGES if stage in measured]
    rows = [[name, *(text(measured[stage]) for stage in stages)] for name, text in _LINES.items()]
    for name in measured["before"]["recall"]:
        rows.append([f"recall of {name}", *(_share(measured[stage]["recall"][name]) for stage in stages)])
    recipe = report["recipe"]
    STDOUT.print(table(f"{report['output']}  ({recipe['method']})", ["", *stages], rows))
    error = report["verification"]["relative_error"]
    STDOUT.print(
        f"took {duration(report['seconds'])}; verified: relative logit difference {error:.1e} after reloading; "
        f"`import compressor` first where transformers loads it",
        soft_wrap=True,
    )
    for event in report["events"]:
        STDOUT.print(f"note: {event}", soft_wrap=True, markup=False)


def _show_plan(job: CutJob, as_json: bool) -> None:
    """Print what would be cut."""
    counts = job.counts
    if as_json:
        print_json({"output": str(job.out), "clusters": {name: list(count) for name, count in counts.items()}})
        return
    rows = [
        [cluster.name, str(len(cluster.members)), *(str(n) for n in counts[cluster.name])]
        for cluster in job.graph.clusters
    ]
    STDOUT.print(table(f"plan: {job.out}", ["channels of", "layers", "before", "after"], rows))


def _share(value: float) -> str:
    return f"{value:.2%}"


_LINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "accuracy": lambda one: _share(one["accuracy"]),
    "balanced accuracy": lambda one: _share(one["balanced_accuracy"]),
    "macro F1": lambda one: f"{one['macro_f1']:.4f}",
    "multiply-adds per image": lambda one: f"{one['macs'] / 1e6:.2f} M",
    "parameters": lambda one: f"{one['parameters'] / 1e6:.3f} M",
    "weights": lambda one: size(one["bytes"]),
    "one image": lambda one: f"{one['latency'] * 1e3:.2f} ms",
}
