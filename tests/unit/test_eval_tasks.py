"""Choosing tasks: names, files, suites, and what is refused."""

from pathlib import Path

import pytest

from compressor.errors import CheckpointError, RecipeError
from compressor.evals.minimal_pairs import read_pairs, score
from compressor.evals.tasks import PAIRS_YAML, Kind, choose, read_suite, suites


def test_the_default_is_perplexity_and_kl_where_there_is_a_baseline() -> None:
    assert [spec.name for spec in choose(None, None, has_baseline=True)] == ["perplexity", "kl"]
    assert [spec.name for spec in choose(None, None, has_baseline=False)] == ["perplexity"]
    assert [spec.name for spec in choose(None, "smoke", has_baseline=True)] == ["perplexity", "minimal-pairs"]


def test_looks_tell_what_a_task_is(tmp_path: Path) -> None:
    names = ["kl", "minimal-pairs", f"minimal-pairs:{tmp_path}/my.data.jsonl", f"{tmp_path}/t.yaml", "arc_easy"]
    kl, own, user, file, registry = choose(names, None, has_baseline=True, num_fewshot=3, limit=50)
    assert (kl.kind, kl.limit, kl.num_fewshot) == (Kind.TEXT, None, None)
    assert (own.kind, own.path, own.pairs) == (Kind.FILE, PAIRS_YAML, None)
    assert (user.name, user.pairs, user.limit) == ("minimal-pairs:my.data", tmp_path / "my.data.jsonl", 50)
    assert (file.kind, file.path) == (Kind.FILE, tmp_path / "t.yaml")
    assert (registry.kind, registry.num_fewshot, registry.limit) == (Kind.REGISTRY, 3, 50)
    assert choose([f"minimal-pairs:{tmp_path}/a.jsonl"], None, has_baseline=False)[0].limit == 10


def test_a_suite_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ntasks:\n- perplexity\n- {task: arc_easy, num_fewshot: 5, limit: 7}\n- {task: sub/t.yaml}\n"
        "- minimal-pairs:pairs.jsonl\n"
    )
    text, arc, file, pairs = choose(None, str(path), has_baseline=False)
    assert (text.name, arc.num_fewshot, arc.limit) == ("perplexity", 5, 7)
    assert (file.path, pairs.pairs) == (tmp_path / "sub" / "t.yaml", tmp_path / "pairs.jsonl")
    overridden = choose(["kl"], str(path), has_baseline=True, num_fewshot=0, limit=2)
    assert [spec.name for spec in overridden][-1] == "kl"
    assert (overridden[1].num_fewshot, overridden[1].limit) == (0, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: x\n", "tasks: Field required"),
        ("name: x\ntasks: []\n", "tasks: Tuple should have at least 1 item"),
        ("name: x\ntasks: [{task: a, limt: 3}]\n", "limt"),
        ("name: x\ntasks: [{task: a, limit: 0}]\n", "greater than or equal to 1"),
        ("- a\n", "the content: Input should be"),
        ("a: [\n", "not YAML"),
    ],
)
def test_a_suite_that_is_not_valid(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(RecipeError, match=message) as caught:
        read_suite(str(tmp_path / "s.yaml"))
    assert "\n" not in caught.value.message


def test_what_cannot_be_chosen() -> None:
    with pytest.raises(RecipeError, match="unknown suite 'smok'") as caught:
        read_suite("smok")
    assert "smoke" in caught.value.hint
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_suite("absent.yaml")
    with pytest.raises(RecipeError, match="perplexity is named twice"):
        choose(["perplexity"], "smoke", has_baseline=True)
    with pytest.raises(RecipeError, match="there is none"):
        choose(["kl"], None, has_baseline=False)
    with pytest.raises(RecipeError, match="a task name is empty"):
        choose(["perplexity", " "], None, has_baseline=False)
    with pytest.raises(RecipeError, match="no task is named"):
        choose([], None, has_baseline=False)


def test_shipped_suites_can_be_chosen_and_the_sample_is_sound() -> None:
    found = {suite.name: suite for suite in suites()}
    assert {"core", "smoke"} <= found.keys()
    for name, suite in found.items():
        assert suite.description
        assert len(choose(None, name, has_baseline=True)) == len(suite.tasks)
    pairs = read_pairs(PAIRS_YAML.with_suffix(".jsonl"))
    groups = [pair["uid"] for pair in pairs]
    assert {group: groups.count(group) for group in groups} == dict.fromkeys(sorted(set(groups)), 10)
    assert len(set(groups)) == 4
    assert len({pair["good"] for pair in pairs} | {pair["bad"] for pair in pairs}) == 80


def test_pairs_in_both_spellings(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"uid": "a", "good": "It is.", "bad": "It are.", "more": 1}\n\n'
        '{"UID": "b", "sentence_good": "We go.", "sentence_bad": "We goes.", "field": "syntax"}\n'
    )
    assert read_pairs(path) == [
        {"uid": "a", "good": "It is.", "bad": "It are."},
        {"uid": "b", "good": "We go.", "bad": "We goes."},
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: not an object"),
        ('{"uid": "a", "good": "x"}', "line 2: bad is missing"),
        ('{"uid": "a", "good": " ", "bad": "y"}', "line 2: good is no text"),
        ('{"uid": "a", "good": "x", "bad": "x"}', "line 2: both sentences are the same"),
    ],
)
def test_a_damaged_pair_is_named_by_its_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"uid": "a", "good": "x", "bad": "y"}}\n{line}\n')
    with pytest.raises(CheckpointError, match=message):
        read_pairs(path)


def test_files_without_pairs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_pairs(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(CheckpointError, match="holds no pairs"):
        read_pairs(tmp_path / "empty.jsonl")


def test_a_tie_is_half_right() -> None:
    def lls(good: float, bad: float) -> list[tuple[float, bool]]:
        return [(good, False), (bad, False)]

    assert [score({}, lls(a, b))["acc"] for a, b in ((-1, -2), (-2, -1), (-1, -1))] == [1.0, 0.0, 0.5]
