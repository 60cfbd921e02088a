"""Bits per layer for a size that is wished for: each layer's error is measured in several formats, then all are chosen.

Layers that runtimes fuse get one format, and so do all experts of a layer. What a format costs a group is measured, not
guessed: with the group alone rounded, its block runs on calibration samples, and the change of what leaves it counts,
relative to each token. Costs of groups are added up, and `allocation.py` chooses.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.allocation import Choice, Group, allocate
from compressor.bits.rules import by_rule
from compressor.checkpoint.blocks import BlockSequence, Recording
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import DTYPES, Source
from compressor.errors import NumericalError, RecipeError
from compressor.formats import FIXED_GROUP, get_format, parse_group_size
from compressor.formats.base import QuantFormat, ScaledFormat
from compressor.input_plan import stored_as
from compressor.methods.base import Method
from compressor.methods.grids import mse_clip
from compressor.plan import OUTSIDE, Plan, WeightRef
from compressor.priorities import Stage
from compressor.recipe import Override, Recipe
from compressor.report import Progress

MENU = ("int2", "int3", "int4", "int6", "int8")
"""Formats to choose from unless others are named."""

SAMPLES = 4
"""Calibration samples every choice is measured on."""


@dataclass(frozen=True)
class Bits:
    """What was chosen.

    Attributes:
        overrides: One for every group, for the recipe.
        formats: Group name -> its format.
        bits: Stored bits per weight of all groups, scales included.
        cost: Sum over groups of the relative squared error each adds to what leaves its block; None where rules chose.
        bound: No choice of this size costs less; None where rules chose.
        stages: The rules; none where every choice was measured.
    """

    overrides: tuple[Override, ...]
    formats: Mapping[str, str]
    bits: float
    cost: float | None
    bound: float | None
    stages: tuple[Stage, ...] = ()

    def sentence(self) -> str:
        """Return what the report says."""
        counts: dict[str, int] = {}
        for name in self.formats.values():
            counts[name] = counts.get(name, 0) + 1
        chosen = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        said = f"formats chosen for {self.bits:.3f} bits per weight: {chosen} groups; "
        if self.cost is None:
            return f"{said}by rule ({', '.join(self.stages)}): no error was measured"
        return (
            f"{said}predicted squared error of blocks, "
            f"relative, summed: {self.cost:.4g} (no choice of this size has less than {self.bound:.4g})"
        )

    def table(self) -> list[tuple[str, str]]:
        """Return kinds of groups, with block numbers left out, and how many got which format."""
        counts: dict[str, dict[str, int]] = {}
        for name, chosen in self.formats.items():
            kind = ".".join("*" if part.isdecimal() else part for part in name.split("."))
            own = counts.setdefault(kind, {})
            own[chosen] = own.get(chosen, 0) + 1
        return [
            (kind, ", ".join(f"{count} {chosen}" for chosen, count in sorted(own.items())))
            for kind, own in counts.items()
        ]


@dataclass
class BitChooser:
    """Measures and chooses.

    Attributes:
        plan: What would happen without it; its compressed layers are the ones to choose for.
        source: The checkpoint.
        skeleton: Its model without weights; filled and emptied here.
        blocks: Its block sequence.
        method: What will round, asked which formats it refuses; errors are those of rounding to nearest.
        recipe: Layers its own `overrides` name keep the formats given there.
        menu: Formats to choose from.
        tokens: Calibration tokens `[n, seq_len]`; the first few samples are used.
        progress: Who is told.
    """

    plan: Plan
    source: Source
    skeleton: Skeleton
    blocks: BlockSequence
    method: Method
    recipe: Recipe
    menu: tuple[str, ...]
    tokens: Tensor
    progress: Progress

    def choose(self, target: float, stages: Sequence[Stage] = ()) -> Bits:
        """Return the choice of at most `target` stored bits per weight, scales included.

        Args:
            target: So many bits.
            stages: Rules that say which layers come first; none: every choice is measured.

        Raises:
            RecipeError: No format suits a layer, nothing is left to choose for, or the smallest formats are larger.
        """
        groups = self._groups()
        if not groups:
            raise RecipeError("--target-bits: every layer has its format already", "leave some --set or --skip out")
        self._check_reach(groups, target)
        weights = sum(ref.numel for members in groups.values() for ref in members)
        budget = math.floor(target * weights / 8)
        cost = bound = None
        if stages:
            formats, nbytes = by_rule(self, groups, stages, budget)
        else:
            measured = [
                Group(name, tuple(ref.name for ref in members), tuple(costs))
                for name, members, costs in self._measured(groups)
            ]
            found = allocate(measured, budget)
            formats = {name: choice.format for name, choice in found.chosen.items()}
            nbytes, cost, bound = found.nbytes, found.cost, found.bound
        everything = [layer.ref.name for layer in self.plan.layers]
        overrides = [
            override
            for name, members in groups.items()
            for override in _overrides([ref.name for ref in members], formats[name], self.recipe, everything)
        ]
        return Bits(tuple(overrides), formats, 8 * nbytes / weights, cost, bound, tuple(stages))

    def _groups(self) -> dict[str, list[WeightRef]]:
        """Return group -> its weights, of the layers no override of the user's names."""
        groups: dict[str, list[WeightRef]] = {}
        for layer in self.plan.compressed:
            ref = layer.ref
            mine = any(
                fnmatch.fnmatchcase(name, override.match)
                for override in self.recipe.overrides
                for name in (ref.name, ref.module)
            )
            if not mine:
                groups.setdefault(ref.fused_with if ref.role is None else ref.owner, []).append(ref)
        return groups

    def formats_for(self, members: Sequence[WeightRef]) -> dict[str, QuantFormat]:
        """Return the formats of the menu that suit all of a group, as overrides name them.

        Raises:
            RecipeError: There is none.
        """
        out: dict[str, QuantFormat] = {}
        reasons = []
        for name in self.menu:
            stored, size = stored_as(name, _size(name, self.recipe), self.recipe.inputs)
            fmt = get_format(stored, parse_group_size(stored, size), DTYPES[self.plan.default_dtype])
            refusals = [self.method.refuse(ref, fmt) or fmt.refuse(ref.matrix or ref.shape) for ref in members]
            refusal = next((reason for reason in refusals if reason), None)
            if refusal is None:
                out[name] = fmt
            else:
                reasons.append(refusal)
        if not out:
            raise RecipeError(
                f"{members[0].module}: no format of the menu suits it: {reasons[0]}", "name others: --menu"
            )
        return out

    def sizes(self, members: Sequence[WeightRef]) -> dict[str, int]:
        """Return the bytes of a group in every format that suits it."""
        return {name: bytes_in(fmt, members) for name, fmt in self.formats_for(members).items()}

    def _check_reach(self, groups: Mapping[str, list[WeightRef]], target: float) -> None:
        """Make sure that the smallest formats are small enough, before anything is measured."""
        least = weights = 0
        for members in groups.values():
            least += min(self.sizes(members).values())
            weights += sum(ref.numel for ref in members)
        if 8 * least > target * weights:
            raise RecipeError(
                f"--target-bits {target:g}: the smallest formats of the menu ({', '.join(self.menu)}) take "
                f"{8 * least / weights:.3f} bits per weight, scales included",
                "raise it, name smaller formats with --menu, or use larger groups",
            )

    def _measured(self, groups: Mapping[str, list[WeightRef]]) -> list[tuple[str, list[WeightRef], list[Choice]]]:
        """Measure block by block, one of them in memory."""
        states, recording = self.enter()
        out = []
        for index, block in enumerate(self.blocks.names):
            self.progress.stage(f"measuring formats: {block}")
            names = [layer.ref.name for layer in self.plan.in_block(index)]
            self.skeleton.load(self.source.read(names))
            with torch.no_grad():
                leaving = [self.blocks.run(index, hidden, recording) for hidden in states]
                for name, members in groups.items():
                    if members[0].block != index:
                        continue
                    costs = []
                    for chosen, fmt in self.formats_for(members).items():
                        cost = self._cost(index, members, fmt, states, leaving, recording)
                        costs.append(Choice(chosen, bytes_in(fmt, members), cost))
                    out.append((name, members, costs))
            self.skeleton.free({layer.ref.param for layer in self.plan.in_block(index)})
            states = leaving
        return out

    def enter(self) -> tuple[list[Tensor], Recording]:
        """Return the states that enter block 0, one per sample, and the other arguments of blocks."""
        outside = [layer.ref for layer in self.plan.in_block(OUTSIDE) if layer.ref.part is None]
        self.skeleton.load(self.source.read(ref.name for ref in outside))
        name, device = self.blocks.model.main_input_name, self.skeleton.device
        rows = [row.unsqueeze(0).to(device) for row in self.tokens[:SAMPLES]]
        entered = [self.blocks.prologue({name: row}) for row in rows]
        for _, other in entered[1:]:
            entered[0][1].check_same(other)
        self.skeleton.free({ref.param for ref in outside})
        return [hidden for hidden, _ in entered], entered[0][1]

    def _cost(
        self,
        index: int,
        members: Sequence[WeightRef],
        fmt: QuantFormat,
        states: Sequence[Tensor],
        leaving: Sequence[Tensor],
        recording: Recording,
    ) -> float:
        """Return the mean over tokens of the relative squared change of what leaves a block, with a group rounded."""
        parts = [self.skeleton.part(ref.param, ref.where) for ref in members]
        kept = [part.clone() for part in parts]
        for part, value in zip(parts, rounded(kept, members, fmt), strict=True):
            part.copy_(value)
        total, count = 0.0, 0
        for hidden, before in zip(states, leaving, strict=True):
            after = self.blocks.run(index, hidden, recording)
            error = (after.double() - before.double()).square().sum(-1)
            total += float((error / before.double().square().sum(-1).clamp_min(1e-30)).sum())
            count += error.numel()
        for part, value in zip(parts, kept, strict=True):
            part.copy_(value)
        if not math.isfinite(total):
            raise NumericalError(f"{members[0].name}: its block's output in {fmt.name} is not finite", "use other data")
        return total / count


