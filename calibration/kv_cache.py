"""FP8 key/value caches: finding their scales, and computing as a runtime with such a cache would.

Attention layers hand keys (after rotary embedding) and values to the cache they are given and go on with what it
returns. That is the one place where both can be seen and rounded, whatever the model: a stand-in cache sits there.
The scales are compressed-tensors' `k_scale` and `v_scale`, one per layer, multipliers: `x ~ FP8(x / scale) * scale`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressor.errors import NumericalError, UnsupportedError
from compressor.ranks import Ranks

FP8_MAX = 448.0
SCALES = ("k_scale", "v_scale")


class KVRange:
    """Largest key and value magnitude of one attention module, over everything that passes.

    Args:
        module: The attention module.
        skip: Says of what passes now that it does not count.
    """

    def __init__(self, module: nn.Module, skip: Callable[[], bool] = lambda: False) -> None:
        self.max_abs: list[Tensor] = []
        self._skip = skip
        self._handle = intercept(module, self._see)

    def _see(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self._skip():
            return key, value
        seen = [key.detach().abs().amax().float(), value.detach().abs().amax().float()]
        self.max_abs = [torch.maximum(a, b) for a, b in zip(self.max_abs or seen, seen, strict=True)]
        return key, value

    def join(self, ranks: Ranks) -> None:
        """Take into account what other processes have seen."""
        if ranks.size == 1:
            return
        everyones = [found for found in ranks.gather([value.cpu() for value in self.max_abs]) if found]
        device = self.max_abs[0].device if self.max_abs else torch.device("cpu")
        self.max_abs = [torch.stack(values).amax().to(device) for values in zip(*everyones, strict=True)]

    def scales(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Stop looking; return `k_scale` and `v_scale`, `[1]` in `dtype`.

        Args:
            name: What errors call the module.
            dtype: Dtype readers will see the scales in.

        Raises:
            UnsupportedError: The module never used a cache.
            NumericalError: Keys or values were not finite.
        """
        self._handle.remove()
        if not self.max_abs:
            raise UnsupportedError(f"{name}: does not hand its keys and values to a cache", "leave --kv-cache out")
        out = {}
        for suffix, largest in zip(SCALES, self.max_abs, strict=True):
            if not torch.isfinite(largest):
                raise NumericalError(f"{name}: its cached values are not finite", "use other calibration data")
            scale = (largest / FP8_MAX).to(dtype).reshape(1)
            out[suffix] = torch.where(scale > 0, scale, torch.ones_like(scale))
        return out


def simulate(module: nn.Module) -> RemovableHandle:
    """Make an attention module, which must have `k_scale` and `v_scale`, see its keys and values rounded to FP8."""

    def see(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return round_fp8(key, module.get_buffer("k_scale")), round_fp8(value, module.get_buffer("v_scale"))

    return intercept(module, see)


def round_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Return `x` as an FP8 (E4M3) cache would give it back, in its own dtype; saturates at 448 scales."""
    scale = scale.to(x.dtype)
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype) * scale


def intercept(module: nn.Module, see: Any) -> RemovableHandle:
    """Let `see(key, value) -> (key, value)` stand between an attention module and its cache, if it has one or not."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "past_key_values": _Between(kwargs.get("past_key_values"), see)}

    return module.register_forward_pre_hook(before, with_kwargs=True)


class _Between:
    """A cache that shows what is stored in it to a function first; everything else is the real cache's."""

    def __init__(self, cache: Any, see: Any) -> None:
        self._cache, self._see = cache, see

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values, as the function returns them."""
        key, value = self._see(key, value)
        if self._cache is None:
            return key, value
        stored: tuple[Tensor, Tensor] = self._cache.update(key, value, *args, **kwargs)
        return stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
