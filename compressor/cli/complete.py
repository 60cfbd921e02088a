"""Values the shell completes: names of methods, formats, models and recipes, and folders that hold a checkpoint.

Each function takes what was typed so far and returns the values that go on from it, with a line about each. Nothing
here loads torch: a shell waits for the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

LISTS = ("formats", "inputs", "methods", "models", "pruners", "recipes")
"""What `compress list` knows."""

EFFORTS = {"fast": "50 steps", "balanced": "200 steps, the default", "best": "1000 steps"}
READERS = ("transformers", "vllm")


def methods(incomplete: str) -> list[tuple[str, str]]:
    """Methods of `compress quantize`."""
    from compressor.methods import SUMMARIES

    return _matching(SUMMARIES, incomplete)


def pruners(incomplete: str) -> list[tuple[str, str]]:
    """Methods of `compress prune`."""
    from compressor.pruning import PRUNERS

    return _matching({name: pruner.summary for name, pruner in PRUNERS.items()}, incomplete)


def formats(incomplete: str) -> list[tuple[str, str]]:
    """Formats of weights."""
    from compressor.formats import SUMMARIES

    return _matching(SUMMARIES, incomplete)


def inputs(incomplete: str) -> list[tuple[str, str]]:
    """Formats of the inputs of layers."""
    from compressor.formats.activations import INPUT_SUMMARIES

    return _matching(INPUT_SUMMARIES, incomplete)


def models(incomplete: str) -> list[tuple[str, str]]:
    """Embedded models, then checkpoints in the folder that is being typed."""
    from compressor.checkpoint.default_model import EMBEDDED

    named = _matching({name: model.summary for name, model in EMBEDDED.items()}, incomplete)
    return [*named, *checkpoints(incomplete)]


def checkpoints(incomplete: str) -> list[tuple[str, str]]:
    """Folders with a `config.json` and GGUF files, and other folders to go on into."""
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    start = "" if incomplete.endswith("/") else typed.name
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    found = []
    for entry in entries:
        if not entry.name.startswith(start) or (entry.name.startswith(".") and not start.startswith(".")):
            continue
        if (entry / "config.json").is_file():
            found.append((str(entry), "checkpoint"))
        elif entry.suffix == ".gguf":
            found.append((str(entry), "GGUF file"))
        elif entry.is_dir():
            found.append((f"{entry}/", "folder"))
    return found


def recipes(incomplete: str) -> list[tuple[str, str]]:
    """Recipes that come with the package, then YAML files here."""
    from compressor.ship.pipeline import shipped

    here = {str(path): "recipe" for path in sorted(Path().glob("*.y*ml"))}
    return _matching({**shipped(), **here}, incomplete)


def efforts(incomplete: str) -> list[tuple[str, str]]:
    """Values of `--effort`."""
    return _matching(EFFORTS, incomplete)


def readers(incomplete: str) -> list[str]:
    """Values of `--for`."""
    return _starting(READERS, incomplete)


def lists(incomplete: str) -> list[str]:
    """What `compress list` takes."""
    return _starting(LISTS, incomplete)


def data(incomplete: str) -> list[tuple[str, str]]:
    """Presets of calibration text; files are the shell's affair."""
    presets = {"python-docs": "documentation topics of Python", "self": "text the model writes itself"}
    return _matching(presets, incomplete)


def _matching(entries: Mapping[str, str], incomplete: str) -> list[tuple[str, str]]:
    return [(name, said) for name, said in entries.items() if name.startswith(incomplete)]


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
