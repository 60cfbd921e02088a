"""iCBS on a module that fits in memory: perceptrons, convolutional networks, anything with linear layers.

The published outer loop, arXiv 2411.17796: every step takes a fresh batch, looks at one tensor, and decides one block
of its weights; how often a tensor's turn comes grows with the logarithm of its size. `sweep` decides a block in every
tensor at once instead, as language models are searched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError, UnsupportedError
from compressor.pruning.candidates import TensorState
from compressor.pruning.gradients import LayerGradient
from compressor.pruning.masks import Pattern, keep_per_row, keep_per_tensor
from compressor.pruning.step import Settings, Step, accepted, take_step
from compressor.pruning.sweeps import generator

Losses = Callable[[nn.Module, Any], Tensor]
"""A module and a batch -> the loss of every sample, `[samples]`; gradients flow."""


@dataclass(frozen=True)
class Taken:
    """One step that was taken.

    Attributes:
        name: The tensor.
        loss: Mean loss of the batch before it.
        energy: Of the decision; never positive.
        predicted: Expected change of that loss.
        swaps: Weights restored, and as many pruned.
    """

    name: str
    loss: float
    energy: float
    predicted: float
    swaps: int


class ModuleSearch:
    """Masks on the weights of some modules, improved step by step.

    The module's weights are changed in place: pruned ones are zero, kept ones have their original values.

    Args:
        model: In eval mode: batch statistics and dropout would make samples depend on each other.
        losses: Gives the loss of every sample of a batch; samples are the first dimension of what layers read.
        layers: Names of linear or 2-D convolution modules; None for all of them.
        sparsity: Share of every matrix that is pruned.
        pattern: `N:M` instead; the settings' groups must be M.
        start: `magnitude`, or `wanda` from one pass over `batch`.
        batch: Needed for `wanda`.
        settings: Of the steps.
        seed: Seed of everything random.

    Raises:
        RecipeError: The model trains, or the start needs a batch that is not given.
        UnsupportedError: A module is neither linear nor a convolution without groups.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Losses,
        *,
        layers: Sequence[str] | None = None,
        sparsity: float = 0.9,
        pattern: str | None = None,
        start: Literal["magnitude", "wanda"] = "magnitude",
        batch: Any = None,
        settings: Settings,
        seed: int = 0,
    ) -> None:
        if model.training:
            raise RecipeError("the model is in training mode: samples would depend on each other", "call model.eval()")
        self.model, self.losses, self.settings, self.seed = model, losses, settings, seed
        found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
        self.modules = found if layers is None else {name: model.get_submodule(name) for name in layers}
        for name, module in self.modules.items():
            if name not in found or getattr(module, "groups", 1) != 1:
                raise UnsupportedError(f"{name}: {type(module).__name__} is no linear layer, nor a plain convolution")
        self.originals = {name: self._matrix(module).clone() for name, module in self.modules.items()}
        self.steps = 0
        scores = {name: w.abs() for name, w in self.originals.items()}
        if start == "wanda":
            if batch is None:
                raise RecipeError("start 'wanda' needs a batch", "give one, or start with magnitude")
            norms = self._input_norms(batch)
            scores = {name: w.abs() * norms[name] for name, w in self.originals.items()}
        self.states: dict[str, TensorState] = {}
        for name, score in scores.items():
            keep = Pattern.parse(pattern).choose(score) if pattern else _keep(score, sparsity, start)
            choice = settings.choice if not pattern else replace(settings.choice, fixed_pruned=0.0, fixed_kept=0.0)
            self.states[name] = TensorState.start(score, keep, choice, per_row=start == "wanda" and not pattern)
            self._apply(name)

    def step(self, batch: Any, name: str) -> Taken | None:
        """Decide one block of one tensor on a fresh batch; None where there is nothing to decide."""
        loss, gradients = self._gradients(batch, [name])
        found = self._decide(name, gradients[name], None)
        self.steps += 1
        if found is None:
            return None
        self.states[name] = accepted(found)
        self._apply(name)
        return Taken(name, loss, found.energy, found.predicted, len(found.swaps))

    def sweep(self, batch: Any) -> list[Taken]:
        """Decide one block in every tensor, from one backward pass and with one shared model of the loss."""
        loss, gradients = self._gradients(batch, list(self.modules))
        expected: Tensor | None = None
        taken = []
        for number, name in enumerate(reversed(self.modules), 1):
            # What samples are to gain is spread over the layers, or those decided first would take all of it.
            found = self._decide(name, gradients[name], expected, number / len(self.modules))
            if found is not None:
                expected = found.expected if expected is None else expected + found.expected
                self.states[name] = accepted(found)
                taken.append(Taken(name, loss, found.energy, found.predicted, len(found.swaps)))
        for step in taken:
            self._apply(step.name)
        self.steps += 1
        return taken

    def schedule(self, steps: int, least: int = 1) -> list[str]:
        """Return whose turn it is in each of so many steps, shuffled."""
        sizes = {name: w.numel() for name, w in self.originals.items()}
        counts = allocate(list(sizes.values()), steps, least, generator(self.seed, "allocate", self.steps))
        names = [name for name, count in zip(sizes, counts, strict=True) for _ in range(count)]
        order = torch.randperm(len(names), generator=generator(self.seed, "order", self.steps))
        return [names[index] for index in order.tolist()]

    def loss(self, batch: Any) -> float:
        """Return the mean loss of a batch at the current weights."""
        with torch.no_grad():
            return float(self.losses(self.model, batch).mean())

    def _decide(self, name: str, gradient: LayerGradient, expected: Tensor | None, share: float = 1.0) -> Step | None:
        return take_step(
            self.states[name],
            self.originals[name],
            gradient.mean(),
            gradient.columns,
            replace(self.settings, alpha=self.settings.alpha * share),
            generator(self.seed, name, self.steps),
            expected,
        )

    def _gradients(self, batch: Any, names: Sequence[str]) -> tuple[float, dict[str, LayerGradient]]:
        """Return the mean loss and the named tensors' gradients, from one pass."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        handles = []
        for name in names:

            def after(module: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> Tensor:
                inputs[name] = args[0].detach()
                # A module that reads no gradients still passes one on: its output is what is watched.
                outputs[name] = output if output.requires_grad else output.requires_grad_()
                return outputs[name]

            handles.append(self.modules[name].register_forward_hook(after))
        try:
            losses = self.losses(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        grads = torch.autograd.grad(losses.sum(), [outputs[name] for name in names])
        found = {name: self._layer(name, inputs[name], grad) for name, grad in zip(names, grads, strict=True)}
        return float(losses.detach().mean()), found

    def _layer(self, name: str, x: Tensor, gradient: Tensor) -> LayerGradient:
        """Return a layer's gradients from what it reads and the gradient of what it gives."""
        if isinstance(self.modules[name], nn.Conv2d):
            outputs = [d.flatten(1) for d in gradient]  # [out, positions]
        else:
            outputs = [_tokens(d) for d in gradient]
        return LayerGradient(self._columns(name, x), outputs)

    def _columns(self, name: str, x: Tensor) -> list[Tensor]:
        """Return for each sample what the layer's matrix multiplies, `[in, positions]`."""
        module = self.modules[name]
        if isinstance(module, nn.Conv2d):
            if isinstance(module.padding, str):
                raise UnsupportedError(f"{name}: padding {module.padding!r} is not supported", "give it as numbers")
            settings: Any = (module.kernel_size, module.dilation, module.padding, module.stride)
            return list(nn.functional.unfold(x, *settings))
        return [_tokens(sample) for sample in x]

    def _input_norms(self, batch: Any) -> dict[str, Tensor]:
        """Return the norm of every input of every layer over a batch, at the original weights."""
        norms: dict[str, Tensor] = {}
        handles = []
        for name, module in self.modules.items():

            def before(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                columns = self._columns(name, args[0].detach())
                norms[name] = torch.stack([c.float().square().sum(1) for c in columns]).sum(0).sqrt()

            handles.append(module.register_forward_pre_hook(before))
        with torch.no_grad():
            self.losses(self.model, batch)
        for handle in handles:
            handle.remove()
        return norms

    def _matrix(self, module: nn.Module) -> Tensor:
        return module.get_parameter("weight").detach().flatten(1)

    def _apply(self, name: str) -> None:
        weight = self.modules[name].get_parameter("weight")
        values = torch.where(self.states[name].keep, self.originals[name], 0.0)
        weight.data.copy_(values.view_as(weight))


def allocate(sizes: Sequence[int], steps: int, least: int, generator: torch.Generator) -> list[int]:
    """Return how many of `steps` each tensor gets: a share proportional to `log10(size)`, at least `least` if possible.

    What rounding leaves over is added to the smallest counts or taken from the largest; ties are drawn.
    """
    shares = [math.log10(max(size, 2)) for size in sizes]
    counts = [max(round(share / sum(shares) * steps), least) for share in shares]
    total = sum(counts)
    counts = [round(count / total * steps) for count in counts]
    while (missing := steps - sum(counts)) != 0:
        edge = min(counts) if missing > 0 else max(counts)
        ties = [index for index, count in enumerate(counts) if count == edge]
        chosen = ties[int(torch.randint(len(ties), (1,), generator=generator))]
        counts[chosen] += 1 if missing > 0 else -1
    return counts


def _keep(scores: Tensor, sparsity: float, start: str) -> Tensor:
    return keep_per_row(scores, sparsity) if start == "wanda" else keep_per_tensor(scores, sparsity)


def _tokens(sample: Tensor) -> Tensor:
    """Return one sample `[features]` or `[..., features]` as `[features, positions]`."""
    return sample.unsqueeze(1) if sample.dim() == 1 else sample.flatten(0, -2).T
