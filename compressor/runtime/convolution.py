"""A convolution whose weight stays packed, as a matrix with a row per filter, and is decoded for each forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.formats.base import PackedTensor, QuantFormat
from compressor.runtime.modules import PackedLinear


class PackedConv2d(PackedLinear):
    """A convolution that computes with the decoded weight; small on disk and in memory, no faster than the dense one.

    Args:
        packed: The weight, as a matrix with one row per filter.
        fmt: The format that packed it.
        convolution: The module it replaces: gives window, stride, padding, dilation, groups and bias.
        dtype: The model's dtype, which the decoded weight is rounded to.
    """

    def __init__(
        self, packed: PackedTensor, fmt: QuantFormat, convolution: nn.Conv2d, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(packed, fmt, convolution.bias, (), dtype)
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        self.kernel_size, self.stride, self.dilation = (
            convolution.kernel_size,
            convolution.stride,
            convolution.dilation,
        )
        self.padding, self.padding_mode, self.groups = (
            convolution.padding,
            convolution.padding_mode,
            convolution.groups,
        )
        self._padded = list(convolution._reversed_padding_repeated_twice)

    def dequantize(self) -> Tensor:
        """Return the weight, `[out, in / groups, height, width]` in the model's dtype."""
        matrix: Tensor = super().dequantize()
        return matrix.reshape(len(matrix), self.in_channels // self.groups, *self.kernel_size)

    def prepare(self) -> None:
        """Leave the weight as it is on disk: no kernel here multiplies patches by packed bytes."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `[images, out, height, width]` in the model's dtype."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._padded, mode=self.padding_mode), 0
        return F.conv2d(x, self.dequantize(), self.bias, self.stride, padding, self.dilation, self.groups)
