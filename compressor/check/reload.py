"""Loading a checkpoint in a fresh process and comparing its output with weights decoded a second way, block by block.

`python -m compressor.check.reload` reads a job as JSON on stdin and prints one JSON object. The reference never holds
more than one block: it decodes weights from disk as dense ones, while what is checked computes from packed ones.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor.calibration import kv_cache
from compressor.checkpoint.blocks import BlockSequence
from compressor.checkpoint.config import quiet
from compressor.checkpoint.ends import example_inputs, first_tensor
from compressor.checkpoint.quantized import PackedDecoder
from compressor.checkpoint.skeleton import Skeleton, Target
from compressor.checkpoint.source import Source, read_headers, read_json
from compressor.engine.experts import Stack, Treat, run_experts
from compressor.errors import CompressorError, UnsupportedError, VerificationError
from compressor.formats.native import QUANT_METHOD, NativeSchemes
from compressor.inputs import apply_ops, carried, stored_slots
from compressor.kernels.dispatch import ENV as FORCED_KERNEL
from compressor.plan import role_of
from compressor.runtime import KeyMismatch, execution_path, load
from compressor.runtime.stored import assemble_inputs, open_checkpoint

PROBE_TOKENS = 32
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """What to do.

    Attributes:
        folder: The checkpoint.
        trust_remote_code: Run model code that comes with it.
        outputs: Where to write a second run's `inputs` and `logits`, or None for no second run.
        dtype: Name of the torch dtype of the second run.
    """

    folder: str
    trust_remote_code: bool = False
    outputs: str | None = None
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Reloaded:
    """What came of it.

    Attributes:
        missing: Tensors the model needs that are not on disk.
        unexpected: Tensors on disk the model has no place for.
        unsupported: Why this package does not run it, or None.
        error: Why it could not be loaded or run, or None.
        path: What computed the linear layers.
        not_finite: Output values that are NaN or Inf, of `values`.
        values: Number of output values.
        relative_error: `||got - expected|| / ||expected||` against the reference; None if there is none.
        no_reference: Why there is none, or None.
        seconds: Wall time.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    unsupported: str | None = None
    error: str | None = None
    path: str = ""
    not_finite: int = 0
    values: int = 0
    relative_error: float | None = None
    no_reference: str | None = None
    seconds: float = 0.0


def reload(job: Job) -> Reloaded:
    """Load a checkpoint with this package, run it, and compare; what the fresh process does."""
    started = time.perf_counter()
    folder = Path(job.folder)
    try:
        result = _compare(folder, job.trust_remote_code)
        if job.outputs is not None:
            _second_run(folder, job)
    except KeyMismatch as problem:
        result = Reloaded(missing=problem.missing, unexpected=problem.unexpected)
    except UnsupportedError as problem:
        result = Reloaded(unsupported=problem.message)
    except CompressorError as problem:
        result = Reloaded(error=problem.message)
    return replace(result, seconds=time.perf_counter() - started)


def reload_fresh(job: Job, timeout: float | None = None) -> Reloaded:
    """Do a job in a fresh process.

    Raises:
        VerificationError: The process crashed, or did not answer in time.
    """
    answer = fresh_process(["-m", "compressor.check.reload"], asdict(job), job.folder, timeout)
    return Reloaded(**{**answer, **{key: tuple(answer[key]) for key in ("missing", "unexpected")}})


