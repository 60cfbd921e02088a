"""The same recipe on the same machine writes the same bytes, whether the run was interrupted or not: every method."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import compressor
import compressor.verify
from compressor.methods import METHODS
from compressor.pruning import PRUNERS
from compressor.report import Silent
from compressor.testing import models
from compressor.testing.images import rare_digits, tiny_classifier
from compressor.testing.tools import save_checkpoint, tree_hash, write_text
from compressor.vision.job import prune as cut

QUANTIZE: dict[str, dict[str, Any]] = {
    "rtn": {"format": "int4", "group_size": 32},
    "fp4": {"format": "nvfp4"},
    "gptq": {"format": "int4", "group_size": 32},
    "awq": {"format": "int4", "group_size": 32},
    "smoothquant": {"inputs": "int8-token"},
    "adaround": {"format": "int4", "group_size": 32, "options": {"iters": 4}},
    "flexround": {"format": "int4", "group_size": 32, "options": {"iters": 4}},
    "nupes": {"format": "power4", "options": {"iters": 4}},
    "outliertune": {},
    "eaquant": {"format": "int4", "group_size": "channel", "options": {"rotations": 4, "block": 32}},
}
PRUNE: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "wanda": {},
    "sparsegpt": {},
    "icbs": {"options": {"window": 16, "samples": 16, "held_back": 8, "block": 512, "restarts": 1, "sweeps": 1}},
    "m-fac": {"options": {"window": 16, "samples": 16, "steps": 2}},
}
STRUCTURED: dict[str, dict[str, Any]] = {
    "optin": {"options": {"group": 16, "samples": 4, "window": 16, "rows": 40, "logit_rows": 16, "length": 16}},
}
FILTERS = ("beta-rank", "l1", "random", "taylor")
TIMES = ("seconds", "time", "latency")
SAME = "the same SHA-256 of every file"


class Stopped(Exception):
    """Stands for whatever ends a process."""


class Stopping(Silent):
    """Ends a run behind its first unit."""

    def unit_done(self, name: str, mean_error: float | None, seconds: float) -> None:
        raise Stopped


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("determinism")
    save_checkpoint(models.tiny_llama(kv_heads=2), root / "dense")
    save_checkpoint(models.tiny_olmoe(), root / "experts")
    tiny_classifier("resnet").save_pretrained(root / "images")
    rare_digits(root / "digits.npz")
    write_text(root / "text.txt", words=1500)
    return root


def hashes(folder: Path) -> dict[str, str]:
    """Hashes of what a result is; files that say how long it took are compared without that."""
    found = tree_hash(folder)
    for path in folder.glob("*.json"):
        if path.name in found and any(word in path.read_text() for word in TIMES):
            found[path.name] = json.dumps(_timeless(json.loads(path.read_text())), sort_keys=True)
    return found


def _timeless(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _timeless(value) for key, value in data.items() if not any(word in key for word in TIMES)}
    return [_timeless(value) for value in data] if isinstance(data, list) else data


def compare(run: Any, folder: Path, tally: Counter[str]) -> None:
    """Run once, then again with an interruption, and compare."""
    run(folder / "once", None)
    with pytest.raises(Stopped):
        run(folder / "twice", Stopping())
    assert not (folder / "twice" / "config.json").exists()
    report = run(folder / "twice", None)
    assert report.resumed_at == 1
    first = hashes(folder / "once")
    assert "model.safetensors" in first
    assert hashes(folder / "twice") == first
    tally[f"{SAME}, also after an interruption"] += 1


@pytest.mark.reliability("Determinism", "every method of `compress quantize`")
@pytest.mark.parametrize("method", list(QUANTIZE))
def test_quantize(root: Path, tmp_path: Path, tally: Counter[str], method: str) -> None:
    source = root / ("experts" if method == "eaquant" else "dense")

    def run(out: Path, progress: Silent | None) -> Any:
        text = {"data": str(root / "text.txt"), "n_samples": 4, "seq_len": 16}
        return compressor.quantize(
            str(source), method=method, output=out, progress=progress, **text, **QUANTIZE[method]
        )

    compare(run, tmp_path, tally)


@pytest.mark.reliability("Determinism", "every method of `compress prune` for language models")
@pytest.mark.parametrize("method", list(PRUNE))
def test_prune(root: Path, tmp_path: Path, tally: Counter[str], method: str) -> None:
    def run(out: Path, progress: Silent | None) -> Any:
        text = {"data": str(root / "text.txt"), "n_samples": 16, "seq_len": 32, "sparsity": 0.5}
        return compressor.prune(
            str(root / "dense"), method=method, output=out, progress=progress, **text, **PRUNE[method]
        )

    compare(run, tmp_path, tally)


@pytest.mark.reliability("Determinism", "every method of `compress prune` that cuts language models")
@pytest.mark.parametrize("method", list(STRUCTURED))
def test_structured(root: Path, tmp_path: Path, tally: Counter[str], method: str) -> None:
    found = []
    for name in ("once", "again"):
        text = {"data": str(root / "text.txt"), "n_samples": 6, "seq_len": 32, "macs": 0.7}
        compressor.prune(str(root / "dense"), method=method, output=tmp_path / name, **text, **STRUCTURED[method])
        found.append(hashes(tmp_path / name))
    assert "model.safetensors" in found[0]
    assert found[0] == found[1]
    tally[SAME] += 1


@pytest.mark.reliability("Determinism", "every method of `compress prune` for image classifiers")
@pytest.mark.parametrize("method", FILTERS)
def test_filters(root: Path, tmp_path: Path, tally: Counter[str], method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.vision.job.latency", lambda model, images: 1e-3)
    monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)
    found = []
    for name in ("once", "again"):
        cut(str(root / "images"), method=method, data=str(root / "digits.npz"), sparsity=0.5, output=tmp_path / name)
        found.append(hashes(tmp_path / name))
    assert "model.safetensors" in found[0]
    assert found[0] == found[1]
    tally[SAME] += 1


def test_no_method_is_left_out() -> None:
    assert set(QUANTIZE) == set(METHODS)
    kinds = {name: pruner.kind for name, pruner in PRUNERS.items()}
    assert set(PRUNE) == {name for name, kind in kinds.items() if kind == "language"}
    assert set(STRUCTURED) == {name for name, kind in kinds.items() if kind == "structured"}
    assert set(FILTERS) == {name for name, kind in kinds.items() if kind == "vision"}
