"""GGUF files as sources: converted once into the cache, known there by their content.

The weights stay what they are. Files of plain floats keep every bit; block-quantized ones are rounded to bfloat16, as
their products of scale and code fit no 16-bit float.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]

from compressor.checkpoint.cache import cache_root, is_intact, locked, publishing
from compressor.checkpoint.gguf_header import check_header
from compressor.errors import CheckpointError, CompressorError, ResourceError, UnsupportedError
from compressor.files import sha256_file

if TYPE_CHECKING:
    import torch

_LOG = logging.getLogger("compressor")
_CONVERSION = "1"
"""Part of the cache key; raise it when a change to the conversion changes the bytes it writes."""
_MAGIC = b"GGUF"
_BYTES_PER_WEIGHT = 4 + 4
"""Peak of the conversion: the model in float32, and beside it what is written (float32 for a float32 file)."""
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Contents:
    """What a GGUF file holds, from its header.

    Attributes:
        architecture: `general.architecture`.
        matrices: Tensor type -> number of tensors with two or more dimensions.
        n_weights: Values in all tensors.
    """

    architecture: str
    matrices: Counter[str]
    n_weights: int

    @property
    def quantized(self) -> bool:
        """Whether some matrix is stored in blocks with a scale."""
        return not self.matrices.keys() <= _FLOATS.keys()

    @property
    def dtype(self) -> str:
        """Dtype of the converted checkpoint: the narrowest that all plain matrices fit, or bfloat16."""
        if self.quantized or not self.matrices:
            return "bfloat16"
        return _FLOATS[next(iter(self.matrices))] if len(self.matrices) == 1 else "float32"


def is_gguf(path: Path) -> bool:
    """Return whether a file is, or claims to be, GGUF."""
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def resolve_gguf(path: Path) -> Path:
    """Return the folder of a GGUF file as an ordinary checkpoint, converting it if it is not in the cache.

    The folder belongs to the cache: read it, never write to it. Notes about the conversion lie beside the weights.

    Raises:
        CheckpointError: Not a complete GGUF file, or weights that are not finite.
        UnsupportedError: An architecture, tokenizer or split file that transformers does not read completely.
        ResourceError: Not enough memory to convert it, or the cache cannot be written.
    """
    content = sha256_file(path)
    key = hashlib.sha256(f"{_CONVERSION}:{version('transformers')}:{content}".encode()).hexdigest()[:16]
    entry = cache_root() / "models" / f"gguf-{key}"
    if not is_intact(entry):
        with locked(entry):
            if not is_intact(entry):  # another process may have finished while this one waited
                _build(path, entry)
    return entry / "checkpoint"


def _build(path: Path, entry: Path) -> None:
    contents = read_contents(path)
    available = psutil.virtual_memory().available
    if (need := contents.n_weights * _BYTES_PER_WEIGHT) > available:
        raise ResourceError(
            f"{path}: converting its {contents.n_weights / 1e9:.2f} G weights takes {need / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are free",
            "convert it on a larger machine, or start from the original checkpoint, which is streamed",
        )
    # Imported here: a cached conversion must not cost the seconds that torch takes.
    import torch

    from compressor.checkpoint.gguf_convert import load_gguf, write_checkpoint

    _LOG.info("converting %s", path)
    with publishing(entry) as folder:
        model, tokenizer = load_gguf(path.resolve().parent, path.name)
        dtype: torch.dtype = getattr(torch, contents.dtype)
        write_checkpoint(
            model, tokenizer, folder / "checkpoint", dtype, lambda tensor: tensor.ndim < 2 or not contents.quantized
        )
        notes = [_note(contents)]
        (folder / "checkpoint" / "compress_source.json").write_text(json.dumps({"notes": notes}), encoding="utf-8")


def read_contents(path: Path) -> Contents:
    """Read a GGUF file's header.

    Raises:
        CheckpointError: Not GGUF, or cut off.
        UnsupportedError: One part of several.
    """
    import gguf

    check_header(path)
    try:
        reader: Any = gguf.GGUFReader(path)
        architecture = str(reader.get_field("general.architecture").contents())
        parts = reader.get_field("split.count")
        if parts is not None and int(parts.contents()) > 1:
            raise UnsupportedError(
                f"{path}: is one of {int(parts.contents())} parts of a split GGUF file",
                "merge them first: llama-gguf-split --merge FIRST OUT",
            )
        types = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1)
        return Contents(architecture, types, sum(int(tensor.n_elements) for tensor in reader.tensors))
    except CompressorError:
        raise
    except Exception as error:  # a parser of foreign bytes can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path}: not readable as GGUF: {type(error).__name__}: {reason}", "is the file complete?"
        ) from error


def _note(contents: Contents) -> str:
    types = ", ".join(f"{count} {name}" for name, count in sorted(contents.matrices.items()))
    what = f"the source is a GGUF file ({contents.architecture}; matrices: {types})"
    if not contents.quantized:
        return f"{what}, converted to {contents.dtype} without changing a value"
    return (
        f"{what}: its weights are dequantized and rounded to {contents.dtype} first (at most 0.2 % each); "
        "the result cannot be better than that"
    )
