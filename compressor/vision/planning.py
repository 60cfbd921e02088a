"""What is known before a cut: the model, the images, and how many channels of what go."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressor import __version__
from compressor import output as output_files
from compressor.checkpoint.resolve import resolve_model
from compressor.checkpoint.source import Source
from compressor.environment import pick_device
from compressor.errors import RecipeError, UnsupportedError
from compressor.runtime import load
from compressor.vision import selection
from compressor.vision.budget import uniform_for
from compressor.vision.clusters import Graph
from compressor.vision.images import ImageData, ImageSet, read_data
from compressor.vision.pixels import Preprocess, align_labels
from compressor.vision.recipe import CutRecipe, build_method

PROBE_IMAGES = 2
FINGERPRINT_IMAGES = 64


@dataclass
class CutJob:
    """A planned run: model and images are there, ratios are known, nothing is cut yet."""

    recipe: CutRecipe
    out: Path
    source: Source
    model: PreTrainedModel
    device: torch.device
    method: Any
    data: ImageData
    preprocess: Preprocess
    example: Tensor
    graph: Graph
    ratios: selection.Ratios
    events: tuple[str, ...]
    trust_remote_code: bool = False

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Channels of every cluster, before and after."""
        counts = {}
        for cluster in self.graph.clusters:
            ratio = self.ratios[cluster.name]
            kept = selection.kept_count(cluster.size, ratio, self.method.options.round_to, cluster.groups)
            counts[cluster.name] = (cluster.size, kept)
        return counts


def prepare(
    recipe: CutRecipe,
    out: Path | None = None,
    *,
    device: str = "auto",
    force: bool = False,
    trust_remote_code: bool = False,
) -> CutJob:
    """Load model and images, and decide how many channels of what go.

    Raises:
        CompressorError: Anything that can be known to be wrong before work begins.
    """
    method = build_method(recipe.method, recipe.options)
    out = out if out is not None else default_output(recipe)
    output_files.check_output(out, force)
    path, revision = resolve_model(recipe.model, trust_remote_code)
    output_files.check_apart(out, path)
    source = Source.open(path, recipe.model, revision)
    if source.decoders:
        raise UnsupportedError(f"{recipe.model}: is quantized", "remove filters first, quantize what is left")
    place = pick_device(device)
    data = read_data(recipe.data, recipe.seed)
    model = load(path, device=place, trust_remote_code=trust_remote_code)
    if model.main_input_name != "pixel_values" or not getattr(model.config, "num_labels", 0):
        raise UnsupportedError(
            f"{recipe.model}: {type(model).__name__} is no image classifier", f"{recipe.method} removes their filters"
        )
    data = ImageData(
        data.name, align_labels(data.train, model.config), align_labels(data.test, model.config), data.events
    )
    preprocess = Preprocess(path, _channels(model))
    first = preprocess([data.train.read(index) for index in range(min(PROBE_IMAGES, len(data.train)))])
    example = first.to(place)
    graph = Graph(model, example, recipe.skip)
    options = method.options
    shared = [c.name for c in graph.clusters if options.scope == "inner" and not c.inner]
    graph.clusters = tuple(cluster for cluster in graph.clusters if cluster.name not in shared)
    if not graph.clusters:
        raise UnsupportedError(f"{recipe.model}: no layer is inner, residual sums share all channels", "use scope=all")

    if options.budget == "sensitivity" and (recipe.macs is None or options.ratios):
        raise RecipeError("budget=sensitivity hands out --macs, not --sparsity or ratios", "give --macs alone")

    def at(strength: float) -> selection.Ratios:
        # Never all of a cluster: the guard keeps one channel per group whatever the ratio.
        return selection.uniform(graph.clusters, min(strength, 1 - 1e-9), options.ratios)

    if recipe.sparsity is not None:
        ratios = at(recipe.sparsity)
    else:
        assert recipe.macs is not None
        ratios = uniform_for(graph, recipe.macs, at, options.round_to)
    events = (*source.notes, *data.events, *preprocess.events)
    return CutJob(
        *(recipe, out, source, model, place, method, data, preprocess, example, graph, ratios, events),
        trust_remote_code=trust_remote_code,
    )


def digest_parts(job: CutJob) -> dict[str, Any]:
    """Return what determines the bytes of a result, by name."""
    recipe = job.recipe.model_dump(mode="json", exclude={"model", "data"})
    return {
        **{f"recipe.{key}": value for key, value in recipe.items()},
        "data": [_fingerprint(job.data.train), _fingerprint(job.data.test)],
        "source": job.source.fingerprint,
        "device": job.device.type,
        "package version": __version__,
        "torch version": torch.__version__,
    }


def default_output(recipe: CutRecipe) -> Path:
    """Return `./<name>-<method>-<percent of filters removed>`, or `...-macs<percent kept>`."""
    name = re.sub(r"[^\w.-]+", "-", Path(recipe.model.partition("@")[0]).resolve().name)
    much = f"{recipe.sparsity * 100:g}" if recipe.sparsity is not None else f"macs{(recipe.macs or 0) * 100:g}"
    return Path(f"{name}-{recipe.method}-{much}")


def _channels(model: PreTrainedModel) -> int:
    """Return how many channels a model's images have: what its first convolution takes."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            return module.in_channels
    raise RecipeError(f"{type(model).__name__}: has no convolution", "filter pruning is for convolutional networks")


def _fingerprint(images: ImageSet) -> str:
    """Return a hash of labels, classes and some of the images."""
    total = hashlib.sha256(images.labels.numpy().tobytes() + repr(images.classes).encode())
    step = max(len(images) // FINGERPRINT_IMAGES, 1)
    for index in range(0, len(images), step):
        total.update(images.read(index).tobytes())
    return total.hexdigest()
