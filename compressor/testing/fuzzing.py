"""Hostile input by the hundred: examples made by Hypothesis, tried in one forked child that may not misbehave."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, configuration, given, settings
from hypothesis.strategies import SearchStrategy

from compressor.errors import CompressorError
from compressor.testing.child import Child, call_main

T = TypeVar("T")
EXPECTED = (2, 4)
"""Exit codes of a command that was given something it cannot use."""


def fuzz(
    inputs: SearchStrategy[T] | Sequence[T],
    attempt: Callable[[T], str],
    *,
    examples: int = 0,
    seconds: float,
    writes: Sequence[Path],
    memory: int = 1 << 30,
) -> Counter[str]:
    """Try many inputs in one child.

    Args:
        inputs: The inputs, or what makes one.
        attempt: Tries one, returns in a few words what came of it, and raises where that may not be.
        examples: How many are made; always the same ones.
        seconds: Time for all of them together.
        writes: Where the child may write.
        memory: Bytes of address space the child may use beyond what it has.

    Returns:
        Outcome -> how often.

    Raises:
        AssertionError: The child hung, crashed, ran out of memory or did what it may not; the message has the last
            input and what the child said.
    """
    last = writes[0] / "last-input.txt"

    seen: Counter[str] = Counter()

    def each(value: T) -> None:
        last.write_text(repr(value)[:20_000], encoding="utf-8", errors="backslashreplace")
        seen[attempt(value)] += 1

    def work() -> int:
        if isinstance(inputs, SearchStrategy):
            # Hypothesis keeps notes, which the child may write to the temporary folder only.
            configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "compress-hypothesis")
            settings(
                max_examples=examples,
                derandomize=True,
                database=None,
                deadline=None,
                phases=(Phase.explicit, Phase.generate),
                suppress_health_check=list(HealthCheck),
            )(given(inputs)(each))()
        else:
            for value in inputs:
                each(value)
        sys.stdout.write(json.dumps(seen))
        return 0

    ended = Child(work, memory=memory, writes=writes).wait(seconds)
    shown = last.read_text(encoding="utf-8")[:3000] if last.is_file() else "none"
    assert not ended.late, f"still busy after {seconds} s; last input: {shown}"
    assert ended.code == 0, f"ended with {ended.code}; last input: {shown}\n{ended.err[-6000:]}"
    return Counter(json.loads(ended.out.splitlines()[-1]))


def outcome(call: Callable[[], object]) -> str:
    """Call something with hostile input; what is refused must be refused in one line, with a hint.

    Raises:
        Exception: Whatever is no planned error, as it is.
    """
    try:
        call()
    except CompressorError as error:
        check_error(error)
        return "refused"
    return "read"


def check_error(error: CompressorError) -> None:
    """Raise unless an error is one line with a hint and the exit code of unusable input."""
    assert error.exit_code in EXPECTED, (error.exit_code, error.message)
    assert error.message, error
    assert error.hint, error.message


def command(*arguments: object, also: tuple[int, ...] = ()) -> str:
    """Run the command line in this process on hostile input; returns what came of it.

    Args:
        arguments: What the user typed.
        also: Exit codes that are fine beside 0, 2 and 4.

    Raises:
        AssertionError: Another exit code, or an error that is not one line.
    """
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = call_main(*arguments)
    text = err.getvalue()
    assert "Traceback" not in text, text
    if code in (0, *also):
        return "read" if code == 0 else f"exit code {code}"
    assert code in EXPECTED, (code, text[-3000:])
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text[-3000:]
    return "refused"


def changed(value: Any, path: Sequence[Any], new: Any) -> Any:
    """Return plain data with one value, `path` inside it, replaced."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


def paths(value: Any, start: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return where every value of plain data is, containers too."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [start, *(path for key in keys for path in paths(value[key], (*start, key)))]
