"""What a linear layer costs at least: bytes over bandwidth, operations over the matrix unit's rate."""

from __future__ import annotations

from dataclasses import dataclass

from compressor.kernels.gpu.layout import CODES, SPARSE, TABLE_WORDS, TABLES, THREE_BITS

LAYERS: dict[str, tuple[int, int]] = {
    "7B qkv": (12288, 4096),
    "7B o": (4096, 4096),
    "7B gate_up": (22016, 4096),
    "7B down": (4096, 11008),
    "70B qkv": (10240, 8192),
    "70B o": (8192, 8192),
    "70B gate_up": (57344, 8192),
    "70B down": (8192, 28672),
}
"""Linear layers of Llama's shapes, `[out, in]`, fused as runtimes fuse them."""

PER_TOKEN = 2
"""Experts that every row of activations goes to."""

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)


@dataclass(frozen=True)
class Row:
    """A format as the bench runs it.

    Attributes:
        name: What the table calls it.
        grid: See `layout.RuntimeWeight`.
        kind: See `samples.KINDS`.
        group: Columns per scale; 0 for whole rows.
        scale_bytes: Bytes of one scale.
        stored: Name and group size of the format on disk; `bf16` for dense weights.
        inputs: What inputs are rounded to before an integer product; empty for products with weights alone.
        experts: Experts of a layer, of which every row of activations goes to `PER_TOKEN`; 0 for plain layers.
        rotated: Columns of the blocks that inputs are turned in, reordered, before they are rounded; 0: they are not.
    """

    name: str
    grid: str
    kind: str
    group: int
    scale_bytes: int
    stored: tuple[str, int | None]
    inputs: str = ""
    experts: int = 0
    rotated: int = 0

    def weight_bytes(self, n: int, k: int) -> int:
        """Return the bytes a matrix takes in memory, padding left out; of experts one."""
        if self.inputs:  # scales are float32, and so is a sum per row
            return n * k * int(self.grid.removeprefix("int")) // 8 + 4 * n * (1 + k // (self.group or k))
        if self.grid in TABLES:
            return self._code_bytes(n, k) + 4 * 3 * TABLE_WORDS
        return self._code_bytes(n, k)

    def touched_bytes(self, n: int, k: int, m: int) -> int:
        """Return the bytes of weights that `m` rows of activations need, spread evenly over experts."""
        return self.weight_bytes(n, k) * (min(self.experts, m * PER_TOKEN) if self.experts else 1)

    def _code_bytes(self, n: int, k: int) -> int:
        codes = n * k * (3 if self.grid in THREE_BITS else 9 if self.grid in SPARSE else 32 // CODES[self.grid]) // 8
        return codes + (n * k // self.group * self.scale_bytes if self.group else 0) + (4 * n if self._has_rows else 0)

    @property
    def _has_rows(self) -> bool:
        return self.kind not in ("group", "dense")


FORMATS: tuple[Row, ...] = (
    Row("int4 g128", "int4", "group", 128, 2, ("int4", 128)),
    Row("int4 g32", "int4", "group", 32, 2, ("int4", 32)),
    Row("nvfp4", "e2m1", "nvfp4", 16, 1, ("nvfp4", 16)),
    Row("mxfp4", "e2m1", "mxfp4", 32, 1, ("mxfp4", 32)),
    Row("e2m1 channel", "e2m1", "channel", 0, 0, ("fp4", None)),
    Row("e3m0 channel", "e3m0", "channel", 0, 0, ("fp4", None)),
    Row("int2 g128", "int2", "group", 128, 2, ("int2", 128)),
    Row("int3 g128", "int3", "group", 128, 2, ("int3", 128)),
    Row("power4 g128", "table8", "group", 128, 2, ("power4", 128)),
    Row("power3 g128", "table3bit", "group", 128, 2, ("power3", 128)),
    Row("power2 g128", "table2bit", "group", 128, 2, ("power2", 128)),
    Row("power4 channel", "table8", "channel", 0, 0, ("power4", None)),
    Row("int4 g128, 8 experts", "int4", "group", 128, 2, ("int4", 128), experts=8),
    Row("nvfp4, 8 experts", "e2m1", "nvfp4", 16, 1, ("nvfp4", 16), experts=8),
    Row("power4 g128, 8 experts", "table8", "group", 128, 2, ("power4", 128), experts=8),
    Row("int8 x int8", "int8", "channel", 0, 4, ("int8", None), "int8-token"),
    Row("int4 x int8", "int4", "channel", 0, 4, ("int4", None), "int8-token"),
    Row("int4 x int8, rotated", "int4", "channel", 0, 4, ("int4", None), "int8-token", rotated=128),
    Row("int4 g128 x int8", "int4", "group", 128, 4, ("int4", 128), "int8-token"),
    Row("int8 channel", "int8", "channel", 0, 0, ("int8", None)),
    Row("bf16 2:4", "bfloat16-2of4", "dense", 0, 0, ("bf16", None)),
)


def layer_bytes(weight_bytes: int, m: int, n: int, k: int) -> int:
    """Return the bytes a product must move: the weight once, 16-bit activations in and out once."""
    return weight_bytes + 2 * m * (n + k)


def floor_seconds(weight_bytes: int, m: int, n: int, k: int, bandwidth: float, rate: float) -> float:
    """Return the least time of a product, by memory or by arithmetic, whichever is slower.

    Args:
        weight_bytes: Bytes of the weight.
        m: Rows of activations.
        n: Rows of the weight.
        k: Columns of both.
        bandwidth: Bytes per second.
        rate: Operations per second, a multiplication and an addition counting two.
    """
    return max(layer_bytes(weight_bytes, m, n, k) / bandwidth, 2 * m * n * k / rate)


def ideal_speedup(weight_bytes: int, m: int, n: int, k: int, bandwidth: float, rate: float) -> float:
    """Return how much faster than a bfloat16 weight a packed one could be."""
    dense = floor_seconds(2 * n * k, m, n, k, bandwidth, rate)
    return dense / floor_seconds(weight_bytes, m, n, k, bandwidth, rate)
