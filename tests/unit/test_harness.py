"""lm-eval behind our adapter: scores against brute force, samples, silence, and what is refused."""

import json
import math
import random
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel

from compressor.errors import CheckpointError, HubError, RecipeError, UnsupportedError, VerificationError
from compressor.evals import harness as harness_module
from compressor.evals.fields import task_from_json
from compressor.evals.harness import Harness
from compressor.evals.scores import TaskResult
from compressor.evals.tasks import PAIRS_YAML, choose
from compressor.report import Silent
from compressor.testing.models import tiny_llama, tiny_tokenizer

WORDS = ("the", "hen", "ran", "on", "a", "stone", "in", "rain", "and", "sand")


class Recorder(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.events: list[str] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def event(self, text: str) -> None:
        self.events.append(text)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def sentence(rng: random.Random, length: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(length))


def log_likelihood(model: PreTrainedModel, context: str, continuation: str) -> tuple[float, bool]:
    """Score a continuation in float64, one request at a time; an empty context is the BOS token."""
    tokenizer = tiny_tokenizer()
    before = tokenizer(context)["input_ids"] if context else [tokenizer.bos_token_id]
    whole = tokenizer(context + continuation)["input_ids"] if context else before + tokenizer(continuation)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
    targets = torch.tensor(whole[1:])
    scores = logits.gather(-1, targets[:, None])[len(before) - 1 :, 0]
    greedy = bool((logits.argmax(-1) == targets)[len(before) - 1 :].all())
    return float(scores.sum()), greedy


def run(harness: Harness, name: str, model: PreTrainedModel, **options: Any) -> TaskResult:
    return harness.run(name, model, tiny_tokenizer(), **options)


def test_minimal_pairs_are_scored_as_by_hand_and_the_same_each_time(capfd: pytest.CaptureFixture[str]) -> None:
    model, told = tiny_llama(4), Recorder()
    pairs = [json.loads(line) for line in PAIRS_YAML.with_suffix(".jsonl").read_text().splitlines()]
    state = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    with Harness(choose(["minimal-pairs"], None, has_baseline=False, limit=3), progress=told) as harness:
        result = run(harness, "minimal-pairs", model)
        again = run(harness, "minimal-pairs", model)
        other = run(harness, "minimal-pairs", model, batch_size=5)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == (state[0], state[2])
    assert torch.equal(torch.get_rng_state(), state[1])
    assert again == result
    assert other.samples == result.samples
    chosen = [index for index in range(40) if index % 10 < 3]
    assert list(result.samples.id) == chosen
    assert list(result.samples.group or ()) == [pairs[index]["uid"] for index in chosen]
    expected = [
        float(log_likelihood(model, "", pairs[i]["good"])[0] > log_likelihood(model, "", pairs[i]["bad"])[0])
        for i in chosen
    ]
    assert list(result.samples.values["acc"]) == expected
    assert 0 < sum(expected) < 12
    assert result.metrics["acc"].value == pytest.approx(sum(expected) / 12)
    assert result.samples.weight == (1,) * 12
    assert len(set(result.samples.hash)) == 12
    assert (result.version, result.settings["limit"], result.settings["num_fewshot"]) == ("1", 3, 0)
    assert told.stages[-1] == "minimal-pairs: 24 of 24 requests"
    assert task_from_json(json.loads(json.dumps(result.to_json())), "here") == result
    assert capfd.readouterr() == ("", "")


def test_pairs_of_ones_own_in_a_file(tmp_path: Path) -> None:
    rng = random.Random(5)
    rows = [
        {"UID": f"u{i % 3}", "sentence_good": sentence(rng, 4), "sentence_bad": sentence(rng, 5)} for i in range(40)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Harness(choose([f"minimal-pairs:{path}", "minimal-pairs"], None, has_baseline=False)) as harness:
        assert set(harness.tasks) == {"minimal-pairs", "minimal-pairs:mine"}
        result = run(harness, "minimal-pairs:mine", tiny_llama())
    assert list(result.samples.id) == list(range(30))  # the first ten of each of three, which take turns
    assert result.settings["data"] == "mine.jsonl"
    path.write_text(path.read_text().replace("hen", "cow"))
    with Harness(choose([f"minimal-pairs:{path}"], None, has_baseline=False)) as harness:
        changed = harness.tasks["minimal-pairs:mine"]
    assert changed.settings["definition"] != result.settings["definition"]


def write_choice_task(folder: Path, name: str = "colours", extra: str = "") -> Path:
    """Write a multiple-choice task with examples for its prompt, data in a folder beside the YAML."""
    rng = random.Random(9)
    (folder / "data").mkdir(exist_ok=True)
    for split, count in (("train", 6), ("test", 12)):
        rows = [
            {"question": sentence(rng, 3), "choices": [sentence(rng, n) for n in (1, 2, 4)], "answer": rng.randrange(3)}
            for _ in range(count)
        ]
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"{name}.yaml"
    path.write_text(
        f"task: {name}\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {train: data/train.jsonl, test: [data/test.jsonl]}}\n"
        "test_split: test\nfewshot_split: train\noutput_type: multiple_choice\n"
        'doc_to_text: "Q: {{question}}\\nA:"\ndoc_to_target: answer\ndoc_to_choice: choices\n'
        "metric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n"
        f"- {{metric: acc_norm, aggregation: mean, higher_is_better: true}}\nmetadata: {{version: 3.0}}\n{extra}"
    )
    return path


def test_a_task_in_a_file_with_data_beside_it(tmp_path: Path) -> None:
    path, model = write_choice_task(tmp_path), tiny_llama(6)
    with Harness(choose([str(path)], None, has_baseline=False, limit=8)) as harness:
        result = run(harness, "colours", model)
    rows = [json.loads(line) for line in (tmp_path / "data" / "test.jsonl").read_text().splitlines()][:8]
    plain, normed = [], []
    for row in rows:
        scores = [log_likelihood(model, f"Q: {row['question']}\nA:", f" {c}")[0] for c in row["choices"]]
        lengths = [len(choice) for choice in row["choices"]]
        plain.append(float(np.argmax(scores) == row["answer"]))
        normed.append(float(np.argmax(np.array(scores) / lengths) == row["answer"]))
    assert list(result.samples.values["acc"]) == plain
    assert list(result.samples.values["acc_norm"]) == normed
    assert plain != normed
    assert result.version == "3.0"
    spread = np.std(normed, ddof=1) / math.sqrt(8)
    assert result.metrics["acc_norm"].value == pytest.approx(np.mean(normed))
    assert result.metrics["acc_norm"].standard_error == pytest.approx(spread)


def test_examples_in_the_prompt_depend_on_the_seed_and_change_the_hash(tmp_path: Path) -> None:
    path, model = write_choice_task(tmp_path), tiny_llama(6)
    results = []
    for shots, seed in ((2, 0), (2, 0), (2, 1), (0, 0)):
        with Harness(choose([str(path)], None, has_baseline=False, num_fewshot=shots, limit=4), seed=seed) as harness:
            results.append(run(harness, "colours", model))
            assert run(harness, "colours", model) == results[-1]  # the generator of examples starts anew
    first, same, other, none = results
    assert same == first
    assert len({result.samples.hash for result in (first, other, none)}) == 3
    assert [result.settings["num_fewshot"] for result in results] == [2, 2, 2, 0]
    assert first.settings["definition"] == other.settings["definition"]


def test_a_task_that_fixes_its_prompt_keeps_it_and_says_so(tmp_path: Path) -> None:
    path, told = write_choice_task(tmp_path, extra="num_fewshot: 0\n"), Recorder()
    with Harness(choose([str(path)], None, has_baseline=False, num_fewshot=5), progress=told) as harness:
        assert harness.tasks["colours"].settings["num_fewshot"] == 0
    assert told.events == ["colours allows no examples in its prompt: run with 0 instead of 5"]


def test_perplexities_keep_log_likelihoods_as_samples(tmp_path: Path) -> None:
    rng, model = random.Random(2), tiny_llama(8)
    texts = [sentence(rng, n) + " é" for n in (3, 9, 20, 5)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    common = "dataset_path: json\ndataset_kwargs: {data_files: {test: t.jsonl}}\ntest_split: test\n"
    (tmp_path / "last.yaml").write_text(
        f"task: last\n{common}output_type: loglikelihood\n"
        "doc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\ndoc_to_target: \"{{' '+text.split(' ')[-1]}}\"\n"
        "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false},"
        " {metric: acc, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1}\n"
    )
    (tmp_path / "all.yaml").write_text(
        f'task: all\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{{{text}}}}"\n'
        "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n"
        "metadata: {version: 1}\n"
    )
    specs = choose([str(tmp_path / "last.yaml"), str(tmp_path / "all.yaml")], None, has_baseline=False)
    with Harness(specs) as harness:
        last, rolling = run(harness, "last", model), run(harness, "all", model)
    nll = [-log_likelihood(model, *_split(text))[0] for text in texts]
    assert last.samples.values["nll"] == pytest.approx(nll, rel=1e-5)
    assert last.metrics["perplexity"].value == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)
    whole = [-log_likelihood(model, "", text)[0] for text in texts]
    sizes = [len(text.encode()) for text in texts]
    assert rolling.samples.values["nll"] == pytest.approx(whole, rel=1e-5)
    assert list(rolling.samples.weight) == sizes
    per_byte = sum(whole) / sum(sizes)
    assert rolling.metrics["byte_perplexity"].value == pytest.approx(math.exp(per_byte), rel=1e-5)
    assert rolling.metrics["bits_per_byte"].value == pytest.approx(per_byte / math.log(2), rel=1e-5)
    assert rolling.metrics["bits_per_byte"].standard_error > 0
    words = sum(len(text.split()) for text in texts)
    assert rolling.metrics["word_perplexity"].value == pytest.approx(math.exp(sum(whole) / words), rel=1e-5)
    assert rolling.metrics["word_perplexity"].standard_error is None


def _split(text: str) -> tuple[str, str]:
    context, _, last = text.rpartition(" ")
    return context, f" {last}"


def registry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lm-eval know the tasks of a folder only: reading its own fourteen thousand takes seconds."""

    def manager(include_defaults: bool) -> TaskManager:
        assert include_defaults
        return TaskManager(include_path=str(folder), include_defaults=False)

    monkeypatch.setattr(harness_module, "TaskManager", manager)


def write_group(folder: Path) -> None:
    for name in ("red", "blue"):
        path = write_choice_task(folder, name)
        path.write_text(
            path.read_text()
            .replace("data/", f"{folder}/data/")
            .replace("{data_files", f"{{cache_dir: {folder}, data_files")
        )
    (folder / "group.yaml").write_text("group: all_colours\ntask: [red, blue]\n")


def test_a_group_of_tasks_is_one_result_grouped_by_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_group(tmp_path)
    registry(tmp_path, monkeypatch)
    with Harness(choose(["all_colours", "blue"], None, has_baseline=False, limit=5)) as harness:
        group, one = (run(harness, name, tiny_llama(6)) for name in ("all_colours", "blue"))
    assert group.samples.group == ("red",) * 5 + ("blue",) * 5
    assert group.samples.id == (0, 1, 2, 3, 4) * 2
    assert group.samples.values["acc"][5:] == one.samples.values["acc"]
    assert group.metrics["acc"] == group.samples.mean("acc")
    assert one.samples.group is None
    assert group.version == "3.0"


def test_unknown_names_and_the_hub_when_it_is_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_group(tmp_path)
    registry(tmp_path, monkeypatch)
    with pytest.raises(RecipeError, match="unknown task 'al_colours'") as caught:
        Harness(choose(["al_colours"], None, has_baseline=False))
    assert "all_colours" in caught.value.hint
    monkeypatch.setenv("COMPRESSOR_OFFLINE", "1")
    with pytest.raises(HubError, match=r"task blue: .* COMPRESSOR_OFFLINE forbids"):
        Harness(choose(["blue"], None, has_baseline=False))


def test_a_broken_model_is_not_right_about_everything(tmp_path: Path) -> None:
    broken = tiny_llama(tied=False)
    broken.get_output_embeddings().weight[9] = float("nan")
    with (
        Harness(choose(["minimal-pairs"], None, has_baseline=False, limit=1)) as harness,
        pytest.raises(VerificationError, match="8 of 8 log-likelihoods are NaN"),
    ):
        run(harness, "minimal-pairs", broken)


def test_prompts_that_do_not_fit_are_cut_and_told_and_answers_are_refused(tmp_path: Path) -> None:
    rng, told = random.Random(3), Recorder()
    path = write_choice_task(tmp_path)
    data = tmp_path / "data" / "test.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()][:3]
    rows[1]["question"] = sentence(rng, 400)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Harness(choose([str(path)], None, has_baseline=False)) as harness:
        run(harness, "colours", tiny_llama(), progress=told)
    assert told.events == ["colours: 3 prompts are cut to the model's 512 positions"]
    rows[1]["choices"][2] = sentence(rng, 400)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (
        Harness(choose([str(path)], None, has_baseline=False)) as harness,
        pytest.raises(RecipeError, match=r"colours: an answer of \d{3,} tokens has no room"),
    ):
        run(harness, "colours", tiny_llama())


def test_files_that_define_no_task_we_run(tmp_path: Path) -> None:
    def refused(path: Path) -> Harness:
        return Harness(choose([str(path)], None, has_baseline=False))

    with pytest.raises(CheckpointError, match=r"absent\.yaml: cannot be read"):
        refused(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("task: [\n")
    with pytest.raises(RecipeError, match=r"broken\.yaml: "):
        refused(tmp_path / "broken.yaml")
    (tmp_path / "group.yaml").write_text("group: g\ntask: [a, b]\n")
    with pytest.raises(RecipeError, match="does not define a task"):
        refused(tmp_path / "group.yaml")
    unsafe = write_choice_task(tmp_path, "unsafe", "unsafe_code: true\n")
    with pytest.raises(UnsupportedError, match="task unsafe runs code"):
        refused(unsafe)
    wrong = write_choice_task(tmp_path, "wrong", "output_type: guessing\n")
    with pytest.raises(RecipeError, match=r"wrong\.yaml: lm-eval .* cannot run it: ValueError"):
        refused(wrong)
    fine = write_choice_task(tmp_path, "fine")
    (tmp_path / "copy.yaml").write_text(fine.read_text())
    with pytest.raises(RecipeError, match="two tasks are called fine"):
        Harness(choose([str(fine), str(tmp_path / "copy.yaml")], None, has_baseline=False))
    (tmp_path / "data" / "test.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"data/test.jsonl is not there"):
        refused(fine)
