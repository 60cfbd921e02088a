"""What the bench times: products with packed weights, of integers, and with experts, each beside its bfloat16 twin."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from compressor.formats.activations import INPUT_FORMATS
from compressor.inputs import InputOp, Permute, Quantize, Rotate
from compressor.kernels.bench.roofline import PER_TOKEN, Row
from compressor.kernels.gpu import experts, int_ops, ops, timing
from compressor.kernels.gpu.int_weight import decode as decode_integers
from compressor.kernels.gpu.int_weight import numbers_of
from compressor.kernels.gpu.layout import RuntimeWeight, unpack_words
from compressor.kernels.gpu.rounding import codes_of, fused
from compressor.kernels.gpu.samples import random_int_weight, random_weight
from compressor.kernels.gpu.tiles import path_for

CHECKED_ROWS = 512
"""Rows of the weight whose part of the result is compared with float64."""

Call = Callable[[], object]
Peer = Callable[[Tensor], Tensor]


class Subject(Protocol):
    """One row of the table on one layer, on copies that outgrow the cache."""

    def calls(self, x: Tensor) -> Sequence[Call]:
        """Return the product with every copy."""
        ...

    def dense_calls(self, x: Tensor) -> Sequence[Call]:
        """Return the same with bfloat16 weights."""
        ...

    def peers(self) -> Mapping[str, Sequence[Peer]]:
        """Return other kernels on the same weight, by name."""
        ...

    def error(self, x: Tensor) -> float:
        """Return the relative error of the first rows' part of the result against float64."""
        ...

    def path(self, m: int) -> str:
        """Return which kernel multiplies so many rows of activations."""
        ...


def subject(row: Row, n: int, k: int, cache: int) -> Subject:
    """Return what a row of the table is on a layer `[n, k]` of the current CUDA device with `cache` bytes of L2."""
    if row.experts:
        return Experts(row, n, k, cache)
    return Integers(row, n, k, cache) if row.inputs else Packed(row, n, k, cache)


class Packed:
    """Activations times packed weights."""

    def __init__(self, row: Row, n: int, k: int, cache: int) -> None:
        self.weight = random_weight(row.grid, n, k, row.kind, "cuda", group=row.group)
        self.copies = [self.weight.clone() for _ in range(timing.copies_for(self.weight.nbytes, cache))]
        self.dense = _dense(n, k, cache)
        self.has_peers = row.grid == "int4" and row.kind == "group"

    def calls(self, x: Tensor) -> Sequence[Call]:
        """See `Subject`, as the others."""
        return [_bound(ops.linear, x, copy, None, torch.bfloat16) for copy in self.copies]

    def dense_calls(self, x: Tensor) -> Sequence[Call]:
        """With cuBLAS."""
        return [_bound(torch.nn.functional.linear, x, w) for w in self.dense]

    def peers(self) -> Mapping[str, Sequence[Peer]]:
        """Other kernels for int4 with groups."""
        return {name: make(self.weight) for name, make in PEERS.items() if self.has_peers}

    def error(self, x: Tensor) -> float:
        """See `Subject`."""
        from compressor.kernels.gpu.launch import dequantize

        n = min(CHECKED_ROWS, self.weight.shape[0])
        expected = x.double() @ dequantize(self.weight, torch.float32, 0, n).double().T
        return _relative(ops.linear(x, self.weight, None, torch.bfloat16)[:, :n], expected)

    def path(self, m: int) -> str:
        """See `Subject`."""
        return path_for(m)


class Integers:
    """Activations rounded to integers, times integers; the rounding is part of what is timed."""

    def __init__(self, row: Row, n: int, k: int, cache: int) -> None:
        bits = int(row.grid.removeprefix("int"))
        self.weight = random_int_weight(bits, n, k, row.group, "cuda")
        self.copies = [self.weight.clone() for _ in range(timing.copies_for(self.weight.nbytes, cache))]
        self.dense = _dense(n, k, cache)
        self.rotated = row.rotated > 0
        last = Quantize(INPUT_FORMATS[row.inputs])
        _, self.rounding = fused((*_turning(row.rotated, k), last), torch.device("cuda"), rotations=True)

    def calls(self, x: Tensor) -> Sequence[Call]:
        """See `Subject`."""
        return [_bound(int_ops.linear, x, copy, self.rounding, None) for copy in self.copies]

    def dense_calls(self, x: Tensor) -> Sequence[Call]:
        """With cuBLAS."""
        return [_bound(torch.nn.functional.linear, x, w) for w in self.dense]

    def peers(self) -> Mapping[str, Sequence[Peer]]:
        """PyTorch's own integer product, with rounding and scales around it as plain operations."""
        if self.weight.bits != 8 or self.weight.group or self.rotated:
            return {}
        numbers, scale = numbers_of(self.weight).T, self.weight.scale[: self.weight.shape[0]]

        def eager(x: Tensor) -> Tensor:
            step = x.abs().amax(-1, keepdim=True).float() / 127.5
            codes = (x / step).round().clamp(-128, 127).to(torch.int8)
            # The operator wants more than 16 rows.
            padded = torch.nn.functional.pad(codes, (0, 0, 0, max(0, 17 - len(codes))))
            return (torch._int_mm(padded, numbers)[: len(codes)] * step * scale).to(x.dtype)

        return {"_int_mm": [eager]}

    def error(self, x: Tensor) -> float:
        """See `Subject`; the reference has the same codes of activations."""
        n = min(CHECKED_ROWS, self.weight.shape[0])
        codes, scale, _ = codes_of(x, self.rounding)
        expected = codes.double() @ decode_integers(self.weight)[:n].double().T * scale[:, None]
        return _relative(int_ops.linear(x, self.weight, self.rounding, None)[:, :n], expected)

    def path(self, m: int) -> str:
        """One kernel does all."""
        return "int"


