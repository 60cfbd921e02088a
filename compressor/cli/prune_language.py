"""`compress prune` for language models: zeros in the layers of the blocks, dense-shaped, by the quantizing engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.cli.quantize import show_plan
from compressor.cli.render import STDOUT, RichProgress, print_json, report_table
from compressor.errors import did_you_mean

if TYPE_CHECKING:
    from compressor.cli.prune import PruneFlags


def run(flags: PruneFlags) -> None:
    """Prune a language model as the flags say.

    Raises:
        CompressorError: See `compressor.errors`.
    """
    flags.refuse("macs", "finetune")
    if flags.format is not None:
        from compressor.formats import BUILDERS

        if flags.format not in BUILDERS:
            raise did_you_mean("format", flags.format, BUILDERS)
    from compressor.api import execute, prepare
    from compressor.pruner import prune_recipe

    recipe = prune_recipe(
        flags.model,
        method=flags.method,
        sparsity=flags.sparsity,
        pattern=flags.pattern,
        format=flags.format,
        group_size=flags.group_size,
        skip=flags.skip,
        options=flags.options or {},
        seed=flags.seed,
        trust_remote_code=flags.trust_remote_code,
        allow_pickle=flags.allow_pickle,
        **flags.calibration(),
    )
    flags.announce()
    job = prepare(recipe, flags.output, device=flags.device, force=flags.force)
    if flags.dry_run:
        show_plan(job, flags.json)
        return
    with RichProgress(flags.quiet) as progress:
        report = execute(job, force=flags.force, progress=progress).to_json()
    if flags.json:
        print_json(report)
        return
    STDOUT.print(report_table(report))
    events = len(report["events"])
    if events:
        STDOUT.print(f"{events} notes, see {report['output']}/compress_report.json", soft_wrap=True)
