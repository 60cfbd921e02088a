"""The evaluation file: what is written is what is read, and every damage is named."""

import copy
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import CheckpointError
from compressor.evals.results import Evaluation
from compressor.evals.scores import Estimate, Model, Samples, TaskResult, weighted_mean


def evaluation() -> Evaluation:
    random.seed(3)
    model = Model("m", None, "ab12", "dense-float32", "float32")
    text = Samples((0, 1), ("aa", "bb"), (128, 40), {"nll": (random.random(), random.random())})
    pairs = Samples(("x", "y"), ("cc", "dd"), (1, 1), {"acc": (1.0, 0.0)}, ("u", "v"))
    tasks = {
        "perplexity": TaskResult("1", {"context": 64}, {"nll": text.mean("nll")}, text),
        "pairs": TaskResult("2", {}, {"acc": pairs.mean("acc"), "other": Estimate(2.5, None)}, pairs),
    }
    return Evaluation(model, Model("o", "c0ffee", "cd", "dense-float32", "float32"), {"torch": "2"}, 7, tasks, {"s": 1})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    original = evaluation()
    original.write(tmp_path / "e.json")
    assert Evaluation.read(tmp_path / "e.json") == original
    alone = Evaluation(original.model, None, {}, 0, {}, {})
    alone.write(tmp_path / "a.json")
    assert Evaluation.read(tmp_path / "a.json") == alone
    first = (tmp_path / "e.json").read_bytes()
    original.write(tmp_path / "e.json")
    assert (tmp_path / "e.json").read_bytes() == first


def change(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        data = data[key]
    if value is ...:
        del data[last]
    else:
        data[last] = value


BROKEN = {
    "schema": ("compressor-eval/9", "schema is 'compressor-eval/9'"),
    "seed": ("7", "seed is a string, not a whole number"),
    "timing": (..., "timing is missing"),
    "extra": (1, "extra is no field"),
    "versions.torch": (2, "versions.torch is a number, not a string"),
    "model.commit": (3, "model.commit is a number"),
    "model.fingerprint": (..., "model.fingerprint is missing"),
    "baseline": ([], "baseline is an array, not an object"),
    "tasks.pairs.version": (2, "tasks.pairs.version is a number, not a string"),
    "tasks.pairs.metrics.acc.value": (None, "tasks.pairs.metrics.acc.value is null, not a number"),
    "tasks.pairs.metrics.acc.standard_error": (-0.5, "standard_error is -0.5, below zero"),
    "tasks.pairs.samples.weight": ([1], "samples.weight has 1 entries for 2 ids"),
    "tasks.pairs.samples.values.acc": ([1.0, math.inf], r"values.acc\[1\] is inf, not finite"),
    "tasks.perplexity.samples.weight": ([128, 0], r"weight\[1\] is 0, not at least 1"),
    "tasks.perplexity.samples.id": ([0, 0], "samples.id holds an id twice"),
    "tasks.pairs.samples.group": (["u", 1], r"samples.group\[1\] is a number"),
    "tasks.pairs.samples.id": ([True, 2], r"id\[0\] is true or false"),
}


@pytest.mark.parametrize("path", BROKEN)
def test_a_broken_field_is_named_with_its_file(path: str, tmp_path: Path) -> None:
    value, message = BROKEN[path]
    data = copy.deepcopy(evaluation().to_json())
    change(data, path, value)
    (tmp_path / "broken.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message) as caught:
        Evaluation.read(tmp_path / "broken.json")
    assert caught.value.message.startswith(f"{tmp_path / 'broken.json'}: ")
    assert "\n" not in caught.value.message


def test_ids_may_repeat_in_different_groups() -> None:
    data = evaluation().to_json()
    data["tasks"]["pairs"]["samples"]["id"] = [4, 4]
    assert Evaluation.from_json(data).tasks["pairs"].samples.id == (4, 4)


def test_files_that_are_no_evaluation(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        Evaluation.read(tmp_path / "absent.json")
    (tmp_path / "text").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        Evaluation.read(tmp_path / "text")
    (tmp_path / "list").write_text("[]")
    with pytest.raises(CheckpointError, match="the content is an array"):
        Evaluation.read(tmp_path / "list")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not text"):
        Evaluation.read(tmp_path / "bytes")


def test_the_mean_of_single_units_has_the_plain_standard_error() -> None:
    random.seed(11)
    values = [random.gauss(2, 3) for _ in range(50)]
    mean = sum(values) / 50
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 49)
    found = weighted_mean(values, [1] * 50)
    assert found.value == pytest.approx(mean, rel=1e-12)
    assert found.standard_error == pytest.approx(spread / math.sqrt(50), rel=1e-12)


def test_weights_count_units_and_one_sample_gives_no_error() -> None:
    assert weighted_mean([6.0, 2.0], [3, 1]) == Estimate(2.0, 0.0)
    assert weighted_mean([6.0], [3]) == Estimate(2.0, None)


def test_reading_needs_neither_torch_nor_transformers() -> None:
    check = "import sys, compressor.evals.results; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