def _turning(size: int, k: int) -> tuple[InputOp, ...]:
    """Return a random permutation and rotation of blocks, on the GPU; nothing if `size` is 0."""
    if not size:
        return ()
    matrix, _ = torch.linalg.qr(torch.randn(size, size, device="cuda"))
    return Permute(torch.randperm(k, device="cuda")), Rotate(matrix.half(), half=True)


class Experts:
    """Rows spread over experts; sorting them is part of what is timed, on our side alone."""

    def __init__(self, row: Row, n: int, k: int, cache: int) -> None:
        made = [random_weight(row.grid, n, k, row.kind, "cuda", group=row.group, seed=i) for i in range(row.experts)]
        stack = experts.stack(made)
        assert stack is not None, "made alike"
        self.stack, self.count = stack, row.experts
        self.copies = [stack.clone() for _ in range(timing.copies_for(stack.nbytes, cache))]
        self.dense = torch.randn(row.experts, n, k, dtype=torch.bfloat16, device="cuda").transpose(1, 2)

    def calls(self, x: Tensor) -> Sequence[Call]:
        """See `Subject`."""
        chosen = self._chosen(len(x))
        return [_bound(self._product, x, copy, chosen) for copy in self.copies]

    def dense_calls(self, x: Tensor) -> Sequence[Call]:
        """With PyTorch's grouped product of rows that are sorted already."""
        order = self._chosen(len(x)).sort()
        ends = torch.searchsorted(order.values, torch.arange(self.count, device=x.device), right=True)
        rows = x[order.indices // PER_TOKEN]
        return [lambda: torch._grouped_mm(rows, self.dense, offs=ends.to(torch.int32))]

    def peers(self) -> Mapping[str, Sequence[Peer]]:
        """None."""
        return {}

    def error(self, x: Tensor) -> float:
        """See `Subject`."""
        chosen, n = self._chosen(len(x)), min(CHECKED_ROWS, self.stack.shape[0])
        found = self._product(x, self.stack, chosen)[:, :n]
        expected = torch.empty(found.shape, dtype=torch.float64, device=x.device)
        for expert in chosen.unique().tolist():
            rows = (chosen == expert).nonzero()[:, 0]
            weight = ops.dense(experts.member(self.stack, expert), torch.float32)[:n].double()
            expected[rows] = x[rows // PER_TOKEN].double() @ weight.T
        return _relative(found, expected)

    def path(self, m: int) -> str:
        """One launch, of tiles of so many rows."""
        return f"grouped {experts.block_rows(m * PER_TOKEN, self.count)}"

    def _chosen(self, m: int) -> Tensor:
        return torch.arange(m * PER_TOKEN, device="cuda") % self.count

    def _product(self, x: Tensor, stack: RuntimeWeight, chosen: Tensor) -> Tensor:
        rows = chosen.numel()
        routing = experts.route(chosen, self.count, experts.block_rows(rows, self.count))
        return experts.linear(x, stack, routing, rows)


def _dense(n: int, k: int, cache: int) -> list[Tensor]:
    return [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(timing.copies_for(2 * n * k, cache))]


def _bound(function: Callable[..., object], *arguments: object) -> Call:
    return lambda: function(*arguments)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def _tinygemm(weight: RuntimeWeight) -> list[Peer]:
    """Return PyTorch's own int4 kernel on the same codes and scales, on copies larger than the cache."""
    n, k = weight.shape
    if weight.group not in (32, 64, 128, 256) or n % 8 or k % 1024:
        return []
    codes = unpack_words(weight.words, weight.bits, "int4", weight.shape)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    scale = weight.scale.transpose(0, 1).flatten(1)[:n, : k // weight.group].T.contiguous()  # [groups, n]
    both = torch.stack((scale, torch.zeros_like(scale)), -1).to(torch.bfloat16)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = [packed.clone() for _ in range(timing.copies_for(packed.nbytes, cache))]
    return [_tinygemm_call(copy, weight.group, both) for copy in copies]


def _tinygemm_call(packed: Tensor, group: int, scales: Tensor) -> Peer:
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)


def _gemlite(weight: RuntimeWeight) -> list[Peer]:
    """Return gemlite's kernel on random codes of the same shape, if it is installed."""
    try:
        gemlite = importlib.import_module("gemlite")
    except ImportError:
        return []
    n, k = weight.shape
    codes = unpack_words(weight.words, weight.bits, "int4", weight.shape)
    scale = weight.scale.transpose(0, 1).flatten(1)[:n, : k // weight.group].reshape(-1, 1).contiguous()
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    layers: list[Peer] = []
    for _ in range(timing.copies_for(weight.nbytes, cache)):
        layer = gemlite.GemLiteLinear(
            4,
            group_size=weight.group,
            in_features=k,
            out_features=n,
            input_dtype=gemlite.DType.BF16,
            output_dtype=gemlite.DType.BF16,
        )
        layer.pack(codes, scale, torch.full_like(scale, 8), None)
        layers.append(layer.forward)
    return layers


PEERS: dict[str, Callable[[RuntimeWeight], list[Peer]]] = {"tinygemm": _tinygemm, "gemlite": _gemlite}
"""Other kernels for int4 with groups, by name: their calls on copies of a weight; none where they do not apply."""
