"""`compress prune` by whole heads and neurons: the language model becomes smaller."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressor.cli.render import STDOUT, RichProgress, duration, print_json, size, table

if TYPE_CHECKING:
    from compressor.cli.prune import PruneFlags
    from compressor.structured.planning import StructuredJob


def run(flags: PruneFlags) -> None:
    """Remove heads and neurons as the flags say.

    Raises:
        CompressorError: See `compressor.errors`.
    """
    flags.refuse("pattern", "format", "group_size", "finetune")
    from compressor.structured.job import execute
    from compressor.structured.planning import prepare
    from compressor.structured.recipe import make_recipe

    recipe = make_recipe(
        model=flags.model,
        method=flags.method,
        sparsity=flags.sparsity,
        macs=flags.macs,
        skip=flags.skip,
        options=flags.options or {},
        calibration=flags.calibration(),
        seed=flags.seed,
        trust_remote_code=flags.trust_remote_code,
        allow_pickle=flags.allow_pickle,
    )
    flags.announce()
    job = prepare(recipe, flags.output, device=flags.device, force=flags.force)
    if flags.dry_run:
        _show_plan(job, flags.json)
        return
    with RichProgress(flags.quiet) as progress:
        report = execute(job, force=flags.force, progress=progress).to_json()
    if flags.json:
        print_json(report)
        return
    _show(report)


def _show(report: dict[str, Any]) -> None:
    """Print what the model costs before and after, and what every layer kept."""
    before, after = report["measured"]["before"], report["measured"]["after"]
    rows = [
        [name, f"{before[key] / 1e6:,.1f} M", f"{after[key] / 1e6:,.1f} M", f"{after[key] / before[key]:.1%}"]
        for name, key in (
            ("multiply-adds of the blocks", "macs"),
            ("their weights", "weights"),
            ("parameters", "parameters"),
        )
    ]
    was, now = report["bytes_before"], report["bytes_after"]
    rows.append(["on disk", size(was), size(now), f"{now / was:.1%}"])
    STDOUT.print(table(f"{report['output']}  ({report['recipe']['method']})", ["", "before", "after", "left"], rows))
    for kind, what in (("heads", "groups of heads"), ("neurons", "neurons")):
        mine = [part for part in report["parts"] if part["kind"] == kind]
        if mine:
            key = "units" if kind == "heads" else "inputs"
            kept = " ".join(str(part[key][1]) for part in mine)
            STDOUT.print(f"{what} left, of {mine[0][key][0]}, layer by layer: {kept}", soft_wrap=True)
    error = report["verification"]["relative_error"]
    who = "stock transformers loads it" if report["stock"] else "`import compressor` first where transformers loads it"
    took = duration(report["seconds"])
    STDOUT.print(
        f"took {took}; verified: after reloading, relative logit difference {error:.1e} to the masked model; {who}",
        soft_wrap=True,
    )
    for event in report["events"]:
        STDOUT.print(f"note: {event}", soft_wrap=True, markup=False)


def _show_plan(job: StructuredJob, as_json: bool) -> None:
    """Print what can be cut, and the budget."""
    costs = job.costs
    what = "weights" if costs.length is None else f"multiply-adds of {costs.length} tokens"
    if as_json:
        parts = [{"name": p.name, "kind": p.kind, "units": p.count, "inputs": p.inputs} for p in job.parts]
        print_json({"output": str(job.out), "counted": what, "dense": costs.dense, "keep": costs.share, "parts": parts})
        return
    rows = [[part.name, part.kind, str(part.inputs), str(part.count)] for part in job.parts]
    STDOUT.print(table(f"plan: {job.out}", ["part", "of", "inputs", "units"], rows))
    STDOUT.print(f"keep {costs.share:.1%} of {costs.dense / 1e6:,.1f} M {what}", soft_wrap=True)
