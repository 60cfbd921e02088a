"""A copy of a model with planted outlier channels, which computes what the model computes.

A few gains of every norm are multiplied by a power of two, and the columns of the weights that read these channels are
divided by it. In floating point both are exact and products stay what they are, so the logits are the same bit for bit;
whoever rounds what flows between them meets channels that are much louder than the others.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor.checkpoint.blocks import BlockSequence
from compressor.checkpoint.dataflow import DataFlow
from compressor.checkpoint.probing import norm_offset
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import Source, shard_files
from compressor.errors import NumericalError, UnsupportedError, disk_error

if TYPE_CHECKING:
    from compressor.evals.bench.table import Planted

MARK = "planted.json"
"""Beside a finished copy: what it was made of."""


@dataclass(frozen=True)
class Site:
    """A norm whose output only linear layers of its own block read.

    Attributes:
        gain: Its weight, by name on disk.
        readers: The weights that read its channels, by name on disk.
    """

    gain: str
    readers: tuple[str, ...]


def plant(folder: Path, target: Path, planted: Planted) -> Path:
    """Write the copy, unless it is there, and return its folder.

    Args:
        folder: The model.
        target: Folder of the copy; it comes into being whole or not at all.
        planted: How many channels, and how loud.

    Raises:
        UnsupportedError: No norm's channels can be made loud without changing the model.
        NumericalError: A value leaves the range of its dtype.
        ResourceError: The copy cannot be written.
    """
    source = Source.open(folder)
    made_of = {"source": source.fingerprint, **planted.model_dump()}
    if (target / MARK).is_file() and json.loads((target / MARK).read_text(encoding="utf-8")) == made_of:
        return target
    factors = _factors(source, find_sites(folder, source), planted)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        shards = shard_files(folder)
        for path in folder.iterdir():
            if path.is_file() and path.name not in shards:
                shutil.copyfile(path, part / path.name)
        for shard in shards:
            tensors = {name: _scaled(name, value, factors) for name, value in load_file(folder / shard).items()}
            save_file(tensors, part / shard, metadata={"format": "pt"})
        (part / MARK).write_text(json.dumps(made_of), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    except OSError as error:
        raise disk_error(error, target) from error
    return target


def find_sites(folder: Path, source: Source) -> list[Site]:
    """Return the norms of a model whose channels can be made loud, in the order in which they run.

    Raises:
        UnsupportedError: There is none.
    """
    skeleton = Skeleton.build(folder)
    blocks, model = BlockSequence.find(skeleton.model), skeleton.model
    flow = DataFlow.of(blocks)
    places = skeleton.targets({name: info.shape for name, info in source.tensors.items()})
    on_disk = {place.param: name for name, place in places.items() if place.param and not place.where.rows}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sites = []
    for name, outputs in flow.outputs.items():
        module = model.get_submodule(name)
        weight = getattr(module, "weight", None)
        if blocks.index_of(name) is None or not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not outputs:
            continue
        # A bias would have to be multiplied with the gain, and a gain of 1 + weight is not exact.
        if getattr(module, "bias", None) is not None or norm_offset(module) != 0:
            continue
        route = flow.follow(outputs[0], linears)
        if route.readers and route.obstacle is None:
            sites.append(
                Site(on_disk[f"{name}.weight"], tuple(on_disk[f"{reader}.weight"] for reader in route.readers))
            )
    if not sites:
        raise UnsupportedError(
            f"{type(model).__name__}: no norm without a bias is read by linear layers of its block alone",
            "outliers can be planted into models of the Llama kind",
        )
    return sites


def _factors(source: Source, sites: list[Site], planted: Planted) -> dict[str, Tensor]:
    """Return tensor on disk -> what it is multiplied by: a vector for gains, one row for matrices."""
    generator = torch.Generator().manual_seed(planted.seed)
    factors: dict[str, Tensor] = {}
    for site in sites:
        width = source.tensors[site.gain].shape[0]
        if planted.channels >= width:
            raise UnsupportedError(f"{site.gain} has {width} channels, not more than {planted.channels}")
        loud = torch.ones(width)
        loud[torch.randperm(width, generator=generator)[: planted.channels]] = planted.factor
        factors[site.gain] = loud
        factors |= {reader: (1 / loud)[None] for reader in site.readers}
    return factors


def _scaled(name: str, value: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
    if name not in factors:
        return value
    scaled = (value.float() * factors[name]).to(value.dtype)
    if not torch.equal(scaled.float() / factors[name], value.float()):
        raise NumericalError(f"{name}: values leave the range of {value.dtype}", "plant a smaller factor")
    return scaled
