"""`compress quantize MODEL`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from compressor.cli.flags import (
    AllowPickle,
    CalibrationText,
    Device,
    DryRun,
    Force,
    Json,
    MethodOptions,
    Model,
    Output,
    Quiet,
    Seed,
    SeqLen,
    TrustRemoteCode,
)
from compressor.cli.render import STDERR, STDOUT, RichProgress, duration, print_json, report_table, size, table
from compressor.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from compressor.api import Job


def quantize(
    model: Model,
    method: Annotated[str, typer.Option("--method", "-m", help="See: compress list methods.")] = "fp4",
    format: Annotated[str | None, typer.Option("--format", "-f", help="See: compress list formats.")] = None,
    group_size: Annotated[str | None, typer.Option(help="Inputs per scale, 'channel' or 'tensor'.")] = None,
    inputs: Annotated[
        str | None, typer.Option("--inputs", help="Round the inputs of layers too. See: compress list inputs.")
    ] = None,
    output: Output = None,
    data: CalibrationText = "python-docs",
    n_samples: Annotated[
        int | None,
        typer.Option(min=1, max=65_536, help="Windows of calibration text."),
    ] = None,
    seq_len: SeqLen = 512,
    min_expert_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens every expert is calibrated on; 0: as they come."),
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Leave tensors dense (repeatable).")] = None,
    skip_inputs: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Leave inputs of layers as they are (repeatable).")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="GLOB=FORMAT[:GROUP]", help="Give tensors another format (repeatable)."),
    ] = None,
    kv_cache: Annotated[
        str | None, typer.Option(metavar="fp8", help="Store scales for an FP8 key/value cache.")
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="Round queries, keys and values too (native): fpq8, int8-token, ..."),
    ] = None,
    batch_norm: Annotated[
        str | None,
        typer.Option(metavar="correct|reestimate", help="New running statistics behind rounded convolutions (images)."),
    ] = None,
    effort: Annotated[
        str | None, typer.Option(help="fast, balanced or best: steps and samples of methods that learn.")
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(min=1, max=16, help="Choose each layer's format for so many stored bits per weight.")
    ] = None,
    menu: Annotated[str | None, typer.Option(metavar="A,B,...", help="Formats --target-bits chooses from.")] = None,
    bits_by: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Rules --target-bits follows instead of measuring.")
    ] = None,
    option: MethodOptions = None,
    seed: Seed = 0,
    device: Device = "auto",
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Keep to 6GB, say: takes experts of a block some at a time.")
    ] = None,
    force: Force = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress a checkpoint and write it as safetensors."""
    if menu is not None and target_bits is None:
        raise RecipeError("--menu says nothing without --target-bits", "for example --target-bits 3.5")
    if bits_by is not None and target_bits is None:
        raise RecipeError("--bits-by says nothing without --target-bits", "for example --target-bits 3")
    options = parse_options(option or [])
    if effort is not None:
        options["effort"] = effort
    check_names(method, format, group_size, inputs, attention)
    formats = parse_overrides(set_ or [])
    if kv_cache not in (None, "fp8"):
        raise did_you_mean("key/value cache format", str(kv_cache), ["fp8"])
    if batch_norm not in (None, "correct", "reestimate"):
        raise did_you_mean("--batch-norm", str(batch_norm), ["correct", "reestimate"])
    if quiet or json_:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from compressor.api import execute, make_overrides, prepare, prepare_bits
    from compressor.engine.memory import parse_memory
    from compressor.priorities import parse_stages
    from compressor.recipe import CalibrationSpec, Recipe

    most = None if max_memory is None else parse_memory(max_memory)
    recipe = Recipe(
        model=model,
        method=method,
        options=options,
        format=format,
        group_size=group_size,
        inputs=inputs,
        skip_inputs=tuple(skip_inputs or ()),
        overrides=make_overrides(formats, skip or ()),
        kv_cache="fp8" if kv_cache else None,
        attention=attention,
        batch_norm=cast(Any, batch_norm),
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
    if not quiet and not json_:
        STDERR.print(f"compress quantize {model}: method {method}", soft_wrap=True, markup=False)
    if target_bits is None:
        job = prepare(recipe, output, device=device, force=force)
    else:
        wanted = parse_menu(menu)
        with RichProgress(quiet or json_) as progress:
            job, bits = prepare_bits(
                *(recipe, target_bits, wanted, output),
                device=device,
                force=force,
                progress=progress,
                stages=parse_stages(bits_by),
            )
        if not json_:
            STDOUT.print(table("formats chosen", ["layers", "formats"], [list(row) for row in bits.table()], text=True))
            STDOUT.print(bits.sentence(), soft_wrap=True)
    if dry_run:
        show_plan(job, json_)
        return
    with RichProgress(quiet) as progress:
        report = execute(job, force=force, progress=progress, max_memory=most).to_json()
    if json_:
        print_json(report)
    else:
        STDOUT.print(report_table(report))
        if coverage := expert_coverage(report):
            STDOUT.print(coverage, soft_wrap=True)
        events = len(report["events"])
        if events:
            STDOUT.print(f"{events} notes, see {report['output']}/compress_report.json", soft_wrap=True)


def expert_coverage(report: dict[str, Any]) -> str | None:
    """Return a line about the calibration tokens of experts, or None where there were none."""
    units = [unit for unit in report["units"] if "expert_tokens_fewest" in unit]
    if not units:
        return None
    fewest, most = min(u["expert_tokens_fewest"] for u in units), max(u["expert_tokens_most"] for u in units)
    topped = sum(u["experts_topped_up"] for u in units)
    return f"calibration tokens the router sends to an expert: {fewest:g} to {most:g}; topped up: {topped:g} experts"


def check_names(
    method: str, format: str | None, group_size: str | None, inputs: str | None, attention: str | None = None
) -> None:
    """Reject unknown names before torch is imported, so that a typo costs no seconds."""
    from compressor.formats import BUILDERS, parse_group_size
    from compressor.formats.activations import get_attention_format, get_input_format
    from compressor.methods import METHODS
    from compressor.pruning import PRUNERS

    if method not in METHODS and method in PRUNERS:
        raise RecipeError(f"method {method} prunes", f"use compress prune --method {method}")
    if method not in METHODS:
        raise did_you_mean("method", method, METHODS)
    if format is not None and format not in BUILDERS:
        raise did_you_mean("format", format, BUILDERS)
    if format is not None:
        parse_group_size(format, group_size)
    if inputs is not None:
        get_input_format(inputs)
    if attention is not None:
        get_attention_format(attention)


def parse_overrides(pairs: list[str]) -> dict[str, str]:
    """Turn `GLOB=FORMAT[:GROUP]` strings into glob -> format.

    Raises:
        RecipeError: A pair has no `=`, or names no known format.
    """
    from compressor.formats import BUILDERS

    formats: dict[str, str] = {}
    for pair in pairs:
        match, found, text = pair.rpartition("=")
        if not found or not match or not text:
            raise RecipeError(f"--set {pair!r} is not GLOB=FORMAT", "for example --set '*.down_proj=int8'")
        name = text.partition(":")[0]
        if name not in BUILDERS:
            raise did_you_mean("format", name, BUILDERS)
        formats.pop(match, None)  # given twice: the later one, in the later place
        formats[match] = text
    return formats


def parse_menu(text: str | None) -> tuple[str, ...]:
    """Turn `A,B,...` into names of formats, none for none.

    Raises:
        RecipeError: A name is unknown.
    """
    from compressor.formats import BUILDERS

    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    for name in names:
        if name not in BUILDERS:
            raise did_you_mean("format", name, BUILDERS)
    return names


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Turn `KEY=VALUE` strings into options; values are JSON where they parse as JSON.

    Raises:
        RecipeError: A pair has no `=`, or a key comes twice.
    """
    import json

    options: dict[str, Any] = {}
    for pair in pairs:
        key, found, text = pair.partition("=")
        if not found or not key:
            raise RecipeError(f"--option {pair!r} is not KEY=VALUE", "for example --option sweeps=4")
        if key in options:
            raise RecipeError(f"--option {key} is given twice")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return options


def show_plan(job: Job, as_json: bool) -> None:
    """Print what would happen: sizes, memory, time, and the fate of every tensor."""
    from compressor.estimate import estimate_seconds

    plan = job.plan
    seconds = estimate_seconds(plan, job.method, job.recipe.calibration, job.skeleton.device)
    if as_json:
        totals = {
            "output": str(job.out),
            "bytes_before": plan.bytes_before,
            "bytes_after": plan.bytes_after,
            "bits_per_weight": plan.bits_per_weight,
            "estimated_seconds": round(seconds, 1),
        }
        print_json({**plan.to_json(), **totals})
        return
    reasons: dict[str, list[int]] = {}
    for layer in plan.layers:
        kept = f"kept: {layer.rewritten_because or layer.kept_because}"
        what = f"{layer.format}, inputs {layer.inputs}" if layer.inputs else layer.format or kept
        entry = reasons.setdefault(what, [0, 0, 0])
        entry[0] += 1
        entry[1] += layer.bytes_before
        entry[2] += layer.bytes_after
    rows = [[why, str(count), size(before), size(after)] for why, (count, before, after) in reasons.items()]
    rows.append(["all", str(len(plan.layers)), size(plan.bytes_before), size(plan.bytes_after)])
    STDOUT.print(table(f"plan: {job.out}", ["tensors", "count", "before", "after"], rows))
    STDOUT.print(
        f"{plan.bits_per_weight:.3f} bits per compressed weight; about {size(plan.peak_bytes)} of tensors in memory "
        f"at once (libraries add about 0.5 GB); roughly {duration(seconds)} on this machine; --json lists every tensor",
        soft_wrap=True,
    )
