"""Channels that must be removed together, found by Torch-Pruning, and their removal.

A residual sum, a depthwise convolution or a normalization ties the channels of several layers: a cluster has one score
per channel and is cut as a whole. Torch-Pruning (Fang et al. 2023, arXiv 2301.12900) traces the ties with autograd.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError, UnsupportedError

LAYERS = (nn.Conv2d, nn.Linear)
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Producer:
    """A layer whose outputs are channels of a cluster.

    Attributes:
        layer: Its name.
        channels: The cluster's channel each of its outputs is, int64 `[out]`.
    """

    layer: str
    channels: Tensor


@dataclass(frozen=True)
class Norm:
    """A batch normalization that some or all channels of a cluster pass.

    Attributes:
        layer: Its name.
        places: Which of its channels these are, int64; all others come from other clusters.
        channels: The cluster's channel each of them is, int64.
    """

    layer: str
    places: Tensor
    channels: Tensor


@dataclass(frozen=True)
class Cluster:
    """Channels of several layers that go or stay together.

    Attributes:
        name: The layer it is known by.
        size: Channels.
        groups: Channel groups of grouped convolutions, which must all lose the same channels; 1 without such.
        producers: Layers that compute the channels. Depthwise convolutions follow and are not among them.
        members: All layers whose outputs are cut with it, depthwise ones included.
        readers: Layers that take the channels, with how many inputs a channel is (a flattened map gives several).
            Depthwise convolutions are not among them.
        norms: Batch normalizations the channels pass.
    """

    name: str
    size: int
    groups: int
    producers: tuple[Producer, ...]
    members: tuple[str, ...]
    readers: tuple[tuple[str, int], ...] = ()
    norms: tuple[Norm, ...] = ()

    @property
    def inner(self) -> bool:
        """Return whether a single layer computes the channels: nothing is added to them."""
        return len(self.producers) == 1

    def score(self, scores: Mapping[str, Tensor], combine: Literal["mean", "max"] = "mean") -> Tensor:
        """Return one score per channel, from those of the producers, `[size]`."""
        total = torch.zeros(self.size) if combine == "mean" else torch.full((self.size,), -torch.inf)
        count = torch.zeros(self.size)
        for producer in self.producers:
            values = scores[producer.layer].float().cpu()
            count.index_add_(0, producer.channels, torch.ones_like(values))
            if combine == "mean":
                total.index_add_(0, producer.channels, values)
            else:
                total[producer.channels] = torch.maximum(total[producer.channels], values)
        return total / count if combine == "mean" else total


class Graph:
    """A model's dependency graph. Cutting changes the model in place.

    Attributes:
        clusters: Everything that can be cut, in the order of the model's modules.
    """

    def __init__(self, model: nn.Module, example: Tensor, skip: Sequence[str] = ()) -> None:
        """Trace the model.

        Args:
            model: In eval mode; its output is logits, or has them.
            example: Images as it takes them.
            skip: Globs of layers whose outputs stay whole.

        Raises:
            UnsupportedError: It cannot be traced, or nothing in it can be cut.
            RecipeError: A glob matches no layer.
        """
        self.model = model
        self.example = example
        self.names = {module: name for name, module in model.named_modules()}
        self._graph = _trace(model, example)
        last = _output_layers(model, example)
        layers = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
        for glob in skip:
            if not fnmatch.filter(layers, glob):
                raise RecipeError(f"--skip {glob!r} matches no layer", f"layers are called {layers[0]}, ...")
        kept = {name for glob in skip for name in fnmatch.filter(layers, glob)} | last
        found = [self._cluster(group) for group in self._graph.get_all_groups(root_module_types=list(LAYERS))]
        order = {name: index for index, name in enumerate(layers)}
        chosen = [c for c in found if c is not None and not kept & set(c.members)]
        self.clusters = tuple(sorted(chosen, key=lambda cluster: order[cluster.name]))
        convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        if not any(convolutions & set(cluster.members) for cluster in self.clusters):
            raise UnsupportedError(
                f"{type(model).__name__}: has no convolution whose filters can be removed",
                "filter pruning is for convolutional networks",
            )

    @property
    def producers(self) -> dict[str, nn.Module]:
        """The layers that need scores, by name."""
        names = {producer.layer for cluster in self.clusters for producer in cluster.producers}
        return {name: module for name, module in self.model.named_modules() if name in names}

    def cut(self, keep: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """Remove channels from the model.

        Args:
            keep: Cluster name -> the channels that stay, ascending.

        Returns:
            Layer -> which of its original outputs it kept.

        Raises:
            UnsupportedError: The model does not run any more.
        """
        kept: dict[str, list[int]] = {}
        for cluster in self.clusters:
            if cluster.name not in keep:
                continue
            stay = set(keep[cluster.name].tolist())
            gone = [channel for channel in range(cluster.size) if channel not in stay]
            if not gone:
                continue
            for producer in cluster.producers:
                channels = producer.channels.tolist()
                kept[producer.layer] = [index for index, channel in enumerate(channels) if channel in stay]
            root = self.model.get_submodule(cluster.name)
            pruner = self._graph.get_pruner_of_module(root)
            group = self._graph.get_pruning_group(root, pruner.prune_out_channels, gone)
            if not self._graph.check_pruning_group(group):
                raise UnsupportedError(f"{cluster.name}: {len(gone)} of {cluster.size} channels would leave none")
            group.prune()
        try:
            with torch.no_grad():
                self.model(self.example)
        except RuntimeError as error:
            raise UnsupportedError(
                f"{type(self.model).__name__}: does not run with fewer channels: {str(error).splitlines()[0]}",
                "leave the layers in question out with --skip",
            ) from error
        return kept

    def _cluster(self, group: Any) -> Cluster | None:
        """Turn a group of Torch-Pruning's, holding all channels, into a cluster; None if no layer computes it."""
        root = self.names[group[0].dep.target.module]
        size, groups = len(group[0].idxs), 1
        producers, norms, members, readers = [], [], [], []
        for item in group:
            module = item.dep.target.module
            if not isinstance(module, (*LAYERS, *BATCH_NORMS)):
                continue
            name = self.names[module]
            if isinstance(module, BATCH_NORMS):
                norms.append(Norm(name, torch.tensor(item.idxs), torch.tensor(item.root_idxs)))
                continue
            depthwise = isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels
            if isinstance(module, nn.Conv2d) and not depthwise:
                groups = max(groups, module.groups)
            if self._graph.is_out_channel_pruning_fn(item.dep.handler):
                if len(item.idxs) != len(module.weight):
                    return None  # a layer whose outputs go different ways stays whole
                members.append(name)
                if not depthwise:
                    producers.append(Producer(name, _channels(item)))
            elif not depthwise:
                readers.append((name, len(item.idxs) // size))
        if not producers:
            return None
        return Cluster(root, size, groups, tuple(producers), tuple(members), tuple(readers), tuple(norms))


def join(graph: Graph, scores: Mapping[str, Tensor], combine: Literal["mean", "max"]) -> dict[str, Tensor]:
    """Return one score per channel of every cluster, from those of the layers that compute them."""
    return {cluster.name: cluster.score(scores, combine) for cluster in graph.clusters}


def _channels(item: Any) -> Tensor:
    """Return which of the root's channels each channel of a group's member is, int64."""
    channels = torch.empty(len(item.idxs), dtype=torch.long)
    channels[torch.tensor(item.idxs)] = torch.tensor(item.root_idxs)
    return channels


def logits_of(output: Any) -> Tensor:
    """Return the logits of a classifier's output: a tensor, or a structure that has them.

    Raises:
        UnsupportedError: There are none.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise UnsupportedError(f"the model gives a {type(output).__name__} without logits", "give an image classifier")
    return found


def _trace(model: nn.Module, example: Tensor) -> Any:
    """Build Torch-Pruning's graph; parameters outside known layers are cut along their only long dimension."""
    import torch_pruning

    lone = []
    for module in model.modules():
        if isinstance(module, (*LAYERS, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.PReLU)):
            continue
        for parameter in module.parameters(recurse=False):
            dims = [dim for dim, size in enumerate(parameter.shape) if size > 1]
            if dims:
                lone.append((parameter, dims[-1]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(True)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch_pruning.DependencyGraph().build_dependency(
                model, example, output_transform=logits_of, unwrapped_parameters=lone, verbose=False
            )
    except (RuntimeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        raise UnsupportedError(
            f"{type(model).__name__}: its channels cannot be followed: {str(error).splitlines()[0]}",
            "filter pruning is for convolutional networks",
        ) from error
    finally:
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def _output_layers(model: nn.Module, example: Tensor) -> set[str]:
    """Return the layers that compute the logits: those whose output they are a view of, else the last one that ran."""
    ran: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: ran.append((name, output)))
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
    ]
    try:
        with torch.no_grad():
            logits = logits_of(model(example))
    finally:
        for handle in handles:
            handle.remove()
    same = {name for name, output in ran if output.data_ptr() == logits.data_ptr()}
    return same or {ran[-1][0]}
