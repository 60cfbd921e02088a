"""Tokens per second and memory of a model next to the original it was made from: `compress bench`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressor.checkpoint.resolve import resolve_model
from compressor.checkpoint.sink import write_json
from compressor.environment import pick_device, pick_dtype, versions
from compressor.errors import RecipeError, disk_error
from compressor.evals.bench.machine import describe
from compressor.evals.speed import Speed, SpeedSettings, measure_speed
from compressor.measure import original_of
from compressor.report import Progress, Silent

BENCH = "compress_bench.json"
VERSION = 1


@dataclass(frozen=True)
class Benched:
    """What was measured.

    Attributes:
        name: The model as it was named.
        model: Its speed.
        baseline_name: The original as it was named; None if there is nothing to compare with.
        baseline: Its speed.
        settings: What was run.
        machine: Where, as `evals.bench.machine.describe` says it.
        written: The file that holds it, or None.
    """

    name: str
    model: Speed
    baseline_name: str | None
    baseline: Speed | None
    settings: SpeedSettings
    machine: dict[str, Any]
    written: Path | None = None

    @property
    def ratios(self) -> dict[str, float] | None:
        """How many times faster, and how many times smaller, than the baseline; None without one."""
        if self.baseline is None:
            return None
        return {
            "prompt": self.model.prompt.median / self.baseline.prompt.median,
            "decode": self.model.decode.median / self.baseline.decode.median,
            "weights": self.baseline.weight_bytes / self.model.weight_bytes,
        }

    def to_json(self) -> dict[str, Any]:
        """Return plain data, as it is written."""
        return {
            "version": VERSION,
            "machine": self.machine,
            "versions": versions(),
            "settings": asdict(self.settings),
            "model": {"name": self.name, **self.model.to_json()},
            "baseline": self.baseline and {"name": self.baseline_name, **self.baseline.to_json()},
            "ratios": self.ratios,
        }


def bench(
    model: str | Path,
    baseline: str | None = None,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batch: int = 1,
    dtype: str = "auto",
    repeats: int = 5,
    device: str = "auto",
    threads: int | None = None,
    output: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Benched:
    """Measure a model and, where there is one, the original it was made from; the same as `compress bench`.

    Args:
        model: A checkpoint folder, or anything else `compress quantize` takes.
        baseline: The original; None takes it from the recipe saved in `model`, and without one measures `model` alone.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens generated after it.
        batch: Prompts at once.
        dtype: What both compute in: `auto` (what `model` is stored in), `float32`, `bfloat16` or `float16`.
        repeats: Rounds; medians count.
        device: `auto`, `cpu`, `cuda`, ...
        threads: Processor threads; None leaves them to PyTorch.
        output: Folder for `compress_bench.json`; None writes nothing.
        trust_remote_code: Run model code that comes with the checkpoints, where transformers has none of its own.
        progress: Who is told how far it is.

    Raises:
        CompressorError: See `compressor.errors`; nothing is written then.
    """
    counts = {"prompt tokens": prompt_tokens, "new tokens": new_tokens, "batch": batch, "repeats": repeats}
    counts |= {} if threads is None else {"threads": threads}
    for name, count in counts.items():
        if count < 1:
            raise RecipeError(f"{name}: {count}", "give at least one")
    where = pick_device(device)
    folder, _ = resolve_model(str(model), trust_remote_code)
    baseline = baseline or original_of(folder)
    folders = [folder] if baseline is None else [folder, resolve_model(baseline, trust_remote_code)[0]]
    chosen = str(pick_dtype(dtype, folder, where)).removeprefix("torch.")
    settings = SpeedSettings(
        prompt_tokens, new_tokens, batch, chosen, str(where), repeats, threads, trust_remote_code=trust_remote_code
    )
    found = measure_speed(folders, settings, (progress or Silent()).stage)
    machine = describe(where.type, found[0].threads)
    result = Benched(str(model), found[0], baseline, found[1] if baseline else None, settings, machine)
    return result if output is None else _written(result, Path(output))


def _written(result: Benched, folder: Path) -> Benched:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / BENCH, result.to_json())
    except OSError as error:
        raise disk_error(error, folder) from error
    return Benched(**{**vars(result), "written": folder / BENCH})
