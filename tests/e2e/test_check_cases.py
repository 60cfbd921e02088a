"""Every way to break a checkpoint gives exactly the finding it should, and no other."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compressor.verify
from compressor.check import CHECKS, check
from compressor.testing.broken import INDEX, SHARD, Broken, Maker, copy_of, problems, text

Q = "model.layers.0.self_attn.q_proj"
O = "model.layers.0.self_attn.o_proj"  # noqa: E741 - not fused with anything
EXPERT = "model.layers.1.mlp.experts.3"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maker]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.verify.verify", compressor.verify.check)
        yield Maker(tmp_path_factory.mktemp("check"))


@dataclass(frozen=True)
class Case:
    """One way to break a checkpoint.

    Attributes:
        base: Which checkpoint.
        change: How it is broken.
        check: The check that must notice; nothing else may.
        says: What the finding must say.
        severity: How bad it is.
        reader: What it is checked for.
        also: Checks that rightly notice the same thing.
    """

    base: str
    change: Callable[[Broken], object]
    check: str
    says: str
    severity: str = "error"
    reader: Any = None
    also: tuple[tuple[str, str], ...] = ()


def nothing(broken: Broken) -> None:
    """Leave it as it is."""


def set_first(value: float) -> Callable[[Tensor], object]:
    return lambda tensor: tensor.view(-1)[:1].copy_(torch.tensor([value]).to(tensor.dtype))


def drop_expert(broken: Broken, leaf: str) -> None:
    module = f"{EXPERT}.{leaf}"
    broken.tensors(lambda t: [t.pop(name) for name in [*t] if name.startswith(f"{module}.")])
    broken.forget()


def add_expert(broken: Broken) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{EXPERT}.")]:
            tensors[name.replace(".experts.3.", ".experts.9.")] = tensors[name].clone()

    broken.tensors(change)


def dense_expert(broken: Broken) -> None:
    broken.unpack(f"{EXPERT}.down_proj")
    broken.section(lambda s: s["ignore"].append(f"{EXPERT}.down_proj"))


def unpack_ignored(broken: Broken, module: str) -> None:
    broken.unpack(module)
    broken.section(lambda s: s["ignore"].append(module))


def duplicate(broken: Broken) -> None:
    broken.shard()
    first, second = load_file(broken.folder / "a.safetensors"), load_file(broken.folder / "b.safetensors")
    name = next(iter(first))
    save_file({**second, name: first[name]}, broken.folder / "b.safetensors", metadata={"format": "pt"})
    content = broken.json(INDEX)
    content["metadata"]["total_size"] += first[name].nbytes
    broken.write(INDEX, content)


def truncate(broken: Broken) -> None:
    data = (broken.folder / SHARD).read_bytes()
    (broken.folder / SHARD).write_bytes(data[:-100])


CASES: dict[str, Case] = {
    # config.json
    "status-missing": Case(
        "int4", lambda b: b.section(lambda s: s.pop("quantization_status")), "config.status", "missing"
    ),
    "status-frozen": Case(
        "int4", lambda b: b.section(lambda s: s.update(quantization_status="frozen")), "config.status", "'frozen'"
    ),
    "extra-in-weights": Case(
        "int4", lambda b: b.group(lambda g: g["weights"].update(method="rtn")), "config.schema", "weights.method"
    ),
    "extra-in-group": Case("int4", lambda b: b.group(lambda g: g.update(note="x")), "config.schema", "group_0.note"),
    "strategy-unknown": Case(
        "int4", lambda b: b.group(lambda g: g["weights"].update(strategy="rows")), "config.schema", "rows"
    ),
    "no-groups": Case(
        "int4",
        lambda b: b.section(lambda s: s.update(config_groups={})),
        "config.schema",
        "missing or empty",
        also=(("tensors.assigned", "error"),),
    ),
    "format-not-in-group": Case(
        "int4", lambda b: b.group(lambda g: g.pop("format")), "config.format", "is missing", "warning"
    ),
    "format-not-at-top": Case("int4", lambda b: b.section(lambda s: s.pop("format")), "config.format", "is missing"),
    "format-nowhere": Case(
        "int4",
        lambda b: (b.section(lambda s: s.pop("format")), b.group(lambda g: g.pop("format"))),
        "config.format",
        "each group must name its own",
    ),
    "format-other-at-top": Case(
        "int4", lambda b: b.section(lambda s: s.update(format="int-quantized")), "config.format", "int-quantized"
    ),
    "format-removed": Case(
        "int4", lambda b: b.group(lambda g: g.update(format="marlin-24")), "config.format", "nothing reads"
    ),
    "format-mixed-in-group": Case(
        "int4", lambda b: b.group(lambda g: g.update(format="mixed-precision")), "config.schema", "mixed-precision"
    ),
    "format-unknown": Case(
        "int4", lambda b: b.group(lambda g: g.update(format="tiny")), "config.schema", "group_0.format"
    ),
    "mixed-not-said": Case(
        "mixed", lambda b: b.section(lambda s: s.update(format="pack-quantized")), "config.format", "mixed-precision"
    ),
    "bad-pattern": Case(
        "int4", lambda b: b.section(lambda s: s["ignore"].append("re:*head")), "config.targets", "re:*head"
    ),
    "idle-ignore": Case(
        "int4",
        lambda b: b.section(lambda s: s["ignore"].append("re:.*router$")),
        "config.targets",
        "1 of 2 entries match no module",
        "warning",
    ),
    "class-beside-names": Case(
        "mixed",
        lambda b: b.group(lambda g: g["targets"].append("Linear")),
        "config.targets",
        "readers differ",
        "warning",
    ),
    "sparsity": Case(
        "int4", lambda b: b.section(lambda s: s.update(sparsity_config={"format": "marlin-24"})), "config.special", "2"
    ),
    "section-lost": Case("int4", lambda b: b.config(lambda c: c.pop("quantization_config")), "config.kind", "random"),
    "native-type": Case(
        "native", lambda b: b.config(lambda c: c.update(model_type="llama")), "config.schema", "random weights"
    ),
    "no-such-model": Case(
        "int4", lambda b: b.config(lambda c: c.update(architectures=["NoSuch"])), "config.model", "NoSuch"
    ),
    # tensors
    "missing": Case(
        "int4",
        lambda b: b.drop("model.norm.weight"),
        "tensors.names",
        "is missing",
        also=(("tensors.report", "error"),),
    ),
    "unexpected": Case("int4", lambda b: b.put("model.norm.bias", torch.zeros(64)), "tensors.names", "no place"),
    "norm-shape": Case("int4", lambda b: b.put("model.norm.weight", torch.ones(65)), "tensors.names", "[65]"),
    "scale-missing": Case(
        "int4", lambda b: b.drop(f"{Q}.weight_scale"), "tensors.layout", f"{Q}.weight_scale: is missing"
    ),
    "codes-missing": Case(
        "int4", lambda b: b.drop(f"{Q}.weight_packed"), "tensors.layout", "weight_packed: is missing"
    ),
    "scale-shape": Case(
        "int4", lambda b: b.put(f"{Q}.weight_scale", torch.ones(64, 1).bfloat16()), "tensors.layout", "[64, 1]"
    ),
    "scale-dtype": Case(
        "mxfp4", lambda b: b.put(f"{Q}.weight_scale", torch.ones(64, 2)), "tensors.layout", "is F32 [64, 2]"
    ),
    "codes-dtype": Case(
        "nvfp4", lambda b: b.put(f"{Q}.weight_packed", torch.ones(64, 32, dtype=torch.int8)), "tensors.layout", "I8"
    ),
    "shape-tensor": Case(
        "int4", lambda b: b.put(f"{Q}.weight_shape", torch.tensor([64, 65])), "tensors.layout", "(64, 65)"
    ),
    "extra-suffix": Case(
        "int4", lambda b: b.put(f"{Q}.weight_global_scale", torch.ones(1)), "tensors.layout", "is no tensor of int4"
    ),
    "bits": Case(
        "int4",
        lambda b: b.group(lambda g: g["weights"].update(num_bits=8)),
        "tensors.layout",
        "int8",
        also=(("tensors.report", "error"),),
    ),
    "group-size": Case(
        "int4", lambda b: b.group(lambda g: g["weights"].update(group_size=48)), "tensors.groups", "64 inputs do not"
    ),
    "dense-beside": Case(
        "int4", lambda b: b.put(f"{Q}.weight", torch.ones(64, 64).bfloat16()), "tensors.dense", "beside weight_packed"
    ),
    "zero-point": Case(
        "int4",
        lambda b: b.put(f"{Q}.weight_zero_point", torch.ones(8, 2, dtype=torch.int32)),
        "tensors.zero-points",
        "is symmetric",
    ),
    "quantized-but-ignored": Case(
        "int4", lambda b: b.section(lambda s: s["ignore"].append(O)), "tensors.assigned", "the ignore list names it"
    ),
    "quantized-untargeted": Case(
        "int4",
        lambda b: b.group(lambda g: g.update(targets=["re:.*self_attn.*", "re:.*(gate|up)_proj"])),
        "tensors.assigned",
        "no config group takes it",
    ),
    "dense-but-targeted": Case("int4", lambda b: b.unpack(O), "tensors.assigned", "is stored dense"),
    "native-not-listed": Case(
        "native", lambda b: b.section(lambda s: s["modules"].pop(O)), "tensors.assigned", f"{O}: is stored quantized"
    ),
    "native-not-stored": Case(
        "native", lambda b: b.section(lambda s: s["modules"].update({"model.x": 0})), "tensors.assigned", "model.x"
    ),
    "kv-missing": Case("kv", lambda b: b.drop("model.layers.1.self_attn.v_scale"), "tensors.kv-cache", "is missing"),
    "kv-module-missing": Case(
        "kv",
        lambda b: b.drop("model.layers.1.self_attn.v_scale", "model.layers.1.self_attn.k_scale"),
        "tensors.kv-cache",
        "layers.1.self_attn.k_scale: is missing",
    ),
    "kv-zero": Case(
        "kv", lambda b: b.edit("model.layers.1.self_attn.v_scale", set_first(0)), "tensors.kv-cache", "positive"
    ),
    "report-differs": Case(
        "int4",
        lambda b: b.report(lambda r: [row.update(action="int8") for row in r["rows"] if row["action"] != "kept"]),
        "tensors.report",
        "written as int8",
    ),
    # values
    "scale-nan": Case(
        "int4", lambda b: b.edit(f"{Q}.weight_scale", set_first(float("nan"))), "values.scales", "1 NaN or Inf of 128"
    ),
    "scale-inf": Case(
        "int4", lambda b: b.edit(f"{Q}.weight_scale", set_first(float("inf"))), "values.scales", "1 NaN or Inf"
    ),
    "scale-zero": Case("int4", lambda b: b.edit(f"{Q}.weight_scale", set_first(0)), "values.scales", "1 zero"),
    "scale-negative": Case(
        "int4-asym",
        lambda b: b.edit(f"{Q}.weight_scale", set_first(-1)),
        "values.scales",
        "1 negative",
        also=(("readers.transformers", "warning"),),
    ),
    "fp8-scale-negative": Case(
        "nvfp4", lambda b: b.edit(f"{Q}.weight_scale", set_first(-1)), "values.scales", "1 negative"
    ),
    "fp8-scale-nan": Case(
        "nvfp4", lambda b: b.edit(f"{Q}.weight_scale", set_first(float("nan"))), "values.scales", "1 NaN or Inf of 256"
    ),
    "fp8-scale-zero": Case(
        "nvfp4", lambda b: b.edit(f"{Q}.weight_scale", set_first(0)), "values.scales", "1 zero of 256"
    ),
    "global-scale-zero": Case(
        "nvfp4", lambda b: b.edit(f"{O}.weight_global_scale", set_first(0)), "values.scales", "1 zero of 1"
    ),
    "e8m0-nan": Case("mxfp4", lambda b: b.edit(f"{Q}.weight_scale", set_first(255)), "values.scales", "1 NaN"),
    "native-scale-nan": Case(
        "native",
        lambda b: b.edit(f"{Q}.weight_scale", set_first(float("nan"))),
        "values.scales",
        "1 NaN",
        also=(("values.codes", "error"),),
    ),
    "fp8-code-nan": Case(
        "fp8", lambda b: b.edit(f"{Q}.weight", set_first(float("nan"))), "values.codes", "1 codes mean NaN"
    ),
    "mxfp8-code-nan": Case(
        "mxfp8", lambda b: b.edit(f"{Q}.weight", set_first(float("nan"))), "values.codes", "1 codes mean NaN"
    ),
    "padding": Case(
        "int3-ragged",
        lambda b: b.edit(f"{Q}.weight_packed", lambda t: t[:, -1].fill_(-1)),
        "values.codes",
        "80 rows have bits set",
        "warning",
    ),
    "dense-nan": Case(
        "int4", lambda b: b.edit("model.norm.weight", set_first(float("nan"))), "values.finite", "1 of 64"
    ),
    "zero-int": Case(
        "int4", lambda b: b.edit(f"{Q}.weight_packed", lambda t: t.fill_(-2004318072)), "values.zero", f"{Q}: every"
    ),
    "zero-fp4": Case(
        "nvfp4", lambda b: b.edit(f"{Q}.weight_packed", lambda t: t.fill_(0x08)), "values.zero", f"{Q}: every"
    ),
    "zero-fp8": Case("fp8", lambda b: b.edit(f"{Q}.weight", lambda t: t.fill_(0)), "values.zero", f"{Q}: every"),
    "zero-native": Case(
        "native", lambda b: b.edit(f"{Q}.weight_packed", lambda t: t.fill_(0)), "values.zero", f"{Q}: every"
    ),
    "zero-expert": Case(
        "moe", lambda b: b.edit(f"{EXPERT}.up_proj.weight_packed", lambda t: t.fill_(0)), "values.zero", EXPERT
    ),
    "zero-dense-expert": Case(
        "dense-moe",
        lambda b: b.edit(f"{EXPERT}.up_proj.weight", lambda t: t.fill_(0)),
        "values.zero",
        EXPERT,
        "warning",
    ),
    # layers that belong together
    "tied-targeted": Case("int4", lambda b: b.section(lambda s: s.update(ignore=[])), "layers.tied", "loading fails"),
    "router-targeted": Case(
        "moe",
        lambda b: b.section(lambda s: s.update(ignore=[n for n in s["ignore"] if not n.endswith("0.mlp.gate")])),
        "layers.routers",
        "is a router",
        "warning",
    ),
    "fused-mixed": Case("int4", lambda b: unpack_ignored(b, Q), "layers.fused", "dense", "warning"),
    "fused-mixed-vllm": Case(
        "int4",
        lambda b: unpack_ignored(b, Q),
        "layers.fused",
        "vLLM",
        reader="vllm",
        also=(("readers.vllm", "warning"),),
    ),
    "global-scales": Case(
        "nvfp4",
        lambda b: b.edit(f"{Q}.weight_global_scale", lambda t: t.mul_(2)),
        "layers.global-scales",
        "differs",
        "warning",
    ),
    "global-scales-vllm": Case(
        "nvfp4",
        lambda b: b.edit(f"{Q}.weight_global_scale", lambda t: t.mul_(2)),
        "layers.global-scales",
        "largest",
        reader="vllm",
    ),
    "expert-missing": Case(
        "moe", lambda b: drop_expert(b, "down_proj"), "layers.experts", "1 of 4 experts have no down_proj (3)"
    ),
    "gate-missing": Case(
        "moe", lambda b: drop_expert(b, "gate_proj"), "layers.experts", "1 of 4 experts have no gate_proj (3)"
    ),
    "expert-too-many": Case("moe", add_expert, "layers.experts", "the model has 4 experts"),
    "expert-dense": Case("moe", dense_expert, "layers.experts", "dense", also=(("readers.transformers", "warning"),)),
    "expert-stack": Case(
        "moe",
        lambda b: b.put("model.layers.0.mlp.experts.down_proj.weight_packed", torch.zeros(4, 8, 8, dtype=torch.uint8)),
        "tensors.layout",
        "one tensor [4, 8, 8] for all experts",
    ),
    "no-tokens": Case(
        "int4",
        lambda b: b.report(lambda r: [row.update(tokens=0 if row["name"].startswith(O) else 9) for row in r["rows"]]),
        "layers.calibration",
        "1 of 14 layers saw no calibration token",
        "warning",
    ),
    # readers
    "nvfp4-experts": Case("moe-nvfp4", nothing, "readers.transformers", "without a word", "warning"),
    "nvfp4-experts-for": Case("moe-nvfp4", nothing, "readers.transformers", "without a word", reader="transformers"),
    "asymmetric": Case("int4-asym", nothing, "readers.transformers", "asymmetric", "warning"),
    "asymmetric-for": Case("int4-asym", nothing, "readers.transformers", "asymmetric", reader="transformers"),
    "native-for": Case("native", nothing, "readers.transformers", "compressor_llama", reader="transformers"),
    "native-vllm": Case("native", nothing, "readers.vllm", "cannot read native", reader="vllm"),
    "vllm-bits": Case("int3-ragged", nothing, "readers.vllm", "4 and 8 bits", "warning", reader="vllm"),
    "vllm-group": Case("int4-g16", nothing, "readers.vllm", "32, 64, 128", "warning", reader="vllm"),
    "vllm-block": Case("fp8-block", nothing, "readers.vllm", "no multiple of the block width 128", reader="vllm"),
    "vllm-mxfp8": Case("mxfp8", nothing, "readers.vllm", "not known to run", "warning", reader="vllm"),
    # files
    "truncated": Case("int4", truncate, "files.shards", "not a complete safetensors file"),
    "metadata": Case("int4", lambda b: b.tensors(lambda t: None, {"by": "x"}), "files.shards", "'by'", "warning"),
    "unfinished": Case("int4", lambda b: (b.folder / ".compress-work").mkdir(), "files.shards", "did not finish"),
    "total-size": Case(
        "int4", lambda b: b.index(lambda i: i["metadata"].update(total_size=7)), "files.index", "total_size is 7"
    ),
    "map-wrong": Case(
        "int4",
        lambda b: b.index(
            lambda i: i["weight_map"].update(
                {"model.norm.weight": "a.safetensors", f"{O}.weight_scale": "b.safetensors"}
            )
        ),
        "files.index",
        "the index says",
    ),
    "map-short": Case(
        "int4", lambda b: b.index(lambda i: i["weight_map"].pop("model.norm.weight")), "files.index", "not in the index"
    ),
    "shard-missing": Case(
        "int4",
        lambda b: (b.shard(), (b.folder / "b.safetensors").unlink()),
        "files.index",
        "b.safetensors: is missing",
        also=tuple((name, "error") for name in ("tensors.names", "tensors.layout", "tensors.report")),
    ),
    "twice": Case("int4", duplicate, "files.index", "stored in 2 shards"),
    "left-over": Case(
        "int4",
        lambda b: (b.shard(), shutil.copy(b.folder / "a.safetensors", b.folder / "c.safetensors")),
        "files.index",
        "not in the index",
        "warning",
    ),
    "no-index": Case("int4", lambda b: (b.shard(), (b.folder / INDEX).unlink()), "files.index", "there are 2 shards"),
    "no-tokenizer": Case(
        "int4", lambda b: [p.unlink() for p in b.folder.glob("token*")], "files.side", "tokenizer.json", "warning"
    ),
    "no-generation": Case(
        "int4", lambda b: (b.folder / "generation_config.json").unlink(), "files.side", "defaults", "warning"
    ),
    "no-recipe": Case(
        "int4", lambda b: (b.folder / "compress_recipe.json").unlink(), "files.hashes", "is missing", "warning"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_way_to_break_one(name: str, made: Maker, tmp_path: Path) -> None:
    case = CASES[name]
    broken = copy_of(made(case.base), tmp_path / "copy")
    case.change(broken)
    report = check(broken.folder, reader=case.reader, quick=True)
    assert problems(report) == {(case.check, case.severity), *case.also}, text(report)
    assert case.says in text(report)
    assert report.ok is (case.severity != "error")


def test_mirrored_integers_are_sound(made: Maker, tmp_path: Path) -> None:
    broken = copy_of(made("int4"), tmp_path / "copy")
    broken.edit(f"{Q}.weight_scale", set_first(-1))
    assert problems(check(broken.folder, quick=True)) == problems(check(made("int4"), quick=True))
    found = text(check(broken.folder, reader="vllm", quick=True))
    assert "VLLM_MARLIN_INPUT_DTYPE=int8" in found
    assert "VLLM_MARLIN_INPUT_DTYPE" not in text(check(made("int4"), reader="vllm", quick=True))


def test_every_check_is_broken_by_some_case() -> None:
    assert {entry.id for entry in CHECKS} - {case.check for case in CASES.values()} == set()
