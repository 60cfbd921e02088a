"""`compress bench` from the command line: two models in processes of their own, and what cannot be measured."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from compressor.cli.app import app
from compressor.environment import pick_dtype
from compressor.errors import CompressorError, RecipeError, UnsupportedError
from compressor.evals.speed import Spread, run_round, weight_bytes
from compressor.formats import get_format
from compressor.runtime import load
from compressor.testing.checkpoints import write_compressed
from compressor.testing.models import sample_tokens, tiny_bert, tiny_llama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a dense bfloat16 checkpoint and the same in int4."""
    folder = tmp_path_factory.mktemp("speed")
    model = tiny_llama(3, hidden_size=128, intermediate_size=256).to(torch.bfloat16)
    model.save_pretrained(folder / "dense")
    write_compressed(model, folder / "int4", get_format("int4", 64, torch.bfloat16))
    return folder / "dense", folder / "int4"


def test_bench_measures_both_models(folders: tuple[Path, Path], tmp_path: Path) -> None:
    dense, packed = folders
    options = ["--prompt-tokens", "24", "--new-tokens", "3", "--repeats", "2", "--threads", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, ["bench", str(packed), "-b", str(dense), *options, "-o", str(tmp_path), "--json"])
    assert result.exception is None, result.exception
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "compress_bench.json").read_text())
    ours, theirs = found["model"], found["baseline"]
    assert (ours["name"], theirs["name"]) == (str(packed), str(dense))
    for side in (ours, theirs):
        for rate in (side["prompt"], side["decode"]):
            assert 0 < rate["slowest"] <= rate["median"] <= rate["fastest"]
        assert side["prompt"]["median"] > side["decode"]["median"]  # many tokens at once, and one at a time
        assert 0 < side["rss_before"] < side["rss_loaded"] <= side["rss_peak"]
        assert side["threads"] == 1
        assert side["cuda_peak"] is None
    assert theirs["decode_path"] == "dense-bfloat16"
    assert ours["decode_path"].endswith("(packed int4)")
    assert theirs["weight_bytes"] == weight_bytes(load(dense, dtype=torch.bfloat16))
    assert ours["weight_bytes"] == weight_bytes(load(packed, dtype=torch.bfloat16)) < theirs["weight_bytes"]
    assert found["ratios"] == {
        "prompt": pytest.approx(ours["prompt"]["median"] / theirs["prompt"]["median"]),
        "decode": pytest.approx(ours["decode"]["median"] / theirs["decode"]["median"]),
        "weights": pytest.approx(theirs["weight_bytes"] / ours["weight_bytes"]),
    }
    settings = found["settings"]
    assert (settings["prompt_tokens"], settings["new_tokens"], settings["repeats"]) == (24, 3, 2)
    assert settings["dtype"] == "bfloat16"
    assert found["machine"]["device"] == "cpu"
    assert found["machine"]["cores"] >= 1


def test_a_model_alone_is_shown_as_a_table(folders: tuple[Path, Path]) -> None:
    options = ["--prompt-tokens", "5", "--new-tokens", "1", "--repeats", "1", "--dtype", "float32", "-q"]
    result = CliRunner().invoke(app, ["bench", str(folders[1]), *options])
    assert result.exception is None, result.exception
    assert "generated, tokens/s" in result.stdout
    assert "reference-float32 (packed int4)" in result.stdout
    assert "speed" not in result.stdout


def test_errors_of_the_measuring_process_arrive_here(tmp_path: Path) -> None:
    tiny_bert(1).save_pretrained(tmp_path)
    failed = CliRunner().invoke(app, ["bench", str(tmp_path), "--repeats", "1", "-q"]).exception
    assert isinstance(failed, UnsupportedError)
    assert "does not generate text" in failed.message


@pytest.mark.parametrize(
    ("options", "error"), [(["--dtype", "int4"], RecipeError), (["--device", "abacus"], RecipeError)]
)
def test_what_is_refused_before_anything_is_loaded(
    options: list[str], error: type[CompressorError], folders: tuple[Path, Path]
) -> None:
    assert isinstance(CliRunner().invoke(app, ["bench", str(folders[0]), *options]).exception, error)


def test_rounds_generate_greedily_with_a_cache(folders: tuple[Path, Path]) -> None:
    model = load(folders[0])
    ids = sample_tokens(model, seed=4)[:, :7]
    seen: list[tuple[int, int]] = []
    forward = model.forward

    def spy(*args: object, **inputs: object) -> object:
        tokens = inputs["input_ids"]
        assert isinstance(tokens, torch.Tensor)
        out = forward(*args, **inputs)
        seen.append((tokens.shape[1], int(tokens[0, -1])))
        return out

    spy.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = spy  # type: ignore[method-assign]
    seconds = run_round(model, ids, 4)
    assert set(seconds) == {"prompt", "decode"}
    assert all(value > 0 for value in seconds.values())
    assert [length for length, _ in seen] == [ids.shape[1], 1, 1, 1, 1]
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert [token for _, token in seen[1:5]] == expected[0, -4:].tolist()


def test_spread_and_bytes() -> None:
    assert Spread.of(10, [1.0, 5.0, 2.0]) == Spread(median=5.0, slowest=2.0, fastest=10.0)
    tied, untied = tiny_llama(0, tied=True), tiny_llama(0, tied=False)
    assert weight_bytes(untied) - weight_bytes(tied) == untied.lm_head.weight.nbytes


def test_dtype_of_a_checkpoint(tmp_path: Path) -> None:
    for text, device, expected in (
        ('{"dtype": "bfloat16"}', CPU, torch.bfloat16),
        ('{"torch_dtype": "torch.float16"}', CPU, torch.bfloat16),
        ('{"torch_dtype": "float16"}', torch.device("cuda"), torch.float16),
        ('{"text_config": {"dtype": "bfloat16"}}', CPU, torch.bfloat16),
        ('{"dtype": null}', CPU, torch.float32),
    ):
        (tmp_path / "config.json").write_text(text)
        assert pick_dtype("auto", tmp_path, device) == expected
    assert pick_dtype("float32", tmp_path, CPU) == torch.float32
    with pytest.raises(RecipeError, match="--dtype fp8"):
        pick_dtype("fp8", tmp_path, CPU)
