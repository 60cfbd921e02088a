"""Loading a written checkpoint in a fresh process and comparing its output with what it must be.

`python -m compressor.verify DIR PROBE.safetensors` prints one JSON object and exits 0 or 7. A fresh process is the
point: what the writing process still holds in memory cannot hide what is missing on disk.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from compressor.checkpoint.config import quiet
from compressor.checkpoint.ends import first_tensor
from compressor.errors import CompressorError, RecipeError, VerificationError
from compressor.process import release_memory
from compressor.runtime import KeyMismatch, load

TOLERANCE = 1e-4
"""Allowed relative error in float32: far above differences in summation order, far below any wrong weight."""

_TRUST = "--trust-remote-code"


@dataclass(frozen=True)
class VerificationResult:
    """What a fresh process found.

    Attributes:
        ok: The checkpoint loads completely and its output is within tolerance.
        max_error: Largest absolute difference of an output value; inf if there was nothing to compare.
        relative_error: `||got - expected|| / ||expected||`; inf if there was nothing to compare.
        tolerance: What `relative_error` may be.
        missing: Tensors the model needs that are not on disk.
        unexpected: Tensors on disk the model has no place for.
        error: Why it could not be loaded or run, or None.
        seconds: Wall time inside the process, imports excluded.
    """

    ok: bool
    max_error: float
    relative_error: float
    tolerance: float
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    error: str | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain data; numbers that are not finite become null."""
        return {
            "ok": self.ok,
            "max_error": _finite(self.max_error),
            "relative_error": _finite(self.relative_error),
            "tolerance": self.tolerance,
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "error": self.error,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> VerificationResult:
        """Rebuild the result `to_json` wrote."""
        values = dict(data)
        for key in ("max_error", "relative_error"):
            values[key] = math.inf if values[key] is None else float(values[key])
        for key in ("missing", "unexpected"):
            values[key] = tuple(values[key])
        return cls(**values)


def verify(
    folder: str | Path, probe: str | Path, *, timeout: float | None = None, trust_remote_code: bool = False
) -> VerificationResult:
    """Verify a checkpoint in a fresh process.

    Args:
        folder: The checkpoint.
        probe: A safetensors file with `inputs` (int64 token ids `[1, n]`, or float32 pixel values) and `logits`
            (the float32 logits or last hidden state they must give).
        timeout: Seconds to wait; None waits as long as it takes.
        trust_remote_code: Run model code that comes with the checkpoint.

    Raises:
        VerificationError: The process crashed, or did not answer in time.
    """
    # Not from the working directory: a file there must not stand in for a library.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "compressor.verify", str(folder), str(probe)]
    if trust_remote_code:
        command.append(_TRUST)
    try:
        child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise VerificationError(f"{folder}: not verified after {timeout} s", "check the machine's load") from None
    result = _parse(child.stdout)
    if result is None or child.returncode != (0 if result.ok else VerificationError.exit_code):
        reason = (child.stderr.strip().splitlines() or ["no output"])[-1]
        raise VerificationError(
            f"{folder}: the verifying process ended with code {child.returncode}: {reason}",
            f"run it by hand: {' '.join(command)}",
        )
    return result


def confirm(out: Path, probe: Path, *, trust_remote_code: bool = False, fresh: bool = True) -> dict[str, Any]:
    """Verify what was just written; a result that cannot be trusted is made unloadable before the error goes on.

    The whole compressed model is in the fresh process's memory; this one gives back what it can before.

    Args:
        out: The checkpoint.
        probe: See `verify`.
        trust_remote_code: Run model code that comes with the checkpoint.
        fresh: False verifies in this process: for experiments that write many small models.

    Returns:
        What a report says about it.

    Raises:
        VerificationError: It does not load, or its output is another one.
    """
    release_memory()
    try:
        result = (verify if fresh else check)(out, probe, trust_remote_code=trust_remote_code)
        if not result.ok:
            differ = f"reloaded logits differ by {result.relative_error:.2e}, allowed is {result.tolerance:.0e}"
            raise VerificationError(
                f"{out}: {result.error or differ}", "this is a bug: please report it with the model's config.json"
            )
    except CompressorError:
        (out / "config.json").replace(out / "config.json.failed")
        raise
    return result.to_json()


def check(folder: Path, probe: Path, *, trust_remote_code: bool = False) -> VerificationResult:
    """Verify a checkpoint in this process; what the fresh process does.

    Raises:
        RecipeError: The probe cannot be read.
    """
    inputs, expected = _read_probe(probe)
    started = time.perf_counter()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    error: str | None = None
    max_error = relative_error = math.inf
    try:
        max_error, relative_error = _compare(_run(load(folder, trust_remote_code=trust_remote_code), inputs), expected)
    except KeyMismatch as problem:
        missing, unexpected, error = problem.missing, problem.unexpected, problem.message
    except CompressorError as problem:
        error = problem.message
    ok = error is None and relative_error <= TOLERANCE
    seconds = time.perf_counter() - started
    return VerificationResult(ok, max_error, relative_error, TOLERANCE, missing, unexpected, error, seconds)


def main(arguments: list[str]) -> int:
    """Run the check, print its result as one JSON object on stdout, and return the exit code."""
    trusted = arguments[2:] == [_TRUST]
    if len(arguments) != 2 and not trusted:
        print(f"usage: python -m compressor.verify DIR PROBE.safetensors [{_TRUST}]", file=sys.stderr)
        return 2
    # Whatever libraries print belongs to stderr: stdout carries the result alone.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            result = check(Path(arguments[0]), Path(arguments[1]), trust_remote_code=trusted)
        except CompressorError as error:
            print(f"{error.message}; {error.hint}", file=sys.stderr)
            return error.exit_code
    print(json.dumps(result.to_json(), allow_nan=False))
    return 0 if result.ok else VerificationError.exit_code


def _parse(text: str) -> VerificationResult | None:
    try:
        return VerificationResult.from_json(json.loads(text))
    except (ValueError, TypeError, KeyError):
        return None


def _read_probe(path: Path) -> tuple[Tensor, Tensor]:
    try:
        tensors = load_file(path)
        return tensors["inputs"], tensors["logits"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise RecipeError(f"{path}: no probe: {error}", "it needs the tensors `inputs` and `logits`") from error


@torch.no_grad()
def _run(model: PreTrainedModel, inputs: Tensor) -> Tensor:
    with quiet():
        return first_tensor(model(**{model.main_input_name: inputs})).float()


def _compare(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the largest and the relative difference.

    Raises:
        VerificationError: The output has another shape or is not finite.
    """
    if got.shape != expected.shape:
        raise VerificationError(f"the output is {list(got.shape)}, expected was {list(expected.shape)}")
    if not torch.isfinite(got).all():
        raise VerificationError(f"{int((~torch.isfinite(got)).sum())} of {got.numel()} output values are NaN or Inf")
    difference = (got - expected).double()
    norm = float(expected.double().norm())
    relative = float(difference.norm()) / norm if norm else math.inf
    return float(difference.abs().max()), relative


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
