"""Copies of checkpoints to break: one change each, so that a test can say which finding it must give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import compressor
from compressor.check import CheckReport, Severity
from compressor.testing import models
from compressor.testing.tools import save_checkpoint

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
BUILDERS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "int4": (lambda: models.tiny_llama(kv_heads=2), {"format": "int4", "group_size": 32}),
    "int4-asym": (models.tiny_llama, {"format": "int4-asym", "group_size": 32}),
    "int3-ragged": (lambda: models.tiny_llama(hidden_size=80), {"format": "int3", "group_size": "channel"}),
    "int4-g16": (models.tiny_llama, {"format": "int4", "group_size": 16}),
    "nvfp4": (models.tiny_llama, {"format": "nvfp4"}),
    "mxfp4": (models.tiny_llama, {"format": "mxfp4"}),
    "fp8": (models.tiny_llama, {"format": "fp8"}),
    "fp8-block": (models.tiny_llama, {"format": "fp8-block"}),
    "mxfp8": (models.tiny_llama, {"format": "mxfp8"}),
    "mixed": (models.tiny_llama, {"format": "int4", "group_size": 32, "overrides": {"*.down_proj": "fp8"}}),
    "kv": (models.tiny_llama, {"format": "int4", "group_size": 32, "kv_cache": "fp8"}),
    "native": (models.tiny_llama, {"format": "fp4"}),
    "moe": (models.tiny_olmoe, {"format": "mxfp4"}),
    "moe-nvfp4": (models.tiny_olmoe, {"format": "nvfp4"}),
    "mixtral": (models.tiny_mixtral, {"format": "int4", "group_size": 32}),
    "bert": (models.tiny_bert, {"format": "int4", "group_size": 32}),
    "dense": (models.tiny_llama, {}),
    "dense-moe": (models.tiny_olmoe, {}),
}
"""Kinds of tiny checkpoint: the model, and how it is quantized; nothing means it stays dense."""


class Maker:
    """Writes every kind of checkpoint once, when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, name: str) -> Path:
        """Return the folder of one of `BUILDERS`; do not change what is in it."""
        out = self.root / name
        if not out.exists():
            build, options = BUILDERS[name]
            model: Any = build()
            source = save_checkpoint(model.to(torch.bfloat16), self.root / f"{name}-source")
            if not options:
                source.rename(out)
            else:
                compressor.quantize(
                    str(source), method="rtn", output=out, data="self", n_samples=2, seq_len=16, **options
                )
        return out


class Broken:
    """A copy of a checkpoint to break. Methods change one thing and leave the rest as it is.

    Attributes:
        folder: Where it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def json(self, name: str) -> dict[str, Any]:
        """Read a file."""
        content: dict[str, Any] = json.loads((self.folder / name).read_text())
        return content

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a file."""
        (self.folder / name).write_text(json.dumps(content))

    def config(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change config.json."""
        config = self.json("config.json")
        change(config)
        self.write("config.json", config)

    def section(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the quantization section."""
        self.config(lambda config: change(config["quantization_config"]))

    def group(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the first config group."""
        self.section(lambda section: change(section["config_groups"]["group_0"]))

    def report(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the report."""
        report = self.json("compress_report.json")
        change(report)
        self.write("compress_report.json", report)

    def tensors(self, change: Callable[[dict[str, Tensor]], object], metadata: dict[str, str] | None = None) -> None:
        """Change the weights."""
        tensors = load_file(self.folder / SHARD)
        change(tensors)
        save_file(tensors, self.folder / SHARD, metadata=metadata or {"format": "pt"})

    def put(self, name: str, value: Tensor) -> None:
        """Add or replace one tensor."""
        self.tensors(lambda tensors: tensors.update({name: value.contiguous()}))

    def edit(self, name: str, change: Callable[[Tensor], object]) -> None:
        """Change one tensor in place."""
        self.tensors(lambda tensors: change(tensors[name]))

    def drop(self, *names: str) -> None:
        """Remove tensors."""
        self.tensors(lambda tensors: [tensors.pop(name) for name in names])

    def rename(self, name: str, other: str) -> None:
        """Rename a tensor."""
        self.tensors(lambda tensors: tensors.update({other: tensors.pop(name)}))

    def unpack(self, module: str) -> None:
        """Store a module dense, and leave that out of the report."""
        shape = load_file(self.folder / SHARD)[f"{module}.weight_scale"].shape[0]
        width = 64

        def change(tensors: dict[str, Tensor]) -> None:
            for name in [name for name in tensors if name.startswith(f"{module}.")]:
                del tensors[name]
            tensors[f"{module}.weight"] = torch.randn(
                shape, width, generator=torch.Generator().manual_seed(11)
            ).bfloat16()

        self.tensors(change)
        self.forget()

    def forget(self) -> None:
        """Take the rows out of the report."""
        self.report(lambda report: report.update(rows=[]))

    def shard(self) -> None:
        """Split the weights over two files with an index."""
        tensors = load_file(self.folder / SHARD)
        names = sorted(tensors)
        halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in halves.items():
            save_file({name: tensors[name] for name in part}, self.folder / file, metadata={"format": "pt"})
        (self.folder / SHARD).unlink()
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {name: file for file, part in halves.items() for name in part}
        self.write(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def index(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Shard, then change the index."""
        self.shard()
        content = self.json(INDEX)
        change(content)
        self.write(INDEX, content)


def copy_of(folder: Path, out: Path) -> Broken:
    """Copy a checkpoint; hashes are left out of its report, which every change would break."""
    shutil.copytree(folder, out)
    broken = Broken(out)
    if (out / "compress_report.json").is_file():
        broken.report(lambda report: report.update(files={}))
    return broken


def problems(report: CheckReport) -> set[tuple[str, str]]:
    """Return check and severity of everything that is more than a plain fact."""
    return {(check, str(finding.severity)) for check, finding in report.findings() if finding.severity != Severity.INFO}


def text(report: CheckReport) -> str:
    """Return everything a report says, hints included."""
    return "\n".join(f"{finding} {finding.hint}" for _, finding in report.findings())
