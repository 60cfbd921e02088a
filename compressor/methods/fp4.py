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
from compressor.methods.fp4_rows import row_errors
from compressor.methods.operands import covering, search_operands
from compressor.methods.rounding import InputSite
from compressor.plan import WeightRef

_ELEMENTS = 1 << 22
"""Weights whose candidates are rounded at once, which bounds memory: a handful of float32 tensors of this size."""

_ROWS = 128
"""Rows searched at once at least, if memory allows: fewer make products of matrices slow."""


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


def search_rows(
    w: Tensor, fmt: SearchableFormat, start: QParams, moment: Tensor, limit: float = torch.inf
) -> tuple[QParams, float]:
    """Choose every row's scale by the error of its output, out of all candidates; the first on ties.

    Args:
        w: `[out, in]` float32.
        fmt: A format with one scale per output channel.
        start: Min-max parameters; the first candidate, so no row gets worse.
        moment: `[in, in]` mean of `x x^T`.
        limit: Summed error from which on the result is not wanted; the search then ends early.

    Returns:
        The chosen parameters and the error `d H d^T` summed over rows; `start` and infinity if it reaches `limit`.
    """
    triangle = moment.triu(1).mul_(2) + moment.diagonal().diag()
    at_once = max(min(_ELEMENTS // w.shape[1], max(w.shape[0] // 8, _ROWS)), 1)
    scales, total = [], 0.0
    for rows in range(0, w.shape[0], at_once):
        if total >= limit:
            return start, torch.inf
        part = w[rows : rows + at_once]
        best, least = start.scale[rows : rows + at_once], w.new_full((len(part), 1), torch.inf)
        for candidate in fmt.scale_candidates(replace(start, scale=best)):
            error = row_errors(fmt.round(part, candidate).sub_(part), triangle)  # [rows, 1]
            # As bytes: torch cannot pick among FP8 values.
            best = torch.where(error < least, candidate.scale.view(torch.uint8), best.view(torch.uint8))
            best = best.view(start.scale.dtype)
            least = torch.minimum(error, least)
        scales.append(best)
        total += float(least.sum(dtype=torch.float64))
    return (replace(start, scale=torch.cat(scales)), total) if total < limit else (start, torch.inf)


def diagonal_blocks(moment: Tensor, size: int) -> Tensor:
    """Return the diagonal blocks `[in/size, size, size]` of `moment` `[in, in]`."""
    groups = moment.shape[0] // size
    return moment.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def search_groups(w: Tensor, fmt: SearchableFormat, start: QParams, blocks: Tensor) -> tuple[QParams, float]:
    """Choose every group's scale on its own, ignoring correlations between groups.

    Args:
        w: `[out, in]` float32.
        fmt: The format whose candidates are tried.
        start: Min-max parameters; the first candidate, so the result is never worse.
        blocks: `[groups, size, size]` diagonal blocks of the second moment.

    Returns:
        The chosen parameters and the summed error `d H d^T` with all but the diagonal blocks of `H` left out.
    """
    trials = _Trials(w, fmt, start)
    errors = [trials.choose(group, own)[0] for group, own in enumerate(blocks)]  # groups x [out]
    return trials.chosen, float(torch.stack(errors).sum(dtype=torch.float64))


def better_rows(w: Tensor, fmt: SearchableFormat, a: QParams, b: QParams, moment: Tensor) -> tuple[QParams, float]:
    """Return for each row the parameters with the smaller error `d H d^T`, `b` on ties, and the error of all rows.

    Args:
        w: `[out, in]` float32.
        fmt: The format of both.
        a: Parameters with the same global scale as `b`.
        b: Parameters.
        moment: `[in, in]` mean of `x x^T`.
    """
    deltas = [fmt.round(w, q).sub_(w) for q in (a, b)]  # [out, in]
    error_a, error_b = (((delta @ moment) * delta).sum(-1, keepdim=True) for delta in deltas)  # [out, 1]
    scale = torch.where(error_a < error_b, a.scale.view(torch.uint8), b.scale.view(torch.uint8)).view(b.scale.dtype)
    return replace(b, scale=scale), float(torch.minimum(error_a, error_b).sum(dtype=torch.float64))


def sweep(w: Tensor, fmt: SearchableFormat, q: QParams, moment: Tensor) -> QParams:
    """Go over the groups once; each takes the scale that is best given all other groups' current errors.

    With `d` the row's error and `g` the group's columns, the part of `d H d^T` that depends on the group is
    `d_g H_gg d_g^T + 2 d_g (H d)_g'`, where `(H d)'` leaves the group itself out.

    Args:
        w: `[out, in]` float32.
        fmt: The format whose candidates are tried.
        q: Where to start; returned unchanged where nothing is better.
        moment: `[in, in]` mean of `x x^T`.
    """
    trials = _Trials(w, fmt, q)
    delta = fmt.round(w, q).sub_(w)  # [out, in]
    for group in range(q.scale.shape[1]):
        columns = trials.columns(group)
        own = moment[columns, columns]
        others = delta @ moment[:, columns] - delta[:, columns] @ own  # [out, size]
        _, delta[:, columns] = trials.choose(group, own, 2 * others)
    return trials.chosen


class _Trials:
    """Tries every candidate scale of one group at a time, for all rows at once."""

    def __init__(self, w: Tensor, fmt: SearchableFormat, start: QParams) -> None:
        self.w, self.fmt, self.start = w, fmt, start
        self.size = fmt.group_size or w.shape[1]
        # As bytes: torch cannot pick among FP8 values.
        assert start.scale.dtype.itemsize == 1, "a group's scale is picked as one byte"
        self.scales = torch.stack([q.scale.view(torch.uint8) for q in fmt.scale_candidates(start)], -1)
        self.best = self.scales[..., 0].clone()  # [out, groups]

    @property
    def chosen(self) -> QParams:
        """The parameters chosen so far."""
        return replace(self.start, scale=self.best.view(self.start.scale.dtype))

    def columns(self, group: int) -> slice:
        """Return the inputs of a group."""
        return slice(group * self.size, (group + 1) * self.size)

    def choose(self, group: int, own: Tensor, linear: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take the scale that minimises `d own d^T + d linear^T` in each row, the first candidate on ties.

        Args:
            group: Which group.
            own: `[size, size]` second moment of its inputs.
            linear: `[out, size]` what the other groups' errors add, or None.

        Returns:
            The minimum `[out]` and the rounding error `d` `[out, size]` it is reached with.
        """
        part = self.w[:, self.columns(group)].contiguous()
        scales = self.scales[:, group].T.unsqueeze(-1).contiguous()  # [candidates, out, 1]
        trial = self.fmt.round(part, replace(self.start, scale=scales.view(self.start.scale.dtype))).sub_(part)
        slope = trial @ own  # [candidates, out, size]
        if linear is not None:
            slope += linear
        error, index = slope.mul_(trial).sum(-1).min(0)  # [out]
        self.best[:, group] = self.scales[:, group].gather(1, index.unsqueeze(1)).squeeze(1)
        return error, trial[index, torch.arange(len(index), device=index.device)]
