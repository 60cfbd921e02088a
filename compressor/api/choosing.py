"""Choosing formats for a number of bits, and planning the run with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from compressor.api.calibrating import calibrate
from compressor.api.job import Job, check_window, prepare
from compressor.bits import MENU, RULED_MENU, BitChooser, Bits
from compressor.errors import UnsupportedError
from compressor.formats import get_format
from compressor.priorities import Stage
from compressor.ranks import join
from compressor.recipe import Recipe
from compressor.report import Progress, Silent


def prepare_bits(
    recipe: Recipe,
    target: float,
    menu: Sequence[str] = (),
    out: Path | None = None,
    *,
    device: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
    stages: Sequence[Stage] = (),
) -> tuple[Job, Bits]:
    """Choose every layer's format for a wished number of bits, and plan the run with them.

    Reads weights and calibration data: what a format costs is measured. The recipe of the job names every choice.

    Args:
        recipe: What is wanted; layers that its overrides name keep the formats given there.
        target: Stored bits per weight, scales included, of the layers to choose for.
        menu: Formats to choose from; none for the usual ones.
        out: As `prepare`.
        device: As `prepare`.
        force: As `prepare`.
        progress: Who is told how far it is.
        stages: Rules that say which layers get more bits first; none: every choice is measured.

    Raises:
        CompressorError: As `prepare`; or the target cannot be met.
    """
    if join().size > 1:
        raise UnsupportedError(
            "choosing formats for a number of bits runs in one process",
            "run it without torchrun, and give the formats it chose to torchrun with --set",
        )
    progress, label = progress or Silent(), f"{target:g}bits"
    for name in menu:
        get_format(name, None, torch.bfloat16)
    job = prepare(recipe, out, device=device, force=force, label=label)
    check_window(job)
    progress.stage("reading calibration data")
    tokens = calibrate(job).tokens
    parts = (job.plan, job.source, job.skeleton, job.blocks, job.method, recipe)
    usual = RULED_MENU if stages else MENU
    bits = BitChooser(*parts, tuple(menu) or usual, tokens, progress).choose(target, stages)
    chosen = recipe.model_copy(update={"overrides": (*bits.overrides, *recipe.overrides)})
    job = prepare(chosen, out, device=device, force=force, label=label)
    return replace(job, plan=replace(job.plan, notes=(bits.sentence(), *job.plan.notes))), bits
