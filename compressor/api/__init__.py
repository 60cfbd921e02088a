"""The package's functions: what the command line does, from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from compressor.api.calibrating import calibrate
from compressor.api.choosing import prepare_bits
from compressor.api.execution import digest_parts, execute
from compressor.api.job import Job, make_overrides, needs_data, prepare
from compressor.engine.memory import parse_memory
from compressor.priorities import parse_stages
from compressor.recipe import CalibrationSpec, Recipe
from compressor.report import Progress, RunReport, Silent

__all__ = [
    "Job",
    "calibrate",
    "digest_parts",
    "execute",
    "make_overrides",
    "needs_data",
    "prepare",
    "prepare_bits",
    "quantize",
]


def quantize(
    model: str,
    *,
    method: str = "fp4",
    format: str | None = None,
    group_size: int | str | None = None,
    inputs: str | None = None,
    output: str | Path | None = None,
    data: str = "python-docs",
    n_samples: int | None = None,
    seq_len: int = 512,
    min_expert_tokens: int | None = None,
    skip: Sequence[str] = (),
    skip_inputs: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    kv_cache: Literal["fp8"] | None = None,
    attention: str | None = None,
    batch_norm: Literal["correct", "reestimate"] | None = None,
    target_bits: float | None = None,
    menu: Sequence[str] = (),
    bits_by: str = "measured",
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    max_memory: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> RunReport:
    """Compress a checkpoint and write it as safetensors; the same as `compress quantize`.

    Args:
        model: Embedded model name, checkpoint folder, GGUF file, or Hub id (`owner/name[@revision]`).
        method: See `compress list methods`.
        format: See `compress list formats`; None picks the method's default.
        group_size: Inputs per scale, `"channel"`, `"tensor"`, or None for the format's default.
        inputs: Format the inputs of layers are rounded to (`"int8-token"`, `"fp8-tensor"`, `"nvfp4"`, ...), or None;
            see `compress list inputs`.
        output: Folder to write; None means `./<name>-<method>-<format>[-<inputs>]`.
        data: Calibration text: preset, local file, or Hub dataset.
        n_samples: Windows of calibration text; None: 32, or what the option `effort` asks for.
        seq_len: Tokens per window.
        min_expert_tokens: Tokens every expert is calibrated on, topped up if need be; None: 0.5 % of all tokens; 0: as
            they come.
        skip: Globs of tensors that stay dense; wins over `overrides`.
        skip_inputs: Globs of layers whose inputs stay in floating point.
        overrides: Glob -> format (`"int8"`, `"int8:channel"`) of tensors that get another one; the last match wins.
        kv_cache: Store scales for an FP8 key/value cache.
        attention: What queries, keys and values are rounded to (`"fpq8"`, `"int4-token-asym"`, ...); see
            `docs/activations.md`.
        batch_norm: Running statistics behind rounded convolutions: `correct` fits them to what the original's
            normalization gives on calibration images, `reestimate` computes them from these anew; None leaves them.
        target_bits: Choose every layer's format so that so many bits are stored per weight; see `docs/moe.md`.
        menu: Formats to choose from; none for int2, int3, int4, int6 and int8 (by rule: int2 and int4).
        bits_by: `measured`, or rules in order: `attention`, `shared`, `first`, `outliers`, `importance`.
        options: Options of the method.
        seed: Seed of everything random.
        device: `auto`, `cpu`, `cuda`, ...
        max_memory: What may be resident while blocks are compressed (`"6GB"`); experts are taken some at a time for it.
        force: Overwrite an earlier result.
        trust_remote_code: Run model code that comes with the checkpoint, where transformers has none of its own.
        allow_pickle: Read a folder of pickled weights, as plain tensors; no code in them is run.
        progress: Who is told how far it is.

    Raises:
        CompressorError: See `compressor.errors`; nothing that loads is left behind.
    """
    recipe = Recipe(
        model=model,
        method=method,
        options=dict(options or {}),
        format=format,
        group_size=None if group_size is None else str(group_size),
        inputs=inputs,
        skip_inputs=tuple(skip_inputs),
        overrides=make_overrides(overrides or {}, skip),
        kv_cache=kv_cache,
        attention=attention,
        batch_norm=batch_norm,
        calibration=CalibrationSpec(
            data=data,
            seq_len=seq_len,
            min_expert_tokens=min_expert_tokens,
            **({} if n_samples is None else {"n_samples": n_samples}),
        ),
        seed=seed,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    out = Path(output) if output is not None else None
    most = None if max_memory is None else parse_memory(max_memory)
    if target_bits is None:
        job = prepare(recipe, out, device=device, force=force)
    else:
        stages = parse_stages(bits_by)
        job, _ = prepare_bits(
            recipe, target_bits, menu, out, device=device, force=force, progress=progress, stages=stages
        )
    return execute(job, force=force, progress=progress or Silent(), max_memory=most)
