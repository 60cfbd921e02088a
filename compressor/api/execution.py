"""Running a planned job: calibrate, compress, write, verify, report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from compressor import __version__
from compressor import output as output_files
from compressor.api.calibrating import calibrate
from compressor.api.job import Job, expert_tokens, needs_data
from compressor.calibration.dataset import CalibrationSet, fingerprint
from compressor.checkpoint.export import copy_side_files, result_config
from compressor.checkpoint.sink import WORK, save_tensors, write_json
from compressor.engine import Engine
from compressor.environment import versions
from compressor.errors import CheckpointError, UnsupportedError
from compressor.plan import Plan, digest
from compressor.process import peak_rss
from compressor.pruning.view import SearchMethod
from compressor.ranks import Ranks, join
from compressor.report import Progress, Row, RunReport, Silent
from compressor.unit import Unit
from compressor.verify import confirm


def execute(
    job: Job,
    *,
    force: bool = False,
    progress: Progress | None = None,
    max_memory: float | None = None,
    fresh: bool = True,
) -> RunReport:
    """Run a planned job: calibrate, compress, write, verify.

    Args:
        job: What `prepare` returned.
        force: Overwrite an earlier result.
        progress: Who is told how far it is.
        max_memory: Bytes that may be resident while blocks are compressed; None for no bound. Results are the same.
        fresh: Verify in a fresh process; False verifies in this one.

    Raises:
        CompressorError: See `compressor.errors`; finished units are kept for the next run where that makes sense.
    """
    ranks = join()
    progress = (progress if ranks.leads else None) or Silent()
    started = time.monotonic()
    if ranks.size > 1 and isinstance(job.method, SearchMethod):
        raise UnsupportedError(f"method {job.method.name} runs in one process", "run it without torchrun")
    _check_same(job, ranks)
    calibration = None
    if needs_data(job.method, job.recipe):
        progress.stage("reading calibration data")
        calibration = ranks.share(calibrate(job) if ranks.leads else None)
    events = [*job.source.notes, *job.plan.notes, *(calibration.events if calibration else ())]
    for event in events:
        progress.event(event)
    progress.stage("hashing the source")
    parts = ranks.share(digest_parts(job, calibration) if ranks.leads else {})
    plan = replace(job.plan, digest=digest(parts))
    claim: AbstractContextManager[None] = nullcontext()
    if ranks.leads:
        claim = output_files.claimed(job.out, parts, plan.digest, force)
    with claim:
        output_files.check_seen_by_all(job.out, ranks)
        engine = _engine(job, plan, calibration, progress, ranks, max_memory)
        resumed_at = len(engine.journal.read()) if ranks.leads else 0
        units = engine.run()
        peaks = ranks.gather(peak_rss())
        report = None
        if ranks.leads:
            report = _publish(job, plan, engine, units, progress, fresh)
            report.resumed_at, report.processes, report.peak_rss = resumed_at, ranks.size, max(peaks)
            output_files.conclude(job.out, report, events, started)
        report = ranks.share(report)
    assert report is not None
    return report


def _check_same(job: Job, ranks: Ranks) -> None:
    """Make sure that all processes are about to do the same.

    Raises:
        CheckpointError: One of them reads another checkpoint, or has other versions of libraries.
    """
    if ranks.size == 1:
        return
    seen = ranks.gather([job.plan.to_json(), versions()])
    for rank, theirs in enumerate(seen):
        for what, mine, other in zip(("plans something else", "has other libraries"), seen[0], theirs, strict=True):
            if mine != other:
                raise CheckpointError(
                    f"process {rank} {what} than process 0", "give all the same checkpoint, flags and environment"
                )


def _engine(
    job: Job,
    plan: Plan,
    calibration: CalibrationSet | None,
    progress: Progress,
    ranks: Ranks,
    max_memory: float | None,
) -> Engine:
    tokens = None if calibration is None else calibration.tokens
    reserve = None if calibration is None else calibration.reserve
    return Engine(
        *(plan, job.source, job.skeleton, job.blocks, job.method, tokens, job.out, job.recipe.seed, progress, reserve),
        min_expert_tokens=expert_tokens(job),
        ranks=ranks,
        max_memory=max_memory,
    )


def _publish(job: Job, plan: Plan, engine: Engine, units: Sequence[Unit], progress: Progress, fresh: bool) -> RunReport:
    """Turn finished units into a checkpoint, verify it, and say what happened."""
    progress.stage("writing")
    probe = job.out / WORK / "probe.safetensors"
    inputs = {name: value.cpu() for name, value in engine.probe_inputs().items()}
    save_tensors(probe, {"inputs": next(iter(inputs.values())), "logits": engine.probe_output(units[-1]).cpu()})
    engine.sink.publish()
    if isinstance(job.method, SearchMethod):
        job.method.publish(job.out)
    copy_side_files(job.source, job.out, code=job.recipe.trust_remote_code)
    recipe = {**job.recipe.model_dump(mode="json"), "source_revision": job.source.revision}
    write_json(job.out / output_files.RECIPE, recipe)
    config = result_config(job.source.config, plan, engine.format_of, job.skeleton.model)
    write_json(job.out / "config.json", config)
    progress.stage(f"verifying in {'a fresh' if fresh else 'this'} process")
    verification = confirm(job.out, probe, trust_remote_code=job.recipe.trust_remote_code, fresh=fresh)
    rows = [row for unit in units for row in unit.rows]
    errors = [row.error for row in rows if row.error is not None]
    return RunReport(
        output=str(job.out),
        digest=plan.digest,
        recipe=recipe,
        versions=versions(),
        rows=rows,
        events=[*engine.events, *(event for unit in units for event in unit.events)],
        units=[{"name": unit.name, **unit.metrics} for unit in units],
        bytes_before=plan.bytes_before,
        bytes_after=plan.bytes_after,
        bits_per_weight=plan.bits_per_weight,
        mean_error=sum(errors) / len(errors) if errors else None,
        sparsity=_sparsity(rows, {layer.ref.name: layer.ref.numel for layer in plan.compressed}),
        verification=verification,
    )


def _sparsity(rows: Sequence[Row], sizes: Mapping[str, int]) -> float | None:
    """Return the share of zeros among all values of the compressed tensors, given how many each has."""
    zeros = [row.sparsity * sizes[row.name] for row in rows if row.sparsity is not None]
    return sum(zeros) / sum(sizes.values()) if zeros else None


def digest_parts(job: Job, calibration: CalibrationSet | None) -> dict[str, Any]:
    """Return what determines the bytes of a result, by name."""
    recipe = job.recipe.model_dump(mode="json", exclude={"model", "calibration"})
    return {
        **{f"recipe.{key}": value for key, value in recipe.items()},
        **({"start": job.method.fingerprint()} if isinstance(job.method, SearchMethod) else {}),
        "calibration": calibration.fingerprint if calibration else None,
        "expert tokens": None if calibration is None else _expert_digest(job, calibration),
        "source": job.source.fingerprint,
        "device": job.skeleton.device.type,
        "package version": __version__,
        "torch version": torch.__version__,
    }


def _expert_digest(job: Job, calibration: CalibrationSet) -> list[object] | None:
    """Return what the statistics of experts depend on beside the calibration tokens; None for models without."""
    wanted = expert_tokens(job)
    return [wanted, None if calibration.reserve is None else fingerprint(calibration.reserve)] if wanted else None
