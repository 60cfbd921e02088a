"""What a recipe decides by itself: how many samples a method that learns is given."""

import pytest

from compressor.recipe import CalibrationSpec, Recipe


@pytest.mark.parametrize(("effort", "samples"), [("fast", 16), ("balanced", 32), ("best", 128)])
def test_effort_decides_the_number_of_samples(effort: str, samples: int) -> None:
    recipe = Recipe(model="m", method="flexround", options={"effort": effort}, calibration=CalibrationSpec(seq_len=64))
    assert (recipe.calibration.n_samples, recipe.calibration.seq_len) == (samples, 64)
    assert Recipe.model_validate(recipe.model_dump()) == recipe, "saved and read again, it says the same"


def test_a_number_that_was_given_stays() -> None:
    given = CalibrationSpec(n_samples=7)
    assert Recipe(model="m", method="flexround", options={"effort": "best"}, calibration=given).calibration == given
    assert Recipe(model="m", method="rtn").calibration.n_samples == 32
    assert Recipe(model="m", method="rtn", options={"effort": "odd"}).calibration.n_samples == 32, "refused elsewhere"
