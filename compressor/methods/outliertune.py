"""OutlierTune: a static scale for every channel of a layer's input, paid for by the weights, and channels centred.

Wang et al. 2024, "OutlierTune: Efficient Channel-Wise Quantization for Large Language Models", arXiv 2406.18832; the
algorithm is that of the authors' published code. With `X` `[tokens, in]` the output of a norm,

    z_k = mean over samples of (max_t X_tk + min_t X_tk) / 2            symmetrization
    s_k = max_t |X_tk - z_k| / (2^(b-1) - 1),   Q = round((X - z) / s)  one static scale per channel
    X W^T + b = Q (s W)^T + (b + W z)                                   pre-execution of dequantization

so the product is one of integers without a scale per token, and `s W` is rounded per row as any weight is. Inputs that
no norm feeds (`o_proj`, `down_proj`) are rounded per token.

Here `s` is folded into the norm's gain up to one number `2^e` for all channels, which is stored as the layer's static
scale: the codes `Q` are the same, and runtimes know the result as int8 with one scale per tensor. A shift goes into
biases where the norm and its readers have them; where they do not, it is subtracted in front of the layer and `W z`
added behind it, which only this package can store. Where blocks normalize after adding, a norm's output is the residual
as well: it stays as it is, and shift and scales are applied in front of each layer that reads it, which is native too.

Differs from the paper:
- By default there is no shift where biases are missing, so that other programs can run the result (`shift=all`: shift).
- Scales per token are those of compressed-tensors: the largest magnitude is 127.5 steps, not 127.
- Weights are symmetric unless the format says otherwise. Attention's operands are not rounded.
- Scales of nearly silent channels have a floor relative to the others; sums are not kept in half precision.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compressor.calibration.channels import ChannelRange
from compressor.calibration.stats import Statistic
from compressor.decision import Outcome, Quantized
from compressor.errors import RecipeError
from compressor.formats.activations import INPUT_FORMATS, InputFormat
from compressor.formats.base import QuantFormat
from compressor.formats.ints import IntFormat
from compressor.inputs import InputOp, Quantize, Scale, Shift
from compressor.methods.base import Layer, MethodOptions, Scope, Stream
from compressor.methods.grids import mse_clip
from compressor.methods.rounding import InputSite
from compressor.methods.scaling import Factors, FoldSite, bounded
from compressor.plan import FoldKind, WeightRef

_FLOOR, _SHARE = 1e-5, 2.0**-8
"""Smallest scale of a channel: absolute as in the authors' code, and as a share of the median."""


class OutlierTuneOptions(MethodOptions):
    """Options of ranges and grid."""

    shift: Literal["auto", "all", "none"] = Field(
        "auto", description="centre channels: where biases take it up (auto), everywhere (all, native result), or not"
    )
    midpoint: Literal["mean", "global"] = Field(
        "mean", description="centre of a channel: mean of each sample's middle, or middle of the whole range"
    )
    cut: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of each sample's largest magnitudes that ranges reach; the paper's Llama: 0.8",
    )
    clip: Literal["none", "mse"] = Field(
        "none", description="scales of weights: covering each row, or shrunk to where its rounding error is least"
    )


