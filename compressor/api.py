"""The package's functions: what the command line does, from Python."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from compressor import __version__
from compressor import output as output_files
from compressor.bits import MENU, RULED_MENU, BitChooser, Bits
from compressor.calibration.dataset import CalibrationSet, Generate, build, fingerprint
from compressor.checkpoint.blocks import BlockSequence
from compressor.checkpoint.export import copy_side_files, result_config
from compressor.checkpoint.fused_experts import rejoined, split_experts
from compressor.checkpoint.resolve import resolve_model
from compressor.checkpoint.sink import WORK, save_tensors, write_json
from compressor.checkpoint.skeleton import Skeleton, quiet
from compressor.checkpoint.source import Source
from compressor.engine import Engine
from compressor.engine.memory import parse_memory
from compressor.environment import load_tokenizer, pick_device, versions
from compressor.errors import CheckpointError, RecipeError, UnsupportedError
from compressor.formats import get_format, parse_group_size
from compressor.formats.activations import get_input_format
from compressor.formats.pruned import PRUNED
from compressor.methods.base import Method, RouterMethod, Stream
from compressor.plan import Kind, Plan, digest
from compressor.planner import make_plan
from compressor.priorities import Stage, parse_stages
from compressor.process import peak_rss
from compressor.pruning import get_method
from compressor.pruning.base import PruneOptions
from compressor.pruning.view import SearchMethod
from compressor.ranks import Ranks, join
from compressor.recipe import CalibrationSpec, Override, Recipe
from compressor.report import Progress, Row, RunReport, Silent
from compressor.unit import Unit
from compressor.verify import confirm
from compressor.vision.calibration import calibration_images

GENERATED_AT_ONCE = 8
"""Samples the model writes side by side for `--data self`: much faster than one by one, and the cache stays small."""


@dataclass(frozen=True)
class Job:
    """A planned run: everything known from headers, nothing computed yet."""

    recipe: Recipe
    out: Path
    source: Source
    skeleton: Skeleton
    blocks: BlockSequence
    method: Method
    plan: Plan


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
        attention: Floats (`"fpq4"`, `"fpq6"`, `"fpq8"`) that queries, keys, probabilities and values are rounded to.
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


def needs_data(method: Method, recipe: Recipe) -> bool:
    """Return whether a run looks at calibration data."""
    static = recipe.inputs is not None and get_input_format(recipe.inputs).static
    looks = method.stream is not Stream.NONE or isinstance(method, SearchMethod)
    return looks or recipe.kv_cache is not None or recipe.attention is not None or static


def make_overrides(formats: Mapping[str, str], skip: Sequence[str]) -> tuple[Override, ...]:
    """Turn `--set GLOB=FORMAT[:GROUP]` and `--skip GLOB` into overrides; skips come last, so they win."""
    chosen = []
    for match, text in formats.items():
        name, found, group_size = text.partition(":")
        chosen.append(Override(match=match, format=name, group_size=group_size if found else None))
    return (*chosen, *(Override(match=match, keep=f"left out by --skip {match}") for match in skip))


def prepare(
    recipe: Recipe, out: Path | None = None, *, device: str = "auto", force: bool = False, label: str | None = None
) -> Job:
    """Plan a run from headers alone: what `--dry-run` shows.

    Args:
        recipe: What is wanted.
        out: Folder to write; None for one named after model, method and format.
        device: Where to compute.
        force: Overwrite an earlier result.
        label: What stands for the format in that name; None for the format.

    Raises:
        CompressorError: Anything that can be known to be wrong before reading weights.
    """
    method = get_method(recipe.method, recipe.options)
    if recipe.inputs is not None:
        get_input_format(recipe.inputs)
    for name, group_size in [(recipe.format, recipe.group_size), *((o.format, o.group_size) for o in recipe.overrides)]:
        if name is not None:
            get_format(name, parse_group_size(name, group_size), torch.bfloat16)
    ranks = join()
    with ranks.leader_first():
        path, revision = resolve_model(recipe.model, recipe.trust_remote_code, recipe.allow_pickle)
    if out is not None:
        output_files.check_apart(out, path)
        if ranks.leads:
            output_files.check_output(out, force)
    source = Source.open(path, recipe.model, revision)
    skeleton = Skeleton.build(path, pick_device(device), recipe.trust_remote_code)
    if not isinstance(getattr(method, "options", None), PruneOptions):  # pruned weights stay in the files they are in
        source = split_experts(source, skeleton)
    blocks = BlockSequence.find(skeleton.model)
    plan = make_plan(recipe, source, skeleton, blocks)
    source = rejoined(source, [layer.ref.name for layer in plan.layers])
    resolved = recipe.model_copy(update={"format": plan.format, "inputs": plan.inputs})
    if out is None:
        out = default_output(resolved, label or plan.format)
        if ranks.leads:
            output_files.check_output(out, force)
    job = Job(resolved, out, source, skeleton, blocks, method, plan)
    if needs_data(method, recipe):
        _check_window(job)
    tokens = recipe.calibration.n_samples * recipe.calibration.seq_len
    if needs_data(method, recipe) and expert_tokens(job) > tokens:
        raise RecipeError(
            f"--min-expert-tokens {expert_tokens(job)}: there are {tokens} calibration tokens in all",
            "raise --n-samples or --seq-len",
        )
    return job


def _check_window(job: Job) -> None:
    """Make sure that the model can read the windows of calibration text."""
    limit = getattr(job.skeleton.model.config.get_text_config(), "max_position_embeddings", None)
    if limit and job.recipe.calibration.seq_len > limit:
        raise RecipeError(
            f"--seq-len {job.recipe.calibration.seq_len}: the model reads at most {limit} tokens",
            f"use --seq-len {limit}",
        )


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
    _check_window(job)
    progress.stage("reading calibration data")
    tokens = calibrate(job).tokens
    parts = (job.plan, job.source, job.skeleton, job.blocks, job.method, recipe)
    usual = RULED_MENU if stages else MENU
    bits = BitChooser(*parts, tuple(menu) or usual, tokens, progress).choose(target, stages)
    chosen = recipe.model_copy(update={"overrides": (*bits.overrides, *recipe.overrides)})
    job = prepare(chosen, out, device=device, force=force, label=label)
    return replace(job, plan=replace(job.plan, notes=(bits.sentence(), *job.plan.notes))), bits


def execute(
    job: Job, *, force: bool = False, progress: Progress | None = None, max_memory: float | None = None
) -> RunReport:
    """Run a planned job: calibrate, compress, write, verify.

    Args:
        job: What `prepare` returned.
        force: Overwrite an earlier result.
        progress: Who is told how far it is.
        max_memory: Bytes that may be resident while blocks are compressed; None for no bound. Results are the same.

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
            report = _publish(job, plan, engine, units, progress)
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


