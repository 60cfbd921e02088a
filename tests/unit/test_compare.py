"""Measuring models: against brute force in float64, standard errors against simulation, and what is refused."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressor.errors import RecipeError, VerificationError
from compressor.evals import compare as compare_module
from compressor.evals import perplexity as perplexity_module
from compressor.evals.compare import Comparison, check_tokenizers, compare, difference, percentile
from compressor.evals.generate import generate
from compressor.evals.perplexity import Text, exponential, perplexity, segment_sums, windows
from compressor.evals.scores import Estimate, weighted_mean
from compressor.testing.models import sample_tokens, tiny_bert, tiny_llama, tiny_tokenizer


def ids(length: int, seed: int = 0) -> Tensor:
    return sample_tokens(tiny_llama(), length, seed)[0]


def text(length: int, context: int, seed: int = 0) -> Text:
    return Text("random", ids(length, seed), context)


def clustered_mean(values: Tensor) -> Estimate:
    """Return the mean of per-token values with the error of its segments, as results have it."""
    return weighted_mean(segment_sums(values), [len(part) for part in values.split(128)])


def perturbed(seed: int, size: float = 0.02) -> PreTrainedModel:
    """Return the model of that seed with noise on its weights, as quantization would leave."""
    model = tiny_llama(seed)
    generator = torch.Generator().manual_seed(99)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return model


@pytest.fixture(scope="module")
def compared() -> tuple[Comparison, Tensor, PreTrainedModel, PreTrainedModel]:
    candidate, baseline, tokens = perturbed(5), tiny_llama(5), ids(391)
    return compare(candidate, baseline, Text("random", tokens, 100)), tokens, candidate, baseline


def test_windows_keep_a_last_one_of_two_tokens_but_not_of_one() -> None:
    assert [part.tolist() for part in windows(torch.arange(8), 3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [part.tolist() for part in windows(torch.arange(7), 3)] == [[0, 1, 2], [3, 4, 5]]
    assert [len(part) for part in windows(torch.arange(3), 8)] == [3]


def test_a_model_equals_itself() -> None:
    model = tiny_llama(3)
    result = compare(model, model, text(300, 128))
    assert result.kl.metrics["kl"] == Estimate(0, 0)
    assert result.kl.metrics["kl_p99"] == Estimate(0, None)
    assert result.kl.metrics["agreement"] == Estimate(1, 0)
    assert result.candidate == result.baseline
    assert result.candidate.settings["n_tokens"] == 127 + 127 + 43
    assert difference(result.candidate, result.baseline, "nll") == Estimate(0, 0)


def brute_force(candidate: PreTrainedModel, baseline: PreTrainedModel, tokens: Tensor, context: int) -> dict[str, list]:
    out: dict[str, list] = {"kl": [], "ours": [], "theirs": [], "agree": []}
    with torch.no_grad():
        for start in range(0, len(tokens), context):
            window = tokens[start : start + context]
            if len(window) < 2:
                continue
            ours, theirs = (model(window[None]).logits[0].double() for model in (candidate, baseline))
            for position in range(len(window) - 1):
                q, p = (logits[position].softmax(-1) for logits in (ours, theirs))
                out["kl"].append(float((p * (p / q).log()).sum()))
                out["ours"].append(-math.log(q[window[position + 1]]))
                out["theirs"].append(-math.log(p[window[position + 1]]))
                out["agree"].append(float(q.argmax() == p.argmax()))
    return out


def standard_error(values: list[float]) -> float:
    """Return the clustered standard error, spelled out."""
    mean = sum(values) / len(values)
    sums = [sum(value - mean for value in values[i : i + 128]) for i in range(0, len(values), 128)]
    return math.sqrt(len(sums) / (len(sums) - 1) * sum(s * s for s in sums)) / len(values)


def test_every_number_equals_brute_force(compared: tuple[Comparison, Tensor, PreTrainedModel, PreTrainedModel]) -> None:
    result, tokens, candidate, baseline = compared
    expected = brute_force(candidate, baseline, tokens, 100)
    count = len(expected["kl"])
    assert result.kl.settings["n_tokens"] == sum(result.kl.samples.weight) == count == 3 * 99 + 90
    change = [a - b for a, b in zip(expected["ours"], expected["theirs"], strict=True)]
    nll = difference(result.candidate, result.baseline, "nll")
    for estimate, values in (
        (result.kl.metrics["kl"], expected["kl"]),
        (nll, change),
        (result.kl.metrics["agreement"], expected["agree"]),
    ):
        assert estimate.value == pytest.approx(sum(values) / count, rel=1e-4, abs=1e-7)
        assert estimate.standard_error == pytest.approx(standard_error(values), rel=1e-4)
    assert result.kl.metrics["kl"].value > 1e-3
    assert 0 < result.kl.metrics["agreement"].value < 1
    p99 = result.kl.metrics["kl_p99"]
    assert p99.value == pytest.approx(sorted(expected["kl"])[math.ceil(0.99 * count) - 1], rel=1e-4)
    assert p99.standard_error is None
    for side, values in ((result.candidate, expected["ours"]), (result.baseline, expected["theirs"])):
        ppl = math.exp(sum(values) / count)
        assert side.metrics["perplexity"].value == pytest.approx(ppl, rel=1e-5)
        assert side.metrics["perplexity"].standard_error == pytest.approx(ppl * standard_error(values), rel=1e-4)
        sums = [sum(values[i : i + 128]) for i in range(0, count, 128)]
        assert side.samples.values["nll"] == pytest.approx(sums, rel=1e-5)
    relative = difference(result.candidate, result.baseline, "perplexity")
    ratio = result.candidate.metrics["perplexity"].value / result.baseline.metrics["perplexity"].value
    assert relative.value == pytest.approx(ratio - 1, rel=1e-9)
    assert relative.standard_error == pytest.approx(ratio * nll.standard_error, rel=1e-9)
    assert difference(result.kl, result.kl, "kl_p99") is None


def test_samples_are_paired_by_what_was_predicted(
    compared: tuple[Comparison, Tensor, PreTrainedModel, PreTrainedModel],
) -> None:
    result, tokens, _, baseline = compared
    assert result.candidate.samples.hash == result.baseline.samples.hash == result.kl.samples.hash
    assert result.kl.samples.id == (0, 1, 2, 3)
    assert result.kl.samples.weight == (128, 128, 128, 3)
    other = tokens.clone()
    other[150] = 4 if tokens[150] != 4 else 5
    changed = Text("random", other, 100).samples({})
    same = [a == b for a, b in zip(changed.hash, result.kl.samples.hash, strict=True)]
    assert same == [True, False, True, True]
    with pytest.raises(RecipeError, match="not the same documents"):
        difference(perplexity(baseline, Text("random", other, 100)), result.baseline, "nll")
    with pytest.raises(RecipeError, match="not the same documents"):
        difference(perplexity(baseline, Text("random", tokens, 130)), result.baseline, "nll")


def test_perplexity_alone_gives_the_same_number(
    compared: tuple[Comparison, Tensor, PreTrainedModel, PreTrainedModel],
) -> None:
    result, tokens, _, baseline = compared
    assert perplexity(baseline, Text("random", tokens, 100)) == result.baseline
    window = tokens[None, :100]
    with torch.no_grad():
        loss = baseline(window, labels=window).loss
    first = perplexity(baseline, Text("random", tokens[:100], 100))
    assert first.metrics["nll"].value == pytest.approx(float(loss), rel=1e-5)


def test_the_size_of_chunks_does_not_matter(
    compared: tuple[Comparison, Tensor, PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, tokens, candidate, baseline = compared
    for module in (compare_module, perplexity_module):
        monkeypatch.setattr(module, "ROWS", 7)
    again = compare(candidate, baseline, Text("random", tokens, 100))
    assert again.kl.metrics["kl"].value == pytest.approx(result.kl.metrics["kl"].value, rel=1e-6)
    assert again.candidate.metrics["nll"].value == pytest.approx(result.candidate.metrics["nll"].value, rel=1e-6)


def correlated(rows: int, length: int, rho: float, generator: torch.Generator) -> Tensor:
    """Return `rows` first-order autoregressive series of variance one."""
    noise = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    out = noise.clone()
    for i in range(1, length):
        out[:, i] = rho * out[:, i - 1] + math.sqrt(1 - rho * rho) * noise[:, i]
    return out


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_the_standard_error_is_that_of_repeated_texts(rho: float) -> None:
    series = correlated(1500, 128 * 12 + 50, rho, torch.Generator().manual_seed(7))
    estimates = [clustered_mean(row).standard_error for row in series]
    claimed = math.sqrt(sum(e * e for e in estimates if e is not None) / len(estimates))
    actual = float(series.mean(1).std())
    assert claimed == pytest.approx(actual, rel=0.1)
    independent = 1 / math.sqrt(series.shape[1])  # what treating tokens as independent would claim
    assert (actual / independent > 2) == (rho > 0)


def test_equal_segments_give_the_plain_error_of_their_means() -> None:
    values = torch.randn(128 * 6, generator=torch.Generator().manual_seed(8))
    means = values.double().view(6, 128).mean(1)
    assert clustered_mean(values).standard_error == pytest.approx(float(means.std() / math.sqrt(6)), rel=1e-9)


def test_less_than_two_segments_give_no_error_not_zero() -> None:
    assert clustered_mean(torch.randn(128)).standard_error is None
    assert exponential(clustered_mean(torch.randn(128))).standard_error is None
    assert clustered_mean(torch.randn(129)).standard_error is not None
    result = compare(perturbed(1), tiny_llama(1), text(60, 64))
    assert result.kl.metrics["kl"].value > 0
    for estimate in (*result.kl.metrics.values(), *result.baseline.metrics.values()):
        assert estimate.standard_error is None
    assert difference(result.candidate, result.baseline, "perplexity").standard_error is None


def test_percentile_is_nearest_rank() -> None:
    values = torch.randperm(200, generator=torch.Generator().manual_seed(9)).double() + 1
    assert percentile(values, 0.99) == 198
    assert percentile(values[:1], 0.99) == float(values[0])


def test_a_broken_loss_is_no_perplexity() -> None:
    with pytest.raises(VerificationError, match="1e\\+04 nats"):
        exponential(clustered_mean(torch.full((3,), 1e4)))


def test_tokenizers_must_agree(tmp_path: Path) -> None:
    candidate, baseline = tmp_path / "int4", tmp_path / "base"
    tokens = ids(40).clamp(max=270)
    candidate.mkdir()
    check_tokenizers(candidate, baseline, tokens)
    tiny_tokenizer().save_pretrained(baseline)
    with pytest.raises(RecipeError, match="int4 has no tokenizer"):
        check_tokenizers(candidate, baseline, tokens)
    other = tiny_tokenizer()
    other.add_tokens(["<extra>"])
    other.save_pretrained(candidate)
    with pytest.raises(RecipeError, match="275 tokens"):
        check_tokenizers(candidate, baseline, tokens)
    tiny_tokenizer(add_bos=True).save_pretrained(candidate)
    with pytest.raises(RecipeError, match="cut the text differently"):
        check_tokenizers(candidate, baseline, tokens)
    tiny_tokenizer().save_pretrained(candidate)
    check_tokenizers(candidate, baseline, tokens)


def test_what_cannot_be_compared_is_refused() -> None:
    model = tiny_llama()
    larger = tiny_llama(tied=False)
    larger.resize_token_embeddings(384, mean_resizing=False)
    with pytest.raises(RecipeError, match="384 tokens, baseline 320"):
        compare(larger, model, text(10, 8))
    with pytest.raises(RecipeError, match="1 tokens"):
        compare(model, model, text(1, 8))
    with pytest.raises(RecipeError, match="context of 1 "):
        compare(model, model, text(10, 1))
    with pytest.raises(RecipeError, match="512 positions"):
        compare(model, model, text(10, 513))
    with pytest.raises(RecipeError, match="320, the model knows 0 to 319"):
        compare(model, model, Text("x", torch.tensor([5, 320]), 8))
    with pytest.raises(RecipeError, match="float32"):
        compare(model, model, Text("x", torch.zeros(10), 8))


def test_logits_that_are_not_finite_name_the_model() -> None:
    broken = tiny_llama(tied=False)
    broken.get_input_embeddings().weight[17] = float("nan")
    tokens = torch.full((20,), 4)
    tokens[13] = 17
    with pytest.raises(VerificationError, match="candidate: logits of window 1, position 0"):
        compare(broken, tiny_llama(), Text("x", tokens, 8))


@pytest.mark.parametrize("chat", [True, False])
def test_generate_is_greedy(chat: bool) -> None:
    model, tokenizer = tiny_llama(13), tiny_tokenizer(chat_template=True)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    out = generate(model, tokenizer, "the red hen", 8, chat)
    prompt = "<bos>user\nthe red hen<eos>\n<bos>assistant\n" if chat else "the red hen"
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert out.chat_template == chat
    assert out.n_prompt == ids.shape[1]
    step = ids
    with torch.no_grad():
        for _ in range(out.n_new):
            step = torch.cat([step, model(step).logits[:, -1:].argmax(-1)], -1)
    assert out.text == tokenizer.decode(step[0, ids.shape[1] :], skip_special_tokens=True)
    assert 0 < out.n_new <= 8


def test_generate_says_when_there_is_no_template_and_what_it_cannot_do() -> None:
    model = tiny_llama(13)
    assert not generate(model, tiny_tokenizer(), "hen", 2, chat=True).chat_template
    assert generate(model, tiny_tokenizer(add_bos=True), "", 2, chat=False).n_prompt == 1
    with pytest.raises(RecipeError, match="no tokens"):
        generate(model, tiny_tokenizer(), "", 2)
    with pytest.raises(RecipeError, match="max_new_tokens is 0"):
        generate(model, tiny_tokenizer(), "hen", 0)
    with pytest.raises(RecipeError, match="BertModel"):
        generate(tiny_bert(), tiny_tokenizer(), "hen", 2)
