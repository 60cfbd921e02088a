"""Cosines of sentence embeddings: pooling by hand, what is a sentence, and the task as people ask for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressor.errors import RecipeError, VerificationError
from compressor.evals.bench.render import render_table
from compressor.evals.bench.table import TABLES, read_table
from compressor.evals.embeddings import Sentences, compare_embeddings, embed, find_sentences
from compressor.evals.results import Evaluation
from compressor.evals.tasks import EMBEDDINGS, choose
from compressor.measure import BASELINE_EVALUATION, EVALUATION, evaluate
from compressor.testing.checkpoints import edit_tensors
from compressor.testing.models import tiny_bert, tiny_tokenizer
from compressor.testing.tools import save_checkpoint

TEXT = """
 = A heading that is long enough to count = 
The quick brown fox jumps over the lazy dog. Short one. Is this sentence long enough to count? It is one of them indeed.
The quick brown fox jumps over the lazy dog.
A sentence without an end but with enough words
"""
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Is this sentence long enough to count?",
    "It is one of them indeed.",
    "A sentence without an end but with enough words",
)


def test_what_is_a_sentence() -> None:
    assert find_sentences(TEXT, 10) == SENTENCES
    assert find_sentences(TEXT, 2) == SENTENCES[:2]
    with pytest.raises(RecipeError, match="1 sentences"):
        find_sentences("This is the only sentence in here.", 5)


def test_pooling_is_the_mean_over_a_sentences_own_tokens() -> None:
    """One sentence at a time, without padding or masks."""
    model, tokenizer = tiny_bert().eval(), tiny_tokenizer()
    sentences = Sentences("t", tuple(f"{text} {'more words ' * index}" for index, text in enumerate(SENTENCES)), 64)
    found = embed(model, tokenizer, sentences)
    for text, row in zip(sentences.texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:64]])
        with torch.no_grad():
            mean = model(input_ids=ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=1e-4, atol=1e-5)
    with pytest.raises(RecipeError, match="longer than the model's"):
        embed(model, tokenizer, Sentences("t", SENTENCES, 100_000))
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(VerificationError, match="NaN or Inf"):
        embed(model, tokenizer, sentences)


def test_cosines_and_neighbours_by_hand() -> None:
    sentences = Sentences("t", SENTENCES, 8)
    theirs = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0], [1, 0.1, 0], [0, 1, 0], [0, 1, 0.5]]), dim=-1)
    ours = theirs.clone()
    ours[3] = torch.tensor([1.0, 0, 0])  # was nearest to the third, now to the first, which it draws away
    result = compare_embeddings(ours, theirs, sentences)
    assert result.samples.values["cosine"][:3] == pytest.approx([1, 1, 1])
    assert result.samples.values["cosine"][3] == pytest.approx(0, abs=1e-6)
    assert result.samples.values["neighbour"] == (0.0, 1.0, 0.0, 0.0)
    assert result.metrics["cosine"].value == pytest.approx(0.75)
    assert result.metrics["cosine_low"].value == pytest.approx(0, abs=1e-6)
    with pytest.raises(RecipeError, match="3 and 2 dimensions"):
        compare_embeddings(ours, ours[:, :2], sentences)


def test_choosing_the_task() -> None:
    assert [spec.name for spec in choose(None, None, has_baseline=True, headless=True)] == [EMBEDDINGS]
    (spec,) = choose([EMBEDDINGS], None, has_baseline=True, headless=True, limit=7)
    assert spec.limit == 7
    with pytest.raises(RecipeError, match="embeddings compares with a baseline"):
        choose(None, None, has_baseline=False, headless=True)
    with pytest.raises(RecipeError, match="predicts no tokens"):
        choose(["perplexity"], None, has_baseline=True, headless=True)
    with pytest.raises(RecipeError, match="has a head"):
        choose([EMBEDDINGS], None, has_baseline=True)


def test_an_encoder_against_its_original(tmp_path: Path) -> None:
    for name in ("original", "changed"):
        save_checkpoint(tiny_bert(), tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    edit_tensors(tmp_path / "changed", lambda tensors: tensors["encoder.layer.1.output.dense.weight"].mul_(1.5))
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    original = str(tmp_path / "original")
    found = evaluate(tmp_path / "changed", original, text=str(text), context=4096, limit=3, cache=False)
    task = found.model.tasks[EMBEDDINGS]
    assert task.settings["sentences"] == 3
    assert task.settings["max_tokens"] == tiny_bert().config.max_position_embeddings
    assert 0.2 < task.metrics["cosine"].value < 0.9999
    assert Evaluation.read(tmp_path / "changed" / EVALUATION).tasks == found.model.tasks
    assert (tmp_path / "changed" / BASELINE_EVALUATION).is_file()
    same = evaluate(original, original, text=str(text), output=tmp_path / "same", cache=False).model.tasks[EMBEDDINGS]
    assert same.metrics["cosine"].value == pytest.approx(1, abs=1e-6)
    assert same.metrics["neighbour"].value == 1


def test_the_projects_table_of_an_encoder() -> None:
    table = read_table(TABLES / "encoder.yaml")
    assert table.evaluation.sentences == 256
    page = render_table(TABLES / "encoder.yaml")
    assert "nearest neighbour kept" in page
    assert "perplexity" not in page
    assert page.count("\n| ") == len(table.rows) + 2
