"""Plans from headers alone: an action or a reason for every tensor, and every refusal before any work."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from compressor.api import make_overrides
from compressor.checkpoint.blocks import BlockSequence
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import Source
from compressor.errors import CompressorError, RecipeError, UnsupportedError
from compressor.plan import OUTSIDE, Kind, Operand, Plan
from compressor.planner import make_plan
from compressor.recipe import Recipe
from compressor.testing import models


def plan_of(model: PreTrainedModel, path: Path, **recipe: object) -> Plan:
    model.save_pretrained(path)
    source, skeleton = Source.open(path), Skeleton.build(path)
    blocks = BlockSequence.find(skeleton.model)
    skip, formats = recipe.pop("skip", ()), recipe.pop("set", {})
    wanted = {"method": "rtn", "overrides": make_overrides(formats, skip), **recipe}  # type: ignore[arg-type]
    made = make_plan(Recipe(model=str(path), **wanted), source, skeleton, blocks)  # type: ignore[arg-type]
    assert {layer.ref.name for layer in made.layers} == set(source.tensors)  # nothing left out
    for layer in made.layers:
        assert (layer.format is None) == bool(layer.kept_because)
        assert layer.bytes_before == source.tensors[layer.ref.name].nbytes
    assert all(p.is_meta for p in skeleton.model.parameters())  # planning reads no weight
    return made


def by_kind(plan: Plan) -> dict[Kind, list[str]]:
    out: dict[Kind, list[str]] = {}
    for layer in plan.layers:
        out.setdefault(layer.ref.kind, []).append(layer.ref.name)
    return out


def test_decoder(tmp_path: Path) -> None:
    plan = plan_of(models.tiny_llama(tied=False, kv_heads=2, layers=3), tmp_path, format="int4")
    assert len(plan.blocks) == 3
    assert len(plan.compressed) == 3 * 7
    head = next(layer for layer in plan.layers if layer.ref.name == "lm_head.weight")
    assert head.ref.kind is Kind.LINEAR
    assert head.ref.block == OUTSIDE
    assert "output head" in (head.kept_because or "")
    refs = {layer.ref.name: layer.ref for layer in plan.layers}
    q, k, v = (refs[f"model.layers.1.self_attn.{n}_proj.weight"] for n in "qkv")
    assert q.fed_by == k.fed_by == v.fed_by
    assert q.fused_with == k.fused_with == v.fused_with
    o, gate, up = (refs[f"model.layers.1.{n}.weight"] for n in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"))
    assert o.fused_with == o.name
    assert gate.fused_with == up.fused_with != q.fused_with
    assert refs["model.layers.0.mlp.gate_proj.weight"].fused_with != gate.fused_with
    sites = {(site.module, site.operand) for site in plan.sites}
    assert sites == {(f"model.layers.{i}.self_attn", operand) for i in range(3) for operand in Operand}


def test_encoder(tmp_path: Path) -> None:
    plan = plan_of(models.tiny_bert(), tmp_path, format="int8")
    assert len(plan.blocks) == 2
    assert len(plan.compressed) == 2 * 6
    assert len({layer.ref.fused_with for layer in plan.compressed if ".self." in layer.ref.name}) == 2
    assert {site.block for site in plan.sites} == {0, 1}


def test_mixture_of_experts(tmp_path: Path) -> None:
    plan = plan_of(models.tiny_mixtral(), tmp_path, format="int4")
    kinds = by_kind(plan)
    assert len(kinds[Kind.EXPERT]) == 2 * 4 * 3
    assert len(kinds[Kind.ROUTER]) == 2
    compressed = {layer.ref.name for layer in plan.compressed}
    assert set(kinds[Kind.EXPERT]) <= compressed
    assert not set(kinds[Kind.ROUTER]) & compressed
    refs = {layer.ref.name: layer.ref for layer in plan.layers}
    w1, w2, w3 = (refs[f"model.layers.0.block_sparse_moe.experts.3.{n}.weight"] for n in ("w1", "w2", "w3"))
    assert w1.param == w3.param == "model.layers.0.mlp.experts.gate_up_proj"
    assert (w1.where.expert, w1.where.rows, w3.where.rows) == (3, (0, 128), (128, 256))
    assert w1.fed_by == w3.fed_by == "model.layers.0.mlp.experts#3.in"
    assert w2.fed_by == "model.layers.0.mlp.experts#3.mid"
    assert w1.fused_with == w3.fused_with != w2.fused_with


def test_part_of_an_expert_stack_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="one scheme for all experts"):
        plan_of(models.tiny_mixtral(), tmp_path, format="int4", skip=("*.w2",))
    with pytest.raises(RecipeError, match="one scheme for all experts"):
        plan_of(models.tiny_mixtral(), tmp_path, format="int4", set={"model.layers.0.*.experts.*.w2": "int8"})
    with pytest.raises(RecipeError, match="one scheme for all experts"):
        plan_of(models.tiny_mixtral(), tmp_path, format="int4", skip=("model.layers.0.*.experts.*",))
    plan = plan_of(models.tiny_mixtral(), tmp_path, format="int4", set={"model.layers.0.*.experts.*": "int8"})
    assert any("compressor.load alone reads" in note for note in plan.notes)
    plan = plan_of(models.tiny_mixtral(), tmp_path, format="int4", skip=("*.experts.*",))
    assert len(plan.compressed) == 2 * 4


def test_experts_that_stock_readers_get_wrong_are_flagged(tmp_path: Path) -> None:
    assert "NVFP4 experts" in plan_of(models.tiny_mixtral(), tmp_path, format="nvfp4").notes[0]
    assert not plan_of(models.tiny_llama(), tmp_path / "dense", format="nvfp4").notes


@pytest.mark.parametrize(
    ("build", "recipe", "words"),
    [
        (models.tiny_llama, {}, "CompressedTensorsConfig(dequantize=True)"),
        (models.tiny_llama, {"group_size": "channel"}, "CompressedTensorsConfig(dequantize=True)"),
        (models.tiny_llama, {"group_size": "tensor"}, None),
        (models.tiny_llama, {"set": {"*.down_proj": "int8"}}, "raises on zero points: load this checkpoint with"),
        (models.tiny_llama, {"format": "int4", "set": {"*.down_proj": "int8-asym:tensor"}}, None),
        (models.tiny_olmoe, {}, "raises on experts with zero points"),
        (models.tiny_olmoe, {"group_size": "tensor"}, "without a word"),
        (models.tiny_olmoe, {"set": {"*.experts.*": "int4"}}, "raises on zero points: load this checkpoint with"),
    ],
)
def test_zero_points_that_stock_readers_refuse_are_flagged(
    build: Callable[[], PreTrainedModel], recipe: dict[str, object], words: str | None, tmp_path: Path
) -> None:
    notes = plan_of(build(), tmp_path, **{"format": "int4-asym", **recipe}).notes
    assert len(notes) == (words is not None)
    assert all(str(words) in note for note in notes)


def test_one_scale_per_matrix(tmp_path: Path) -> None:
    formats = {"*.down_proj": "int8-asym:tensor"}
    plan = plan_of(models.tiny_llama(), tmp_path, format="int4", group_size="tensor", set=formats)
    assert set(plan.formats) == {("int4", "tensor"), ("int8-asym", "tensor")}
    down = next(layer for layer in plan.layers if layer.ref.name.endswith("0.mlp.down_proj.weight"))
    assert down.bytes_after == down.ref.numel + 4 + 16 + 1  # codes, scale in float32, shape, zero point
    with pytest.raises(RecipeError, match=r"is int4 per channel but .* is int4 per tensor, and runtimes fuse them"):
        plan_of(models.tiny_llama(), tmp_path, format="int4", group_size="tensor", set={"*.k_proj": "int4:channel"})


def test_shared_expert_and_its_gate(tmp_path: Path) -> None:
    plan = plan_of(models.tiny_qwen2_moe(), tmp_path, format="int4")
    kinds = by_kind(plan)
    assert kinds[Kind.ROUTER] == ["model.layers.1.mlp.gate.weight", "model.layers.1.mlp.shared_expert_gate.weight"]
    assert "model.layers.1.mlp.shared_expert.up_proj.weight" in {layer.ref.name for layer in plan.compressed}


def test_convolutions_have_one_scale_per_filter_and_need_a_method_that_moves_nothing(tmp_path: Path) -> None:
    plan = plan_of(models.tiny_resnet(), tmp_path, format="int8")
    assert {(layer.ref.kind, layer.group_size) for layer in plan.compressed} == {(Kind.CONV, None)}
    with pytest.raises(UnsupportedError, match="nothing to compress") as caught:
        plan_of(models.tiny_resnet(), tmp_path, format="int8", method="awq")
    assert "awq moves factors between norms and linear layers only" in caught.value.message


@pytest.mark.parametrize(
    ("build", "expected"), [(models.tiny_llama, "nvfp4"), (models.tiny_olmoe, "mxfp4")], ids=["dense", "moe"]
)
def test_default_format_of_fp4(build: Callable[[], PreTrainedModel], expected: str, tmp_path: Path) -> None:
    assert plan_of(build(), tmp_path, method="fp4").format == expected


def test_sizes_are_exact(tmp_path: Path) -> None:
    plan = plan_of(models.tiny_llama(), tmp_path, format="int4", group_size="32")
    layer = next(layer for layer in plan.compressed if layer.ref.name.endswith("layers.0.mlp.up_proj.weight"))
    assert layer.bytes_after == 128 * 64 // 2 + 128 * (64 // 32) * 4 + 16  # codes, float32 scales, int64 shape
    assert plan.bits_per_weight == pytest.approx(8 * sum(x.bytes_after for x in plan.compressed) / sum(
        x.ref.numel for x in plan.compressed))  # fmt: skip


def test_skip(tmp_path: Path) -> None:
    plan = plan_of(models.tiny_llama(), tmp_path, format="int4", skip=("*.down_proj", "model.layers.1.*"))
    kept = {layer.ref.name: layer.kept_because for layer in plan.layers if not layer.format}
    assert kept["model.layers.0.mlp.down_proj.weight"] == "left out by --skip *.down_proj"
    assert kept["model.layers.1.self_attn.q_proj.weight"] == "left out by --skip model.layers.1.*"
    assert len(plan.compressed) == 6


def test_overrides_last_match_wins(tmp_path: Path) -> None:
    formats = {"*.mlp.*": "int8", "*.down_proj": "int8:channel", "model.layers.1.self_attn.*": "nvfp4"}
    plan = plan_of(models.tiny_llama(), tmp_path, format="int4", set=formats, skip=("model.layers.0.self_attn.*",))
    chosen = {layer.ref.module: (layer.format, layer.group_size) for layer in plan.layers if layer.ref.matrix}
    assert chosen["model.layers.0.mlp.up_proj"] == ("int8", 64)
    assert chosen["model.layers.0.mlp.down_proj"] == ("int8", None)
    assert chosen["model.layers.1.self_attn.o_proj"] == ("nvfp4", 16)
    assert chosen["model.layers.0.self_attn.o_proj"] == (None, None)
    assert set(plan.formats) == {("int8", 64), ("int8", None), ("nvfp4", 16)}


@pytest.mark.parametrize(
    ("recipe", "kind", "words"),
    [
        ({"method": "fpq4"}, RecipeError, "unknown method 'fpq4'"),
        ({"format": "int9"}, RecipeError, "unknown format 'int9'"),
        ({"method": "fp4", "format": "int4"}, RecipeError, "method fp4 searches 4-bit float formats"),
        ({"method": "fp4", "options": {"sweep": 3}}, RecipeError, "unknown option of fp4 'sweep'"),
        ({"method": "fp4", "options": {"sweeps": -1}}, RecipeError, "option sweeps of fp4"),
        ({"format": "int4", "group_size": "48"}, RecipeError, "128 inputs do not divide into groups of 48"),
        ({"format": "int4", "group_size": "x"}, RecipeError, "--group-size 'x'"),
        ({"format": "nvfp4", "group_size": "64"}, RecipeError, "nvfp4 has groups of 16"),
        ({"format": "int4", "skip": ("*.dwn_proj",)}, RecipeError, "matches no tensor"),
        ({"format": "int4", "skip": ("*.q_proj",)}, RecipeError, "runtimes fuse them"),
        ({"format": "int4", "set": {"*.gate_proj": "int8"}}, RecipeError, "runtimes fuse them"),
        ({"format": "int4", "set": {"*.down_proj": "int9"}}, RecipeError, "unknown format 'int9'"),
        ({"format": "int4", "set": {"*.norm": "int8"}}, RecipeError, "matches model.norm.weight, which stays dense"),
        ({"format": "int4", "set": {"*.dwn_proj": "int8"}}, RecipeError, "--set '*.dwn_proj' matches no tensor"),
        ({"format": "int4", "set": {"*.down_proj": "int8:48"}}, RecipeError, "do not divide into groups of 48"),
        ({"method": "fp4", "set": {"*.down_proj": "int8"}}, RecipeError, "method fp4 searches 4-bit float formats"),
        ({"format": "int4", "skip": ("*",)}, UnsupportedError, "nothing to compress"),
    ],
)
def test_refusals(recipe: dict[str, object], kind: type[CompressorError], words: str, tmp_path: Path) -> None:
    with pytest.raises(kind) as caught:
        plan_of(models.tiny_llama(), tmp_path, **recipe)
    assert words in caught.value.message
    assert "\n" not in caught.value.message + caught.value.hint


def test_width_that_no_flag_chose_is_the_checkpoints_fault(tmp_path: Path) -> None:
    model = models.tiny_llama()
    model.config.intermediate_size = 72  # no multiple of 64
    with pytest.raises(UnsupportedError, match="72 inputs do not divide into groups of 64") as caught:
        plan_of(type(model)(model.config), tmp_path, format="int4")
    assert "--group-size 8 or channel" in caught.value.hint
    assert caught.value.exit_code == 4
