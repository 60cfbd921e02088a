"""Gradients of every layer's weights for single samples, one block in memory at a time.

The model runs forward block by block and leaves what enters each block on the disk. The loss is then taken behind the
last block, and the blocks are run again in reverse, each carrying the gradient of its output to its input. A linear
layer's inputs `A` `[tokens, in]` and the gradients `D` `[tokens, out]` of its outputs say all about its weight: sample
s has the gradient `D_s^T A_s`, and a single entry (i, j) of it is `sum_t D_s[t, i] A_s[t, j]`. Weights of samples are
never built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.calibration.precision import products
from compressor.calibration.store import Boundary, HiddenStore
from compressor.checkpoint.blocks import BlockSequence, Recording
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import Source
from compressor.errors import UnsupportedError
from compressor.plan import OUTSIDE, LayerPlan, Plan
from compressor.pruning.expert_gradients import watch_stack
from compressor.pruning.view import ModelView

TOKENS_AT_ONCE = 1024
"""Tokens that run through a block at once."""

LOGITS_AT_ONCE = 256
"""Tokens that run through the head at once: each takes three numbers per word of the vocabulary, or five."""

EXPERTS_PER_TOKEN = 4
"""Experts that a token is taken to reach where memory is estimated."""

Target = Literal["text", "original"]

Masks = Callable[[str], Tensor]
"""Tensor name -> mask bool `[out, in]`, True where the weight is kept."""


@dataclass(frozen=True)
class LayerGradient:
    """What a backward pass left of one layer.

    Attributes:
        inputs: Per sample `[in, tokens]` float32; an expert has only the tokens that reach it.
        outputs: Per sample `[out, tokens]` float32, the gradient of that sample's loss.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]

    def mean(self) -> Tensor:
        """Return the gradient of the mean loss, `[out, in]`."""
        total = torch.zeros(len(self.outputs[0]), len(self.inputs[0]), device=self.outputs[0].device)
        for a, d in zip(self.inputs, self.outputs, strict=True):
            total.addmm_(d, a.T)
        return total / len(self.outputs)

    def columns(self, index: Tensor) -> Tensor:
        """Return single samples' gradients at flat indices `[n]` of the weight, `[samples, n]`."""
        rows, columns = index // len(self.inputs[0]), index % len(self.inputs[0])
        return torch.stack([(d[rows] * a[columns]).sum(1) for a, d in zip(self.inputs, self.outputs, strict=True)])


Gradients = Iterator[tuple[LayerPlan, Tensor, LayerGradient]]
"""Plan of a layer, its original weight `[out, in]` float32, and its gradients."""


def held_by_gradients(layers: Sequence[LayerPlan], tokens: int) -> int:
    """Return the bytes of a block's weights, and of its layers' inputs and output gradients for so many tokens.

    The projections of a stack share the tokens: each token is taken to go to `EXPERTS_PER_TOKEN` of its experts.
    """
    total = 0
    inputs: dict[str, float] = {}
    experts = {(layer.ref.owner, layer.ref.where.expert) for layer in layers if layer.ref.where.expert is not None}
    for layer in layers:
        if layer.ref.matrix is None:
            continue
        rows, columns = layer.ref.matrix
        n_experts = sum(owner == layer.ref.owner for owner, _ in experts) or 1
        share = min(EXPERTS_PER_TOKEN / n_experts, 1.0)
        inputs[layer.ref.fed_by] = share * columns * tokens
        total += rows * columns + int(share * rows * tokens)
    return 4 * (total + int(sum(inputs.values())))


