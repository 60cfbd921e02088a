"""Options of every method that learns roundings: how long, on what, and how errors count."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from pydantic import Field

from compressor.calibration import precision
from compressor.errors import RecipeError
from compressor.methods.scaled import ScalingOptions

MOST_STEPS_AT_2_BITS = 60
"""More of them fit the calibration tokens better and others worse, up to a useless model."""


class LearningOptions(ScalingOptions):
    """Options of every method that learns by reconstruction."""

    effort: Literal["fast", "balanced", "best"] = Field(
        "balanced",
        description="fast, balanced or best: 50, 200 or 1000 steps per block (at 2 bits 60 at most), unless iters says "
        "so, on 16, 32 or 128 samples, unless the recipe says so",
    )
    iters: int | None = Field(None, ge=0, le=100_000, description="optimizer steps per block; effort decides if unset")
    batch: int = Field(2, ge=1, le=64, description="calibration samples per step")
    checks: int = Field(4, ge=1, le=100, description="times the loss on a fixed subset decides which variables to keep")
    input_mix: float = Field(
        1.0, ge=0, le=1, description="share of input values from the compressed prefix, the rest from the original"
    )
    drop: float = Field(
        0.0,
        ge=0,
        le=1,
        description="where inputs are rounded: share of their values, drawn anew in every step, that stay unrounded "
        "while learning (QDrop); 1 learns the weights by themselves",
    )
    balance: float = Field(
        0.5, ge=0, le=1, description="of tokens in the loss: 0 for plain squared errors, 1 for errors relative to each"
    )
    blend: float | None = Field(
        None,
        ge=0,
        le=1,
        description="how far tokens are moved towards others while learning, so that roundings hold between them; "
        "if unset 0.5 at 2 bits, else 0",
    )
    window: int | None = Field(
        None,
        ge=2,
        description="tokens of the pieces that samples are cut into while learning; if unset 128 at 2 bits, else whole "
        "samples",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the block's products while learning; auto: bf16 where processor and bits allow"
    )

    def steps(self, bits: int) -> int:
        """Return the optimizer steps per block; `bits` are those of its widest weight."""
        if self.iters is not None:
            return self.iters
        steps = {"fast": 50, "balanced": 200, "best": 1000}[self.effort]
        return min(steps, MOST_STEPS_AT_2_BITS) if bits == 2 else steps

    def reach(self, bits: int) -> float:
        """Return how far tokens are moved; `bits` are those of the block's widest weight."""
        if self.blend is not None:
            return self.blend
        return 0.5 if bits == 2 else 0.0

    def window_of(self, bits: int, seq_len: int) -> int:
        """Return the tokens that samples of `seq_len` tokens are cut into; `bits` are those of the widest weight.

        First tokens are unlike all others, and every window has one. At 2 bits the first tokens of 32 samples are too
        few to learn what others become.

        Raises:
            RecipeError: The window does not divide the samples.
        """
        if self.window is None:
            return math.gcd(128, seq_len) if bits == 2 and seq_len % 32 == 0 else seq_len
        if seq_len % self.window:
            raise RecipeError(f"window={self.window} does not divide samples of {seq_len} tokens", "use a divisor")
        return self.window

    def check_images(self) -> None:
        """Refuse options that mean tokens of a text.

        Raises:
            RecipeError: One of them is set.
        """
        for name in ("blend", "window"):
            if getattr(self, name) is not None:
                raise RecipeError(f"option {name} is about tokens of a text; this model reads images", "leave it out")

    def products(self, device: torch.device, bits: int) -> AbstractContextManager[None]:
        """Return the context the block's products are computed in; `bits` are those of its widest weight."""
        if self.precision == "auto":
            return precision.products(device, bits)
        return nullcontext() if self.precision == "fp32" else torch.autocast(device.type, dtype=torch.bfloat16)
