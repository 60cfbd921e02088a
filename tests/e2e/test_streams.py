"""Which inputs a method sees: full precision, or what the compressed prefix produces."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch

import compressor
from compressor.calibration.dataset import build as build_set
from compressor.calibration.stats import SecondMoment
from compressor.decision import Outcome, Quantized
from compressor.formats.base import QuantFormat
from compressor.methods.base import Layer, MethodOptions, Scope, Stream
from compressor.plan import WeightRef
from compressor.recipe import CalibrationSpec
from compressor.runtime import dequantized
from compressor.testing import models
from compressor.testing.tools import save_checkpoint, write_text


class Watcher:
    """Rounds to nearest and keeps what it saw."""

    name = "watcher"
    summary = "for this test"
    scope = Scope.LAYER
    Options = MethodOptions
    stream: ClassVar[Stream] = Stream.FP

    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def stats(self, fmt: QuantFormat) -> tuple[SecondMoment, ...]:
        return (SecondMoment(),)

    def refuse(self, ref: WeightRef, fmt: QuantFormat) -> str | None:
        return None

    def solve(self, layer: Layer, fmt: QuantFormat, generator: torch.Generator) -> Outcome:
        self.seen[layer.ref.name] = layer.second_moment(SecondMoment()).clone()
        q = layer.fit(fmt)
        return Outcome({layer.ref.name: Quantized(fmt.encode(layer.weight, q), q)})


@pytest.mark.parametrize("stream", [Stream.FP, Stream.COMPRESSED, Stream.BOTH])
def test_statistics_come_from_the_stream_the_method_asked_for(
    stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = Watcher()
    monkeypatch.setattr(Watcher, "stream", stream)
    monkeypatch.setattr("compressor.api.job.get_method", lambda name, options: watcher)
    monkeypatch.setattr("compressor.planner.get_method", lambda name, options: watcher)
    model = models.tiny_llama(layers=3, kv_heads=2)
    source, text = save_checkpoint(model, tmp_path / "source"), write_text(tmp_path / "text.txt")
    spec = CalibrationSpec(data=str(text), n_samples=5, seq_len=24)
    compressor.quantize(
        str(source), method="watcher", format="int8", output=tmp_path / "out", data=str(text), n_samples=5, seq_len=24
    )
    tokens = build_set(spec, models.tiny_tokenizer(), model.config.vocab_size, seed=0).tokens
    if stream is not Stream.FP:  # a layer sees what the compressed blocks before its own make of the tokens
        weights = dict(dequantized(tmp_path / "out"))
        for name, parameter in model.named_parameters():
            if name.startswith(("model.layers.0.", "model.layers.1.")):
                parameter.data.copy_(weights[name])
    inputs: list[torch.Tensor] = []
    hook = model.model.layers[2].self_attn.q_proj.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].detach().flatten(0, 1))
    )
    with torch.no_grad():
        model(tokens)
    hook.remove()
    rows = torch.cat(inputs).double()
    expected = rows.T @ rows / len(rows)
    got = watcher.seen["model.layers.2.self_attn.q_proj.weight"].double()
    assert (got - expected).norm() / expected.norm() < 1e-5
