"""What every row of a table reads: the model's folder, the two texts, and their tokens for other tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compressor.checkpoint.default_model import EMBEDDED
from compressor.checkpoint.resolve import HUB_ID, resolve_model
from compressor.checkpoint.source import Source
from compressor.errors import CheckpointError, RecipeError
from compressor.evals.bench.row import Preset, Row, TextFile
from compressor.evals.bench.table import Table
from compressor.files import sha256_file
from compressor.recipe import CalibrationSpec


@dataclass(frozen=True)
class Inputs:
    """Where the inputs of a table are on this machine.

    Attributes:
        model: Folder of the original.
        model_argument: What `compress` is told; the folder for models inside the data folder.
        fingerprint: SHA-256 over the original's files.
        weight_bytes: Bytes of its tensors.
        bits_per_weight: Bits of the dtype its weights are stored in.
        calibration: Text file.
        evaluation: Text file.
        texts: Row -> what `--data` is told, where it is not the table's text.
    """

    model: Path
    model_argument: str
    fingerprint: str
    weight_bytes: int
    bits_per_weight: float
    calibration: Path
    evaluation: Path
    texts: Mapping[str, str] = field(default_factory=dict)

    def text_of(self, row: Row) -> str:
        """Return what `--data` is told for a row."""
        return self.texts.get(row.name, str(self.calibration))


def find_inputs(table: Table, data: Path, work: Path) -> Inputs:
    """Find and check the inputs; where a text's part is meant, it is written into the work folder.

    Raises:
        RecipeError: A text is not in the data folder.
        CheckpointError: A text is not the one the table names, or the model cannot be read.
    """
    calibration, evaluation = (_find_text(spec, data, work) for spec in (table.calibration, table.evaluation))
    own = {
        row.name: row.text.preset if isinstance(row.text, Preset) else str(_find_text(row.text, data, work))
        for row in table.rows
        if row.text is not None
    }
    folder, argument = find_model(table, data)
    if table.planted is not None:
        # Imported here: it builds the model, which other tables do without.
        from compressor.evals.bench.planted import plant

        folder = plant(folder, work.resolve() / table.model_name, table.planted)
        argument = str(folder)
    source = Source.open(folder)
    bits = {"F64": 64.0, "F32": 32.0, "F16": 16.0, "BF16": 16.0}[source.dtype]
    stored = sum(info.nbytes for info in source.tensors.values())
    return Inputs(folder, argument, source.fingerprint, stored, bits, calibration, evaluation, own)


def find_model(table: Table, data: Path) -> tuple[Path, str]:
    """Return the folder of the model that a table names, and what `compress` is told.

    Raises:
        CompressorError: It cannot be found or fetched.
    """
    inside = data / table.model
    is_name = table.model in EMBEDDED or (HUB_ID.fullmatch(table.model) is not None and not inside.is_dir())
    argument = table.model if is_name else str(inside.resolve())
    folder, _ = resolve_model(argument)
    return folder.resolve(), argument


def write_tokens(table: Table, inputs: Inputs, folder: Path) -> tuple[Path, Path]:
    """Write the calibration windows `[samples, seq_len]` and the scored tokens `[n]` as int64 `.npy` files.

    They are the very tokens that `compress quantize` and `compress eval` use.

    Raises:
        RecipeError: Too little text.
    """
    # Imported here: transformers takes seconds, and tables without other tools' rows do not need it.
    import numpy as np
    from transformers import AutoConfig, AutoTokenizer

    from compressor.calibration.dataset import build, load_text, tokenize

    tokenizer = AutoTokenizer.from_pretrained(inputs.model)
    vocabulary = AutoConfig.from_pretrained(inputs.model).get_text_config().vocab_size
    samples, seq_len = table.calibration.samples, table.calibration.seq_len
    spec = CalibrationSpec(data=str(inputs.calibration), n_samples=samples, seq_len=seq_len)
    windows = build(spec, tokenizer, vocabulary, seed=table.seed).tokens
    assert table.evaluation.tokens is not None, "other tools' rows are scored on tokens"
    scored = tokenize(load_text(str(inputs.evaluation)), tokenizer, vocabulary, limit=table.evaluation.tokens)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "calibration.npy", folder / "evaluation.npy"
    for path, tokens in zip(paths, (windows, scored), strict=True):
        np.save(path, tokens.numpy())
    return paths


def _find_text(spec: TextFile, data: Path, work: Path) -> Path:
    path = _text(data, spec.file, spec.sha256)
    return path if spec.part is None else _part(path, spec.part, work)


def _part(path: Path, part: tuple[float, float], work: Path) -> Path:
    """Write a share of a text's characters to a file of its own."""
    text = path.read_text(encoding="utf-8")
    start, stop = (round(share * len(text)) for share in part)
    target = work / "texts" / f"{path.stem}-{start}-{stop}{path.suffix}"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text[start:stop], encoding="utf-8")
    return target.resolve()


def _text(data: Path, name: str, sha256: str) -> Path:
    path = data / name
    if not path.is_file():
        raise RecipeError(f"{path}: no such file", "give the folder that holds the table's texts with --data-dir")
    found = sha256_file(path)
    if found != sha256:
        raise CheckpointError(
            f"{path}: SHA-256 is {found}, the table names {sha256}", "another text makes another table: get that file"
        )
    return path.resolve()
