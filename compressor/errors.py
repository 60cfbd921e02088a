"""Every error a user can meet, and the exit code it ends the command with.

An error says what is wrong and where (tensor, shape, file), then what to try, with numbers. Nothing else in the
package calls `sys.exit`; the command line maps these classes to exit codes in one place.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar


class CompressorError(Exception):
    """Base of all planned errors.

    Args:
        message: One line: the thing that is wrong and the numbers that show it.
        hint: What to try next; empty when there is nothing useful to say.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RecipeError(CompressorError):
    """What the user asked for is not valid: flags, recipe, names, or an output folder in the way."""

    exit_code = 2


class UnsupportedError(CompressorError):
    """This model, shape, format or hardware is not supported."""

    exit_code = 4


class CheckpointError(CompressorError):
    """The source cannot be read or trusted: missing, truncated, corrupt, not finite, or pickled."""

    exit_code = 4


class ResourceError(CompressorError):
    """Memory or disk ran out; what was finished is kept and the next run continues there."""

    exit_code = 5


class HubError(CompressorError):
    """A download that is needed could not be had: network, authentication, or offline and not cached."""

    exit_code = 6


class VerificationError(CompressorError):
    """The result was written but cannot be trusted."""

    exit_code = 7


class NumericalError(VerificationError):
    """A computation left the numbers it can be trusted with."""


class CoverageError(VerificationError):
    """Calibration data did not reach what it had to reach."""


def did_you_mean(kind: str, name: str, known: Iterable[str]) -> RecipeError:
    """Build the error for an unknown name, with the closest known names as the hint."""
    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of: {', '.join(names)}"
    return RecipeError(f"unknown {kind} {name!r}", hint)


def disk_error(error: OSError, path: Path) -> ResourceError:
    """Turn a failed write into the error users see; other causes keep their own words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(
            f"{path}: the disk is full ({error.strerror})",
            "free space and run the same command again; finished units are kept",
        )
    return ResourceError(f"{path}: cannot write: {error.strerror}", "check the folder's permissions")
