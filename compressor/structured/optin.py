"""OPTIN: a head or neuron is worth what the outputs of all later layers, and the logits, lose when it is masked.

Khaki and Plataniotis 2024, "The Need for Speed: Pruning Transformers with One Recipe", arXiv 2403.17921 (ICLR 2024).
With `F_j` what layer j's feed-forward part adds, its rows (tokens) scaled to length one, and `M_j = F_j F_j^T`,

    I(u) = sum_{j > l} |M_j - M_j(u masked)|^2  +  c tau^2 KL(softmax(z / tau) || softmax(z(u masked) / tau))

for a unit u of layer l; the last layer compares its own output. `c` makes the second term smaller than the first by the
factor `balance`, in powers of ten.

Differs from the paper:
- Units are groups of neurons, and key/value heads with their query heads: a language model has too many neurons to mask
  one at a time, and query heads that share a key head go together or shapes would not be legal.
- One `c` for all units, from medians; one sample of tokens for all of them; logits are divided by tau.
- No factor depends on a unit's index, as one does in the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from compressor.checkpoint.blocks import BlockSequence, Recording
from compressor.checkpoint.sink import save_tensors
from compressor.structured.cutting import masked
from compressor.structured.options import OptinOptions
from compressor.structured.units import Part, Unit


class OPTIN:
    """Masks every unit once and compares what comes out behind it.

    Args:
        options: The method's options.
    """

    name: ClassVar[str] = "optin"
    summary: ClassVar[str] = "OPTIN: remove whole heads and groups of neurons, to a budget of multiply-adds"
    Options: ClassVar[type[OptinOptions]] = OptinOptions

    def __init__(self, options: OptinOptions | None = None) -> None:
        self.options = options or OptinOptions()

    def scores(
        self, dense: Dense, units: Sequence[Unit], seed: int, state: Path | None, progress: Callable[[str], None]
    ) -> Tensor:
        """Return the importance of every unit, float32 `[units]`, not negative.

        Args:
            dense: What the whole model computes.
            units: All of them, block by block.
            seed: Of chance.
            state: File that finished blocks are kept in, so that a killed run goes on; None for none.
            progress: Told how far it is.
        """
        options = self.options
        if options.importance == "random":
            return torch.rand(len(units), generator=torch.Generator().manual_seed(seed))
        measured = _Measured.read(state, len(units))
        n_blocks = len(dense.blocks.names)
        for block in range(n_blocks):
            mine = [n for n, unit in enumerate(units) if unit.part.block == block and not measured.done[n]]
            if not mine:
                continue
            progress(f"block {block + 1} of {n_blocks}: masking {len(mine)} units")
            for index in mine:
                layers, logits = dense.without(units[index], options.temperature)
                measured.set(index, layers, logits)
            measured.write(state)
        if options.importance == "logits":
            scores = measured.logits
        else:
            scores = measured.layers + balance(measured.layers, measured.logits, options.balance) * measured.logits
        heads = torch.tensor([unit.part.heads > 0 for unit in units])
        last = torch.tensor([unit.part.block == n_blocks - 1 for unit in units])
        scores = torch.where(heads, options.head_weight * scores, scores)
        return torch.where(last, options.last_weight * scores, scores)


def unit_rows(outputs: Tensor) -> Tensor:
    """Return rows `[rows, width]` scaled to length one; rows of zeros stay."""
    return nn.functional.normalize(outputs.float(), dim=1)


def gram_distance(gram: Tensor, outputs: Tensor) -> float:
    """Return `|M - A A^T|^2` of a Gram matrix `[rows, rows]` and rows of length one `[rows, width]`."""
    return float((gram - outputs @ outputs.T).square().sum(dtype=torch.float64))


def divergence(before: Tensor, after: Tensor, temperature: float) -> float:
    """Return `tau^2 KL(softmax(z / tau) || softmax(z' / tau))`, summed over rows of logits `[rows, classes]`.

    Of a single number per row, a regression's, it is the squared difference.
    """
    if before.shape[-1] == 1:
        return float((before - after).square().sum(dtype=torch.float64))
    p, q = (nn.functional.log_softmax(z.float() / temperature, -1) for z in (before, after))
    # Rounding can make a sum of tiny terms negative; the divergence is not.
    return max(temperature**2 * float((p.exp() * (p - q)).sum(dtype=torch.float64)), 0.0)


def balance(layers: Tensor, logits: Tensor, ratio: float) -> float:
    """Return the factor of the logits' term: a power of ten that makes its median about `1 / ratio` of the layers'."""
    first, second = (float(term[term > 0].median()) if (term > 0).any() else 0.0 for term in (layers, logits))
    if first == 0 or second == 0:
        return 1.0
    return float(10.0 ** math.trunc(math.log10(first / second) - math.log10(ratio)))


@dataclass
class Dense:
    """What the whole model computes on some text, and what it computes without a unit.

    Attributes:
        blocks: Of the model, all of whose weights are loaded.
        inputs: Of the model.
        recording: The blocks' arguments for them.
        entering: What enters each block, `[samples, tokens, width]`.
        rows: Tokens that are compared, int64, as indices into samples and tokens laid end to end.
        grams: Of each block, `[rows, rows]`.
        logits: Of tokens `logit_rows`, or of samples; None if the model has none.
        watched: Of each block, the module whose output is compared.
        logit_rows: Tokens whose logits are compared; None where samples have one row of logits each.
        norms: Reader -> norm of each of its inputs, `[inputs]`.
    """

    blocks: BlockSequence
    inputs: dict[str, Tensor]
    recording: Recording
    entering: list[Tensor]
    rows: Tensor
    watched: list[str]
    logit_rows: Tensor | None
    grams: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None
    norms: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def run(
        cls, blocks: BlockSequence, parts: Sequence[Part], tokens: Tensor, options: OptinOptions, seed: int
    ) -> Dense:
        """Run the model.

        Args:
            blocks: Of the model, all of whose weights are loaded.
            parts: What can be cut.
            tokens: `[samples, window]`.
            options: The method's.
            seed: Picks the tokens that are compared.
        """
        model = blocks.model
        inputs = {model.main_input_name: tokens.to(model.device)}
        order = torch.randperm(tokens.numel(), generator=torch.Generator().manual_seed(seed))
        rows = order[: options.rows].to(model.device)
        per_token = model.get_output_embeddings() is not None
        readers = {part.block: part.reader for part in parts if part.kind == "neurons"}
        watched = [readers.get(index, name) for index, name in enumerate(blocks.names)]
        hidden, recording = blocks.prologue(inputs)
        dense = cls(
            *(blocks, inputs, recording, [], rows, watched),
            logit_rows=rows[: options.logit_rows] if per_token else None,
        )
        with dense._norms(parts):
            for index in range(len(blocks.names)):
                dense.entering.append(hidden)
                hidden, seen = dense._block(index, hidden)
                dense.grams.append(seen @ seen.T)
        dense.logits = dense._tail(hidden)
        return dense

    @torch.no_grad()
    def without(self, unit: Unit, temperature: float) -> tuple[float, float]:
        """Return both terms of a unit's importance: of the layers, and of the logits."""
        first, last = unit.part.block, len(self.grams) - 1
        hidden, layers = self.entering[first], 0.0
        for index in range(first, last + 1):
            with masked(self.blocks.model, [unit] if index == first else []):
                hidden, seen = self._block(index, hidden)
            if index > first or index == last:
                layers += gram_distance(self.grams[index], seen)
        if self.logits is None:
            return layers, 0.0
        found = self._tail(hidden)
        assert found is not None
        return layers, divergence(self.logits, found, temperature)

    def grouped(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """Return parts whose neurons are grouped by how large a share of the output they are, the largest first."""
        out = []
        for part in parts:
            if part.kind == "neurons":
                weight = self.blocks.model.get_submodule(part.reader).get_parameter("weight")
                sizes = self.norms[part.reader] * weight.detach().float().norm(dim=0)
                part = replace(part, order=sizes.argsort(descending=True, stable=True).cpu())
            out.append(part)
        return tuple(out)

    def _block(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Run a block; returns what leaves it, and the compared rows of what is watched, scaled to length one."""
        seen: list[Tensor] = []

        def after(_: nn.Module, args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handle = self.blocks.model.get_submodule(self.watched[index]).register_forward_hook(after)
        try:
            leaving = self.blocks.run(index, hidden, self.recording)
        finally:
            handle.remove()
        return leaving, unit_rows(seen[-1].flatten(0, -2)[self.rows])

    def _tail(self, hidden: Tensor) -> Tensor | None:
        """Return the logits to compare, `[rows, classes]`, of states behind the last block; None if there are none."""
        if self.logit_rows is not None:
            chosen = hidden.flatten(0, -2)[self.logit_rows].unsqueeze(0)
            return self.blocks.tail(chosen, self.inputs)[0].float()
        out = self.blocks.tail(hidden, self.inputs)
        return out.float() if out.dim() == 2 else None

    @contextmanager
    def _norms(self, parts: Sequence[Part]) -> Any:
        """Take the norms of what readers of neurons read."""

        def watch(reader: str) -> Any:
            def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                self.norms[reader] = args[0].flatten(0, -2).float().norm(dim=0)

            return before

        handles = [
            self.blocks.model.get_submodule(part.reader).register_forward_pre_hook(watch(part.reader))
            for part in parts
            if part.kind == "neurons"
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Measured:
    """Both terms of every unit, as far as they are known."""

    def __init__(self, layers: Tensor, logits: Tensor, done: Tensor) -> None:
        self.layers, self.logits, self.done = layers, logits, done

    @classmethod
    def read(cls, path: Path | None, count: int) -> _Measured:
        if path is not None and path.is_file():
            found = load_file(path)
            return cls(found["layers"], found["logits"], found["done"])
        return cls(torch.zeros(count), torch.zeros(count), torch.zeros(count, dtype=torch.bool))

    def set(self, index: int, layers: float, logits: float) -> None:
        self.layers[index], self.logits[index], self.done[index] = layers, logits, True

    def write(self, path: Path | None) -> None:
        if path is None:
            return
        part = path.with_name(path.name + ".part")
        save_tensors(part, {"layers": self.layers, "logits": self.logits, "done": self.done})
        part.replace(path)
