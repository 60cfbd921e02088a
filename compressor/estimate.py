"""How long a run will take here: counted operations over this machine's measured matmul rate."""

from __future__ import annotations

import time

import torch

from compressor.checkpoint.source import DTYPES
from compressor.formats import get_format
from compressor.formats.activations import get_input_format
from compressor.formats.base import SearchableFormat
from compressor.formats.small_floats import SPLITS
from compressor.formats.split_floats import POINTS, SplitFloat
from compressor.methods.awq import AWQOptions
from compressor.methods.base import Method, Stream
from compressor.methods.fp4 import FP4Options
from compressor.methods.learning import LearningOptions
from compressor.methods.scaled import ScalingOptions
from compressor.plan import OUTSIDE, Plan
from compressor.pruning.base import PruningMethod
from compressor.recipe import CalibrationSpec

SETTLED = 2
"""Rounds after which most joint searches of weights and inputs find nothing new; further ones cost nothing then."""

FACTORS = 20
"""Candidates of factors that AWQ tries for every fold by default."""

SECONDS_PER_BYTE = 4e-9
"""Reading, converting, packing, hashing and writing, per source byte; measured on one CPU core."""


def matmul_rate(device: torch.device, size: int = 512) -> float:
    """Return float32 operations per second of a square matmul, the best of a few short tries."""
    a = torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        result = a @ a
        float(result[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def estimate_seconds(plan: Plan, method: Method, spec: CalibrationSpec, device: torch.device) -> float:
    """Estimate wall time: passes over the calibration samples, their statistics, and the method's own search.

    Good to a factor of two; the search is counted as if it ran at the matmul rate, and learning at that of float32,
    though bf16 may be faster.
    """
    seconds = plan.bytes_before * SECONDS_PER_BYTE
    if isinstance(method, PruningMethod):
        return seconds + 5 + method.operations(plan, spec.n_samples * spec.seq_len) / matmul_rate(device)
    ranges = any(layer.ranges for layer in plan.compressed)  # two passes more: to measure them, and with rounding
    if method.stream is Stream.NONE and not ranges:
        return seconds + 5
    tokens = spec.n_samples * spec.seq_len
    passes = {Stream.NONE: 0, Stream.BOTH: 2}.get(method.stream, 1) + 2 * ranges
    options = getattr(method, "options", None)
    operations = 0.0
    widths: dict[str, int] = {}
    scaled: set[str] = set()
    if isinstance(options, AWQOptions | ScalingOptions):  # of the plan's folds, if it has any, AWQ searches the factors
        scaled = {name for fold in plan.folds for name in fold.readers}
    for layer in plan.compressed:
        if layer.ref.block == OUTSIDE:
            continue  # rounded by itself
        assert layer.ref.matrix is not None
        rows, columns = layer.ref.matrix
        operations += 2.0 * passes * tokens * rows * columns
        fmt = get_format(layer.format or "", layer.group_size, DTYPES[plan.default_dtype])
        if layer.ref.name in scaled:
            # Each candidate is rounded to, dozens of element operations, and judged by the second moment.
            operations += FACTORS * (40.0 * rows * columns + 2.0 * rows * columns * columns)
        if isinstance(options, FP4Options) and layer.inputs and get_input_format(layer.inputs).searched:
            splits = len(SPLITS[get_input_format(layer.inputs).bits])
            step = splits * options.points * 2.0 * options.tokens * rows * columns
            weights = len(SPLITS[fmt.bits]) if isinstance(fmt, SplitFloat) else 0
            judged = min(POINTS * 2.0 * options.tokens, 170.0 * columns) * rows * columns
            operations += min(options.rounds, SETTLED) * (step + weights * judged)
        elif method.stream is Stream.NONE:
            continue
        elif isinstance(options, LearningOptions):
            # Forward and backward pass of every sample of every step.
            operations += 6.0 * options.steps(fmt.bits) * options.batch * spec.seq_len * rows * columns
        elif isinstance(options, FP4Options) and isinstance(fmt, SearchableFormat) and fmt.group_size is None:
            # One scale spans a row, so each of the hundred candidates is judged by the whole second moment.
            operations += (2 if fmt.bits == 4 else 4) * 170.0 * rows * columns * columns
        else:
            # A search tries a dozen candidates per weight a few times; each costs dozens of element operations.
            operations += 12 * 5 * 40.0 * rows * columns + 6.0 * rows * columns * columns
        widths[layer.ref.fed_by] = columns
    operations += sum(2.0 * tokens * width * width for width in widths.values())
    return seconds + 5 + operations / matmul_rate(device)
