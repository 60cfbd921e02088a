"""Modules that keep their weights packed in memory and compute with whatever kernel fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from compressor.errors import UnsupportedError
from compressor.formats.base import PackedTensor, QuantFormat
from compressor.inputs import InputOp, apply_ops, carried, rebuild
from compressor.kernels import dispatch
from compressor.kernels.gpu.experts import block_rows, route
from compressor.kernels.gpu.kernel import TRITON, ExpertStack
from compressor.kernels.gpu.ops import KERNEL_DTYPES
from compressor.kernels.reference.linear import dequantize
from compressor.stacks import BIASES, FUSED, expert_bias, gated_middle, stack_layout


class PackedLinear(nn.Module):
    """A linear layer whose weight stays packed; its buffers carry the suffixes they have on disk.

    Moving the module moves the packed tensors but never changes their dtype: they are bytes, not numbers.

    Args:
        packed: The weight.
        fmt: The format that packed it.
        bias: `[out]` or None.
        inputs: What happens to the input first, in order.
        dtype: The model's dtype, which the decoded weight is rounded to.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        packed: PackedTensor,
        fmt: QuantFormat,
        bias: Tensor | None = None,
        inputs: Sequence[InputOp] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.fmt = fmt
        self.dtype = dtype
        self._suffixes = tuple(packed.tensors)
        self._prepared: dispatch.Prepared | None = None
        self._settled = False  # whether the kernel of the device it is on was asked for its layout
        self._steps = tuple(op.describe() for op in inputs)
        stored = dict(packed.tensors)
        for op in inputs:
            for suffix, tensor in op.tensors().items():
                if suffix in stored:
                    raise UnsupportedError(f"two input operations store {suffix}", "use each operation at most once")
                stored[suffix] = tensor
        # Not register_buffer: formats whose codes are stored as `weight` would meet the property of that name.
        self._buffers.update(stored)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def packed(self) -> PackedTensor:
        """The weight as it lies on disk; shares memory with the module, unless that has been prepared."""
        if self._prepared is not None:
            return self._prepared.restore()
        # Not get_buffer, which would decode a buffer named `weight`.
        buffers = cast(Mapping[str, Tensor], self._buffers)
        tensors = {suffix: buffers[suffix] for suffix in self._suffixes}
        return PackedTensor(self.fmt.name, (self.out_features, self.in_features), tensors)

    @property
    def inputs(self) -> tuple[InputOp, ...]:
        """The operations applied to the input, on the device the module is on."""
        return rebuild(self._steps, dict(self._buffers)) if self._steps else ()  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The decoded weight, made anew each time: for model code that reads its dtype or multiplies by itself."""
        return self.dequantize()

    def dequantize(self) -> Tensor:
        """Return the weight, `[out, in]` in the model's dtype."""
        if self._prepared is not None:
            return self._prepared.dequantize(self.dtype)
        return dequantize(self.packed, self.fmt, self.dtype)

    def problem(self, m: int) -> dispatch.Problem:
        """Describe multiplying `m` rows in the model's dtype by this layer where it is."""
        device = next(t.device for t in self._buffers.values() if t is not None)
        shell = PackedTensor(self.fmt.name, (self.out_features, self.in_features), {})
        return dispatch.linear_problem(shell, self.fmt, m, self.dtype, device, self.inputs)

    def prepare(self) -> None:
        """Lay the weight out for the kernel of the device it is on, once; its bytes as on disk are given up."""
        if self._settled:
            return
        self._settled = True
        packed = self.packed
        prepared = dispatch.prepare(packed, self.fmt, self.dtype, self.inputs)
        if prepared is not None:
            for suffix in self._suffixes:
                del self._buffers[suffix]
            self._prepared = prepared
            for name, tensor in prepared.tensors.items():
                self.register_buffer(name, tensor, persistent=False)

    @property
    def prepared(self) -> dispatch.Prepared | None:
        """The weight as a kernel reads it, if it was laid out for one."""
        return self._prepared

    def share(self, prepared: dispatch.Prepared) -> None:
        """Put a prepared weight that is equal to this layer's, in memory of others, in its place."""
        assert self._prepared is not None, "nothing is prepared"
        self._prepared = prepared
        self._buffers.update(prepared.tensors)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]` in the dtype of `x` `[..., in]`."""
        if not torch.compiler.is_compiling():
            self.prepare()
        carry: Tensor | None = None
        if self._steps:
            ops = self.inputs
            carry = carried(ops)
            if not isinstance(self._prepared, dispatch.TREATS_INPUTS):
                x = apply_ops(ops, x)
        if self._prepared is not None:
            out = self._prepared.linear(x, self.bias, self.dtype)
        else:
            out = dispatch.linear(x, self.packed, self.fmt, self.bias, self.dtype)
        # Added last, as while compressing: another last bit could tip the rounding of what the next layer reads.
        return out if carry is None else out + carry.to(out.dtype)

    def extra_repr(self) -> str:
        """Describe the layer inside `print(model)`."""
        steps = "".join(f", {step['op']}" for step in self._steps)
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.fmt.name}{steps}"

    def _unprepare(self) -> None:
        """Put the weight back as it lies on disk."""
        if self._prepared is not None:
            packed = self._prepared.restore()
            for name in self._prepared.tensors:
                delattr(self, name)
            self._prepared = None
            self._buffers.update(packed.tensors)
        self._settled = False

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._prepared is not None:
            destination.update({prefix + suffix: t for suffix, t in self._prepared.restore().tensors.items()})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        prepared = self._prepared is not None
        self._unprepare()
        kept = dict(self._buffers)
        self._buffers.clear()
        nn.Module._apply(self, fn, recurse)
        for name, tensor in kept.items():
            assert tensor is not None
            # An empty tensor tells where `fn` moves things without letting it convert the bytes.
            probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            self._buffers[name] = tensor.to(probe.device)
        if prepared:
            self.prepare()
        return self


class PackedExperts(nn.Module):
    """Fused experts whose projections stay packed: one expert is decoded at a time, or one launch multiplies all.

    Takes the place of a transformers v5 experts module and is called like it. Its submodules are named as on disk:
    `<expert>.<projection>`.

    Args:
        source: The module it replaces: gives the gating function, and biases if there are any; its weight stacks are
            dropped.
        experts: One mapping per expert, from the projection's name on disk to its packed layer.
        roles: Which projection is which: keys `up` and `down`, and `gate` if the experts have one.

    Raises:
        UnsupportedError: The module's layout is one this class does not compute.
    """

    def __init__(
        self, source: nn.Module, experts: Sequence[Mapping[str, PackedLinear]], roles: Mapping[str, str]
    ) -> None:
        super().__init__()
        self._layout = stack_layout(source)
        assert ("gate" in roles) == self._layout.gated, (roles, type(source).__name__)
        for name in FUSED:
            source._parameters.pop(name, None)
        for name in BIASES:
            if (bias := source._parameters.pop(name, None)) is not None:
                self.register_parameter(name, bias)
        self.source = source
        self.n_experts = len(experts)
        self._roles = dict(roles)
        self._stacks: dict[str, ExpertStack] | None = None  # by role; empty if experts are multiplied one by one
        for index, projections in enumerate(experts):
            self.add_module(str(index), nn.ModuleDict(dict(projections)))

    def projection(self, expert: int, role: str) -> PackedLinear:
        """Return one expert's `gate`, `up` or `down`."""
        projections = self._modules[str(expert)]  # not get_submodule: a token asks for many
        assert projections is not None
        layer = projections._modules[self._roles[role]]
        assert isinstance(layer, PackedLinear)
        return layer

    def prepare(self) -> None:
        """Lay all experts' weights out together if their device's kernel multiplies them in one launch, once."""
        if self._stacks is not None:
            return
        self._stacks = {}
        if self.n_experts == 0 or dispatch.pick(self.projection(0, "up").problem(1)).name != TRITON:
            return
        stacks: dict[str, ExpertStack] = {}
        for role in self._roles:
            layers = [self.projection(expert, role) for expert in range(self.n_experts)]
            for layer in layers:
                layer.prepare()
            stack = (
                None if any(layer.inputs for layer in layers) else ExpertStack.of([each.prepared for each in layers])
            )
            if stack is None:
                return
            for layer, view in zip(layers, stack.members, strict=True):
                layer.share(view)
            stacks[role] = stack
        self._stacks = stacks

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: `[tokens, hidden]`.
            top_k_index: `[tokens, k]` int64; indices past the last expert mean "none".
            top_k_weights: `[tokens, k]`.
        """
        tokens, k = top_k_index.shape
        if not torch.compiler.is_compiling():
            self.prepare()
        if self._stacks and tokens and hidden_states.dtype in KERNEL_DTYPES:
            return self._all_at_once(self._stacks, hidden_states, top_k_index.flatten(), top_k_weights)
        dtype = torch.result_type(hidden_states, top_k_weights)
        # Every (token, slot) pair has its own row, so the sum over slots has a fixed order.
        out = hidden_states.new_zeros(tokens, k, hidden_states.shape[-1], dtype=dtype)
        for expert in top_k_index.unique().tolist():
            if expert < self.n_experts:
                token, slot = torch.where(top_k_index == expert)
                value = self._expert(expert, hidden_states[token])  # [n, hidden]
                out[token, slot] = value * top_k_weights[token, slot, None]
        return out.sum(1).to(hidden_states.dtype)

    def _all_at_once(
        self, stacks: Mapping[str, ExpertStack], hidden: Tensor, chosen: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Do what `forward` does with one launch per projection; `chosen` is `[tokens * k]`."""
        rows = chosen.numel()
        routing = route(chosen, self.n_experts, block_rows(rows, self.n_experts))
        both = stacks["up"].linear(hidden, routing, rows)
        if self._layout.gated:
            both = self._layout.side_by_side(stacks["gate"].linear(hidden, routing, rows), both)
        real = chosen.clamp(max=self.n_experts - 1)
        bias = expert_bias(self, self._layout.leaf("up"), real)
        middle = gated_middle(self.source, both if bias is None else both + bias)
        out = stacks["down"].linear(middle, routing, rows)
        bias = expert_bias(self, "down_proj", real)
        out = out if bias is None else out + bias
        weights = torch.where(chosen < self.n_experts, top_k_weights.flatten(), 0)
        return (out * weights[:, None]).view(*top_k_weights.shape, -1).sum(1).to(hidden.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExperts:
        self._stacks = None  # before experts move, or the stack and their own weights would be there at once
        nn.Module._apply(self, fn, recurse)
        return self

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        both: Tensor = self.projection(expert, "up")(x)
        if self._layout.gated:
            both = self._layout.side_by_side(self.projection(expert, "gate")(x), both)
        bias = expert_bias(self, self._layout.leaf("up"), expert)
        middle = gated_middle(self.source, both if bias is None else both + bias)
        out: Tensor = self.projection(expert, "down")(middle)
        bias = expert_bias(self, "down_proj", expert)
        return out if bias is None else out + bias
