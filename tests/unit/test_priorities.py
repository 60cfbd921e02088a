"""Rules that choose who gets more bits: scores by hand, ties, budgets."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from compressor.errors import RecipeError
from compressor.priorities import Candidate, Place, Stage, outlier_score, parse_stages, spend, turning


def candidate(name: str, block: int, place: Place, small: int = 2, large: int = 4) -> Candidate:
    return Candidate(name, block, place, small, large)


CANDIDATES = [
    candidate("a0", 0, Place.ATTENTION),
    candidate("e0", 0, Place.FEED_FORWARD, 20, 40),
    candidate("a1", 1, Place.ATTENTION),
    candidate("s1", 1, Place.SHARED, 4, 8),
    candidate("e1", 1, Place.FEED_FORWARD, 20, 40),
    candidate("e2", 2, Place.FEED_FORWARD, 6, 12),
]
SMALL = sum(c.small for c in CANDIDATES)


def scores(stage: Stage) -> Mapping[str, float]:
    return {"e0": 1.0, "e1": 3.0, "e2": 3.0} if stage is Stage.OUTLIERS else {"e0": 0.5, "e1": 0.1, "e2": 0.2}


@pytest.mark.parametrize(
    ("stages", "more", "raised"),
    [
        ("attention", 100, {"a0", "a1"}),
        ("attention", 3, {"a0"}),
        ("attention,shared,first", 28, {"a0", "a1", "s1", "e0"}),
        ("attention,shared,first", 27, {"a0", "a1", "s1", "e2"}),  # the first that does not fit is left out
        ("first", 20, {"e0"}),
        ("outliers", 26, {"e1", "e2"}),
        ("outliers", 20, {"e1"}),  # of equals the earlier layer
        ("importance", 26, {"e0", "e2"}),
        ("importance,importance", 26, {"e0", "e2"}),
        ("first", 0, set()),
    ],
)
def test_what_is_raised(stages: str, more: int, raised: set[str]) -> None:
    assert spend(CANDIDATES, parse_stages(stages), SMALL + more, scores) == raised


def test_outlier_scores() -> None:
    first = torch.tensor([[1, -2.0], [0.5, 0.1], [-3, 0.3]])
    assert outlier_score([first]) == pytest.approx(2.5)
    assert outlier_score([torch.tensor([[4.0], [0], [0], [0]])]) == 4
    assert (
        outlier_score([first, torch.tensor([[4.0, 0], [0, 0], [0, 0], [0, 0]])]) == 4
    )  # columns of zeros do not count
    assert outlier_score([torch.zeros(3, 2)]) == 1


def test_turning() -> None:
    x = torch.tensor([[1.0, 0], [0, 2], [3, 4]])
    p, q, s = torch.tensor([[1.0, 1], [0, 1], [4, 3]]), torch.tensor([[0.0, 1], [1, 1], [3, 4]]), 2 * x
    means = [float(turning(x, y).mean()) for y in (p, q, s)]
    assert means == pytest.approx([-0.889036, -0.569036, -1], abs=1e-6)
    assert sorted(range(3), key=lambda i: -means[i]) == [1, 0, 2]  # the second turns its input most


def test_names() -> None:
    assert parse_stages(None) == parse_stages("measured") == ()
    assert parse_stages("attention, shared") == (Stage.ATTENTION, Stage.SHARED)
    for text in ("frequency", "measured,attention"):
        with pytest.raises(RecipeError, match="no such rule"):
            parse_stages(text)
