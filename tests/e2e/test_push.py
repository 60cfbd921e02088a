"""Uploading to a local server that speaks the Hub's calls: what arrives, what is refused, what survives a bad line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import compressor
from compressor.evals.gate import gate
from compressor.evals.results import Evaluation
from compressor.evals.rules import parse_rule
from compressor.evals.verdict import VERDICT, write_verdict
from compressor.measure import BASELINE_EVALUATION, EVALUATION, evaluate
from compressor.ship.card import MARK, command_of
from compressor.testing.hub import SIGNATURE, Hub, Repo, serving
from compressor.testing.hub_uploads import Faults
from compressor.testing.models import tiny_llama
from compressor.testing.tools import save_checkpoint, write_text

TOKEN, READER, STRANGER = ("hf_" + letter * 30 for letter in "wrs")

DRIVER = """
import contextlib, io, json, os, sys, time
wait = time.sleep
time.sleep = lambda seconds: wait(min(seconds, 0.02))  # waiting before another try is the client's and ours
from compressor.cli.app import main
for line in sys.stdin:
    job = json.loads(line)
    sys.argv, out, err = ["compress", *job["argv"]], io.StringIO(), io.StringIO()
    os.environ.update(job["env"])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    for name in job["env"]:
        del os.environ[name]
    print(json.dumps({"exit": code, "stdout": out.getvalue(), "stderr": err.getvalue()}), flush=True)
"""
"""A process of its own: the Hub client reads its address when it is imported."""


class Client:
    """Runs `compress` in one process, for one hub."""

    def __init__(self, hub: Hub, home: Path) -> None:
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "COMPRESSOR_"))}
        variables |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        pipes: Any = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER], text=True, env={**variables, "OMP_NUM_THREADS": "1"}, **pipes
        )

    def __call__(self, *words: object, token: str | None = TOKEN, **env: str) -> tuple[int, str, str]:
        job = {"argv": [str(word) for word in words], "env": {**({"HF_TOKEN": token} if token else {}), **env}}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        for secret in (TOKEN, READER, STRANGER, SIGNATURE):
            assert secret not in line
        answer = json.loads(line)
        return answer["exit"], answer["stdout"], answer["stderr"]

    def close(self) -> None:
        _, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, err
        assert TOKEN not in err


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving(Hub(writers={TOKEN: {"me"}, READER: set()})) as running:
        yield running


@pytest.fixture(scope="module")
def compress(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(hub, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


@pytest.fixture(autouse=True)
def calm(hub: Hub) -> None:
    hub.faults, hub.requests[:] = Faults(), []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny result with an evaluation and a verdict."""
    folder = tmp_path_factory.mktemp("made")
    source = save_checkpoint(tiny_llama(4), folder / "tiny")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Tiny\n")
    text = write_text(folder / "t.txt", 1200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.verify.verify", compressor.verify.check)  # type: ignore[attr-defined]
        patch.setenv("COMPRESSOR_CACHE", str(folder / "cache"))
        compressor.quantize(str(source), method="rtn", format="int8", output=folder / "out", skip=["*.o_proj*"])
        evaluate(folder / "out", str(source), text=str(text), max_tokens=1700, context=32)
    judged = gate(
        Evaluation.read(folder / "out" / BASELINE_EVALUATION),
        Evaluation.read(folder / "out" / EVALUATION),
        [parse_rule("kl <= 5")],
    )
    write_verdict(folder / "out", judged)
    return folder / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "out")


def asked(hub: Hub, method: str, part: str) -> int:
    return len([request for request in hub.requests if request.method == method and part in request.path])


def test_everything_arrives_in_one_commit(hub: Hub, compress: Client, out: Path) -> None:
    code, text, err = compress("push", out, "me/first", "--private", "--json")
    assert code == 0, err
    repo = hub.repos["me/first"]
    assert repo.private
    assert len(repo.commits) == 1
    assert json.loads(text)["commit"] == repo.commit
    for path in out.iterdir():
        assert repo.files[path.name] == path.read_bytes()
    assert MARK in repo.files["README.md"].decode()
    assert not (out / "README.md").exists()
    # Large files went to their signed address without the token.
    puts = [request for request in hub.requests if request.method == "PUT"]
    assert len(puts) == 1
    assert puts[0].token is None
    # Again: nothing to do, nothing sent, no commit.
    hub.requests.clear()
    code, text, _ = compress("push", out, "me/first", "--private", "--quiet")
    assert code == 0
    assert "everything is there already" in text
    assert len(repo.commits) == 1
    assert not asked(hub, "PUT", "") + asked(hub, "POST", "/commit/") + asked(hub, "POST", "/preupload/")


