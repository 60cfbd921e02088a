"""What the user asks for, validated before anything is read or computed."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SAMPLES = {"fast": 16, "balanced": 32, "best": 128}
"""Windows of calibration text for each `effort`: more steps than samples to take them on would learn these by heart."""

EXPERT_SHARE = 0.005
"""Share of the calibration tokens that every expert is to see unless the recipe says otherwise."""


class CalibrationSpec(BaseModel):
    """Which text calibrates the model and how much of it; the seed that picks windows belongs to the whole recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = Field(
        default="python-docs",
        min_length=1,
        description="a preset's name, a .txt or .jsonl file, or a Hub dataset as owner/name or owner/name:config",
    )
    n_samples: int = Field(default=SAMPLES["balanced"], ge=1, le=65_536, description="windows of text the methods see")
    seq_len: int = Field(default=512, ge=2, le=1_048_576, description="tokens in one window")
    text_column: str = Field(default="text", min_length=1, description="column (or JSON key) that holds the text")
    split: str = Field(default="train", min_length=1, description="split of a Hub dataset")
    min_expert_tokens: int | None = Field(
        default=None, ge=0, description="tokens every expert is calibrated on; None: 0.5 % of all; 0: as they come"
    )

    @property
    def expert_tokens(self) -> int:
        """Tokens every expert is to be calibrated on."""
        if self.min_expert_tokens is not None:
            return self.min_expert_tokens
        return math.ceil(EXPERT_SHARE * self.n_samples * self.seq_len)


class Override(BaseModel):
    """What happens to tensors whose name matches a glob: another format, or nothing. The last match wins."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: str = Field(min_length=1, description="glob over tensor or module names")
    format: str | None = Field(default=None, description="format of these tensors")
    group_size: str | None = Field(default=None, description="inputs per scale, 'channel' or 'tensor'")
    keep: str | None = Field(default=None, description="why these tensors stay dense")

    @model_validator(mode="after")
    def _one_action(self) -> Override:
        if (self.format is None) == (self.keep is None):
            raise ValueError("an override needs either a format or a reason to keep")
        return self


class Recipe(BaseModel):
    """One compression: model, method, format, data.

    The recipe is saved beside the result. Together with the source's content, the calibration tokens and the package
    version it determines every byte that is written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = Field(1, ge=1, le=1, description="version of this schema")
    model: str = Field(min_length=1, description="embedded model name, folder, GGUF file, or Hub id[@revision]")
    method: str = Field(description="see: compress list methods")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the method")
    format: str | None = Field(None, description="see: compress list formats; None picks the method's default")
    group_size: str | None = Field(
        None, description="inputs per scale, 'channel' or 'tensor'; None picks the format's default"
    )
    inputs: str | None = Field(
        None, description="format of layers' inputs; see: compress list inputs; None: not rounded"
    )
    skip_inputs: tuple[str, ...] = Field(default=(), description="globs of layers whose inputs are not rounded")
    overrides: tuple[Override, ...] = Field(default=(), description="exceptions by name; the last match wins")
    kv_cache: Literal["fp8"] | None = Field(default=None, description="format of the key/value cache at run time")
    attention: str | None = Field(
        default=None, description="what the operands of attention's products are rounded to at run time; None: nothing"
    )
    batch_norm: Literal["correct", "reestimate"] | None = Field(
        default=None,
        description="running statistics of batch normalization behind rounded convolutions: fitted to what the "
        "original's gives on calibration images, or computed from these anew; None: left",
    )
    calibration: CalibrationSpec = Field(default_factory=CalibrationSpec)
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of everything random")
    trust_remote_code: bool = Field(False, description="run model code that comes with the checkpoint")
    allow_pickle: bool = Field(False, description="read pickled weights, as plain tensors: no code in them is run")

    @model_validator(mode="after")
    def _as_many_samples_as_effort_asks_for(self) -> Recipe:
        """Where the number of samples is left open, the method's `effort` decides, if it has one."""
        if "n_samples" in self.calibration.model_fields_set or self.options.get("effort") not in SAMPLES:
            return self
        calibration = self.calibration.model_copy(update={"n_samples": SAMPLES[self.options["effort"]]})
        object.__setattr__(self, "calibration", calibration)  # frozen for everybody else
        return self
