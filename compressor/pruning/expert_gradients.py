"""What a fused stack of experts brings to gradients: inputs and output gradients of every projection, by sample.

A fused stack hands no projection's input to a hook, so its forward is replaced while a block is watched. An expert sees
some tokens of each sample, perhaps none; a sample it sees nothing of has no gradient there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.errors import UnsupportedError
from compressor.plan import LayerPlan
from compressor.stacks import StackLayout, stack_layout

if TYPE_CHECKING:
    from compressor.pruning.gradients import LayerGradient


def watch_stack(
    module: nn.Module, layers: Sequence[LayerPlan], seen: Mapping[str, LayerGradient], n_samples: int
) -> Callable[[], None]:
    """Record what the projections of a stack read, and the gradients of their outputs, until the result is called.

    Args:
        module: The stack, with `gate_up_proj` and `down_proj`.
        layers: Projections of its experts.
        seen: Tensor name -> what to add to.
        n_samples: Samples that every forward pass holds, one after the other, all of one length.

    Raises:
        UnsupportedError: The stack's layout is not the standard one.
    """
    down, stacked = module.get_parameter("down_proj"), module.get_parameter("gate_up_proj")
    if stack_layout(module) != StackLayout():
        raise UnsupportedError(
            f"{type(module).__name__}: experts stored transposed, interleaved, with biases or without a gate have no "
            "gradients here",
            "leave the experts of this model out: --skip '*.experts.*'",
        )
    of_expert: dict[int, list[LayerPlan]] = {}
    for layer in layers:
        assert layer.ref.where.expert is not None
        of_expert.setdefault(layer.ref.where.expert, []).append(layer)

    def note(expert: int, leaf: str, inputs: Tensor, output: Tensor, counts: list[int]) -> None:
        mine = [layer for layer in of_expert.get(expert, ()) if layer.ref.param.endswith(f".{leaf}")]
        if not mine:
            return
        rows = _by_sample(inputs.detach(), counts)
        for layer in mine:
            seen[layer.ref.name].inputs.extend(rows)

        def after(gradient: Tensor) -> None:
            for layer in mine:
                part = gradient if layer.ref.where.rows is None else gradient[:, slice(*layer.ref.where.rows)]
                seen[layer.ref.name].outputs.extend(_by_sample(part, counts))

        if len(output):
            output.register_hook(after)
        else:
            after(output.detach())

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        gate: Any = module._apply_gate
        per_sample = len(hidden) // n_samples
        out = torch.zeros_like(hidden)
        for expert in range(len(down)):
            token, slot = torch.where(top_k_index == expert)  # tokens ascend, so samples do
            counts = torch.bincount(token // per_sample, minlength=n_samples).tolist()
            rows = hidden[token]
            both = functional.linear(rows, stacked[expert])
            note(expert, "gate_up_proj", rows, both, counts)
            middle = gate(both)
            value = functional.linear(middle, down[expert])
            note(expert, "down_proj", middle, value, counts)
            out = out.index_add(0, token, (value * top_k_weights[token, slot, None]).to(out.dtype))
        return out

    module.forward = forward
    return lambda: module.__dict__.pop("forward")


def _by_sample(rows: Tensor, counts: list[int]) -> list[Tensor]:
    """Return rows `[tokens, width]` as one float32 `[width, tokens]` per sample."""
    return [part.T.float().contiguous() for part in rows.split(counts)]