def test_an_update_replaces_what_is_stale(hub: Hub, compress: Client, out: Path) -> None:
    assert compress("push", out, "me/update")[0] == 0
    repo = hub.repos["me/update"]
    repo.files |= {"model-00001-of-00002.safetensors": b"old", "compress_old.json": b"{}", "notes.md": b"kept"}
    (out / VERDICT).unlink()
    code, text, _ = compress("push", out, "me/update", "--json")
    assert code == 0
    assert json.loads(text)["changed"] == 1  # the card; it says no more what the gate said
    assert set(repo.files) == {*(path.name for path in out.iterdir()), "README.md", ".gitattributes", "notes.md"}


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (STRANGER, "me/x", "does not accept the token (HTTP status 401)"),
        (READER, "me/x", "may not write there (HTTP status 403)"),
        (TOKEN, "you/x", "may not write there (HTTP status 403)"),
        (None, "me/x", "there is no token"),
        (TOKEN, "nobody", "has no owner"),
        (TOKEN, "me/a b", "not an id the Hub can have"),
    ],
)
def test_not_allowed(hub: Hub, compress: Client, out: Path, token: str | None, repo: str, message: str) -> None:
    code, text, err = compress("push", out, repo, "--quiet", token=token)
    assert code == (2 if "has no owner" in message or "not an id" in message else 6)
    assert message in err
    assert len(err.strip().splitlines()) == 2  # the error and its hint
    assert text == ""
    assert repo not in hub.repos


def test_offline(compress: Client, out: Path) -> None:
    code, _, err = compress("push", out, "me/x", COMPRESSOR_OFFLINE="1")
    assert code == 6
    assert "COMPRESSOR_OFFLINE is set" in err


def test_a_folder_that_is_not_there_is_said_before_anything_else(compress: Client, tmp_path: Path) -> None:
    code, _, err = compress("push", tmp_path / "nowhere", "me/x", token=None)
    assert code == 4
    assert "nowhere: no such directory" in err


@pytest.mark.parametrize(
    "faults",
    [{"cut_files": 1}, {"cut_before_commit": 1}, {"cut_after_commit": 1}, {"busy": 2}, {"cut_files": 1, "busy": 1}],
    ids=str,
)
def test_a_bad_line_makes_no_second_commit(
    hub: Hub, compress: Client, out: Path, faults: dict[str, int], request: pytest.FixtureRequest
) -> None:
    name = f"me/bad-{abs(hash(request.node.name)) % 10**8}"
    hub.uploaded.clear()
    hub.faults = Faults(**faults)
    code, text, err = compress("push", out, name, "--json")
    assert code == 0, err
    repo = hub.repos[name]
    assert len(repo.commits) == 1
    assert json.loads(text)["commit"] == repo.commit
    assert repo.files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert hub.faults == Faults()  # what should go wrong did


def test_the_line_stays_bad(hub: Hub, compress: Client, out: Path) -> None:
    hub.faults = Faults(cut_before_commit=99)
    code, _, err = compress("push", out, "me/never", "--quiet")
    assert code == 6
    assert "failed" in err
    assert hub.repos["me/never"].commits == []
    assert asked(hub, "POST", "/commit/") == 4
    # The next run sends the commit alone.
    hub.faults, hub.requests[:] = Faults(), []
    assert compress("push", out, "me/never", "--quiet")[0] == 0
    assert asked(hub, "PUT", "") == 0
    assert len(hub.repos["me/never"].commits) == 1


def test_somebody_else_was_faster(hub: Hub, compress: Client, out: Path) -> None:
    hub.faults = Faults(race=1)
    code, _, err = compress("push", out, "me/race", "--quiet")
    assert code == 6
    assert "somebody else changed it" in err
    assert hub.repos["me/race"].commits == []


def test_a_repository_that_is_there(hub: Hub, compress: Client, out: Path) -> None:
    hub.repos["me/empty"] = Repo({".gitattributes": b""})
    assert compress("push", out, "me/empty", "--quiet")[0] == 0
    hub.repos["me/open"] = Repo({".gitattributes": b""})
    code, _, err = compress("push", out, "me/open", "--private", "--quiet")
    assert (code, "exists and is public" in err) == (2, True)
    hub.repos["me/other"] = Repo({"model.safetensors": b"weights", "config.json": b"{}"})
    code, _, err = compress("push", out, "me/other", "--quiet")
    assert (code, "holds a model that compress did not upload" in err) == (2, True)
    assert hub.repos["me/other"].commits == []
    assert compress("push", out, "me/other", "--quiet", "--force")[0] == 0
    assert hub.repos["me/other"].files["model.safetensors"] == (out / "model.safetensors").read_bytes()


