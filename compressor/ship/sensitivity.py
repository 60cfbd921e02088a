"""What rounding each layer to each format is expected to add to the KL divergence, from one backward pass.

For a small change of a layer's output `dy_t` at token `t`, KL(original || changed) is to second order `1/2 dy' F dy`
with the Fisher information `F = E[g g']`, where `g` is the gradient of the log-likelihood of tokens drawn from the
model itself (Amari 1998; Li et al. 2021, "BRECQ", and Kim et al. 2023, "SqueezeLLM", use its diagonal to quantize).
Nothing is taken as diagonal here: a layer's change is `dy_t = (W' - W) x_t`, so per token

    KL = 1/2 mean_t (g_t . (W' - W) x_t)^2

needs only the inputs `x_t` and the gradients `g_t` of some tokens. Rounding is to nearest: methods do better, by a
similar factor everywhere. Layers are taken as independent, and changes as small; both fail at two bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.allocation import Choice
from compressor.errors import NumericalError
from compressor.formats.base import QuantFormat, ScaledFormat


@dataclass(frozen=True)
class Seen:
    """What flowed through a layer at some tokens.

    Attributes:
        inputs: `[tokens, in]`.
        gradients: Of the log-likelihood of sampled tokens with respect to the output, `[tokens, out]`.
    """

    inputs: Tensor
    gradients: Tensor


def observe(model: Any, names: Sequence[str], tokens: Tensor, rows: int, seed: int) -> dict[str, Seen]:
    """Run a model forward and backward, and keep inputs and gradients of its layers at some tokens.

    Args:
        model: A causal language model in float32, all of it in memory; its parameters need no gradients.
        names: Linear modules.
        tokens: int64 `[n_samples, seq_len]`.
        rows: Tokens kept of each sample, evenly spread.
        seed: Of the tokens that are drawn.

    Raises:
        NumericalError: Gradients are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.linspace(0, tokens.shape[1] - 1, min(rows, tokens.shape[1])).long()
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    for sample in tokens:
        with _recording(model, names, chosen) as current:
            embedded = model.get_input_embeddings()(sample[None]).detach().requires_grad_()
            logits = model(inputs_embeds=embedded).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            logits.log_softmax(-1).gather(1, drawn).sum().backward()
        for name in names:
            kept[name].append(current[name])
    seen = {
        name: Seen(torch.cat([x for x, _ in pairs]), torch.cat([g for _, g in pairs])) for name, pairs in kept.items()
    }
    for name, layer in seen.items():
        if not torch.isfinite(layer.gradients).all():
            raise NumericalError(f"{name}: gradients are not finite", "try other --data")
    return seen


@contextmanager
def _recording(model: nn.Module, names: Sequence[str], chosen: Tensor) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Keep inputs and output gradients of modules at chosen tokens while inside a `with`."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            x = arguments[0].detach().flatten(0, -2)[chosen]

            def with_gradient(gradient: Tensor) -> None:
                found[name] = x, gradient.detach().flatten(0, -2)[chosen]

            output.register_hook(with_gradient)

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def expected_kl(seen: Seen, change: Tensor) -> float:
    """Return the KL divergence per token (nats) that changing a weight by `change` `[out, in]` is expected to add."""
    moved = ((seen.gradients @ change) * seen.inputs).sum(-1)  # [tokens]
    return 0.5 * float(moved.square().mean())


@torch.no_grad()
def choices_of(weight: Tensor, seen: Seen, formats: Mapping[str, QuantFormat]) -> tuple[Choice, ...]:
    """Return every format that can store a weight, with its bytes and the divergence it is expected to add.

    Args:
        weight: `[out, in]`.
        seen: What flows through the layer.
        formats: Name, as `--set` takes it -> format.
    """
    w = weight.float()
    shape = (w.shape[0], w.shape[1])
    found = []
    for name, fmt in formats.items():
        if fmt.refuse(shape) is not None:
            continue
        q = fmt.fit(w)
        rounded = fmt.round(w, q) if isinstance(fmt, ScaledFormat) else fmt.decode(fmt.encode(w, q), q)
        nbytes = sum(slot.nbytes for slot in fmt.layout(shape).values())
        found.append(Choice(name, nbytes, expected_kl(seen, rounded - w)))
    return tuple(found)
