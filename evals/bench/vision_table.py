"""What a table of filter pruning says: the ways to cut or to round, at which sparsities, from how many seeds."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressor.errors import RecipeError
from compressor.evals.bench.table import DIGEST_CHARS

SCHEMA = "compressor-bench-vision/1"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Arm(_Strict):
    """One way to cut, tried at every sparsity of the table.

    Attributes:
        name: Shown in the table, unique in it.
        tool: Another tool that cuts instead, with its own importance; None: a method of ours.
        method: A pruner of kind `vision`, or the tool's importance.
        options: Of the method.
        finetune: Fields of the training after the cut that differ from the table's.
        sparsities: Only these; None: all of the table's.
    """

    name: str = Field(min_length=1)
    tool: Literal["torch-pruning"] | None = None
    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    finetune: dict[str, Any] = Field(default_factory=dict)
    sparsities: tuple[float, ...] | None = None


class Rounding(_Strict):
    """One way to round the blocks of the original and of all that was fine-tuned.

    Attributes:
        name: Shown in the table, unique in it.
        method: As `compress quantize --method`.
        format: As `--format`; per channel.
        options: Of the method.
        n_samples: Of calibration: each is eight training images.
        batch_norm: As `--batch-norm`.
    """

    name: str = Field(min_length=1)
    method: str
    format: str
    options: dict[str, Any] = Field(default_factory=dict)
    n_samples: int = Field(32, ge=1)
    batch_norm: Literal["correct", "reestimate"] | None = None


class VisionTable(_Strict):
    """A table.

    Attributes:
        kind: Tells it from tables of language models.
        title: Heading of the page.
        text: A paragraph under it.
        file: Labelled images: name inside --data-dir.
        sha256: Of the file.
        model: Fields of the small ResNet's config.
        training: How the original is trained.
        finetune: How what was cut is trained.
        seeds: How many.
        sparsities: Shares of the filters to remove.
        formats: Formats, per channel, that the weights are rounded to after all.
        against: The way the others are compared with.
        arms: In the order in which they run.
        roundings: Ways to round with the package's methods, a table of their own under that of the cuts.
    """

    kind: Literal["vision"]
    title: str = Field(min_length=1)
    text: str = ""
    file: str = Field(pattern=r"^[^/\\]+\.npz$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    model: dict[str, Any]
    training: dict[str, Any]
    finetune: dict[str, Any]
    seeds: int = Field(ge=2)
    sparsities: tuple[float, ...] = Field(min_length=1)
    formats: tuple[str, ...] = ()
    against: str
    arms: tuple[Arm, ...] = Field(min_length=1)
    roundings: tuple[Rounding, ...] = ()

    def spec(self, seed: int, data: str) -> dict[str, Any]:
        """Return what the program is told."""
        arms = [
            {**arm.model_dump(exclude={"sparsities"}, exclude_none=True), "sparsity": share}
            for arm in self.arms
            for share in arm.sparsities or self.sparsities
        ]
        whole = {"model": self.model, "training": self.training, "finetune": self.finetune}
        spec = {"data": data, **whole, "arms": arms, "formats": list(self.formats), "seed": seed}
        return {**spec, "roundings": [one.model_dump() for one in self.roundings]} if self.roundings else spec

    def key(self, seed: int) -> str:
        """Return the name of a seed's result file, without suffix."""
        return f"seed-{seed}-{self.digest(seed)[:DIGEST_CHARS]}"

    def folder(self, seed: int) -> str:
        """Return the name of a seed's work folder: ways that are added or changed find what the others have made."""
        rest = {key: value for key, value in self.spec(seed, self.sha256).items() if key not in ("arms", "roundings")}
        return f"seed-{seed}-{hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:DIGEST_CHARS]}"

    def original(self, seed: int) -> str:
        """Return the name of the file with the trained original, which tables that train alike share."""
        what = [self.sha256, self.model, self.training, seed, version("torch"), version("transformers")]
        return f"{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:DIGEST_CHARS]}.safetensors"

    def digest(self, seed: int) -> str:
        """Return the hex SHA-256 of all that a seed's result depends on."""
        return hashlib.sha256(json.dumps(self.spec(seed, self.sha256), sort_keys=True).encode()).hexdigest()


def is_vision(path: Path) -> bool:
    """Return whether a YAML file says it is such a table; whatever is wrong with it otherwise is found later."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return False
    return isinstance(data, dict) and data.get("kind") == "vision"


def read_vision_table(path: Path) -> VisionTable:
    """Read a table.

    Raises:
        RecipeError: Not a table; the message names the field.
    """
    try:
        table = VisionTable.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{path}: {where}: {first['msg']}") from error
    names = [arm.name for arm in table.arms]
    if len(set(names)) < len(names) or table.against not in names:
        raise RecipeError(f"{path}: arms are {', '.join(names)}; against is {table.against!r}", "names must be unique")
    ways = [rounding.name for rounding in table.roundings]
    if len(set(ways)) < len(ways):
        raise RecipeError(f"{path}: roundings are {', '.join(ways)}", "names must be unique")
    return table
