"""Beside other tools: their environments, rows that both sides make, who is ahead, and the command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compressor.errors import RecipeError
from compressor.evals.bench.external import gptqmodel_row, llmcompressor_row, stock_score
from compressor.evals.bench.leads import find_leads, job_of, leads_section
from compressor.evals.bench.peers import environments
from compressor.evals.bench.peers.__main__ import main
from compressor.evals.bench.peers.environments import TOOLS, SetupError, Tool, make_environment
from compressor.evals.bench.record import Record
from compressor.evals.bench.steps import Cost
from compressor.evals.bench.table import TABLES, Table, read_table
from compressor.evals.bench.tools import bits_per_weight, tool_arguments
from compressor.evals.results import Evaluation
from compressor.evals.scores import Estimate, Model, Samples, TaskResult
from compressor.testing.models import tiny_llama

TEXT = {"file": "text.txt", "sha256": "0" * 64}


def table(*rows: Mapping[str, Any], folder: Path, **changes: Any) -> Table:
    described = {
        "title": "T",
        "model": "tiny",
        "calibration": {**TEXT, "samples": 4, "seq_len": 32},
        "evaluation": {**TEXT, "tokens": 300, "context": 64},
        "rows": list(rows),
        **changes,
    }
    path = folder / "t.yaml"
    path.write_text(yaml.safe_dump(described), encoding="utf-8")
    return read_table(path)


OURS = {"method": "gptq", "format": "int4", "group_size": 64}
THEIRS = {"tool": "llmcompressor", "algorithm": "gptq", "format": "int4", "group_size": 64}


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        (THEIRS, "--algorithm gptq --format int4 --group-size 64"),
        ({**THEIRS, "algorithm": "awq"}, "--algorithm awq --format int4 --group-size 64"),
        (
            {"tool": "llmcompressor", "algorithm": "smoothquant+gptq", "format": "int8", "inputs": "int8-token"},
            "--algorithm smoothquant+gptq --format int8 --inputs int8-token",
        ),
        (
            {"tool": "llmcompressor", "name": "w", "prune": {"method": "wanda", "sparsity": 0.5}},
            "--algorithm wanda --sparsity 0.5",
        ),
        (
            {"tool": "llmcompressor", "name": "s", "prune": {"method": "sparsegpt", "pattern": "2:4"}},
            "--algorithm sparsegpt --pattern 2:4",
        ),
        ({"tool": "gptqmodel", "format": "int4", "group_size": 64}, "--bits 4 --group-size 64"),
        (
            {"tool": "autoround", "iters": 5, "format": "int3", "group_size": 32},
            "--bits 3 --iters 5 --group-size 32",
        ),
    ],
)
def test_what_a_tool_is_told(row: Mapping[str, Any], flags: str, tmp_path: Path) -> None:
    made = table(row, folder=tmp_path).rows[1]
    assert tool_arguments(made) == flags.split()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**THEIRS, "inputs": "int8-token"}, "go together"),
        ({**THEIRS, "algorithm": "smoothquant+gptq"}, "go together"),
        ({**THEIRS, "algorithm": "smoothquant+gptq", "inputs": "int8-token"}, "means format int8"),
        (
            {"tool": "llmcompressor", "name": "m", "prune": {"method": "magnitude", "sparsity": 0.5}},
            "prunes with wanda",
        ),
        ({**THEIRS, "prune": {"method": "wanda", "sparsity": 0.5}}, "means nothing for llmcompressor"),
        (
            {"tool": "autoround", "name": "a", "iters": 1, "prune": {"method": "wanda", "sparsity": 0.5}},
            "means nothing",
        ),
        ({"tool": "gptqmodel", "format": "nvfp4"}, "gptqmodel rows are integers"),
        ({**THEIRS, "text": {"preset": "self"}}, "text means nothing for llmcompressor"),
    ],
)
def test_what_a_tool_cannot_be_asked(row: Mapping[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        table(row, folder=tmp_path)


def test_a_list_of_algorithms_stands_for_a_row_each(tmp_path: Path) -> None:
    made = table({**THEIRS, "algorithm": ["rtn", "gptq"]}, folder=tmp_path)
    assert [row.name for row in made.rows[1:]] == ["int4 g64 llmcompressor rtn", "int4 g64 llmcompressor gptq"]


def test_who_reads_a_result_is_part_of_its_digest(tmp_path: Path) -> None:
    usual, stock = (table(OURS, THEIRS, folder=tmp_path, reader=reader) for reader in ("compress", "stock"))
    before, after = ([made.digest(row) for row in made.rows] for made in (usual, stock))
    assert before[0] == after[0], "the original is scored by compress eval in both"
    assert before[1] != after[1]
    assert before[2] == after[2], "other tools' rows have always been read by stock transformers"
    assert [made.by_stock(made.rows[1]) for made in (usual, stock)] == [False, True]


def test_bits_of_an_export_that_is_not_packed(tmp_path: Path) -> None:
    row = table({"tool": "autoround", "iters": 5, "format": "int3", "group_size": 32}, folder=tmp_path).rows[1]
    assert bits_per_weight(row, {}) == 3 + 16 / 32
    assert bits_per_weight(row, {"bits_per_weight": 3.75}) == 3.75


def record(name: str, kl: tuple[float, ...]) -> Record:
    ids = tuple(range(len(kl)))
    samples = Samples(ids, tuple(f"h{k}" for k in ids), (10,) * len(kl), {"kl": tuple(10 * value for value in kl)})
    metrics = {"kl": samples.mean("kl"), "agreement": Estimate(0.5, None)}
    words = Samples(ids, samples.hash, samples.weight, {"nll": (1.0,) * len(kl)})
    tasks = {
        "kl": TaskResult("1", {}, metrics, samples),
        "perplexity": TaskResult("1", {}, {"perplexity": Estimate(9.0, None)}, words),
    }
    evaluation = Evaluation(Model(name, None, "f", "p", "float32"), None, {}, 0, tasks, {})
    cost = {"quantize": Cost(1.0, 2.0, 3), "evaluate": Cost(1.0, 1.0, 1)}
    return Record(name, "d", "f", ("do it",), {}, {"tool": "1"}, cost=cost, evaluation=evaluation)


def test_who_is_ahead(tmp_path: Path) -> None:
    int3, pruned = {**OURS, "format": "int3"}, {"prune": {"method": "wanda", "sparsity": 0.5}}
    made = table(
        {**OURS, "method": ["rtn", "gptq"]},
        THEIRS,
        {**THEIRS, "algorithm": "rtn"},
        int3,
        {**THEIRS, "format": "int3"},
        {**pruned, "name": "ours wanda"},
        {**pruned, "name": "their wanda", "tool": "llmcompressor"},
        {**OURS, "format": "int2"},
        folder=tmp_path,
        reader="stock",
    )
    kl = {
        "int4 g64 rtn": (0.9, 0.9, 0.8, 0.9),
        "int4 g64 gptq": (0.1, 0.2, 0.15, 0.12),
        "int4 g64 llmcompressor gptq": (0.2, 0.29, 0.26, 0.22),
        "int4 g64 llmcompressor rtn": (0.8, 0.8, 0.8, 0.7),
        "int3 g64 gptq": (0.5, 0.6, 0.5, 0.6),
        "int3 g64 llmcompressor gptq": (0.6, 0.5, 0.6, 0.5),
        "ours wanda": (0.7, 0.8, 0.9, 0.8),
        "their wanda": (0.5, 0.6, 0.72, 0.6),
        "int2 g64 gptq": (1.0, 1.0, 1.0, 1.0),
    }
    records: dict[str, Record | None] = {name: record(name, values) for name, values in kl.items()}
    records["original"] = None
    leads = find_leads(made, records)
    assert [(lead.job, lead.ours.name, lead.theirs.name, lead.ahead) for lead in leads] == [
        ("int4 g64", "int4 g64 gptq", "int4 g64 llmcompressor gptq", "ours"),
        ("int3 g64", "int3 g64 gptq", "int3 g64 llmcompressor gptq", "level"),
        ("50 % zeros", "ours wanda", "their wanda", "theirs"),
    ]
    assert leads[0].difference.value == pytest.approx(sum((-0.1, -0.09, -0.11, -0.1)) / 4)
    lines = leads_section(made, records)
    row = next(line for line in lines if line.startswith("| int4 g64 "))
    assert row.endswith(" | 0.1425 | 2 s | int4 g64 llmcompressor gptq | 0.2425 | 2 s | -0.1000 ± 0.0041 | ours |")
    assert leads_section(made.model_copy(update={"reader": "compress"}), records) == []


def test_jobs_are_told_apart_by_grid_inputs_and_zeros() -> None:
    rows = [row for row in read_table(TABLES / "peers.yaml").rows if not row.is_original]
    sides: dict[str, set[bool]] = {}
    for row in rows:
        sides.setdefault(job_of(row), set()).add(row.tool is not None)
    wanted = {"int4 g64", "int3 g64", "nvfp4", "mxfp4", "int8 inputs int8-token", "50 % zeros"}
    assert set(sides) == wanted
    assert all(both == {True, False} for both in sides.values()), "every job is done by both sides"
    assert {row.tool for row in rows if row.tool} <= set(TOOLS)


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def call(command: list[str], log: Path, name: str) -> None:
        calls.append(command)
        if command[1:3] == ["-m", "venv"]:
            python = Path(command[3]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.write_text("")

    monkeypatch.setattr(environments, "_call", call)
    monkeypatch.setattr(environments, "TOOLS", {"tool": Tool("tool==1.*", "https://example.org")})
    said: list[str] = []
    python = make_environment("tool", tmp_path, said.append)
    assert python == tmp_path / "tool" / "bin" / "python"
    assert [command[1:3] for command in calls] == [["-m", "venv"], ["-m", "pip"]]
    assert calls[1][0] == str(python)
    assert calls[1][-1] == "tool==1.*"
    make_environment("tool", tmp_path, said.append)
    assert len(calls) == 2
    assert len(said) == 1
    (python.parents[1] / environments.MARK).unlink()  # as if it had been stopped half-way
    make_environment("tool", tmp_path, said.append)
    assert len(calls) == 4
    monkeypatch.setattr(environments, "TOOLS", {"tool": Tool("tool==2.*", "https://example.org")})
    make_environment("tool", tmp_path, said.append)
    assert len(calls) == 6


def test_an_environment_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments.sys, "executable", str(tmp_path / "none"))
    with pytest.raises(SetupError, match="none: No such file"):
        make_environment("llmcompressor", tmp_path / "envs", lambda text: None)
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho ERROR: No matching distribution >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(environments.sys, "executable", str(script))
    with pytest.raises(SetupError, match="llmcompressor: no environment: ERROR: No matching distribution") as caught:
        make_environment("llmcompressor", tmp_path / "envs", lambda text: None)
    assert "--env llmcompressor=PYTHON" in str(caught.value.hint)


def test_the_command_writes_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "--output", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "peers.json").read_text())
    peers = read_table(TABLES / "peers.yaml")
    assert [row["name"] for row in data["rows"]] == [row.name for row in peers.rows]
    for row in data["rows"]:
        assert ("error" in row) != ("scores" in row)
    assert (tmp_path / "peers.md").read_text() == (TABLES / "peers.md").read_text()
    assert main(["tools", "--envs", str(tmp_path)]) == 0
    assert "llmcompressor: llmcompressor==" in capsys.readouterr().out
    assert main(["run", "--tools", "magic"]) == 2
    assert "--tools magic: no such tool" in capsys.readouterr().err


def test_zeros_a_pattern_leaves() -> None:
    assert llmcompressor_row.pattern_share("2:4") == 0.5
    assert llmcompressor_row.pattern_share("1:4") == 0.75
    with pytest.raises(SystemExit, match="--sparsity or --pattern"):
        llmcompressor_row.pattern_share("0:0")


def test_size_and_zeros_of_a_pruned_model() -> None:
    model = tiny_llama()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                module.weight[::2] = 0
    found = llmcompressor_row.dense_size(model)
    assert found["sparsity"] == pytest.approx(0.5)
    assert found["bits_per_weight"] == 32
    assert found["weight_bytes"] == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()) * 4


def test_rounded_inputs_are_seen_and_4_bit_floats_refused(tmp_path: Path) -> None:
    def written(inputs: dict[str, Any] | None) -> Path:
        group = {"weights": {"num_bits": 8, "type": "int"}, "input_activations": inputs}
        quantization = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
        return tmp_path

    assert stock_score.input_schemes(written(None)) == []
    eight = {"num_bits": 8, "type": "int", "dynamic": True}
    assert stock_score.input_schemes(written(eight)) == [eight]
    with pytest.raises(SystemExit, match="in bfloat16 alone"):
        stock_score.load(str(written({"num_bits": 4, "type": "float"})))
    (tmp_path / "config.json").write_text("{}")
    assert stock_score.input_schemes(tmp_path) == []


def test_weights_of_the_tools_layers_are_put_where_they_belong() -> None:
    class Packed(torch.nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.stored = weight

        def dequantize_weight(self) -> torch.Tensor:
            return self.stored.T * 2  # [in, out]

    dense, saved = tiny_llama(), tiny_llama()
    before = dense.model.layers[1].mlp.up_proj.weight.clone()
    saved.model.layers[1].mlp.up_proj = Packed(saved.model.layers[1].mlp.up_proj.weight.detach())
    assert gptqmodel_row.fill(dense, saved) == 1
    assert torch.equal(dense.model.layers[1].mlp.up_proj.weight, 2 * before)
    assert torch.equal(dense.model.layers[0].mlp.up_proj.weight, saved.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(SystemExit, match="no quantized layer"):
        gptqmodel_row.fill(dense, dense)
