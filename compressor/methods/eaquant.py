"""EAQuant: rotations that spread outliers over channels, and what a mixture of experts needs beside them.

"EAQuant: Enhancing Post-Training Quantization for MoE Models via Expert-Aware Optimization", arXiv 2506.13329; its base
is DuQuant, arXiv 2406.01721. Three pieces, each of which can be switched off:

- `smoothing`: one vector per norm that feeds experts, the channel-wise maximum of what every expert would choose;
- `align`: the clipping ratio of the rounded router is the one after which it chooses most like the original;
- `balance`: every expert is calibrated on its fair share of tokens.

Differs from the authors' code, beside what `eaquant.md` lists:
- Weights are rounded by GPTQ on the second moment of transformed inputs; `rounding=nearest` is theirs.
- Statistics and transforms come from tokens as they are, not from sequences averaged over samples.
- The transform of what `down` reads is fitted before gate and up are rounded.
- The router's weight is rounded, its input is not; attention's own operands are not rounded either.
- Ranges hold zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear

from compressor.calibration.averages import MovingRange
from compressor.calibration.channels import MaxAbs
from compressor.calibration.routing_rule import SOFTMAX, RoutingRule
from compressor.calibration.samples import InputSample
from compressor.calibration.stats import SecondMoment, Statistic
from compressor.decision import Decision, Outcome, Quantized
from compressor.errors import RecipeError
from compressor.formats.activations import INPUT_FORMATS, InputFormat
from compressor.formats.base import QParams, QuantFormat
from compressor.formats.ints import IntFormat
from compressor.inputs import InputOp, Quantize
from compressor.methods.base import Layer, MethodOptions, Scope, Stream
from compressor.methods.eaquant_rotation import descriptions, fit_transform, turned_moment, turned_weight
from compressor.methods.eaquant_router import agreement, align, by_weights, counted, ratios, round_rows
from compressor.methods.eaquant_smoothing import (
    aggregate,
    outlier_factors,
    outlier_scores,
    own_factors,
    within_reach,
    without_dead,
)
from compressor.methods.gptq import GPTQ
from compressor.methods.rounding import InputSite
from compressor.methods.scaling import Factors, FoldSite, bounded
from compressor.plan import FoldKind, WeightRef


class EAQuantOptions(MethodOptions):
    """Options of the three pieces and of the base method."""

    smoothing: Literal["max", "max_gate", "sum1", "sum2", "sum3", "off"] = Field(
        "max",
        description="one vector for a mixture's norm: maximum over experts (max; max_gate: and the router), or sum by "
        "tokens (sum1), outliers (sum2) or router shares (sum3); off: none",
    )
    align: Literal["renorm", "truncated", "full", "off"] = Field(
        "renorm", description="divergence that picks the router's clipping ratio; off: squared error of its weights"
    )
    balance: float = Field(
        2.0, ge=0, le=64, description="tokens per expert, in fair shares of one window; 0: as the router sends them"
    )
    alpha: float = Field(0.6, ge=0, le=1, description="how much of the difficulty moves from inputs to weights")
    folds: bool = Field(True, description="smooth attention and what down projections read as well")
    transform: Literal["auto", "on", "off"] = Field(
        "auto", description="rotate and reorder inputs at run time; auto: where inputs are rounded"
    )
    block: int = Field(128, ge=2, le=1024, description="largest block of channels that is rotated together")
    rotations: int = Field(256, ge=0, le=4096, description="most factors of a rotation")
    rows: int = Field(
        512, ge=1, le=65536, description="calibration tokens per layer or expert that rotations are fitted to"
    )
    input_clip: float = Field(0.9, gt=0, le=1, description="share of a token's range that its scale covers")
    rounding: Literal["gptq", "nearest"] = Field(
        "gptq", description="of weights: GPTQ's loop on the transformed weights and inputs; nearest: on clipped ranges"
    )
    least_ratio: float = Field(
        0.35, gt=0, le=1, description="smallest clipping ratio tried: of the router, and of weights rounded to nearest"
    )
    router_bits: int = Field(8, ge=0, le=8, description="bits the router's weights are rounded to; 0: not at all")
    router_share: float = Field(0.0, ge=0, le=1, description="share of the experts not chosen that alignment looks at")


class EAQuant:
    """DuQuant with smoothing, routing and calibration that know about experts."""

    name = "eaquant"
    summary = "EAQuant: rotate inputs, smooth over experts, keep the router's choices; experts in 4 bits and below"
    scope = Scope.GROUP
    folds = (FoldKind.NORM, FoldKind.EXPERTS, FoldKind.PRODUCT, FoldKind.VALUE)
    Options = EAQuantOptions

    def __init__(self, options: EAQuantOptions | None = None) -> None:
        self.options = options or EAQuantOptions()

    @property
    def router_bits(self) -> int:
        """Bits routers are rounded to; 0 leaves them alone."""
        return self.options.router_bits

    @property
    def balance(self) -> float:
        """Tokens every expert is to see, in fair shares of a window."""
        return self.options.balance

    @property
    def stream(self) -> Stream:
        """What GPTQ compensates for, earlier layers' errors included; the paper looks at the original's inputs."""
        return Stream.COMPRESSED if self.options.rounding == "gptq" else Stream.FP

    def stats(self, fmt: QuantFormat) -> tuple[Statistic, ...]:
        """Return reach and usual range of every channel, some rows, and the second moment, if GPTQ rounds."""
        moments = (SecondMoment(),) if self.options.rounding == "gptq" else ()
        return (MaxAbs(), MovingRange(), InputSample(self.options.rows), *moments)

    def refuse(self, ref: WeightRef, fmt: QuantFormat) -> str | None:
        """Refuse what is no integer grid: a clipping ratio is searched for it."""
        if not isinstance(fmt, IntFormat):
            return f"method eaquant rounds to integers (int2 ... int8, int2-asym ... int8-asym), not {fmt.name}"
        return None

    def input_format(self, wanted: str | None, weights: str | None) -> str | None:
        """Return the wanted format: integers per token.

        Raises:
            RecipeError: Another one is wanted, or none although transforms are.
        """
        if wanted is None:
            if self.options.transform == "on":
                raise RecipeError("option transform=on needs rounded inputs", "add --inputs int4-token-asym")
            return None
        fmt = INPUT_FORMATS[wanted]
        if (fmt.kind, fmt.granularity) != ("int", "token"):
            raise RecipeError(
                f"method eaquant rounds inputs to integers per token, not {wanted}", "use --inputs int4-token-asym"
            )
        return wanted

    def input_stats(self, fmt: InputFormat) -> tuple[Statistic, ...]:
        """Return nothing more."""
        return ()

    def steps(self, fmt: InputFormat, site: InputSite) -> tuple[dict[str, object], ...]:
        """Return the transform and clipped rounding."""
        assert site.ref.matrix is not None
        turns = () if self.options.transform == "off" else descriptions(site.ref.matrix[1], self.options.block)
        return (*turns, Quantize(fmt, clip=self.options.input_clip).describe())

    def fold(self, site: FoldSite) -> Factors:
        """Return the factors of one fold."""
        kind = site.fold.kind
        unseen = [layer.ref.name for layer in site.layers if layer.n_tokens == 0]
        off = self.options.smoothing == "off" if kind is FoldKind.EXPERTS else not self.options.folds
        if off or len(unseen) == len(site.layers):
            events = () if off else site.unseen_events()
            return Factors(torch.ones_like(site.layers[0].weight[0]), events)
        events = tuple(f"{name}: no calibration token reached it, so it has no say in smoothing" for name in unseen)
        if kind is FoldKind.EXPERTS:
            return Factors(site.storable(self._for_experts(site)), events)
        if kind is FoldKind.PRODUCT:
            high, low = site.layers[0].magnitude(MovingRange())
            return Factors(site.storable(bounded(outlier_factors(high, low), torch.zeros_like(high, dtype=torch.bool))))
        loudest = site.layers[0].magnitude(MaxAbs())
        s = own_factors(loudest, _heaviest(site.layers), self.options.alpha)
        return Factors(site.storable(bounded(s, loudest == 0)))

    def _for_experts(self, site: FoldSite) -> Tensor:
        """Return one vector for all readers of a mixture's norm, `[channels]`."""
        groups: dict[str, list[Layer]] = {}
        for layer in site.layers:
            if layer.n_tokens:
                groups.setdefault(layer.ref.fed_by, []).append(layer)
        experts = [group for group in groups.values() if group[0].ref.role is not None]
        shared = [group for group in groups.values() if group[0].ref.role is None]
        vectors = torch.stack([self._own(group) for group in experts])  # [experts, channels]
        always = [self._own(group) for group in shared]
        routers = [layer for layer in site.dense if layer.weight.shape[0] > 1 and layer.n_tokens]
        if self.options.smoothing == "max_gate":
            always += [self._own([router]) for router in routers]
        s = within_reach(aggregate(vectors, self._shares(experts, routers), always))
        loud = torch.stack([group[0].magnitude(MaxAbs()) for group in groups.values()]).amax(0)
        return bounded(s, loud == 0)

    def _own(self, group: Sequence[Layer]) -> Tensor:
        heaviest = _heaviest(group)
        return without_dead(own_factors(group[0].magnitude(MaxAbs()), heaviest, self.options.alpha), heaviest)

    def _shares(self, experts: Sequence[Sequence[Layer]], routers: Sequence[Layer]) -> Tensor | None:
        """Return every expert's weight in the sum, or None for the maximum."""
        mode = self.options.smoothing
        if mode == "sum1":
            counts = torch.tensor([float(group[0].n_tokens) for group in experts])
            return (counts / counts.sum()).to(experts[0][0].weight)
        if mode == "sum2":
            worst = [torch.stack([outlier_scores([layer.weight])[0] for layer in group]).max() for group in experts]
            return torch.stack(worst).sqrt().softmax(0)
        if mode == "sum3" and routers:
            likes = (routers[0].magnitude(InputSample(self.options.rows)) @ routers[0].weight.T).softmax(-1).mean(0)
            indices = [group[0].ref.where.expert for group in experts]
            own = likes[torch.tensor([index for index in indices if index is not None])]
            return own / own.sum()
        return None

    def solve_group(self, layers: Sequence[Layer], fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        """Fit the transform of every common input, and round the transformed weights."""
        assert isinstance(fmt, IntFormat)
        decided: dict[str, Decision] = {}
        events: list[str] = []
        sites: dict[str, list[Layer]] = {}
        for layer in layers:
            layer.magnitude(MaxAbs())  # raises where inputs are not finite, also if nothing else looks at them
            sites.setdefault(layer.ref.fed_by, []).append(layer)
        for members in sites.values():
            turns = self._transform(members[0], generator)
            turned = [replace(layer, weight=turned_weight(layer.weight, turns)) for layer in members]
            outcome = self._rounded(turned, turns, fmt)
            events += outcome.events
            for layer in members:
                own = outcome.decisions[layer.ref.name]
                assert isinstance(own, Quantized)
                inputs = (*turns, *self._rounding(layer)) if layer.steps else ()
                decided[layer.ref.name] = replace(own, inputs=inputs)
        return Outcome(decided, tuple(events))

    def _rounded(self, layers: Sequence[Layer], turns: tuple[InputOp, ...], fmt: IntFormat) -> Outcome:
        """Round weights that follow the transform of their input."""
        if self.options.rounding == "gptq" and layers[0].n_tokens:
            moment = layers[0].second_moment(SecondMoment())
            return GPTQ().round_with(turned_moment(moment, turns), layers, fmt)
        decided: dict[str, Decision] = {}
        for layer in layers:
            q = best_ratio(layer.weight, fmt, layer.fit(fmt), self.options.least_ratio)
            decided[layer.ref.name] = Quantized(fmt.encode(layer.weight, q), q)
        unseen = () if layers[0].n_tokens else layers
        return Outcome(decided, tuple(f"{layer.ref.name}: no calibration token reached it" for layer in unseen))

    def _transform(self, layer: Layer, generator: torch.Generator) -> tuple[InputOp, ...]:
        if len(layer.steps) < 2:
            return ()
        rows = layer.magnitude(InputSample(self.options.rows))
        return fit_transform(rows, self.options.block, self.options.rotations, generator)

    def _rounding(self, layer: Layer) -> tuple[InputOp, ...]:
        return (Quantize(INPUT_FORMATS[str(layer.steps[-1]["format"])], clip=self.options.input_clip),)

    def solve_router(
        self,
        router: Layer,
        top_k: int,
        dtype: torch.dtype,
        rule: RoutingRule = SOFTMAX,
        bias: Tensor | None = None,
    ) -> Outcome:
        """Return a router's weight on a grid of few bits per row, still stored in its own dtype.

        Args:
            router: With rows of its input, as statistics.
            top_k: Experts per token.
            dtype: What it is stored in.
            rule: How it chooses.
            bias: What it adds to logits, `[experts]`, or None.
        """
        bits, least = self.options.router_bits, self.options.least_ratio
        name, weight = router.ref.name, router.weight
        if router.n_tokens == 0:
            return Outcome({}, (f"{name}: no calibration token reached it, so it is not rounded",))
        x = router.magnitude(InputSample(self.options.rows))
        ratio: float | Tensor
        if self.options.align == "off":
            ratio = by_weights(weight, bits, least)
        else:
            m = counted(len(weight), top_k, self.options.router_share)
            ratio = align(weight, x, bits, m, least, self.options.align, rule, bias)
        stored = round_rows(weight, bits, ratio).to(dtype)
        agrees = agreement(linear(x, weight, bias), linear(x, stored.float(), bias), top_k, rule)
        return Outcome({}, metrics={"router_agreement": agrees}, rewrites={name: stored})


def best_ratio(w: Tensor, fmt: IntFormat, q: QParams, least: float) -> QParams:
    """Return the parameters, of ranges clipped to a ratio of their own, with the least squared error of each scale.

    Zero points stay: both ends of a range shrink by the same ratio. Of equal errors the smallest ratio wins.

    Args:
        w: `[out, in]` float32.
        fmt: The format of `q`.
        q: Min-max parameters of `w`.
        least: Smallest ratio; the largest is one.
    """
    whole = fmt.steps(q)  # [out, groups, 1], or [1, 1, 1] for one scale in all
    shared = [dim for dim in range(3) if whole.shape[dim] == 1]
    best, lowest = whole, torch.full_like(whole, torch.inf)
    for ratio in ratios(least):
        trial = fmt.with_steps(q, (whole * ratio).clamp_min(torch.finfo(fmt.dtype).tiny))
        error = (fmt.round(w, trial) - w).unflatten(1, (-1, fmt.group_size or w.shape[1])).square()
        total = error.sum(shared, keepdim=True)
        better = total < lowest
        best, lowest = torch.where(better, fmt.steps(trial), best), torch.minimum(total, lowest)
    return fmt.with_steps(q, best)


def _heaviest(layers: Sequence[Layer]) -> Tensor:
    """Return the largest magnitude of every column over all layers, `[in]`."""
    return torch.stack([layer.weight.abs().amax(0) for layer in layers]).amax(0)
