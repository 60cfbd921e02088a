"""Checks of the files around the weights, and of the weights against the report of the run that wrote them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from compressor.check.checkpoint import DENSE, Checkpoint
from compressor.check.finding import Finding, error, info, warning
from compressor.checkpoint.sink import WORK
from compressor.checkpoint.source import INDEX, indexed_files, read_json
from compressor.errors import CheckpointError, CompressorError
from compressor.files import sha256_file
from compressor.output import RECIPE, REPORT

_TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("tokenizer_config.json", "tekken.json"),
)
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def shards(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Every safetensors file must be whole, and say that torch wrote it."""
    yield from checkpoint.damaged
    if (checkpoint.path / WORK).exists():
        yield error(WORK, "is there: the run that wrote this checkpoint did not finish", "repeat its command")
    for file, metadata in checkpoint.metadata.items():
        if metadata.get("format") != "pt":
            said = f"metadata is {dict(metadata) or 'empty'}, not {{'format': 'pt'}}"
            yield warning(file, said, "older readers raise on it; write the file with metadata={'format': 'pt'}")


def index(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The index of a sharded checkpoint must name every tensor once, in the file it lies in, and the right size."""
    stored = Counter(entry.name for entries in checkpoint.files.values() for entry in entries)
    for name, count in stored.items():
        if count > 1:
            yield error(name, f"is stored in {count} shards", "readers differ in which one they take")
    path = checkpoint.path / INDEX
    if not path.is_file():
        if len(checkpoint.files) > 1:
            yield error(INDEX, f"is missing, but there are {len(checkpoint.files)} shards", "write it again")
        return
    try:
        content, files = read_json(path), indexed_files(checkpoint.path)
    except CheckpointError as problem:
        yield error(INDEX, problem.message, problem.hint)
        return
    for file in files:
        if not (checkpoint.path / file).is_file():
            yield error(file, "is missing, but the index names it", "copy it there")
    for other in sorted({found.name for found in checkpoint.path.glob("*.safetensors")} - set(files)):
        yield warning(other, "is not in the index: readers ignore it", "remove it, or name its tensors in the index")
    yield from _weight_map(checkpoint, content["weight_map"])
    metadata = content.get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(entry.nbytes for entries in checkpoint.files.values() for entry in entries)
    if said != total and not checkpoint.damaged:
        yield error(INDEX, f"total_size is {said}, the tensors have {total} bytes", f"set it to {total}")


def side_files(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Tokenizer, processor and generation config must be there for a model that needs them."""
    model = checkpoint.model
    if isinstance(model, CompressorError):
        return
    there = {path.name for path in checkpoint.path.iterdir()}
    hint = "copy it from the original"
    if model.module.main_input_name == "input_ids" and not there & set(_TOKENIZERS):
        yield warning("tokenizer.json", "is missing, and so is every other kind of tokenizer", hint)
    images = model.module.main_input_name == "pixel_values" or "vision_config" in checkpoint.config
    if images and not there & set(_PROCESSORS):
        yield warning("preprocessor_config.json", "is missing: nothing says how images are prepared", hint)
    if model.module.can_generate() and "generation_config.json" not in there:
        yield warning("generation_config.json", "is missing: generation uses the library's defaults", hint)


def provenance(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Files must be those the report names, by SHA-256; the recipe must be there too."""
    report = checkpoint.report
    if report is None:
        if checkpoint.container != DENSE:
            yield info(REPORT, "is not there: written by another program, so there are no hashes to compare with")
        return
    if not (checkpoint.path / RECIPE).is_file():
        yield warning(RECIPE, "is missing: nothing says how this was made", f"the recipe is in {REPORT} too")
    hashes = report.get("files")
    if not isinstance(hashes, dict) or not hashes:
        yield info(REPORT, "has no file hashes: an older version of this package wrote it")
        return
    for name, expected in sorted(hashes.items()):
        path = checkpoint.path / str(name)
        matters = str(name).endswith((".safetensors", ".index.json")) or name == "config.json"
        found = error if matters else warning
        if not path.is_file():
            yield found(str(name), f"is missing, {REPORT} names it", "copy the whole folder")
        elif (actual := sha256_file(path)) != expected:
            said = f"changed since it was written: SHA-256 is {actual[:12]}..., was {str(expected)[:12]}..."
            yield found(str(name), said, "compress again, or copy the folder again, unless the change is meant")


def rows(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Every tensor must have come to what the report says."""
    for row in (checkpoint.report or {}).get("rows") or []:
        name, action = str(row["name"]), row["action"]
        module = checkpoint.modules.get(name.removesuffix(".weight"))
        dense = action in ("kept", "rewritten", "pruned")
        if dense and (name not in checkpoint.tensors or checkpoint.owner(name) is not None):
            yield error(name, f"was {action} dense, says {REPORT}, but is not stored so", "the folder was mixed up")
        elif not dense and module is None:
            yield error(name, f"was written as {action}, says {REPORT}, but is not stored so", "it was mixed up")
        elif action != "kept" and module and module.scheme and not _same_format(str(action), module.scheme.name):
            said = f"was written as {action}, says {REPORT}, but config.json says {module.scheme.name}"
            yield error(name, said, "restore the config.json that was written with these weights")


def _same_format(action: str, name: str) -> bool:
    """Compare names of formats, which say more than the grid in some cases: `fp8-block` is `fp8`."""
    return action.partition("-")[0] == name.partition("-")[0]


def _weight_map(checkpoint: Checkpoint, weight_map: dict[str, str]) -> Iterator[Finding]:
    places = {(entry.name, file) for file, entries in checkpoint.files.items() for entry in entries}
    for name, file in sorted(weight_map.items()):
        if file in checkpoint.files and (name, file) not in places:
            where = checkpoint.tensors[name].file if name in checkpoint.tensors else "no file"
            yield error(name, f"is in {where}, but the index says {file}", "write the index again")
    for name in sorted(set(checkpoint.tensors) - set(weight_map)):
        yield error(name, f"is in {checkpoint.tensors[name].file}, but not in the index", "write the index again")
