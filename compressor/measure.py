"""Measuring a result against the original, by folder or name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.calibration.dataset import load_text, tokenize
from compressor.checkpoint.resolve import resolve_model
from compressor.checkpoint.sink import write_json
from compressor.checkpoint.skeleton import read_config
from compressor.checkpoint.source import read_json
from compressor.environment import load_tokenizer, pick_device
from compressor.errors import CheckpointError, RecipeError, disk_error
from compressor.evals.compare import evaluate as compare_folders
from compressor.output import RECIPE
from compressor.report import Progress, Silent

EVALUATION = "compress_eval.json"


def evaluate(
    directory: str | Path,
    baseline: str | None = None,
    *,
    text: str = "python-docs",
    max_tokens: int = 8192,
    context: int = 1024,
    output: str | Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint against the original and write `compress_eval.json`; the same as `compress eval`.

    Args:
        directory: The compressed checkpoint.
        baseline: The original; None takes it from the recipe saved in `directory`.
        text: Preset (its held-out part), .txt or .jsonl file.
        max_tokens: Tokens of the text to score, from its start.
        context: Tokens per window.
        output: Folder for the JSON; None means `directory`.
        device: `auto`, `cpu`, `cuda`, ...
        trust_remote_code: Run model code that comes with the checkpoints, where transformers has none of its own.
        progress: Who is told how far it is.

    Raises:
        CompressorError: See `compressor.errors`; nothing is written then.
    """
    progress = progress or Silent()
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory", "give the folder that compress quantize wrote")
    baseline = baseline or _original_of(folder)
    original, _ = resolve_model(baseline, trust_remote_code)
    tokenizer = load_tokenizer(original, trust_remote_code)
    vocab_size = read_config(original, trust_remote_code).get_text_config().vocab_size
    tokens = tokenize(load_text(text), tokenizer, vocab_size, limit=max_tokens)
    progress.stage("loading both models")

    def done(windows: int, total: int) -> None:
        progress.stage(f"window {windows} of {total}")

    comparison = compare_folders(
        folder,
        original,
        tokens,
        context,
        names=(str(directory), baseline),
        device=pick_device(device),
        trust_remote_code=trust_remote_code,
        progress=done,
    )
    result = {**comparison.to_json(), "text": text}
    target = Path(output) if output is not None else folder
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, target) from error
    write_json(target / EVALUATION, result)
    return result


def _original_of(folder: Path) -> str:
    """Return the model a result was made from, as its saved recipe says."""
    recipe = folder / RECIPE
    if not recipe.is_file():
        raise RecipeError(f"{folder}: no {RECIPE} says what it was made from", "name it with --baseline")
    saved = read_json(recipe)
    model, revision = str(saved.get("model")), saved.get("source_revision")
    return f"{model.partition('@')[0]}@{revision}" if revision else model
