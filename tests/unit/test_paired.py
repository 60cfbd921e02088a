"""Pairing two evaluations: the right documents, the right standard errors, and what is refused."""

import dataclasses
import math

import numpy as np
import pytest

from compressor.errors import RecipeError
from compressor.evals.paired import pair, paired_difference, paired_ratio
from compressor.evals.scores import Samples
from compressor.testing.evaluations import samples


def shuffled(made: Samples, seed: int = 0) -> Samples:
    order = np.random.default_rng(seed).permutation(len(made))

    def column(values: tuple) -> tuple:
        return tuple(values[i] for i in order)

    return Samples(
        column(made.id),
        column(made.hash),
        column(made.weight),
        {name: column(values) for name, values in made.values.items()},
        None if made.group is None else column(made.group),
    )


def test_documents_have_the_plain_paired_error() -> None:
    rng = np.random.default_rng(1)
    old, new = rng.random((2, 50))
    estimate = paired_difference(samples({"f1": old}), shuffled(samples({"f1": new})), "f1")
    assert estimate.value == pytest.approx(float((new - old).mean()), abs=1e-12)
    assert estimate.standard_error == pytest.approx(float((new - old).std(ddof=1)) / math.sqrt(50), rel=1e-9)


def test_segments_have_the_ratio_estimator_error() -> None:
    rng = np.random.default_rng(2)
    old, new = rng.random((2, 7)) * 128
    weight = np.array([128, 128, 128, 128, 128, 128, 11])
    a, b = (dataclasses.replace(samples({"nll": v}), weight=tuple(int(w) for w in weight)) for v in (old, new))
    estimate = paired_difference(a, b, "nll")
    value = (new - old).sum() / weight.sum()
    squares = sum((n - o - value * w) ** 2 for n, o, w in zip(new, old, weight, strict=True))
    assert estimate.value == pytest.approx(float(value), rel=1e-9)
    assert estimate.standard_error == pytest.approx(math.sqrt(7 / 6 * squares) / weight.sum(), rel=1e-9)


def test_the_error_of_a_ratio_is_that_of_repeated_samples() -> None:
    rng = np.random.default_rng(3)
    ratios, errors = [], []
    for _ in range(400):
        old = rng.gamma(4, 0.25, 60)
        estimate = paired_ratio(samples({"kl": old}), samples({"kl": old * rng.gamma(9, 1.2 / 9, 60)}), "kl")
        ratios.append(estimate.value)
        errors.append(estimate.standard_error or 0)
    assert np.mean(ratios) == pytest.approx(1.2, abs=0.01)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(ratios), rel=0.15)


def test_one_sample_has_a_value_but_no_error() -> None:
    estimate = paired_difference(samples({"acc": [1.0]}), samples({"acc": [0.0]}), "acc")
    assert (estimate.value, estimate.standard_error) == (-1, None)
    assert paired_ratio(samples({"acc": [1.0]}), samples({"acc": [1.0]}), "acc").standard_error is None


def test_a_model_and_itself_differ_by_exactly_nothing() -> None:
    made = samples({"nll": np.random.default_rng(4).random(9)}, weight=128)
    estimate = paired_difference(made, shuffled(made), "nll")
    assert (estimate.value, estimate.standard_error) == (0, 0)


def test_groups_as_units() -> None:
    """Documents of a group move together, so the groups' error is that of four changes, not of forty."""
    groups = [f"uid{i // 10}" for i in range(40)]
    moved = np.repeat([0.0, 1.0, 0.0, 1.0], 10)
    a, b = samples({"acc": np.zeros(40)}, group=groups), samples({"acc": moved}, group=groups)
    plain, clustered = paired_difference(a, b, "acc"), paired_difference(a, shuffled(b), "acc", by_group=True)
    assert plain.value == clustered.value == 0.5
    assert plain.standard_error == pytest.approx(math.sqrt(0.25 / 39))
    assert clustered.standard_error == pytest.approx(math.sqrt(0.25 / 3))
    pairs = pair(a, b, "acc", by_group=True)
    assert (pairs.unit, len(pairs.old), pairs.weight.tolist()) == ("groups", 4, [10, 10, 10, 10])
    assert pair(samples({"acc": [1]}), samples({"acc": [1]}), "acc", by_group=True).unit == "documents"


def test_the_same_ids_in_several_groups_are_different_documents() -> None:
    a = dataclasses.replace(samples({"acc": [0, 1]}, group=["x", "y"]), id=(0, 0))
    b = dataclasses.replace(a, group=("y", "x"), hash=a.hash[::-1], values={"acc": (1.0, 0.0)})
    assert pair(a, b, "acc").new.tolist() == [0, 1]


def test_what_counts_as_a_share() -> None:
    def share(values: list[float], metric: str = "acc", weight: int = 1) -> bool:
        made = samples({metric: values}, weight)
        return pair(made, made, metric).share

    assert share([0, 0.5, 1])
    assert not share([0, 1.5])
    assert not share([-0.1, 1])
    assert not share([0.1, 0.2], "kl")
    assert not share([0.1, 0.2], "nll")
    assert share([128, 0], "agreement", 128)
    assert not pair(samples({"acc": [0.5]}), samples({"acc": [2.0]}), "acc").share


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": (0, 1, 7)}, "1 of 3 are missing in the new evaluation, 1 of 3 in the baseline, for example 2"),
        ({"hash": ("x", "y", "z")}, "another hash for 3 of 3, for example 0"),
        ({"weight": (1, 2, 1)}, "another weight for 1 of 3, for example 1"),
        ({"values": {"f1": (0.0, 0.0, 0.0)}}, "the new evaluation has no samples of 'acc'"),
        ({"values": {"acc": (0.0, math.nan, 0.0)}}, "acc of document 1 is nan in the new evaluation"),
        ({"values": {"acc": (0.0, math.inf, 0.0)}}, "acc of document 1 is inf in the new evaluation"),
    ],
    ids=str,
)
def test_what_cannot_be_paired_is_refused(change: dict, words: str) -> None:
    made = samples({"acc": [0, 1, 1]})
    with pytest.raises(RecipeError) as caught:
        paired_difference(made, dataclasses.replace(made, **change), "acc")
    assert words in caught.value.message
    assert caught.value.hint


def test_more_and_fewer_documents_are_refused() -> None:
    few, more = samples({"acc": [0, 1]}), samples({"acc": [0, 1, 1, 1]})
    with pytest.raises(RecipeError, match="0 of 2 are missing in the new evaluation, 2 of 4 in the baseline"):
        paired_difference(few, more, "acc")
    with pytest.raises(RecipeError, match="2 of 4 are missing in the new evaluation, 0 of 2 in the baseline"):
        paired_difference(more, few, "acc")
    nothing = Samples((), (), (), {"acc": ()})
    with pytest.raises(RecipeError, match="no samples to compare"):
        paired_difference(nothing, nothing, "acc")


@pytest.mark.parametrize(("old", "new"), [([0.0, 0.0], [1.0, 1.0]), ([-1.0, 3.0], [1.0, 1.0]), ([1.0], [-1.0])])
def test_no_ratio_to_zero_or_of_negative_values(old: list[float], new: list[float]) -> None:
    with pytest.raises(RecipeError, match="not negative and a baseline above zero"):
        paired_ratio(samples({"score": old}), samples({"score": new}), "score")
