"""Imports point down only, and the command line starts without the heavy libraries."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import compressor

ROOT = Path(compressor.__file__).parent
LAYERS = [
    {"errors", "files", "offline", "process", "_hook"},
    {"formats", "ranks", "yaml_text"},
    {"inputs"},
    {"recipe", "decision", "plan", "report"},
    {"stacks"},
    {"kernels", "calibration", "checkpoint"},
    {"methods", "runtime"},
    {
        *("evals", "verify", "runners", "plugin", "environment", "unit", "output", "folding", "input_plan"),
        *("fold_plan", "weights", "allocation", "priorities", "readers", "pruning", "saving"),
    },
    {"planner", "engine", "estimate", "measure", "inspection", "vision", "bits"},
    {"api", "check", "structured"},
    {"pruner", "pages", "vision_trial"},
    {"ship"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ONLY_IN = {
    "rich": ("cli",),
    "typer": ("cli",),
    "click": ("cli",),
    "triton": ("kernels/gpu",),
    "lm_eval": ("evals/harness.py",),
    "transformers.core_model_loading": ("checkpoint/skeleton.py",),
    "transformers.conversion_mapping": ("checkpoint/skeleton.py",),
}


def modules() -> list[tuple[str, Path]]:
    """Every source file with its path inside the package; the linked folders are walked too."""
    found = []
    for top in sorted(ROOT.iterdir()):
        paths = [top] if top.suffix == ".py" else sorted(top.resolve().rglob("*.py")) if top.is_dir() else []
        for path in paths:
            inside = top.name if top.suffix == ".py" else f"{top.name}/{path.relative_to(top.resolve()).as_posix()}"
            found.append((inside, path))
    return found


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def part_of(name: str) -> str | None:
    pieces = name.split(".")
    return pieces[1] if pieces[0] == "compressor" and len(pieces) > 1 and pieces[1] in LEVEL else None


@pytest.mark.parametrize(("inside", "path"), modules(), ids=[inside for inside, _ in modules()])
def test_imports_point_down(inside: str, path: Path) -> None:
    me = inside.split("/")[0].removesuffix(".py")
    if me in ("__init__", "testing"):
        return
    assert me in LEVEL, f"{inside} has no layer"
    for name in imports(path):
        assert not name.startswith("compressor.testing"), f"{inside} imports {name}"
        other = part_of(name)
        if other is not None and other != me:
            assert LEVEL[other] < LEVEL[me], f"{inside} imports {name}, which is not below it"
        for library, places in ONLY_IN.items():
            if name == library or name.startswith(f"{library}."):
                assert inside.startswith(places), f"{inside} imports {library}"
    if me == "methods" and inside != "methods/__init__.py":
        allowed = {"errors", "formats", "inputs", "decision", "plan", "recipe", "report", "methods"}
        seen = ("stats", "channels", "samples", "averages", "precision", "operands", "routing_rule")
        shown = tuple(f"compressor.calibration.{name}" for name in seen)
        for name in imports(path):
            other = part_of(name)
            fine = other is None or other in allowed or name.startswith(shown)
            assert fine, f"{inside} imports {name}: methods see no files, kernels or model classes"


def test_the_walk_sees_the_linked_folders() -> None:
    tops = {inside.split("/")[0] for inside, _ in modules()}
    assert {"kernels", "calibration", "evals", "methods", "cli"} <= tops


def test_linked_folders_are_no_packages_of_their_own() -> None:
    # With an __init__.py a bare `import kernels` from the repository would hide Hugging Face's package of that name.
    for name in ("kernels", "calibration", "evals"):
        assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.parametrize("code", ["import compressor", "import compressor.cli.app"])
def test_start_is_cheap(code: str) -> None:
    check = f"import sys; {code}; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_syntax_of_the_oldest_python() -> None:
    for _, path in modules():
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 11))