class OutlierTune:
    """Inputs of norms' readers in integers with one static scale per channel."""

    name = "outliertune"
    summary = "OutlierTune: inputs in integers, their static scales per channel moved into the weights"
    scope = Scope.LAYER
    stream = Stream.FP
    folds = (FoldKind.NORM,)
    Options = OutlierTuneOptions

    def __init__(self, options: OutlierTuneOptions | None = None) -> None:
        self.options = options or OutlierTuneOptions()

    @property
    def shifts(self) -> bool:
        """Whether folds with biases take up a shift."""
        return self.options.shift != "none"

    def stats(self, fmt: QuantFormat) -> tuple[Statistic, ...]:
        """Return the range of each channel."""
        return (ChannelRange(self.options.cut),)

    def refuse(self, ref: WeightRef, fmt: QuantFormat) -> str | None:
        """Refuse what is no integer grid: the product would not be one of integers."""
        if not isinstance(fmt, IntFormat):
            return f"method outliertune multiplies integers (int2 ... int8, int2-asym ... int8-asym), not {fmt.name}"
        return None

    def input_format(self, wanted: str | None, weights: str | None) -> str:
        """Return integers per token; without a wish, of as many bits as the weights, but four at least.

        Raises:
            RecipeError: Another format is wanted.
        """
        if wanted is None:
            bits = (weights or "int8").removeprefix("int")[:1]
            return f"int{max(int(bits), 4)}-token" if bits.isdecimal() else "int8-token"
        fmt = INPUT_FORMATS.get(wanted)
        if fmt is None or (fmt.kind, fmt.granularity) != ("int", "token"):
            raise RecipeError(
                f"method outliertune rounds inputs to integers, per token where no norm is in front, not {wanted}",
                "use --inputs int8-token or int6-token",
            )
        return wanted

    def input_stats(self, fmt: InputFormat) -> tuple[Statistic, ...]:
        """Return nothing more."""
        return ()

    def steps(self, fmt: InputFormat, site: InputSite) -> tuple[dict[str, object], ...]:
        """Return a static scale, and perhaps a shift before it, where a norm is in front; nothing elsewhere."""
        rounding = INPUT_FORMATS[f"int{fmt.bits}-tensor"].describe()
        if site.fold is None and site.norm is None:
            return ()
        if site.fold is None:
            shift = ({"op": "shift", "carry": True},) if self.shifts else ()
            return (*shift, {"op": "scale"}, rounding)
        native = self.options.shift == "all" and not site.fold.shifted
        return ({"op": "shift", "carry": True}, rounding) if native else (rounding,)

    def fold(self, site: FoldSite) -> Factors:
        """Return factors after which every channel reaches as far, and the shift if biases take it up."""
        if site.is_unseen:
            return Factors(torch.ones_like(site.layers[0].weight[0]), site.unseen_events())
        ranges = self._ranges(site.layers[0])
        z = self._middle(ranges) if self.shifts and (site.fold.shifted or self.options.shift == "all") else None
        c = site.storable(factors(reach(ranges, z)))
        return Factors(c, shift=z if site.fold.shifted else None)

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Round a weight, folded where a norm is in front, to nearest, and settle what happens to its input."""
        assert isinstance(fmt, IntFormat)
        events = list[str]()
        inputs = self._inputs(layer, fmt.dtype)
        for scale in (op for op in inputs if isinstance(op, Scale)):
            layer = replace(layer, weight=layer.weight / scale.factor)
        q = layer.fit(fmt)
        if self.options.clip == "mse":
            q = mse_clip(layer.weight, fmt, q)
        if layer.n_tokens == 0:
            events.append(f"{layer.ref.name}: no calibration token reached it")
        return Outcome({layer.ref.name: Quantized(fmt.encode(layer.weight, q), q, inputs)}, tuple(events))

    def _inputs(self, layer: Layer, dtype: torch.dtype) -> tuple[InputOp, ...]:
        """Return the operations planned for a layer behind a norm, else nothing: the recipe's format is used."""
        ranges = self._ranges(layer)
        if not layer.steps or not str(layer.steps[-1]["format"]).endswith("-tensor"):
            return ()
        rounding = INPUT_FORMATS[str(layer.steps[-1]["format"])]
        planned = [step["op"] for step in layer.steps]
        z = self._middle(ranges) if "shift" in planned else None
        reaches, ops = reach(ranges, z), list[InputOp]()
        if z is not None:
            ops.append(Shift(z, (layer.weight.double() @ z.double()).float()))
        if "scale" in planned:
            factor = 1 / factors(reaches)
            ops.append(Scale(factor))
            reaches = reaches * factor
        scale = (reaches.amax().reshape(1) / largest_code(rounding)).to(dtype)
        return (*ops, Quantize(rounding, torch.where(scale == 0, torch.finfo(dtype).eps, scale)))

    def _ranges(self, layer: Layer) -> Tensor:
        return layer.magnitude(ChannelRange(self.options.cut))

    def _middle(self, ranges: Tensor) -> Tensor:
        return ranges[0] if self.options.midpoint == "mean" else (ranges[1] + ranges[2]) / 2


def largest_code(fmt: InputFormat) -> int:
    """Return the code that the largest magnitude of calibration gets."""
    return int(2 ** (fmt.bits - 1)) - 1


def reach(ranges: Tensor, z: Tensor | None) -> Tensor:
    """Return the largest `|x - z|` of every channel `[in]`, from its middle and ends `[3, in]`; `z` None for zero."""
    shift = torch.zeros_like(ranges[0]) if z is None else z
    return torch.maximum(ranges[2] - shift, shift - ranges[1]).clamp_min(0)


def factors(reaches: Tensor) -> Tensor:
    """Return `c` `[in]` that makes all channels reach `2^e`, with `2^e` their geometric mean to the next power of two.

    Channels that hardly move get what the floor of their scale asks for; if no channel moves, ones.
    """
    moving = reaches[reaches > 0]
    if not moving.numel():
        return torch.ones_like(reaches)
    target = moving.double().log2().mean().round().exp2().float()
    floor = max(float(moving.median()) * _SHARE, _FLOOR * 127)
    return bounded(reaches.clamp_min(floor) / target, torch.zeros_like(reaches, dtype=torch.bool))
