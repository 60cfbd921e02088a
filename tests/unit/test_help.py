"""Every help page reads on 80 columns, shows defaults and an example; the shell completes names."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.models import ArgumentInfo, OptionInfo
from typer.testing import CliRunner

from compressor.cli import complete
from compressor.cli.app import VERBS, app
from compressor.cli.help import COMPLETIONS, DEFAULTS, EXAMPLES, METAVARS, PAGES, PANELS
from compressor.formats import BUILDERS
from compressor.methods import METHODS
from compressor.pages.assemble import ROOT
from compressor.pruning import PRUNERS

FUNCTIONS: dict[str, Callable[..., None]] = {verb: run for verbs in VERBS.values() for verb, run in verbs.items()}
PAGES_OF_HELP = ["", *FUNCTIONS]


def shown(verb: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("COLUMNS", "TERMINAL_WIDTH"):
        monkeypatch.setenv(name, "80")
    result = CliRunner().invoke(app, [*([verb] if verb else []), "--help"])
    assert result.exit_code == 0, result.output
    return result.output


def parameters(verb: str) -> dict[str, tuple[Any, Any]]:
    """Parameter -> what Typer knows of it, and its default."""
    function = FUNCTIONS[verb]
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        found[name] = (parameter.annotation.__metadata__[0], parameter.default)
    return found


@pytest.mark.parametrize("verb", PAGES_OF_HELP)
def test_help_fits_80_columns_and_has_an_example(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(verb, monkeypatch)
    assert max(len(line) for line in text.splitlines()) <= 80
    flat = " ".join(text.split())
    for example in EXAMPLES[verb]:
        assert f"$ {example}" in flat
    if verb in PAGES:
        assert f"docs/{PAGES[verb]}.md" in flat
        assert (ROOT / "docs" / f"{PAGES[verb]}.md").is_file()
    assert "\\[" not in text, "markup is shown"


@pytest.mark.parametrize("verb", list(FUNCTIONS))
def test_every_option_says_what_it_means_and_its_default(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(shown(verb, monkeypatch).replace("│", " ").split())
    for name, (info, default) in parameters(verb).items():
        assert info.help, f"{verb}: {name} says nothing"
        if isinstance(info, ArgumentInfo) or isinstance(default, bool) or default is inspect.Parameter.empty:
            continue
        if default is None and "(repeatable" not in info.help and "repeated" not in info.help:
            assert isinstance(info.show_default, str), f"{verb}: the default of {name} is not shown"
            assert f"[default: ({info.show_default})]" in text
        elif default is not None:
            assert f"[default: {default}]" in text, f"{verb}: the default of {name} is not shown"


@pytest.mark.parametrize("verb", list(EXAMPLES))
def test_examples_are_commands_that_parse(verb: str) -> None:
    import typer

    root: Any = typer.main.get_command(app)
    for example in EXAMPLES[verb]:
        program, name, *words = shlex.split(example)
        assert program == "compress"
        assert verb in ("", name)
        root.commands[name].make_context(name, list(words))


def test_tables_name_parameters_that_exist() -> None:
    known = {verb: set(parameters(verb)) for verb in FUNCTIONS}
    everywhere = set().union(*known.values())
    assert set(METAVARS) <= everywhere
    assert set(COMPLETIONS) <= everywhere
    assert set(DEFAULTS[""]) <= everywhere
    for verb, words in DEFAULTS.items():
        assert verb == "" or set(words) <= known[verb], f"{verb}: {set(words) - known[verb]}"
    assert set(PANELS) <= set(FUNCTIONS)
    assert set(EXAMPLES) == set(PAGES_OF_HELP)
    for verb in FUNCTIONS:
        for name, (info, default) in parameters(verb).items():
            if isinstance(info, OptionInfo) and name in DEFAULTS.get(verb, {}):
                assert default is None, f"{verb}: {name} has a default of its own"


def completed(words: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What bash gets for the last word."""
    env = {"_COMPRESS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    return CliRunner().invoke(app, [], prog_name="compress", env=env).output.split()


def test_bash_completes_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smol-mine").mkdir()
    (tmp_path / "smol-mine" / "config.json").write_text("{}")
    assert completed("compress quan", monkeypatch) == ["quantize"]
    assert completed("compress quantize --method gp", monkeypatch) == ["gptq"]
    assert completed("compress prune --method spar", monkeypatch) == ["sparsegpt"]
    assert completed("compress quantize -f nv", monkeypatch) == ["nvfp4"]
    assert completed("compress quantize smol", monkeypatch) == ["smollm2-135m", "smol-mine"]
    assert completed("compress check smol", monkeypatch) == ["smol-mine"]
    assert completed("compress list me", monkeypatch) == ["methods"]
    assert "w4-gptq" in completed("compress run w4", monkeypatch)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_shown(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    result = CliRunner().invoke(app, ["--show-completion", shell], prog_name="compress")
    assert result.exit_code == 0
    assert "_COMPRESS_COMPLETE" in result.output


def test_all_names_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [name for name, _ in complete.methods("")] == list(METHODS)
    assert [name for name, _ in complete.pruners("")] == list(PRUNERS)
    assert {name for name, _ in complete.formats("")} == set(BUILDERS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub" / "model").mkdir(parents=True)
    (tmp_path / "sub" / "model" / "config.json").write_text("{}")
    (tmp_path / "sub" / "m.gguf").write_text("")
    (tmp_path / "sub" / ".hidden").mkdir()
    assert complete.checkpoints("") == [("sub/", "folder")]
    assert complete.checkpoints("sub/m") == [("sub/m.gguf", "GGUF file"), ("sub/model", "checkpoint")]
    assert complete.checkpoints("none/") == []
