"""LLM-FP4's search on 4-bit floats: choose grids and scales that minimise each layer's output error.

Liu et al. 2023, "LLM-FP4: 4-Bit Floating-Point Quantized Transformers", arXiv 2310.16836, section 3. The search for
weights alone is here; with inputs in the paper's own floats (`fpq4`, `fpq6`, `fpq8`) `fp4_inputs.py` searches both.

The objective is the paper's: `||X W'^T - X W^T||^2` on full-precision calibration inputs, which per row of `W` is
`d H d^T` with `d = w' - w` and `H = sum x x^T`.

With format `fp4` the search is the paper's too: for every split of the bits each output channel takes the exponent bias
with the least error, out of all candidates and with all of `H`; then the layer takes the split with the least total.
One round is enough, as weights have no partner to alternate with. (Differs from the paper: the candidates contain the
min-max bias, so that nothing gets worse, and by default they are spaced evenly; see `Float4.grid`.)

The formats that other readers know store a scale per group instead of a bias per channel, so with them the bias of each
group is searched over the scales the format can store.

Differs from the paper:
- Candidates are the stored scales next to the min-max one, taken exactly, instead of 100 points of `gamma * bias`.
  The paper's grid is not scale-equivariant and does not contain the min-max scale.
- A group is 16 or 32 inputs, so a row has many biases. The first pass keeps only the diagonal blocks of `H`, where
  groups are independent. Rows that all of `H` shows to be worse than before go back to the min-max scales. Then sweeps
  of coordinate descent use all of `H`: each group picks its best scale given the rounding errors of all other groups.
- NVFP4's global scale is searched too, over the first pass's error summed over the layers that must share it, and kept
  if all of `H` agrees. The error summed over these layers thus never exceeds that of rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
from pydantic import Field
from torch import Tensor

from compressor.calibration.channels import MaxAbs
from compressor.calibration.operands import OperandWatch
from compressor.calibration.samples import InputSample, LoudRows, strata
from compressor.calibration.stats import SecondMoment, Statistic
from compressor.decision import Outcome, Quantized
from compressor.formats.activations import GLOBAL_SCALE, INPUT_FORMATS, InputFormat
from compressor.formats.base import QParams, QuantFormat, SearchableFormat
from compressor.formats.float4 import Float4
from compressor.inputs import Quantize, RoundFloat
from compressor.methods.base import Layer, MethodOptions, Scope, Stream
from compressor.methods.fp4_inputs import JointSearch
from compressor.methods.fp4_scales import better_rows, diagonal_blocks, search_groups, search_rows, sweep
from compressor.methods.operands import covering, search_operands
from compressor.methods.rounding import InputSite
from compressor.plan import WeightRef


class FP4Options(MethodOptions):
    """Options of the search."""

    sweeps: int = Field(
        2, ge=0, le=20, description="passes of coordinate descent over all groups with the full second moment"
    )
    globals: int = Field(4, ge=1, le=64, description="global scales tried (formats that have one)")
    offsets: bool = Field(True, description="fpq inputs: powers of two per channel (the paper's pre-shifted bias)")
    rounds: int = Field(3, ge=1, le=20, description="fpq inputs: times weights and inputs are searched in turn")
    points: int = Field(25, ge=1, le=100, description="fpq inputs: biases of inputs tried in each step; the paper: 100")
    tokens: int = Field(256, ge=1, le=65_536, description="inputs that searches see: a sample, one in 8 the loudest")


class FP4:
    """Searched scales for 4-bit float formats."""

    name = "fp4"
    summary = "LLM-FP4: search the scales that minimise each layer's output error; 4-bit floats"
    scope = Scope.GROUP
    stream = Stream.FP
    Options = FP4Options

    def __init__(self, options: FP4Options | None = None) -> None:
        self.options = options or FP4Options()

    def stats(self, fmt: QuantFormat) -> tuple[SecondMoment, ...]:
        """Return the full second moment; its diagonal blocks are cut from it."""
        return (SecondMoment(),)

    def solve_operands(self, watch: OperandWatch, bits: int) -> tuple[RoundFloat, ...]:
        """Search the rounding of queries, keys, probabilities and values; see `operands.py`."""
        start = covering(watch, bits)
        return search_operands(watch, start, Float4(), self.options.points, min(self.options.rounds, 2))

    def refuse(self, ref: WeightRef, fmt: QuantFormat) -> str | None:
        """Refuse formats whose scales are not a short list of stored values."""
        if not isinstance(fmt, SearchableFormat):
            return f"method fp4 searches 4-bit float formats (nvfp4, mxfp4, fp4), fp6 and fp8-searched, not {fmt.name}"
        return None

    def input_format(self, wanted: str | None, weights: str | None) -> str | None:
        """Return what is wanted: every format will do."""
        return wanted

    def input_stats(self, fmt: InputFormat) -> tuple[Statistic, ...]:
        """Return a sample of the inputs, and each channel's largest magnitude, where inputs are searched."""
        return (*self._sample(), MaxAbs()) if searches(fmt) else ()

    def steps(self, fmt: InputFormat, site: InputSite) -> tuple[dict[str, object], ...]:
        """Return the format where its parameters are searched; others are left to the engine."""
        return (fmt.describe(),) if searches(fmt) else ()

    def solve_group(self, layers: Sequence[Layer], fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Choose the grid of every layer, or the global scale they share, then every scale."""
        assert isinstance(fmt, SearchableFormat)
        unseen = [layer for layer in layers if layer.n_tokens == 0]
        if unseen:
            # Only experts can be unseen. Their error has no data to be measured on: round to nearest, and say so.
            plain = {layer.ref.name: self._unseen(layer, fmt) for layer in layers}
            return Outcome(plain, tuple(f"{layer.ref.name}: no calibration token reached it" for layer in unseen))
        wanted = INPUT_FORMATS.get(str(layers[0].steps[0].get("format"))) if layers[0].steps else None
        if wanted is not None and wanted.searched and fmt.group_size is None:
            return Outcome({layer.ref.name: self._jointly(layer, fmt, wanted.bits, layer.fit(fmt)) for layer in layers})
        moments = [layer.second_moment(SecondMoment()) for layer in layers]
        if fmt.group_size is None:
            splits = [search_splits(layer, fmt, moment) for layer, moment in zip(layers, moments, strict=True)]
            return Outcome({layer.ref.name: _quantized(layer, fmt, q) for layer, q in zip(layers, splits, strict=True)})
        together = len(layers) if fmt.has_global_scale else 1
        chosen: list[QParams] = []
        for first in range(0, len(layers), together):
            part = slice(first, first + together)
            chosen += self._first_pass(layers[part], fmt, moments[part])
        decisions: dict[str, Quantized] = {}
        for layer, q, moment in zip(layers, chosen, moments, strict=True):
            for _ in range(self.options.sweeps):
                q = sweep(layer.weight, fmt, q, moment)
            decisions[layer.ref.name] = _quantized(layer, fmt, q)
            if wanted is not None and wanted.searched:
                decisions[layer.ref.name] = self._jointly(layer, fmt, wanted.bits, q)
        if wanted is not None and wanted.suffix == GLOBAL_SCALE:
            ops = self._global_scale(layers, fmt, [decisions[layer.ref.name] for layer in layers], wanted)
            decisions = {name: replace(decision, inputs=(ops,)) for name, decision in decisions.items()}
        return Outcome(decisions)

    def _jointly(self, layer: Layer, fmt: SearchableFormat, bits: int, q: QParams) -> Quantized:
        """Search inputs, and weights with them where their scales span rows; others keep `q`."""
        x, counts = self._rows(layer)
        largest = layer.magnitude(MaxAbs())
        search = JointSearch(layer.weight, x, largest, fmt, bits, self.options.offsets, self.options.points, q, counts)
        search.run(self.options.rounds)
        return Quantized(fmt.encode(layer.weight, search.q), search.q, (search.op,))

    def _sample(self) -> tuple[InputSample, LoudRows]:
        """Return what the searches see: a sample of all inputs, and the loudest ones, an eighth of `tokens`."""
        loud = max(self.options.tokens // 8, 1)
        return InputSample(max(self.options.tokens - loud, 1)), LoudRows(loud)

    def _rows(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return these inputs `[rows, in]`, and how many of all each stands for, `[rows]`."""
        sample, loud = (layer.magnitude(spec) for spec in self._sample())
        return strata(sample, loud, layer.n_tokens)

    def _global_scale(
        self, layers: Sequence[Layer], fmt: SearchableFormat, decisions: Sequence[Quantized], wanted: InputFormat
    ) -> Quantize:
        """Return the rounding of inputs with the global scale that gives the layers that share it the least error."""
        start = Quantize.calibrated(wanted, layers[0].magnitude(MaxAbs()).amax(), torch.float32)
        assert start.scale is not None
        x, counts = self._rows(layers[0])
        weights = torch.cat([fmt.round(layer.weight, d.qparams) for layer, d in zip(layers, decisions, strict=True)])
        target = x @ torch.cat([layer.weight for layer in layers]).T
        best, least = start, torch.inf
        for factor in _INPUT_FACTORS:
            trial = replace(start, scale=start.scale * factor)
            error = float((trial.apply(x) @ weights.T - target).square().sum(1).dot(counts))
            if error < least:
                best, least = trial, error
        return best

    def _unseen(self, layer: Layer, fmt: SearchableFormat) -> Quantized:
        assert not layer.steps, f"{layer.ref.name}: inputs of experts are not rounded, and others are never unseen"
        return _quantized(layer, fmt, layer.fit(fmt))

    def _first_pass(self, layers: Sequence[Layer], fmt: SearchableFormat, moments: list[Tensor]) -> list[QParams]:
        """Return parameters, under one global scale if there is one, with a summed error at most that of rounding."""
        assert fmt.group_size is not None
        diagonals = [diagonal_blocks(moment, fmt.group_size) for moment in moments]
        starts = zip(*(fmt.starts(layer.weight, layer.global_scale) for layer in layers), strict=True)
        passes: list[tuple[float, tuple[QParams, ...], list[QParams]]] = []
        for plain in islice(starts, self.options.globals if fmt.has_global_scale else None):
            found = [
                search_groups(layer.weight, fmt, q, diagonal)
                for layer, q, diagonal in zip(layers, plain, diagonals, strict=True)
            ]
            passes.append((sum(error for _, error in found), plain, [q for q, _ in found]))
        best = min(range(len(passes)), key=lambda index: passes[index][0])
        # The diagonal blocks chose; all of H decides whether the min-max scales of a row, or the global scale given,
        # were better after all.
        finalists = []
        for _, plain, searched in (passes[index] for index in sorted({0, best})):
            rows = [
                better_rows(layer.weight, fmt, before, after, moment)
                for layer, before, after, moment in zip(layers, plain, searched, moments, strict=True)
            ]
            finalists.append((sum(error for _, error in rows), [q for q, _ in rows]))
        return min(finalists, key=lambda entry: entry[0])[1]


_INPUT_FACTORS = (1.0, *(2 ** (i / 8) for i in (-1, 1, 2, 3, 4, 6, 8, 12, 16)))
"""Global scales of inputs tried, as factors of the divisor that covers them; the one that does comes first.

Scales of groups are FP8, and saturate at 448: a larger divisor clips the loudest groups and spares the quiet ones.
"""


def searches(fmt: InputFormat) -> bool:
    """Return whether this method searches the parameters of a format of inputs."""
    return fmt.searched or fmt.suffix == GLOBAL_SCALE


def _quantized(layer: Layer, fmt: QuantFormat, q: QParams) -> Quantized:
    return Quantized(fmt.encode(layer.weight, q), q)


def search_splits(layer: Layer, fmt: SearchableFormat, moment: Tensor) -> QParams:
    """Return the parameters of the grid with the least total error, each searched by `search_rows`; ties to the first.

    Args:
        layer: The layer.
        fmt: A format with one scale per output channel.
        moment: `[in, in]` mean of `x x^T`.
    """
    best, least = layer.fit(fmt), torch.inf
    for start in fmt.starts(layer.weight, layer.global_scale):
        found, error = search_rows(layer.weight, fmt, start, moment, limit=least)
        if error < least:
            best, least = found, error
    return best