def fresh_process(arguments: list[str], job: dict[str, Any], what: str, timeout: float | None = None) -> dict[str, Any]:
    """Run this interpreter with a JSON job on stdin and return the JSON object it prints.

    Raises:
        VerificationError: The process crashed, or did not answer in time.
    """
    # Not from the working directory: a file there must not stand in for a library. One kernel, so that it is the
    # checkpoint that is checked and not what multiplies.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", FORCED_KERNEL: "reference"}
    command = [sys.executable, *arguments]
    try:
        child = subprocess.run(
            command,
            input=json.dumps(job),
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise VerificationError(f"{what}: not reloaded after {timeout} s", "check the machine's load") from None
    try:
        if child.returncode:
            raise ValueError
        answer: dict[str, Any] = json.loads(child.stdout)
    except ValueError:
        reason = (child.stderr.strip().splitlines() or ["no output"])[-1]
        raise VerificationError(
            f"{what}: the reloading process ended with code {child.returncode}: {reason}",
            f"run it by hand: echo '{json.dumps(job)}' | {' '.join(command)}",
        ) from None
    return answer


def decoded_source(folder: Path, skeleton: Skeleton) -> Source:
    """Return a source that shows every tensor dense and decodes packed ones to float32 as they are read.

    Raises:
        CheckpointError: Config and tensors do not belong together.
        UnsupportedError: A scheme that is not decoded here.
    """
    config = read_json(folder / "config.json")
    section = config.get("quantization_config") or {}
    if section.get("quant_method") == QUANT_METHOD:
        source = _native_source(folder, config, section, skeleton)
    else:
        source = Source.open(folder)
    # In float32, as codes are defined: a source of its own would round to the dtype of the model.
    tensors = {
        name: replace(info, dtype="F32") if name in source.decoders else info for name, info in source.tensors.items()
    }
    return replace(source, tensors=tensors, stored=source.stored or source.tensors)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return `||got - expected|| / ||expected||`; inf where shapes differ or there is nothing to compare with."""
    norm = float(expected.double().norm())
    if got.shape != expected.shape or not norm:
        return math.inf
    return float((got.double() - expected.double()).norm()) / norm


@torch.no_grad()
def _compare(folder: Path, trust_remote_code: bool) -> Reloaded:
    model = load(folder, trust_remote_code=trust_remote_code)
    inputs = example_inputs(model, CPU, length=PROBE_TOKENS)
    with quiet():
        got = first_tensor(model(**inputs)).float()
    path = execution_path(model)
    del model
    bad = int((~torch.isfinite(got)).sum())
    result = Reloaded(path=path, not_finite=bad, values=got.numel())
    if bad:
        return result
    try:
        expected = reference_output(folder, inputs, trust_remote_code)
    except UnsupportedError as problem:
        return replace(result, no_reference=problem.message)
    difference = relative_error(got, expected)
    return replace(result, relative_error=difference if math.isfinite(difference) else 1e30)


@torch.no_grad()
def _second_run(folder: Path, job: Job) -> None:
    assert job.outputs is not None
    model = load(folder, dtype=getattr(torch, job.dtype), trust_remote_code=job.trust_remote_code)
    inputs = example_inputs(model, CPU, length=PROBE_TOKENS)
    with quiet():
        logits = first_tensor(model(**inputs))
    save_file({"inputs": next(iter(inputs.values())), "logits": logits.contiguous()}, job.outputs)


@torch.no_grad()
def reference_output(folder: Path, inputs: dict[str, Tensor], trust_remote_code: bool = False) -> Tensor:
    """Return the model's main output, float32, computed from decoded weights with one block resident at a time.

    Raises:
        CheckpointError: As `load`.
        UnsupportedError: The architecture cannot be run block by block, or the scheme is not decoded here.
    """
    skeleton = Skeleton.build(folder, CPU, trust_remote_code)
    blocks = BlockSequence.find(skeleton.model)
    blocks.trace()  # notes what each block returns
    source = decoded_source(folder, skeleton)
    targets = skeleton.targets({name: info.shape for name, info in source.tensors.items()})
    _simulate_caches(skeleton, folder)
    _round_inputs(skeleton, folder, targets)
    parts: dict[int | None, list[str]] = {}
    for name, target in targets.items():
        if target.param is not None and blocks.beside(target.param) is None:
            parts.setdefault(blocks.index_of(target.param), []).append(name)
    skeleton.load(source.read(parts.get(None, ())))
    hidden, recording = blocks.prologue(inputs)
    for index in range(len(blocks.names)):
        skeleton.load(source.read(parts[index]))
        hidden = blocks.run(index, hidden, recording)
        if blocks.names[index]:
            skeleton.free({str(targets[name].param) for name in parts[index]})
    return blocks.tail(hidden, inputs).float()


def _simulate_caches(skeleton: Skeleton, folder: Path) -> None:
    """Round keys and values as the config's cache would, as `load` does."""
    section = read_json(folder / "config.json").get("quantization_config") or {}
    if not section.get("kv_cache_scheme"):
        return
    stored = read_headers(folder)
    names = [name for name in stored if name.rpartition(".")[2] in kv_cache.SCALES]
    values = Source(folder, str(folder), None, {}, stored).read(names)
    for name in names:
        owner, _, suffix = name.rpartition(".")
        skeleton.model.get_submodule(owner).register_buffer(suffix, values[name].float())
    for owner in {name.rpartition(".")[0] for name in names}:
        kv_cache.simulate(skeleton.model.get_submodule(owner))


def _round_inputs(skeleton: Skeleton, folder: Path, targets: Mapping[str, Target]) -> None:
    """Let layers do to their inputs what the config says."""
    source, schemes = open_checkpoint(folder)
    if schemes is None:
        return
    stacks: dict[str, Stack] = {}
    treat: dict[str, dict[tuple[int, str], Treat]] = {}
    for name, target in targets.items():
        module = name.removesuffix(".weight")
        if target.param is None or module == name or f"{module}.weight_scale" not in source.tensors:
            continue
        owner, role, expert = target.param.rpartition(".")[0], role_of(target.param, target.where), target.where.expert
        if role is not None and expert is not None:
            stacks.setdefault(owner, {}).setdefault(expert, {})[role] = target
        steps = schemes.steps((module, target.param.removesuffix(".weight")))
        if not steps:
            continue
        rows, columns = target.where.of(skeleton.model.get_parameter(target.param)).shape
        tensors = source.read(f"{module}.{suffix}" for suffix in stored_slots(steps, (rows, columns), torch.float32))
        ops = assemble_inputs(module, steps, (rows, columns), tensors, torch.float32)
        if role is not None and expert is not None:
            treat.setdefault(owner, {})[expert, role] = partial(apply_ops, ops)
            continue
        linear = skeleton.model.get_submodule(owner)
        linear.register_forward_pre_hook(lambda _, args, ops=ops: (apply_ops(ops, args[0]), *args[1:]))
        if (carry := carried(ops)) is not None:
            linear.register_forward_hook(lambda _, args, out, carry=carry: out + carry.to(out.dtype))
    for owner, own in treat.items():
        experts = skeleton.model.get_submodule(owner)
        experts.forward = partial(run_experts, experts, stacks[owner], own)


def _native_source(folder: Path, config: dict[str, Any], section: dict[str, Any], skeleton: Skeleton) -> Source:
    stored = read_headers(folder)
    schemes = NativeSchemes.parse(section)
    codes = {module: stored.get(f"{module}.weight_packed") or stored[f"{module}.weight"] for module in schemes.modules}
    rows = {f"{module}.weight": (info.shape[0], 1) for module, info in codes.items()}
    targets = skeleton.targets(rows)
    expected = skeleton.model.state_dict(keep_vars=True)
    decoders = {}
    for module in schemes.modules:
        target = targets[f"{module}.weight"]
        fmt = schemes.find((module,), torch.float32)
        assert fmt is not None
        shape = target.where.of(expected[str(target.param)]).shape
        window = tuple(shape[1:]) if len(shape) == 4 else None  # a convolution, packed as one row per filter
        decoders[f"{module}.weight"] = PackedDecoder(module, fmt, (shape[0], math.prod(shape[1:])), window)
    parts = {part for decoder in decoders.values() for part in decoder.parts}
    tensors = {name: info for name, info in stored.items() if name not in parts}
    for name, decoder in decoders.items():
        full = decoder.shape if decoder.window is None else (decoder.shape[0], *decoder.window)
        tensors[name] = replace(stored[decoder.parts[0]], name=name, dtype="F32", shape=full)
    return Source(folder, str(folder), None, config, tensors, stored, decoders)


def main() -> int:
    """Do the job on stdin and print what came of it as one JSON object."""
    job = Job(**json.load(sys.stdin))
    # Whatever libraries print belongs to stderr: stdout carries the result alone.
    with contextlib.redirect_stdout(sys.stderr):
        result = reload(job)
    print(json.dumps(asdict(result), allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