def test_what_cannot_be_trusted_is_refused(hub: Hub, compress: Client, out: Path, made: Path) -> None:
    verdict = json.loads((out / VERDICT).read_text())
    (out / VERDICT).write_text(json.dumps({**verdict, "passed": False}))
    code, _, err = compress("push", out, "me/gated", "--quiet")
    assert (code, "the gate said no" in err, "--force" in err) == (7, True, True)
    report = json.loads((made / "compress_report.json").read_text())
    (out / "compress_report.json").write_text(json.dumps({**report, "verification": {}}))
    code, _, err = compress("push", out, "me/gated", "--quiet")
    assert (code, "not verified" in err) == (7, True)
    assert not hub.requests
    code, _, err = compress("push", out, "me/gated", "--force")
    assert code == 0
    assert "uploaded all the same: it was not verified" in err
    card = hub.repos["me/gated"].files["README.md"].decode()
    assert "**It was not verified by loading it.**" in card
    assert "**did not pass** the gate" in card
    code, _, err = compress("push", made.parent / "tiny", "me/gated", "--quiet", "--force")
    assert (code, "no finished result" in err) == (7, True)


def test_the_card(compress: Client, made: Path, hub: Hub) -> None:
    code, card, _ = compress("push", made, "me/tiny-int8", "--card")
    assert code == 0
    assert not hub.requests
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit"
    assert front["language"] == ["en"]
    assert front["pipeline_tag"] == "text-generation"
    assert front["tags"] == ["compressed-tensors", "rtn", "int8"]
    assert str(made.parent) not in card  # no places on this machine
    evaluation = Evaluation.read(made / EVALUATION)
    kl = evaluation.tasks["kl"].metrics["kl"]
    label = "| KL divergence to the original (nats per token) |  | "
    value, error = (float(word) for word in card.partition(label)[2].partition(" |")[0].split(" ± "))
    assert (value, error) == (pytest.approx(kl.value, rel=0.1), pytest.approx(kl.standard_error, rel=0.1))
    assert "- `kl <= 5`: pass" in card
    assert "compress quantize tiny --method rtn --format int8 --skip '*.o_proj*'" in card
    assert 'from_pretrained("me/tiny-int8", dtype="float32")' in card
    assert f"compressor {compressor.__version__}" in card
    assert "No calibration data was used." in card


def test_the_cards_licence_comes_from_the_hub(hub: Hub, compress: Client, out: Path) -> None:
    hub.repos["big/model"] = Repo({"config.json": b"{}"}, card={"license": "llama3.3", "language": ["en", "de"]})
    report = json.loads((out / "compress_report.json").read_text())
    report["recipe"] |= {"model": "big/model", "source_revision": hub.repos["big/model"].commit}
    (out / "compress_report.json").write_text(json.dumps(report))
    assert compress("push", out, "me/big")[0] == 0
    front = yaml.safe_load(hub.repos["me/big"].files["README.md"].decode().split("---")[1])
    assert front["license"] == "llama3.3"
    assert front["base_model"] == ["big/model"]
    assert front["base_model_relation"] == "quantized"
    assert front["language"] == ["en", "de"]


def test_push_as_a_step(hub: Hub, compress: Client, out: Path, tmp_path: Path, made: Path) -> None:
    recipe = tmp_path / "r.yaml"
    settings = {"method": "rtn", "format": "int8", "skip": ["*.o_proj*"]}
    steps = [{"quantize": settings}, {"push": {"repo": "me/step", "private": True}}]
    recipe.write_text(yaml.safe_dump({"model": str(made.parent / "tiny"), "output": str(out), "steps": steps}))
    code, _, err = compress("run", recipe, "--quiet", token=None)
    assert code == 6  # said before anything runs
    assert "step 2, push: me/step: there is no token" in err
    code, text, err = compress("run", recipe, "--quiet")
    assert code == 0, err
    assert "quantize: " in text
    assert "(was done already)" in text
    assert hub.repos["me/step"].private
    card = hub.repos["me/step"].files["README.md"].decode()
    assert "`compress run` with this recipe" in card
    assert str(tmp_path) not in card
    assert compress("run", recipe, "--quiet")[0] == 0
    assert len(hub.repos["me/step"].commits) == 1


def test_command_of_a_recipe() -> None:
    recipe = {
        "model": "smollm2-135m",
        "method": "gptq",
        "format": "int4",
        "group_size": "32",
        "options": {"damp": 0.02, "order": "plain"},
        "overrides": [
            {"match": "*.down_proj*", "format": "int8", "group_size": "channel"},
            {"match": "a b", "keep": "x"},
        ],
        "calibration": {"data": "python-docs", "n_samples": 16, "seq_len": 512},
        "seed": 3,
    }
    assert command_of(recipe) == (
        "compress quantize smollm2-135m --method gptq --format int4 --group-size 32 --option damp=0.02 "
        "--option order=plain --set '*.down_proj*=int8:channel' --skip 'a b' --n-samples 16 --seed 3"
    )
