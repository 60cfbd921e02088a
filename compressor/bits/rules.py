"""Choosing between two formats by rule: what the rules of `priorities.py` need to know of a model, and their choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.checkpoint.ends import first_tensor
from compressor.errors import RecipeError
from compressor.plan import WeightRef
from compressor.priorities import Candidate, Place, Stage, outlier_score, place_of, spend, turning

if TYPE_CHECKING:
    from compressor.bits.chooser import BitChooser

RULED_MENU = ("int2", "int4")
"""The two formats that rules choose between unless others are named."""


def by_rule(
    chooser: BitChooser, groups: Mapping[str, list[WeightRef]], stages: Sequence[Stage], budget: int
) -> tuple[dict[str, str], int]:
    """Return group -> its format, and the bytes of all.

    Args:
        chooser: Knows model, weights, menu and calibration data.
        groups: Group -> its weights.
        stages: The rules, in order.
        budget: Bytes of all groups.

    Raises:
        RecipeError: There are not two formats to choose from.
    """
    if len(chooser.menu) != 2:
        raise RecipeError(
            f"--bits-by: rules choose between two formats, not {len(chooser.menu)} ({', '.join(chooser.menu)})",
            "for example --menu int2,int4",
        )
    candidates, pairs = [], {}
    stacks = chooser.blocks.trace().experts
    for name, members in groups.items():
        sizes = chooser.sizes(members)
        pair = min(sizes, key=lambda chosen: sizes[chosen]), max(sizes, key=lambda chosen: sizes[chosen])
        place = place_of(members[0], chooser.blocks.model, stacks)
        candidates.append(Candidate(name, members[0].block, place, sizes[pair[0]], sizes[pair[1]]))
        pairs[name] = pair
    feeding = {c.name: groups[c.name] for c in candidates if c.place is Place.FEED_FORWARD}

    def scores(stage: Stage) -> Mapping[str, float]:
        return _turning(chooser, feeding) if stage is Stage.IMPORTANCE else _outliers(chooser, feeding)

    raised = spend(candidates, stages, budget, scores)
    nbytes = sum(c.large if c.name in raised else c.small for c in candidates)
    return {name: pairs[name][name in raised] for name in groups}, nbytes


def _outliers(chooser: BitChooser, groups: Mapping[str, list[WeightRef]]) -> dict[str, float]:
    """Return the outlier score of every group; one matrix is in memory at a time."""
    return {
        name: max(outlier_score(list(chooser.source.read([ref.name]).values())) for ref in members)
        for name, members in groups.items()
    }


def _turning(chooser: BitChooser, groups: Mapping[str, list[WeightRef]]) -> dict[str, float]:
    """Return for every group how much the feed-forward part it lies in turns what passes it, with the residual."""
    states, recording = chooser.enter()
    blocks, skeleton = chooser.blocks, chooser.skeleton
    by_block: dict[int, float] = {}
    for index, block in enumerate(blocks.names):
        chooser.progress.stage(f"measuring blocks: {block}")
        layers = chooser.plan.in_block(index)
        skeleton.load(chooser.source.read(layer.ref.name for layer in layers))
        first = next((members[0] for members in groups.values() if members[0].block == index), None)
        part = blocks.block(index) if first is None else blocks.model.get_submodule(first.owner.rpartition(".")[0])
        added: list[Tensor] = []
        hook = part.register_forward_hook(lambda _, args, out, added=added: added.append(first_tensor(out)))
        with torch.no_grad():
            leaving = [blocks.run(index, hidden, recording) for hidden in states]
        hook.remove()
        # What enters the part is what leaves the block without what the part adds; parts of other widths add nothing.
        entering = [
            after - own.view_as(after) if own.numel() == after.numel() and first is not None else hidden
            for hidden, own, after in zip(states, added, leaving, strict=True)
        ]
        turned = torch.cat([turning(before, after) for before, after in zip(entering, leaving, strict=True)])
        by_block[index] = float(turned.mean(dtype=torch.float64))
        skeleton.free({layer.ref.param for layer in layers})
        states = leaving
    return {name: by_block[members[0].block] for name, members in groups.items()}