def _publish(job: Job, plan: Plan, engine: Engine, units: Sequence[Unit], progress: Progress) -> RunReport:
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
    progress.stage("verifying in a fresh process")
    verification = confirm(job.out, probe, trust_remote_code=job.recipe.trust_remote_code)
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


def calibrate(job: Job) -> CalibrationSet:
    """Build the calibration set of a job.

    Raises:
        CompressorError: Before any work: unreadable, too little, or not this model's vocabulary.
    """
    if job.skeleton.model.main_input_name == "pixel_values":
        return calibration_images(job.recipe.calibration, job.source.path, job.skeleton.model.config, job.recipe.seed)
    tokenizer = load_tokenizer(job.source.path, job.recipe.trust_remote_code)
    vocab_size = job.skeleton.model.config.get_text_config().vocab_size
    reserve = job.recipe.calibration.n_samples if expert_tokens(job) else 0
    return build(job.recipe.calibration, tokenizer, vocab_size, job.recipe.seed, _generator(job), reserve)


def expert_tokens(job: Job) -> int:
    """Return how many tokens every expert is to be calibrated on; 0 for models without experts.

    A method may wish for some shares of what an expert would get of one window if the router were even.
    """
    experts = [layer.ref for layer in job.plan.compressed if layer.ref.kind is Kind.EXPERT]
    if not experts:
        return 0
    spec, wish = job.recipe.calibration, 0
    top_k = getattr(job.skeleton.model.config.get_text_config(), "num_experts_per_tok", None)
    if isinstance(job.method, RouterMethod) and top_k:
        n_experts = job.skeleton.model.get_parameter(experts[0].param).shape[0]
        wish = min(int(top_k / n_experts * spec.seq_len * job.method.balance), spec.n_samples * spec.seq_len)
    return max(spec.expert_tokens, wish)


def _generator(job: Job) -> Generate:
    """Return a function that lets the full-precision model write its own calibration text."""

    def generate(n_samples: int, seq_len: int, seed: int) -> Tensor:
        from compressor.runtime import load

        model: Any = load(job.source.path, trust_remote_code=job.recipe.trust_remote_code)
        torch.manual_seed(seed)  # transformers samples from the global generator
        vocab_size = model.config.get_text_config().vocab_size
        start = torch.randint(0, vocab_size, (n_samples, 1))
        rows = []
        with torch.no_grad(), quiet():
            for first in start.split(GENERATED_AT_ONCE):  # [at most GENERATED_AT_ONCE, 1]
                # Sampled, not greedy: greedy text of small models repeats itself.
                out = model.generate(
                    first,
                    attention_mask=torch.ones_like(first),
                    do_sample=True,
                    top_k=0,
                    max_new_tokens=seq_len,
                    min_new_tokens=seq_len,
                    pad_token_id=0,
                    use_cache=True,
                )
                rows.append(out[:, 1:])
        return torch.cat(rows)

    return generate


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


def default_output(recipe: Recipe, format_name: str) -> Path:
    """Return `./<name>-<method>-<format>`, and the format of inputs behind it if they are rounded.

    In the place of a format, pruned checkpoints say how much is gone: `50`, or `2of4`.
    """
    name = Path(recipe.model.partition("@")[0]).resolve().name.removesuffix(".gguf")
    name = re.sub(r"[^\w.-]+", "-", name)
    words = [name, recipe.method]
    pruning = getattr(get_method(recipe.method, recipe.options), "options", None)
    if isinstance(pruning, PruneOptions):
        words.append(str(pruning.groups).replace(":", "of") if pruning.groups else f"{100 * pruning.sparsity:g}")
    words += [] if format_name == PRUNED else [format_name]
    words += [recipe.inputs] if recipe.inputs else []
    return Path("-".join([*words, *([f"attention-{recipe.attention}"] if recipe.attention else [])]))
