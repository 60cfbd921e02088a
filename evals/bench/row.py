"""One row of a table: a recipe of ours, or a call of another tool, checked before anything runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compressor.evals.bench.pruning import Prune

ORIGINAL = "original"
"""Name of the row every table begins with: the model as it is."""

ROUNDING = ("gptq", "rtn", "awq")
"""What llm-compressor does to weights alone; `smoothquant+gptq` rounds inputs too, and pruning is said by `prune`."""

TOOL_MASKS = ("wanda", "sparsegpt")
"""Ways to prune that llm-compressor has too."""


class Strict(BaseModel):
    """Frozen, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TextFile(Strict):
    """A text, or a share of one."""

    file: str = Field(pattern=r"^[^/\\]+\.(txt|jsonl)$", description="file name inside --data-dir")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the file; another text is another table")
    part: tuple[float, float] | None = Field(None, description="from where to where, as shares of its characters")

    @model_validator(mode="after")
    def _in_order(self) -> TextFile:
        if self.part is not None and not 0 <= self.part[0] < self.part[1] <= 1:
            raise ValueError(f"part {list(self.part)} is not a start and a stop between 0 and 1")
        return self


class Preset(Strict):
    """Calibration text that `--data` knows by name."""

    preset: Literal["python-docs", "self"]


class Row(Strict):
    """One row.

    Attributes:
        name: Shown in the table, unique in it.
        method: Method of ours; None for the original and other tools' rows.
        format: Format of the weights.
        group_size: Inputs per scale, `channel`, or what else `--group-size` takes; None is the format's default.
        inputs: Format the inputs of layers are rounded to, or None.
        attention: Floats the operands of attention are rounded to, or None.
        options: Options of our method.
        text: Calibration text instead of the table's.
        samples: Calibration samples instead of the table's, for methods that read more when they learn longer.
        seq_len: Tokens of a calibration sample instead of the table's.
        seed: Seed instead of the table's; rows that differ in it alone make one line of the page.
        tool: The other tool, or None.
        prune: What is pruned first; without a method of ours that is all.
        algorithm: llm-compressor: `gptq`, `rtn`, `awq` or, with inputs, `smoothquant+gptq`.
        iters: AutoRound: steps per block.
    """

    name: str = Field(min_length=1)
    method: str | None = None
    format: str | None = None
    group_size: str | None = None
    inputs: str | None = None
    attention: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    text: TextFile | Preset | None = None
    samples: int | None = Field(None, ge=1)
    seq_len: int | None = Field(None, ge=2)
    seed: int | None = Field(None, ge=0)
    prune: Prune | None = None
    tool: Literal["llmcompressor", "autoround", "gptqmodel"] | None = None
    algorithm: Literal["gptq", "rtn", "awq", "smoothquant+gptq"] | None = None
    iters: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _complete(self) -> Row:
        given = {name for name, value in self if name != "name" and value not in (None, {})}
        if self.name == ORIGINAL:
            if given:
                raise ValueError(f"the row {ORIGINAL!r} comes by itself, name this one otherwise")
            return self
        wanted = self._wanted()
        if given - wanted:
            raise ValueError(f"{', '.join(sorted(given - wanted))} means nothing for {self.tool or 'a row of ours'}")
        optional = {"group_size", "inputs", "attention", "options", "text", "samples", "seq_len", "seed", "prune"}
        missing = wanted - given - optional
        if self.prune is not None and not given & {"method", "format", "group_size", "inputs", "attention", "options"}:
            missing = set()  # pruned and not rounded
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))} is missing")
        if self.tool is not None:
            self._check_tool()
        return self

    def _wanted(self) -> set[str]:
        """Return the fields that mean something for this row."""
        weights = {"tool", "format", "group_size", "seed"}
        if self.tool == "llmcompressor":
            return {"tool", "prune", "seed"} if self.prune else {*weights, "algorithm", "inputs"}
        if self.tool == "autoround":
            return {*weights, "iters"}
        if self.tool == "gptqmodel":
            return weights
        ours = {"method", "format", "group_size", "inputs", "attention", "options"}
        return {*ours, "text", "samples", "seq_len", "seed", "prune"}

    def _check_tool(self) -> None:
        """Refuse what the tool, or the program that calls it, cannot do."""
        if self.prune is not None:
            asked = self.prune
            if asked.method not in TOOL_MASKS or asked.options or asked.format or asked.macs or asked.after:
                raise ValueError(f"{self.tool} prunes with {' or '.join(TOOL_MASKS)}, a sparsity or a pattern alone")
            return
        integers = str(self.format).startswith("int")
        if self.tool != "llmcompressor" and not integers:
            raise ValueError(f"{self.tool} rows are integers, not {self.format!r}")
        smooth = self.algorithm == "smoothquant+gptq"
        if smooth != (self.inputs is not None):
            raise ValueError("algorithm smoothquant+gptq and inputs go together")
        if smooth and (self.format, self.inputs, self.group_size) != ("int8", "int8-token", None):
            raise ValueError("smoothquant+gptq means format int8, inputs int8-token and no group size")
        if integers and not smooth and not str(self.group_size).isdecimal():
            raise ValueError(f"group_size is {self.group_size!r}, {self.tool} needs a number for {self.format}")

    @property
    def is_original(self) -> bool:
        """True for the model as it is."""
        return self.name == ORIGINAL
