"""Several processes write what one would, byte for byte; whatever ends one of them ends the job, and is said once."""

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import compressor.api.execution
import compressor.verify
from compressor.engine import Engine
from compressor.errors import NumericalError
from compressor.testing import models
from compressor.testing.child import Child, call_main
from compressor.testing.ranks import finish, start
from compressor.testing.tools import save_checkpoint, tree_hash, write_text

RUNS = {
    "rtn": "quantize llama -m rtn -f nvfp4",
    "gptq": "quantize llama -m gptq -f int4",
    "fp4": "quantize llama -m fp4 -f nvfp4",
    "sampled inputs": "quantize llama -m fp4 -f nvfp4 --inputs nvfp4",
    "folds": "quantize llama -m awq -f int4",
    "learned": "quantize llama -m flexround -f int3 --option iters=3",
    "learned on scaled weights": "quantize llama -m flexround -f int3 --option iters=3 --option scaling=awq",
    "inputs and cache": "quantize llama -m gptq -f int8 --inputs int8-tensor --kv-cache fp8",
    "experts": "quantize moe -m gptq -f int4 --min-expert-tokens 90",
    "scarce experts": "quantize moe -m flexround -f int4 --option iters=2 --min-expert-tokens 110",
    "pruned": "prune llama -m wanda --sparsity 0.5",
}
"""Name -> verb, model and flags. Between them they use every way in which processes share samples and layers."""


@dataclass(frozen=True)
class Case:
    """Models, a text, and what one process makes of them."""

    folder: Path
    alone: dict[str, Path]

    def command(self, name: str, out: Path) -> list[object]:
        verb, model, *flags = RUNS[name].split()
        data = ("--data", self.folder / "text.txt", "--n-samples", 5, "--seq-len", 48)
        return [verb, self.folder / model, "-o", out, *flags, *data]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ranks")
    save_checkpoint(models.tiny_llama(), folder / "llama")
    save_checkpoint(models.tiny_mixtral(), folder / "moe")
    write_text(folder / "text.txt")
    case = Case(folder, {name: folder / f"alone-{name}" for name in RUNS})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.verify.verify", compressor.verify.check)
        for name, out in case.alone.items():
            ended = Child(lambda name=name, out=out: call_main(*case.command(name, out))).wait(300)
            assert ended.code == 0, ended.err
    return case


def report(out: Path) -> dict[str, object]:
    data: dict[str, object] = json.loads((out / "compress_report.json").read_text())
    return data


@pytest.mark.parametrize("size", [2, 3])
def test_same_digest_and_bytes_as_one_process(size: int, case: Case, tmp_path: Path) -> None:
    ended = finish(start(size, [case.command(name, tmp_path / name) for name in RUNS]))
    assert [end.code for end in ended] == [0] * size, [end.err for end in ended]
    for name, alone in case.alone.items():
        assert tree_hash(tmp_path / name) == tree_hash(alone), name
        mine, theirs = report(tmp_path / name), report(alone)
        assert mine["digest"] == theirs["digest"]
        assert (mine["processes"], theirs["processes"]) == (size, 1)
        assert [row["name"] for row in mine["rows"]] == [row["name"] for row in theirs["rows"]]
        assert [row["tokens"] for row in mine["rows"]] == [row["tokens"] for row in theirs["rows"]]
        assert mine["events"] == theirs["events"]
        assert not (tmp_path / name / ".compress-work").exists()
    assert "gptq rounded those" in (tmp_path / "scarce experts" / "compress_report.json").read_text()
    assert "verifying" in ended[0].err
    assert [(end.out, end.err) for end in ended[1:]] == [("", "")] * (size - 1), "only process 0 talks"


def after_the_first_unit(rank: int, do: Callable[[], None]) -> Callable[[int], None]:
    """Return what lets process `rank` do something when the first unit is on the disk."""

    def arm(me: int) -> None:
        commit = Engine._commit
        if me == rank:

            def committed(self: Engine, *arguments: object) -> object:
                unit = commit(self, *arguments)
                do()
                return unit

            Engine._commit = committed

    return arm


