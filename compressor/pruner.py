"""`compressor.prune`: what `compress prune` does to language models, from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.api import execute, make_overrides, prepare
from compressor.errors import RecipeError, did_you_mean
from compressor.formats.pruned import PRUNED
from compressor.pruning import PRUNERS
from compressor.recipe import CalibrationSpec, Recipe
from compressor.report import Progress, RunReport, Silent
from compressor.structured import job as structured


def prune(
    model: str,
    *,
    method: str = "wanda",
    sparsity: float | None = None,
    pattern: str | None = None,
    macs: float | None = None,
    format: str | None = None,
    group_size: int | str | None = None,
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
) -> RunReport:
    """Prune a language model and write it as safetensors, with zeros or smaller; the same as `compress prune`.

    Args:
        model: Embedded model name, checkpoint folder, GGUF file, or Hub id (`owner/name[@revision]`).
        method: See `compress list pruners`.
        sparsity: Share of every matrix's weights that become zero; None is one half, or the pattern's share. Of methods
            that remove heads and neurons, the share of all weights that goes.
        pattern: `N:M`: keep N of every M consecutive inputs.
        macs: Share of the multiply-adds to keep, for methods that remove heads and neurons.
        format: Round the kept weights to this format in the same loop; only `sparsegpt` does.
        group_size: Inputs per scale of that format.
        output: Folder to write; None means `./<name>-<method>-<what is left out>`.
        data: Calibration text: preset, local file, or Hub dataset.
        n_samples: Windows of calibration text.
        seq_len: Tokens per window.
        skip: Globs of tensors that are left alone.
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
    if method in PRUNERS and PRUNERS[method].kind == "structured":
        _refuse(method, pattern=pattern, format=format, group_size=group_size)
        return structured.prune(
            model,
            method=method,
            macs=macs,
            sparsity=sparsity,
            output=output,
            data=data,
            n_samples=n_samples,
            seq_len=seq_len,
            skip=skip,
            options=options,
            seed=seed,
            device=device,
            force=force,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    _refuse(method, macs=macs)
    recipe = prune_recipe(
        model,
        method=method,
        sparsity=sparsity,
        pattern=pattern,
        format=format,
        group_size=None if group_size is None else str(group_size),
        data=data,
        n_samples=n_samples,
        seq_len=seq_len,
        skip=skip,
        options=options or {},
        seed=seed,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    job = prepare(recipe, Path(output) if output is not None else None, device=device, force=force)
    return execute(job, force=force, progress=progress or Silent())


def prune_recipe(
    model: str,
    *,
    method: str,
    sparsity: float | None,
    pattern: str | None,
    format: str | None,
    group_size: str | None,
    skip: Sequence[str],
    options: Mapping[str, Any],
    seed: int,
    trust_remote_code: bool,
    allow_pickle: bool = False,
    data: str = "python-docs",
    n_samples: int = 32,
    seq_len: int = 512,
) -> Recipe:
    """Return the recipe of a pruning run; sparsity and pattern are options of the method.

    Raises:
        RecipeError: Unknown method.
    """
    if method not in PRUNERS:
        raise did_you_mean("pruning method", method, PRUNERS)
    given = {key: value for key, value in (("sparsity", sparsity), ("pattern", pattern)) if value is not None}
    return Recipe(
        model=model,
        method=method,
        options={**options, **given},
        format=format or PRUNED,
        group_size=group_size,
        overrides=make_overrides({}, skip),
        calibration=CalibrationSpec(data=data, n_samples=n_samples, seq_len=seq_len),
        seed=seed,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )


def _refuse(method: str, **given: object) -> None:
    """Raise if one of these was given: the method has no use for it.

    Raises:
        RecipeError: Names it.
    """
    for name, value in given.items():
        if value is not None:
            raise RecipeError(f"{name} means nothing for method {method}", "leave it out")
