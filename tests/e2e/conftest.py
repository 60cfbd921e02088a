"""Quantizing in a test verifies in the same process; the fresh process has tests of its own and costs seconds each."""

import pytest

import compressor.verify


@pytest.fixture(autouse=True)
def verify_inline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("fresh_process") is None:
        monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)