def test_a_process_that_dies_ends_the_job_and_another_number_continues(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = case.command("gptq", out)
    dies = after_the_first_unit(1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    first, second = finish(start(2, [command], before=dies))
    assert second.code == -signal.SIGKILL
    assert first.code == 5
    errors = [line for line in first.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "another of the 2 processes of this job ended" in errors[0]
    assert not (out / "config.json").exists()
    ended = finish(start(3, [command]))
    assert [end.code for end in ended] == [0, 0, 0], ended[0].err
    assert re.search(r"continuing: 1 of \d+ units", ended[0].err)
    assert report(out)["resumed_at"] == 1
    assert tree_hash(out) == tree_hash(case.alone["gptq"])


def test_an_error_in_one_process_is_told_once(case: Case, tmp_path: Path) -> None:
    def fail() -> None:
        raise NumericalError("model.layers.1: not finite", "try another format")

    ended = finish(start(2, [case.command("rtn", tmp_path / "out")], before=after_the_first_unit(1, fail)))
    assert [end.code for end in ended] == [5, 7]
    errors = [line for end in ended for line in end.err.splitlines() if line.startswith("error")]
    assert errors == ["error: model.layers.1: not finite"]


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "message"),
    [
        (["eval", "x"], {}, 2, "compress eval runs in one process, but WORLD_SIZE is 2"),
        (["list", "methods"], {}, 2, "compress list runs in one process"),
        (["prune", "x", "-m", "beta-rank"], {}, 2, "compress prune --method beta-rank runs in one process"),
        (["quantize", "x", "-m", "rtn"], {"MASTER_ADDR": ""}, 2, "WORLD_SIZE is 2, but MASTER_ADDR not set"),
        (["quantize", "x", "-m", "rtn"], {"WORLD_SIZE": "many"}, 2, "WORLD_SIZE 'many'"),
        (["quantize", "x", "-m", "rtn"], {"RANK": "2"}, 2, "RANK is '2'"),
    ],
)
def test_what_cannot_be_shared_says_so(
    arguments: list[str], environment: dict[str, str], code: int, message: str
) -> None:
    def work() -> int:
        os.environ.update({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
        os.environ.update(environment)
        return call_main(*arguments)

    ended = Child(work).wait(60)
    assert ended.code == code, ended.err
    assert message in ended.err
    assert ended.err.count("error:") == 1


def test_formats_for_a_number_of_bits_are_chosen_in_one_process(case: Case, tmp_path: Path) -> None:
    command = [*case.command("gptq", tmp_path / "out"), "--target-bits", 4.5]
    ended = finish(start(2, [command]))
    assert [end.code for end in ended] == [4, 4]
    assert sum(end.err.count("error: choosing formats for a number of bits runs in one process") for end in ended) == 1


def test_processes_must_be_about_to_do_the_same(case: Case, tmp_path: Path) -> None:
    def other(rank: int) -> None:
        if rank == 1:
            compressor.api.execution.versions = lambda: {"torch": "0.1"}

    ended = finish(start(2, [case.command("rtn", tmp_path / "out")], before=other))
    assert {end.code for end in ended} == {4}
    errors = [line for end in ended for line in end.err.splitlines() if line.startswith("error")]
    assert errors == ["error: process 1 has other libraries than process 0"]


def test_the_folder_must_be_seen_by_all(case: Case, tmp_path: Path) -> None:
    def elsewhere(rank: int) -> None:
        os.chdir(tmp_path / str(rank))

    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    ended = finish(start(2, [case.command("rtn", Path("out"))], before=elsewhere))
    assert {end.code for end in ended} == {2}
    errors = [line for end in ended for line in end.err.splitlines() if line.startswith("error")]
    assert errors == ["error: out: process 1 does not see what process 0 wrote there"]
