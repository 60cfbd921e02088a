"""Whether a folder may be given to others: verified, unchanged since, and not refused by the gate."""

from __future__ import annotations

from pathlib import Path

from compressor.errors import CheckpointError
from compressor.evals.verdict import VERDICT, read_verdict
from compressor.measure.subject import fingerprint
from compressor.ship.finished import check_intact, finished


def reasons_against(folder: Path) -> list[str]:
    """Return why a folder should not be published; empty if nothing speaks against it.

    Raises:
        CheckpointError: A report or verdict in it is damaged.
    """
    report = finished(folder)
    if report is None:
        return ["it holds no finished result of compress"]
    found = []
    if not report.get("verification", {}).get("ok"):
        found.append("it was not verified by loading it in a fresh process")
    try:
        check_intact(folder, report)
    except CheckpointError as error:
        return [*found, f"it is not what was verified: {error.message}"]
    verdict = read_verdict(folder)
    if verdict is None:
        return found
    if verdict["model"]["fingerprint"] != fingerprint(folder):
        found.append(f"the verdict in {VERDICT} is about other weights")
    elif not verdict["passed"]:
        found.append("the gate said no")
    return found
