"""Filter pruning from checkpoint to checkpoint: rank, cut, recalibrate, train, measure, write, verify."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import output as output_files
from compressor import saving
from compressor.checkpoint.sink import WORK, save_tensors, write_json
from compressor.environment import versions
from compressor.plan import digest
from compressor.report import Progress, RunReport, Silent
from compressor.verify import confirm
from compressor.vision.clusters import Cluster, logits_of
from compressor.vision.complexity import count_macs, count_parameters, latency
from compressor.vision.cutting import cut_filters
from compressor.vision.finetune import Training, train
from compressor.vision.pixels import Pixels
from compressor.vision.planning import CutJob, digest_parts, prepare
from compressor.vision.recipe import make_recipe
from compressor.vision.scores import evaluate
from compressor.vision.sparse import shrink


@dataclass
class CutReport(RunReport):
    """One run of filter pruning.

    Attributes:
        measured: `before`, `sparse` if it was trained before the cut, `pruned` and, if it was trained, `finetuned`:
            scores, multiply-adds for one image, parameters, bytes of all tensors, and the median seconds of one image's
            forward pass.
        clusters: What was cut: name, members, channels before and after.
        training: History of the fine-tuning, best epoch.
        sparse: Of the training before the cut: strength, losses, scales before and after.
    """

    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    clusters: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    sparse: dict[str, Any] = field(default_factory=dict)


def prune(
    model: str,
    *,
    method: str = "beta-rank",
    data: str,
    sparsity: float | None = None,
    macs: float | None = None,
    finetune: int = 0,
    output: str | Path | None = None,
    skip: tuple[str, ...] = (),
    options: dict[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> CutReport:
    """Remove filters from an image classifier and write it; the same as `compress prune` with these methods.

    Args:
        model: Checkpoint folder, or Hub id (`owner/name[@revision]`).
        method: `beta-rank`, `l1` or `random`.
        data: Labelled images: folder, `.npz` file, or Hub dataset.
        sparsity: Share of the filters to remove.
        macs: Share of the multiply-adds to keep, instead of `sparsity`.
        finetune: Epochs of training after the cut.
        output: Folder to write; None means `./<name>-<method>-<share>`.
        skip: Globs of layers whose filters stay.
        options: Options of the method.
        seed: Seed of everything random.
        device: `auto`, `cpu`, `cuda`, ...
        force: Overwrite an earlier result.
        trust_remote_code: Run model code that comes with the checkpoint, where transformers has none of its own.
        progress: Who is told how far it is.

    Raises:
        CompressorError: See `compressor.errors`; nothing that loads is left behind.
    """
    recipe = make_recipe(
        model=model,
        method=method,
        data=data,
        sparsity=sparsity,
        macs=macs,
        finetune=finetune,
        skip=skip,
        options=dict(options or {}),
        seed=seed,
    )
    out = Path(output) if output is not None else None
    job = prepare(recipe, out, device=device, force=force, trust_remote_code=trust_remote_code)
    return execute(job, force=force, progress=progress or Silent())


def execute(job: CutJob, *, force: bool = False, progress: Progress | None = None) -> CutReport:
    """Run a planned job.

    Raises:
        CompressorError: See `compressor.errors`; a training that was stopped continues with the next run.
    """
    progress = progress or Silent()
    started = time.monotonic()
    for event in job.events:
        progress.event(event)
    progress.stage("hashing the source")
    parts = digest_parts(job)
    name = digest(parts)
    with output_files.claimed(job.out, parts, name, force):
        report = _run(job, name, progress)
        output_files.conclude(job.out, report, job.events, started)
    return report


def measure(job: CutJob, test: Pixels) -> dict[str, Any]:
    """Return what the model is worth and what it costs now."""
    one = job.example[:1]
    return {
        **evaluate(job.model, test, job.device).to_json(),
        "macs": count_macs(job.model, one),
        "parameters": count_parameters(job.model),
        "bytes": sum(t.numel() * t.element_size() for t in saving.stored_tensors(job.model, job.source).values()),
        "latency": latency(job.model, one),
    }


def _run(job: CutJob, name: str, progress: Progress) -> CutReport:
    model, recipe = job.model, job.recipe
    report = CutReport(output=str(job.out), digest=name, recipe=recipe.model_dump(mode="json"), versions=versions())
    before = saving.stored_shapes(model, job.source)
    train_images, test = Pixels(job.data.train, job.preprocess), Pixels(job.data.test, job.preprocess)
    progress.stage("measuring the original")
    report.measured["before"] = measure(job, test)
    progress.stage("ranking filters")
    share = recipe.macs if job.method.options.budget == "sensitivity" else None

    def before_cut(keep: Mapping[str, Tensor]) -> None:
        if job.method.options.sparse_epochs:
            report.sparse = _shrink(job, keep, train_images, progress)
            report.measured["sparse"] = measure(job, test)

    cutting = (job.graph, job.method, job.ratios, train_images, job.device, recipe.seed, share, before_cut)
    kept, job.ratios = cut_filters(*cutting)
    progress.stage("measuring what is left")
    report.measured["pruned"] = measure(job, test)
    if recipe.finetune:
        report.training = _finetune(job, train_images, progress)
        report.measured["finetuned"] = measure(job, test)
    saving.round_to_stored(model, job.source)
    progress.stage("writing")
    probe = job.out / WORK / "probe.safetensors"
    with torch.no_grad():
        logits = logits_of(model(job.example))
    save_tensors(probe, {"inputs": job.example.cpu(), "logits": logits.float().cpu()})
    report.clusters = [_described(cluster, job.counts[cluster.name]) for cluster in job.graph.clusters]
    write_json(job.out / output_files.RECIPE, {**report.recipe, "source_revision": job.source.revision})
    saving.write(model, job.source, job.out, kept, job.trust_remote_code)
    same = "trained" if recipe.finetune else "statistics computed again"
    report.rows = saving.rows(model, job.source, before, ("rewritten", same))
    report.bytes_before = sum(row.bytes_before for row in report.rows)
    report.bytes_after = sum(row.bytes_after for row in report.rows)
    progress.stage("verifying in a fresh process")
    report.verification = confirm(job.out, probe, trust_remote_code=job.trust_remote_code)
    return report


def _shrink(job: CutJob, keep: Mapping[str, Tensor], images: Pixels, progress: Progress) -> dict[str, Any]:
    """Train before the cut; images that will pick the best epoch of fine-tuning are left out."""
    options, folder = job.method.options, job.out / WORK / "sparse"
    folder.mkdir(exist_ok=True)
    done = shrink(
        job.graph,
        keep,
        _held_back(job, images)[0],
        _settings(job, options.sparse_epochs),
        job.device,
        strength=options.sparse_strength,
        folder=folder,
        told=lambda text: progress.stage(f"before the cut, {text}"),
    )
    return asdict(done)


def _held_back(job: CutJob, images: Pixels) -> tuple[Pixels, Pixels | None]:
    """Return the images that are trained on, and those that pick the best epoch."""
    if not job.method.options.validation:
        return images, None
    rest, held = job.data.train.split(job.method.options.validation, job.recipe.seed)
    return Pixels(rest, job.preprocess), Pixels(held, job.preprocess)


def _settings(job: CutJob, epochs: int) -> Training:
    options = job.method.options
    return Training(
        epochs=epochs,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        batch=options.batch,
        loss=options.loss,
        augment=options.augment,
        patience=options.patience,
        seed=job.recipe.seed,
    )


def _finetune(job: CutJob, images: Pixels, progress: Progress) -> dict[str, Any]:
    images, validation = _held_back(job, images)
    done = train(
        job.model,
        images,
        _settings(job, job.recipe.finetune),
        job.device,
        validation=validation,
        folder=job.out / WORK,
        told=progress.stage,
    )
    return asdict(done)


def _described(cluster: Cluster, counts: tuple[int, int]) -> dict[str, Any]:
    return {"name": cluster.name, "members": list(cluster.members), "before": counts[0], "after": counts[1]}
