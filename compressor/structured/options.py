"""What OPTIN can be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressor.methods.base import MethodOptions


class OptinOptions(MethodOptions):
    """How units are measured, and what the result may look like."""

    group: int = Field(128, ge=1, description="neurons that go or stay together")
    group_by: Literal["size", "index"] = Field(
        "size",
        description="which neurons form a group: those whose outputs are about equally large, or neighbours",
    )
    layers: Literal["free", "equal"] = Field(
        "free",
        description="equal: as many heads and neurons in every layer, so that the model's own config can say it",
    )
    importance: Literal["trajectory", "logits", "random"] = Field(
        "trajectory",
        description="what a unit is worth: what the outputs of later layers and the logits lose without it; the logits "
        "alone; or chance, for comparison",
    )
    samples: int = Field(8, ge=1, description="windows of text that are looked at")
    window: int = Field(128, ge=2, description="tokens in one of them; calibration windows are cut into these")
    rows: int = Field(768, ge=2, description="tokens among which outputs of layers are compared")
    logit_rows: int = Field(256, ge=1, description="of those, tokens whose logits are compared (language models)")
    temperature: float = Field(4.0, gt=0, description="logits are divided by this before they are compared")
    balance: float = Field(10.0, gt=0, description="how much larger the layers' term is made than that of the logits")
    head_weight: float = Field(0.5, gt=0, description="factor of the importance of heads")
    last_weight: float = Field(0.5, gt=0, description="factor of the importance of the last layer's units")
    length: int = Field(512, ge=1, description="tokens of the sequence whose multiply-adds --macs means")
