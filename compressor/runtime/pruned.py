"""Linear layers of pruned checkpoints whose zeros are left out in memory, where a kernel gains by that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from compressor.kernels import dispatch
from compressor.kernels.gpu.kernel import PrunedWeight


class PrunedLinear(nn.Module):
    """A linear layer that keeps two of every four weights if the device has a kernel for that, else all.

    What it saves is the dense weight either way; zeros may have lost their sign.

    Args:
        weight: `[out, in]`.
        bias: `[out]` or None.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._prepared: PrunedWeight | None = None
        self._settle(weight.detach(), dispatch.prepare_pruned(weight.detach()))

    @classmethod
    def of(cls, linear: nn.Linear) -> PrunedLinear | None:
        """Return what can take a layer's place, or None if nothing is gained by it."""
        layer = cls(linear.weight, linear.bias)
        return layer if layer.is_packed else None

    @property
    def is_packed(self) -> bool:
        """Whether zeros are left out."""
        return self._prepared is not None

    @property
    def weight(self) -> Tensor:
        """The dense weight; made anew each time if zeros are left out."""
        if self._prepared is not None:
            return self._prepared.dequantize(self.dtype)
        dense = self._parameters["weight"]
        assert dense is not None, "one of the two is there"
        return dense

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]` in the dtype of `x` `[..., in]`."""
        if self._prepared is None:
            return nn.functional.linear(x, self.weight, self.bias)
        return self._prepared.linear(x, self.bias, self.dtype)

    def extra_repr(self) -> str:
        """Describe the layer inside `print(model)`."""
        kept = ", 2:4" if self.is_packed else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{kept}"

    def _settle(self, weight: Tensor, prepared: PrunedWeight | None) -> None:
        for name in () if self._prepared is None else self._prepared.tensors:
            delattr(self, name)
        self._parameters.pop("weight", None)
        self._prepared = prepared
        if prepared is None:  # not register_parameter, which refuses the name of a property
            self._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        else:
            for name, tensor in prepared.tensors.items():
                self.register_buffer(name, tensor, persistent=False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._prepared is not None:
            destination[prefix + "weight"] = self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrunedLinear:
        self._settle(self.weight, None)
        nn.Module._apply(self, fn, recurse)
        weight = self.weight
        self.dtype = weight.dtype
        self._settle(weight.detach(), dispatch.prepare_pruned(weight.detach()))
        return self


def leave_out_zeros(model: nn.Module) -> int:
    """Replace the linear layers of a model on its device that gain by their zeros; return how many.

    Layers whose weight is shared, such as a tied head, stay, and so do those with hooks.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    count = 0
    for name, module in list(model.named_modules()):
        # Only the plain class: what derives from it may use its weight in other ways.
        if type(module) is not nn.Linear or uses[id(module.weight)] > 1:
            continue
        if not module._forward_pre_hooks and not module._forward_hooks:
            layer = PrunedLinear.of(module)
            if layer is not None:
                layer.training = module.training
                model.set_submodule(name, layer)
                count += 1
    return count