def rounded(weights: Sequence[Tensor], members: Sequence[WeightRef], fmt: QuantFormat) -> list[Tensor]:
    """Return weights rounded to nearest on clipped ranges; fused ones share a global scale where there is one."""
    fused: dict[str, list[Tensor]] = {}
    for weight, ref in zip(weights, members, strict=True):
        fused.setdefault(ref.fused_with, []).append(weight)
    shared = {name: fmt.fit_global(own) if fmt.has_global_scale else None for name, own in fused.items()}
    out = []
    for weight, ref in zip(weights, members, strict=True):
        q = fmt.fit(weight, shared[ref.fused_with])
        if isinstance(fmt, ScaledFormat):
            q = mse_clip(weight, fmt, q)
        out.append(fmt.decode(fmt.encode(weight, q), q))
    return out


def _size(name: str, recipe: Recipe) -> str | None:
    """Return the recipe's group size for a format that can have one."""
    return None if name in FIXED_GROUP else recipe.group_size


def bytes_in(fmt: QuantFormat, members: Sequence[WeightRef]) -> int:
    """Return the bytes of some weights in a format, scales included."""
    return sum(slot.nbytes for ref in members for slot in fmt.layout(ref.matrix or (0, 0)).values())


def _overrides(names: Sequence[str], chosen: str, recipe: Recipe, everything: Sequence[str]) -> list[Override]:
    """Return overrides for exactly these tensors: one pattern where it matches no others, else one each."""
    size = _size(chosen, recipe)
    parents = [name.split(".")[:-1] for name in names]
    common = [first for first, *rest in zip(*parents, strict=False) if all(part == first for part in rest)]
    pattern = f"{'.'.join(common)}.*.weight"
    if len(names) > 1 and {name for name in everything if fnmatch.fnmatchcase(name, pattern)} == set(names):
        names = [pattern]
    return [Override(match=name, format=chosen, group_size=size) for name in names]
