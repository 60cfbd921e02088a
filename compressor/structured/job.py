"""Structured pruning from checkpoint to checkpoint: measure units, choose, cut, write, verify."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import output as output_files
from compressor import saving
from compressor.calibration.dataset import CalibrationSet
from compressor.checkpoint.config import quiet
from compressor.checkpoint.ends import example_inputs, first_tensor
from compressor.checkpoint.sink import WORK, save_tensors, write_json
from compressor.environment import versions
from compressor.errors import RecipeError, VerificationError
from compressor.plan import digest
from compressor.report import Progress, RunReport, Silent
from compressor.structured.budget import search, search_equal
from compressor.structured.config import plain_config
from compressor.structured.cutting import NOISE, cut, masked, relative_difference, try_cuts
from compressor.structured.optin import Dense
from compressor.structured.planning import StructuredJob, calibrate, digest_parts, prepare, windows
from compressor.structured.recipe import make_recipe
from compressor.structured.units import Part, Unit, count_macs, count_weights, units_of
from compressor.verify import confirm

PROBE_TOKENS = 32

STATE = "optin.state"
"""Units measured so far, in the work folder."""


@dataclass
class StructuredReport(RunReport):
    """One run of structured pruning.

    Attributes:
        measured: `before` and `after`: multiply-adds of the blocks for one sequence, weights of their linear layers,
            and parameters.
        parts: What was cut: name, kind, block, units and inputs before and after.
        stock: Whether stock transformers loads the result without this package.
    """

    measured: dict[str, dict[str, int]] = field(default_factory=dict)
    parts: list[dict[str, Any]] = field(default_factory=list)
    stock: bool = False


def prune(
    model: str,
    *,
    method: str = "optin",
    macs: float | None = None,
    sparsity: float | None = None,
    output: str | Path | None = None,
    data: str = "python-docs",
    n_samples: int = 32,
    seq_len: int = 512,
    skip: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    force: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> StructuredReport:
    """Remove heads and neurons of a language model and write it; `compressor.prune` with this method.

    Args:
        model: Embedded model name, checkpoint folder, or Hub id (`owner/name[@revision]`).
        method: `optin`.
        macs: Share of the blocks' multiply-adds to keep.
        sparsity: Share of the weights of the blocks' linear layers to remove, instead.
        output: Folder to write; None means `./<name>-<method>-<share>`.
        data: Calibration text: preset, local file, or Hub dataset.
        n_samples: Windows of calibration text.
        seq_len: Tokens per window.
        skip: Globs of modules that stay whole.
        options: Options of the method.
        seed: Seed of everything random.
        device: `auto`, `cpu`, `cuda`, ...
        force: Overwrite an earlier result.
        trust_remote_code: Run model code that comes with the checkpoint, where transformers has none of its own.
        allow_pickle: Read a folder of pickled weights, as plain tensors; no code in them is run.
        progress: Who is told how far it is.

    Raises:
        CompressorError: See `compressor.errors`; nothing that loads is left behind.
    """
    recipe = make_recipe(
        model=model,
        method=method,
        macs=macs,
        sparsity=sparsity,
        skip=tuple(skip),
        options=dict(options or {}),
        calibration={"data": data, "n_samples": n_samples, "seq_len": seq_len},
        seed=seed,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    job = prepare(recipe, Path(output) if output is not None else None, device=device, force=force)
    return execute(job, force=force, progress=progress or Silent())


def execute(job: StructuredJob, *, force: bool = False, progress: Progress | None = None) -> StructuredReport:
    """Run a planned job. All weights are in memory at once, in float32.

    Raises:
        CompressorError: See `compressor.errors`; units that were measured are kept for the next run.
    """
    progress = progress or Silent()
    started = time.monotonic()
    progress.stage("reading calibration data")
    calibration = calibrate(job)
    events = [*job.events, *calibration.events]
    for event in events:
        progress.event(event)
    progress.stage("hashing the source")
    parts = digest_parts(job, calibration)
    name = digest(parts)
    with output_files.claimed(job.out, parts, name, force):
        report = _run(job, name, calibration, progress)
        output_files.conclude(job.out, report, events, started)
    return report


@torch.no_grad()
def _run(job: StructuredJob, name: str, calibration: CalibrationSet, progress: Progress) -> StructuredReport:
    recipe = {**job.recipe.model_dump(mode="json"), "source_revision": job.source.revision}
    report = StructuredReport(output=str(job.out), digest=name, recipe=recipe, versions=versions())
    report.measured["before"] = _measure(job)
    progress.stage("reading weights")
    job.skeleton.load(job.source.read(job.source.tensors))
    kept, parts = _choose(job, calibration.tokens, progress)
    gone = [unit for unit in units_of(parts) if unit not in kept]
    inputs = example_inputs(job.skeleton.model, job.skeleton.device, length=PROBE_TOKENS)
    with masked(job.skeleton.model, gone):
        expected = _output(job, inputs)
    before = saving.stored_shapes(job.skeleton.model, job.source)
    rows = cut(job.skeleton.model, gone)
    off = relative_difference(_output(job, inputs), expected)
    if not off <= NOISE:
        raise VerificationError(
            f"{job.out}: the cut model's output is off by {off:.1e} from what masking the same units gives",
            "this is a bug: please report it with the model's config.json",
        )
    progress.stage("writing")
    probe = job.out / WORK / "probe.safetensors"
    save_tensors(probe, {"inputs": inputs[job.skeleton.model.main_input_name].cpu(), "logits": expected.float().cpu()})
    write_json(job.out / output_files.RECIPE, recipe)
    config = plain_config(job.source, job.skeleton.model, kept, job.recipe.trust_remote_code)
    saving.write(job.skeleton.model, job.source, job.out, rows, job.recipe.trust_remote_code, config)
    report.stock = config is not None
    if config is None and job.method.options.layers == "equal":
        report.events.append("layers are equal, but the model's config cannot say so: the cuts are listed instead")
    report.rows = saving.rows(job.skeleton.model, job.source, before, ("kept", "not cut"))
    report.bytes_before = sum(row.bytes_before for row in report.rows)
    report.bytes_after = sum(row.bytes_after for row in report.rows)
    report.measured["after"] = _measure(job)
    report.bits_per_weight = 8 * report.bytes_after / report.measured["after"]["parameters"]
    report.parts = [_described(part, kept) for part in parts]
    progress.stage("verifying in a fresh process")
    report.verification = confirm(job.out, probe, trust_remote_code=job.recipe.trust_remote_code)
    return report


def _choose(job: StructuredJob, tokens: Tensor, progress: Progress) -> tuple[list[Unit], tuple[Part, ...]]:
    """Return the units that stay, and the parts with their neurons in groups.

    Raises:
        RecipeError: The budget is out of reach.
    """
    options = job.method.options
    progress.stage("running the original")
    dense = Dense.run(job.blocks, job.parts, windows(job, tokens), options, job.recipe.seed)
    try_cuts(job.blocks, job.parts, dense.entering, dense.recording)
    parts = dense.grouped(job.parts) if options.group_by == "size" else job.parts
    units = units_of(parts)
    scores = job.method.scores(dense, units, job.recipe.seed, job.out / WORK / STATE, progress.stage)
    find = search_equal if options.layers == "equal" else search
    kept = find(units, scores, job.costs.of(units), job.costs.limit(units))
    if kept is None:
        raise RecipeError(
            f"no choice of heads and neurons costs {job.costs.share:.3f} or less of what the blocks cost now",
            "ask for less, or use smaller groups of neurons with --option group=N",
        )
    return kept, parts


def _output(job: StructuredJob, inputs: Mapping[str, Tensor]) -> Tensor:
    with quiet():
        return first_tensor(job.skeleton.model(**inputs)).float()


def _measure(job: StructuredJob) -> dict[str, int]:
    """Return what the model costs as it is now."""
    return {
        "macs": count_macs(job.blocks, job.method.options.length),
        "weights": count_weights(job.blocks),
        "parameters": sum(parameter.numel() for parameter in job.skeleton.model.parameters()),
    }


def _described(part: Part, kept: Sequence[Unit]) -> dict[str, Any]:
    mine = [unit for unit in kept if unit.part is part]
    return {
        "name": part.name,
        "kind": part.kind,
        "block": part.block,
        "units": [part.count, len(mine)],
        "inputs": [part.inputs, sum(unit.size for unit in mine)],
    }
