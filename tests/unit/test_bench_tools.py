"""The programs that make rows with other tools: what they score, how they are set up, what they leave behind."""

from pathlib import Path

import pytest
import torch

from compressor.evals.bench import steps
from compressor.evals.bench.external import autoround_row, llmcompressor_row, stock_score
from compressor.evals.compare import compare
from compressor.evals.perplexity import Text, windows
from compressor.formats import get_format
from compressor.testing.checkpoints import write_compressed
from compressor.testing.models import tiny_llama


def test_stock_scores_are_our_scores() -> None:
    """Segment by segment, on a model and a perturbed copy, with a last window and a last segment that are short."""
    baseline, candidate = tiny_llama(3), tiny_llama(3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in candidate.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    tokens = torch.randint(0, 320, (211,), generator=generator)
    parts = [stock_score.score(candidate, baseline, window) for window in windows(tokens, 50)]
    text = Text("text", tokens, 50)
    ours = compare(candidate, baseline, text)
    values = dict(
        zip(("nll", "baseline_nll", "kl", "agreement"), map(torch.cat, zip(*parts, strict=True)), strict=True)
    )
    theirs = text.samples(values)
    for name, wanted in (
        ("nll", ours.candidate.samples.values["nll"]),
        ("baseline_nll", ours.baseline.samples.values["nll"]),
        ("kl", ours.kl.samples.values["kl"]),
        ("agreement", ours.kl.samples.values["agreement"]),
    ):
        assert theirs.values[name] == pytest.approx(wanted, rel=1e-6), name
    assert len(theirs) == 2


def test_bits_of_a_compressed_tensors_checkpoint(tmp_path: Path) -> None:
    """What the llm-compressor program says about its own result, on a checkpoint whose bits are known."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "dense")
    write_compressed(model, tmp_path / "packed", get_format("int4", 64, torch.float32))
    found = llmcompressor_row.stored_size(tmp_path / "packed", tmp_path / "dense")
    assert found["bits_per_weight"] == 4 + 32 / 64  # a float32 scale per 64 weights
    size = (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert 0 < size - found["weight_bytes"] < 20_000, "all but the header"


def test_a_checkpoint_in_a_folder_the_tool_named_is_brought_up(tmp_path: Path) -> None:
    inner = tmp_path / "tiny-w4g64"
    inner.mkdir()
    (inner / "config.json").write_text("{}")
    (inner / "model.safetensors").write_text("weights")
    for _ in range(2):  # the second time it is there already
        autoround_row.lift(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "config.json").unlink()
    with pytest.raises(SystemExit, match="0 checkpoints"):
        autoround_row.lift(tmp_path)


def test_schemes_given_to_llm_compressor() -> None:
    weights = llmcompressor_row.scheme("int3", 32)["config_groups"]["group_0"]["weights"]
    assert weights == {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    assert llmcompressor_row.scheme("nvfp4", None) == {"targets": "Linear", "scheme": "NVFP4A16"}
    with pytest.raises(SystemExit, match="int4 needs --group-size"):
        llmcompressor_row.scheme("int4", None)
    with pytest.raises(SystemExit, match="has its own group size"):
        llmcompressor_row.scheme("mxfp4", 64)


def test_other_tools_see_neither_our_packages_nor_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "here")
    around = steps.Surroundings(3, "cpu", {"/secret/place": "PLACE", "/secret/place/in": "INSIDE"})
    ours, theirs = around.environment(foreign=False), around.environment(foreign=True)
    assert (ours["OMP_NUM_THREADS"], ours["PYTHONPATH"]) == ("3", "here")
    assert "PYTHONPATH" not in theirs
    assert (theirs["HF_HUB_OFFLINE"], theirs["CUDA_VISIBLE_DEVICES"]) == ("1", "")
    assert around.scrub("/secret/place/in/x /secret/place") == "INSIDE/x PLACE"
