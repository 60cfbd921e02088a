"""What filter pruning can be told: which filters go, how many, and how the model is trained afterwards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressor.methods.base import MethodOptions
from compressor.vision.finetune import Augment, Loss
from compressor.vision.ranking import Ratio


class CutOptions(MethodOptions):
    """Options of every method that removes filters."""

    scope: Literal["all", "inner"] = Field(
        "all", description="inner: only layers whose channels no residual sum shares with others"
    )
    combine: Literal["mean", "max"] = Field(
        "mean", description="how the scores of layers that share channels are joined"
    )
    ratios: dict[str, float] | None = Field(
        None,
        description="JSON: glob of layers -> share of their filters to remove, instead of --sparsity",
    )
    round_to: int = Field(1, ge=1, description="raise the number of kept filters to a multiple of this")
    budget: Literal["uniform", "sensitivity"] = Field(
        "uniform",
        description="with --macs: the same share of every layer, or more of layers that bear it (looks at images)",
    )
    recalibrate: int = Field(
        512, ge=0, description="training images to compute batch normalization's statistics from again; 0: leave them"
    )
    sparse_epochs: int = Field(
        0, ge=0, description="epochs of training before the cut that shrink what will be cut (MaskSparsity); 0: none"
    )
    sparse_strength: float | None = Field(
        None,
        gt=0,
        description="of their penalty; unset: what brings the largest scale that goes to 0 halfway",
    )
    validation: float = Field(
        0.1, ge=0, lt=1, description="share of the training images that picks the best epoch; 0: keep the last one"
    )
    patience: int = Field(0, ge=0, description="stop after so many epochs without a better validation; 0: never")
    lr: float = Field(0.01, gt=0, description="learning rate of fine-tuning; falls to 0 along a cosine")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of fine-tuning")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay of fine-tuning")
    batch: int = Field(64, ge=2, description="images per step of fine-tuning")
    loss: Loss = Field("plain", description="balanced: every class weighs the same in fine-tuning, however few images")
    augment: Augment = Field("shift+flip", description="of images in fine-tuning: none, shift, flip or shift+flip")


class RankedOptions(CutOptions):
    """Options of methods that look at images to rank filters."""

    ranking_batch: Literal["random", "balanced"] = Field(
        "random", description="images to rank on: any, or equally many of every class"
    )
    ranking_images: int = Field(256, ge=2, description="how many images to rank on")


class BetaRankOptions(RankedOptions):
    """Options of Beta-Rank."""

    ratio: Ratio = Field(
        "out_over_in",
        description="spread of outputs over that of inputs (published code), or in_over_out (published formula)",
    )
    robust: bool = Field(False, description="keep nearly constant filters from getting huge scores")


class TaylorOptions(RankedOptions):
    """Options of the first-order ranking."""

    ranking_batch: Literal["random", "balanced"] = Field(
        "balanced", description="images to rank on: any, or equally many of every class"
    )
    classes: Literal["mean", "max", "all"] = Field(
        "mean", description="mean or max over classes of each class's own score; all: over images, whatever their class"
    )
