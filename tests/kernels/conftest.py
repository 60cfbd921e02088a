"""One interpreter process for all tests of a session, and compilation that starts anew in every test."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from compressor.testing.kernels import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as process:
        yield process


@pytest.fixture(autouse=True)
def _compiled_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what a test compiled: the limit of recompilations counts those of all tests of a process."""
    compiled = []
    compile_ = torch.compile

    def counting(*args: object, **kwargs: object) -> object:
        compiled.append(args)
        return compile_(*args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "compile", counting)
    yield
    if compiled:
        sys.modules["torch._dynamo"].reset()
