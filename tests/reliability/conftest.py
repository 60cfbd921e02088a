"""Counts what the tests of this folder tried and what came of it; `docs/reliability.md` is made from that.

With `COMPRESS_RELIABILITY=FILE` the counts are written there, beside those of earlier calls.
"""

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import compressor.verify
from compressor.testing.reliability import Record, add

RECORDS = pytest.StashKey[list[Record]]()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """Outcome -> how often; counts only if the test passes."""
    marker = request.node.get_closest_marker("reliability")
    assert marker is not None, "mark the test with @pytest.mark.reliability(section, title)"
    seen: Counter[str] = Counter()
    yield seen
    if not request.node.stash.get(FAILED, False):
        assert seen, "nothing was counted"
        request.config.stash.setdefault(RECORDS, []).append(Record(*marker.args, dict(seen)))


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call":
        item.stash[FAILED] = not report.passed
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = os.environ.get("COMPRESS_RELIABILITY")
    if target and (records := session.config.stash.get(RECORDS, [])):
        add(Path(target), records)


@pytest.fixture(autouse=True)
def verify_inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process for every verification would cost seconds each; tests/e2e has those."""
    gc.freeze()  # the engine collects garbage after every block: it need not look at the libraries each time
    monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)
