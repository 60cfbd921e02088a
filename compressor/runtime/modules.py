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
from compressor.kernels.reference.linear import dequantize

FUSED = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the parameters that stack experts."""


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
        return dispatch.linear_problem(shell, self.fmt, m, self.dtype, device)

    def prepare(self) -> None:
        """Lay the weight out for the kernel of the device it is on, once; its bytes as on disk are given up."""
        if self._settled:
            return
        self._settled = True
        packed = self.packed
        prepared = dispatch.prepare(packed, self.fmt, self.dtype)
        if prepared is not None:
            for suffix in self._suffixes:
                del self._buffers[suffix]
            self._prepared = prepared
            for name, tensor in prepared.tensors.items():
                self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]` in the dtype of `x` `[..., in]`."""
        if not torch.compiler.is_compiling():
            self.prepare()
        bias: Tensor | None = self.bias
        if self._steps:
            ops = self.inputs
            x, carry = apply_ops(ops, x), carried(ops)
            bias = bias if carry is None else carry if bias is None else bias + carry
        if self._prepared is not None:
            return self._prepared.linear(x, bias, self.dtype)
        return dispatch.linear(x, self.packed, self.fmt, bias, self.dtype)

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
    """Fused experts whose projections stay packed; one expert is decoded at a time.

    Takes the place of a transformers v5 experts module and is called like it. Its submodules are named as on disk:
    `<expert>.<projection>`.

    Args:
        source: The module it replaces: gives the gating function; its weight stacks are dropped.
        experts: One mapping per expert, from the projection's name on disk to its packed layer.
        roles: Which projection is which: keys `up` and `down`, and `gate` if the experts have one.

    Raises:
        UnsupportedError: The module's layout is one this class does not compute.
    """

    def __init__(
        self, source: nn.Module, experts: Sequence[Mapping[str, PackedLinear]], roles: Mapping[str, str]
    ) -> None:
        super().__init__()
        if reason := refuse_experts(source):
            raise UnsupportedError(
                f"{type(source).__name__}: {reason}", "leave the experts of this model uncompressed with --skip"
            )
        assert ("gate" in roles) == source.has_gate, (roles, type(source).__name__)
        for name in FUSED:
            source._parameters.pop(name, None)
        self.source = source
        self.n_experts = len(experts)
        self._roles = dict(roles)
        for index, projections in enumerate(experts):
            self.add_module(str(index), nn.ModuleDict(dict(projections)))

    def projection(self, expert: int, role: str) -> PackedLinear:
        """Return one expert's `gate`, `up` or `down`."""
        layer = self.get_submodule(f"{expert}.{self._roles[role]}")
        assert isinstance(layer, PackedLinear)
        return layer

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: `[tokens, hidden]`.
            top_k_index: `[tokens, k]` int64; indices past the last expert mean "none".
            top_k_weights: `[tokens, k]`.
        """
        tokens, k = top_k_index.shape
        dtype = torch.result_type(hidden_states, top_k_weights)
        # Every (token, slot) pair has its own row, so the sum over slots has a fixed order.
        out = hidden_states.new_zeros(tokens, k, hidden_states.shape[-1], dtype=dtype)
        for expert in top_k_index.unique().tolist():
            if expert < self.n_experts:
                token, slot = torch.where(top_k_index == expert)
                value = self._expert(expert, hidden_states[token])  # [n, hidden]
                out[token, slot] = value * top_k_weights[token, slot, None]
        return out.sum(1).to(hidden_states.dtype)

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        source: Any = self.source
        hidden = self.projection(expert, "up")(x)
        if source.has_gate:
            hidden = source._apply_gate(torch.cat((self.projection(expert, "gate")(x), hidden), -1))
        else:
            hidden = source.act_fn(hidden)
        out: Tensor = self.projection(expert, "down")(hidden)
        return out


def refuse_experts(source: nn.Module) -> str | None:
    """Return why the experts of this module cannot be kept packed, or None.

    transformers describes the layout by flags on decorated classes; without them it would have to be guessed.
    """
    flags = {
        "is_transposed": False,
        "is_concatenated": True,
        "has_bias": False,
        "has_post_expert_norm": False,
    }
    for flag in ("has_gate", *flags):
        if not hasattr(source, flag):
            return f"its experts do not say how they are stored (no {flag})"
    for flag, expected in flags.items():
        if getattr(source, flag) != expected and not (flag == "is_concatenated" and not source.has_gate):
            return f"experts with {flag} = {getattr(source, flag)} are not supported packed"
    return None
