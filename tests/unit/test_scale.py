"""Random checkpoints of real widths, what runs on them used, and what larger models cost."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

import compressor
import compressor.verify
from compressor.checkpoint.source import Source
from compressor.errors import RecipeError, ResourceError
from compressor.evals.scale import cost, render
from compressor.evals.scale.__main__ import main
from compressor.evals.scale.measure import Usage, _Watch, check_limit
from compressor.evals.scale.write import write_llama

DOCS = Path(__file__).parents[2] / "docs" / "scale.md"


def test_a_written_checkpoint_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.evals.scale.write.SHARD_BYTES", 30_000)
    monkeypatch.setattr("compressor.verify.verify", compressor.verify.check)
    said: list[str] = []
    total = write_llama(tmp_path / "tiny", "tiny", layers=2, say=said.append)
    source = Source.open(tmp_path / "tiny")
    assert total == sum(info.nbytes for info in source.tensors.values()) > 150_000
    assert len({info.file for info in source.tensors.values()}) == len(said) > 3
    report = compressor.quantize(
        str(tmp_path / "tiny"), method="gptq", format="int4", output=tmp_path / "out", n_samples=2, seq_len=16
    )
    assert report.verification["ok"]
    assert sum(row.action == "int4" for row in report.rows) == 14


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_llama(tmp_path / name, "tiny", layers=1, seed=seed)
    first, again, other = (Source.open(tmp_path / name).fingerprint for name in "abc")
    assert first == again != other


def test_what_is_in_the_way_or_unknown_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["write", str(tmp_path / "full"), "--shape", "tiny"]) == 2
    assert main(["write", str(tmp_path / "new"), "--shape", "llama-7"]) == 2
    assert main(["render", str(tmp_path / "none.md")]) == 2
    errors = capsys.readouterr().err
    assert "is not an empty folder" in errors
    assert "llama-7b" in errors
    assert "none.md" in errors


def test_progress_lines_end_units() -> None:
    usage, said = Usage("x", 1), list[str]()
    lines = ["hashing the source", "[1/3] model.layers.0, error 0.1, 3.0s", "", "[2/3] model.layers.1, 2.0s", "writing"]
    watch = _Watch(None, Path("nowhere"), usage)
    watch._peak = 7
    watch.follow(io.StringIO("\n".join(lines)), said.append)
    assert [(unit["name"], unit["peak_rss"]) for unit in usage.units] == [("model.layers.0", 7), ("model.layers.1", 0)]
    assert watch.last == "writing"


def used(peak: int, blocks: list[int], **changes: object) -> Usage:
    units = [{"name": str(index), "seconds": 1.0, "peak_rss": peak} for index, peak in enumerate([*blocks, 0])]
    values = {"peak_rss": peak, "units": units, "work_left": False, "cpu_seconds": 60.0, "tokens": 512, **changes}
    return Usage("compress quantize x --method gptq --format int4", 10, **values)  # type: ignore[arg-type]


def test_limits_hold_for_the_process_and_its_children() -> None:
    check_limit(used(5_900_000_000, [1]), 6)
    with pytest.raises(ResourceError, match=r"6\.10 GB were resident, the limit is 6 GB"):
        check_limit(used(6_100_000_000, [1]), 6)
    with pytest.raises(ResourceError, match=r"7\.00 GB"):
        check_limit(used(1, [1], peak_tree=7_000_000_000), 6)
    with pytest.raises(ResourceError, match="work folder"):
        check_limit(used(1, [1], work_left=True), 6)
    assert used(0, [9, 5, 5, 6]).growth == 1
    assert used(0, [9, 5]).growth is None


def test_a_run_leaves_its_record_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(source: Path, out: Path, arguments: list[str], threads: int, say: object) -> Usage:
        out.mkdir(parents=True)
        assert (source, arguments, threads) == (tmp_path / "model", ["--method", "rtn"], 1)
        return used(4_000_000_000, [1])

    monkeypatch.setattr("compressor.evals.scale.__main__.measure", run)
    flags = ["--work", tmp_path / "work", "--results", tmp_path / "new" / "results", "--method", "rtn"]
    command = ["measure", tmp_path / "model", "a-run", *flags]
    assert main([str(word) for word in [*command, "--limit-gb", "6"]]) == 0
    (record,) = render.read_results(tmp_path / "new" / "results")
    assert (record["name"], record["limit_gb"], record["peak_rss"]) == ("a-run", 6.0, 4_000_000_000)
    assert record["machine"]["threads"] == 1
    assert not any((tmp_path / "work").iterdir())
    assert main([str(word) for word in [*command, "--limit-gb", "3"]]) == 5
    assert "the limit is 3 GB" in capsys.readouterr().err


def test_counted_models_are_those_of_their_names() -> None:
    seven, seventy, mixture = cost.MODELS
    for model, billions in ((seven, 6.74), (seventy, 69.0), (mixture, 671)):
        assert model.weights * model.blocks + model.outside == pytest.approx(billions * 1e9, rel=0.06)
    # Of a 7B block: weights in float32 and bf16; second moments of 4096 inputs three times, and of 11008.
    assert seven.statistics == 4 * (3 * 4096**2 + 11_008**2)
    assert cost.memory(seven, 1, statistics=False) == 6 * seven.weights
    assert cost.memory(seventy, 8, statistics=True) < cost.memory(seventy, 1, statistics=True)
    assert cost.least_memory(seventy) is None
    least = cost.least_memory(mixture)
    assert least is not None
    assert 6 * mixture.outside <= least < cost.memory(mixture, 1, statistics=False) / 5
    assert cost.hidden_states(seventy, 128 * 2048) == 2 * 128 * 2048 * 8192 * 4


def test_times_follow_a_measured_run() -> None:
    run = used(1, [1, 1, 1]).to_json()
    seven = cost.MODELS[0]
    assert cost.seconds_of(seven, "gptq", run, 512) == pytest.approx(32 * 60 / 3)
    assert cost.seconds_of(seven, "rtn", run, 512) == pytest.approx(32 * 60 / 3)
    assert cost.seconds_of(seven, "gptq", None, 512) is None
    more = cost.seconds_of(cost.MODELS[1], "gptq", run, 512)
    assert more is not None
    assert more > 80 / 32 * 10 * 32 * 60 / 3, "solving grows faster than the number of weights"


def test_a_page_is_filled_and_filled_again() -> None:
    page = "a\n" + "".join(f"<!-- {n} -->\nold\n<!-- end of {n} -->\n" for n in ("measured", "models", "processes"))
    result = {**used(5_000_000_000, [3_000_000_000]).to_json(), "name": "gptq-run", "limit_gb": 6.0}
    filled = render.fill(page, [result])
    assert "| `gptq-run` |" in filled
    assert "5.00 GB" in filled
    assert "old" not in filled
    assert render.fill(filled, [result]) == filled
    with pytest.raises(RecipeError, match="measured"):
        render.fill("a", [])


def test_the_page_shows_the_results() -> None:
    page = DOCS.read_text(encoding="utf-8")
    assert render.fill(page, render.read_results(render.RESULTS)) == page
