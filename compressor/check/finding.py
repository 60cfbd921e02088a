"""What a check reports: one sentence about one thing, and how much it matters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Literal, TypeAlias

Reader: TypeAlias = Literal["transformers", "vllm"]
"""Programs other than this one that a checkpoint can be checked for."""


class Severity(StrEnum):
    """How much a finding matters."""

    ERROR = "error"
    """The checkpoint cannot be trusted, or not by the reader that was asked about."""
    WARNING = "warning"
    """Worth a look; what was checked computes what it should."""
    INFO = "info"
    """A fact the reader of the report may want to know."""


@dataclass(frozen=True)
class Finding:
    """One thing a check has to say.

    Attributes:
        severity: See `Severity`.
        where: Tensor, module, file or config key.
        message: What is there, with numbers.
        hint: What to try; empty when there is nothing to do.
    """

    severity: Severity
    where: str
    message: str
    hint: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def error(where: str, message: str, hint: str = "") -> Finding:
    """Build an error."""
    return Finding(Severity.ERROR, where, message, hint)


def warning(where: str, message: str, hint: str = "") -> Finding:
    """Build a warning."""
    return Finding(Severity.WARNING, where, message, hint)


def info(where: str, message: str, hint: str = "") -> Finding:
    """Build a plain fact."""
    return Finding(Severity.INFO, where, message, hint)