class MaskedModel:
    """The model with masks on its layers, run block by block.

    Args:
        plan: Says which layers have masks.
        source: Original tensors.
        skeleton: Filled and emptied block by block.
        blocks: The block sequence.
        folder: Where hidden states lie in between.
        products: The context blocks run in.
        values: Tensor name -> weights `[out, in]` that take the place of the source's, or None.
        target: What a sample's loss measures: `text`, how unlikely its next tokens are, or `original`, how far all
            predictions are from those of the source's weights (KL divergence).
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        skeleton: Skeleton,
        blocks: BlockSequence,
        folder: Path,
        products: Callable[[], AbstractContextManager[Any]] = nullcontext,
        values: Callable[[str], Tensor | None] = lambda name: None,
        target: Target = "text",
    ) -> None:
        self.plan, self.source, self.skeleton, self.blocks = plan, source, skeleton, blocks
        self.store = HiddenStore(folder, "search", skeleton.device)
        self.products, self.values, self.target = products, values, target
        self._judged: tuple[Tensor, list[Tensor]] | None = None

    @classmethod
    def of(cls, view: ModelView, **more: Any) -> MaskedModel:
        """Return the model a search looks at, in the precision of searches; `more` are arguments that follow."""
        parts = (view.plan, view.source, view.skeleton, view.blocks, view.work / "search")
        return cls(*parts, lambda: products(view.device, 0), **more)

    def losses(self, tokens: Tensor, masks: Masks) -> Tensor:
        """Return the mean loss per token of every sample, `[samples]` float32, for tokens `[samples, seq]`.

        What the original makes of the tokens is kept for the next call, if that gets the same tensor.
        """
        if self.target == "original" and (self._judged is None or self._judged[0] is not tokens):
            self._judged = tokens, self._originals(tokens)
        with torch.no_grad():
            return self._forward(tokens, masks, False, self._judged[1] if self._judged else None)[0]

    def backward(
        self, tokens: Tensor, masks: Masks
    ) -> tuple[Tensor, Iterator[tuple[LayerPlan, Tensor, LayerGradient]]]:
        """Return the loss of every sample, and then for each masked layer, last block first: plan, weight, gradients.

        The weight is the original one, or what takes its place, `[out, in]` float32.
        """
        originals = self._originals(tokens) if self.target == "original" else None
        losses, entering, gradients, recording = self._forward(tokens, masks, True, originals)
        return losses, self._reverse(masks, entering, gradients, recording)

    def _forward(
        self, tokens: Tensor, masks: Masks, keep: bool, originals: list[Tensor] | None
    ) -> tuple[Tensor, list[Boundary], list[Tensor], Recording]:
        """Run all blocks; with `keep`, leave what enters each block and return the gradient of what leaves the last."""
        parts = list(self._parts(tokens))
        hidden, entering, recording = self._run(parts, masks, keep)
        losses, gradients = [], []
        with self._outside():
            for number, (part, states) in enumerate(zip(parts, hidden, strict=True)):
                few = max(LOGITS_AT_ONCE // part.shape[1], 1)
                rows = [slice(start, start + few) for start in range(0, len(part), few)]
                aims = originals[number] if originals else None
                pieces = [self._tail(part[r], states[r], None if aims is None else aims[r], keep) for r in rows]
                losses += [loss for loss, _ in pieces]
                found = [gradient for _, gradient in pieces if gradient is not None]
                gradients += [torch.cat(found)] if found else []
        return torch.cat(losses), entering, gradients, recording

    def _originals(self, tokens: Tensor) -> list[Tensor]:
        """Return what leaves the last block of the original model, part by part."""
        return self._run(list(self._parts(tokens)), None, keep=False)[0]

    def _run(
        self, parts: list[Tensor], masks: Masks | None, keep: bool
    ) -> tuple[list[Tensor], list[Boundary], Recording]:
        """Return what leaves the last block, what entered each one if that is to be kept, and the block arguments."""
        with self._outside():
            hidden = [self.blocks.prologue(self._inputs(part))[0] for part in parts]
            recording = self.blocks.prologue(self._inputs(parts[0]))[1]
        entering: list[Boundary] = []
        for index in range(len(self.blocks.names)):
            if keep:
                entering.append(self._save(index, hidden))
            with self._block(index, masks), torch.no_grad(), self.products():
                hidden = [self.blocks.run(index, part, recording).float() for part in hidden]
        return hidden, entering, recording

    def _tail(
        self, tokens: Tensor, hidden: Tensor, original: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the losses of samples whose states leave the last block, and the gradient of their sum."""
        hidden = hidden.detach().requires_grad_(keep)
        inputs, functional = self._inputs(tokens), nn.functional
        with torch.set_grad_enabled(keep):
            logits = self.blocks.tail(hidden, inputs).float()  # always in float32: it is the judge
            if original is None:
                wanted = tokens[:, 1:].to(logits.device)
                each = functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten(), reduction="none")
                losses = each.view(wanted.shape).mean(1)
            else:
                with torch.no_grad():
                    aim = self.blocks.tail(original, inputs).float().log_softmax(-1)
                each = functional.kl_div(logits.log_softmax(-1), aim, reduction="none", log_target=True).sum(-1)
                losses = each.mean(1)
        if not keep:
            return losses, None
        (gradient,) = torch.autograd.grad(losses.sum(), hidden)
        return losses.detach(), gradient

    def _reverse(
        self, masks: Masks, entering: list[Boundary], gradients: list[Tensor], recording: Recording
    ) -> Gradients:
        """Carry gradients from the last block to the first; yield what every masked layer got."""
        for index in reversed(range(len(self.blocks.names))):
            layers = [layer for layer in self.plan.in_block(index) if layer.format]
            with self._block(index, masks) as originals:
                seen = {layer.ref.name: LayerGradient([], []) for layer in layers}
                for number, gradient in enumerate(gradients):
                    hidden = self.store.read(entering[index], number).requires_grad_()
                    with self._watched(layers, seen, (hidden.shape[0], hidden.shape[1])), torch.enable_grad():
                        with self.products():
                            leaving = self.blocks.run(index, hidden, recording)
                        gradients[number] = torch.autograd.grad(leaving, hidden, gradient.to(leaving.dtype))[0]
            for layer in layers:
                yield layer, originals[layer.ref.name], seen[layer.ref.name]
            del seen
            (self.store.folder / entering[index].file).unlink()

    @contextmanager
    def _watched(
        self, layers: list[LayerPlan], seen: Mapping[str, LayerGradient], shape: tuple[int, int]
    ) -> Iterator[None]:
        """Record inputs and the gradients of outputs of these layers' modules, for samples x tokens of this shape."""
        undo: list[Callable[[], object]] = []
        copies: dict[int, tuple[Tensor, list[Tensor]]] = {}  # layers that read one tensor share its copy

        def split(values: Tensor) -> list[Tensor]:
            return [x.T.float().contiguous() for x in values.detach().reshape(*shape, -1)]

        def watch(layer: LayerPlan, module: nn.Module) -> None:
            def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                if args[0].shape[:-1] not in (shape, (shape[0] * shape[1],)):
                    raise UnsupportedError(
                        f"{layer.ref.name}: its input is {list(args[0].shape)}, not samples x tokens x width",
                        "leave it out with --skip, or use --method wanda or sparsegpt",
                    )
                found = copies.get(id(args[0]))
                if found is None:
                    found = copies[id(args[0])] = (args[0], split(args[0]))
                seen[layer.ref.name].inputs.extend(found[1])
                output.register_hook(lambda grad: seen[layer.ref.name].outputs.extend(split(grad)))

            undo.append(module.register_forward_hook(after).remove)

        stacks: dict[str, list[LayerPlan]] = {}
        for layer in layers:
            if layer.ref.where.expert is not None:
                stacks.setdefault(layer.ref.owner, []).append(layer)
            else:
                watch(layer, self.skeleton.model.get_submodule(layer.ref.owner))
        for owner, members in stacks.items():
            undo.append(watch_stack(self.skeleton.model.get_submodule(owner), members, seen, shape[0]))
        try:
            yield
        finally:
            for action in undo:
                action()

    @contextmanager
    def _block(self, index: int, masks: Masks | None) -> Iterator[dict[str, Tensor]]:
        """Keep a block resident, the original (None) or with masks applied; yields masked layers' weights without."""
        layers = self.plan.in_block(index)
        self.skeleton.load(self.source.read(layer.ref.name for layer in layers))
        originals: dict[str, Tensor] = {}
        for layer in layers:
            if layer.format and masks is not None:
                weight = self.skeleton.part(layer.ref.param, layer.ref.where)
                moved = self.values(layer.ref.name)
                if moved is not None:
                    weight.copy_(moved)
                originals[layer.ref.name] = weight.detach().clone()
                weight.masked_fill_(~masks(layer.ref.name).to(weight.device), 0.0)
        try:
            yield originals
        finally:
            self.skeleton.free({layer.ref.param for layer in layers})

    @contextmanager
    def _outside(self) -> Iterator[None]:
        layers = [layer for layer in self.plan.in_block(OUTSIDE) if layer.ref.part is None]
        self.skeleton.load(self.source.read(layer.ref.name for layer in layers))
        try:
            yield
        finally:
            self.skeleton.free({layer.ref.param for layer in layers})

    def _save(self, index: int, hidden: list[Tensor]) -> Boundary:
        with self.store.writer(index) as writer:
            for part in hidden:
                writer.append(part)
            return writer.close()

    def _inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        return {self.blocks.model.main_input_name: tokens.to(self.skeleton.device)}

    def _parts(self, tokens: Tensor) -> Iterator[Tensor]:
        """Yield tokens in parts of equally many samples, so that block arguments are the same for all."""
        most = max(TOKENS_AT_ONCE // tokens.shape[1], 1)
        size = next(size for size in range(min(most, len(tokens)), 0, -1) if len(tokens) % size == 0)
        yield from tokens.split(size)
