"""One interpreter process for all tests of a session."""

from collections.abc import Iterator

import pytest

from compressor.testing.kernels import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as process:
        yield process
