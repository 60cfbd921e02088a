"""Reading compressed-tensors configs: which module has which format, and what is refused."""

import copy
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.utils.match import is_match
from torch import nn

from compressor.errors import CheckpointError, RecipeError, UnsupportedError
from compressor.formats import FIXED_GROUP, GroupSize, get_format, parse_group_size
from compressor.formats.base import group_setting
from compressor.formats.ints import IntFormat
from compressor.formats.schemes import Schemes, format_from_scheme

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64, "dynamic": False}
CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "format": "pack-quantized", "weights": INT4}},
    "ignore": ["lm_head"],
}


def config(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(CONFIG), **changes}


@pytest.mark.parametrize("group_size", [32, 64, None, "tensor"])
@pytest.mark.parametrize(
    "name",
    [
        *("int2", "int3", "int4", "int8", "int2-asym", "int4-asym", "int8-asym"),
        *("nvfp4", "mxfp4", "fp8", "fp8-tensor", "fp8-block", "mxfp8"),
    ],
)
def test_a_scheme_leads_back_to_its_format(name: str, group_size: GroupSize) -> None:
    fmt = get_format(name, group_size, torch.bfloat16)
    scheme, container = fmt.scheme(), fmt.container
    assert scheme is not None
    assert container is not None
    assert format_from_scheme(scheme, container, torch.bfloat16) == fmt
    # What that library writes back has every key spelled out.
    spelled = QuantizationArgs(**scheme).model_dump(mode="json")
    assert format_from_scheme(spelled, container, torch.bfloat16) == fmt


@pytest.mark.parametrize("text", ["32", "channel", "tensor", None])
@pytest.mark.parametrize("name", ["int3", "int8-asym"])
def test_a_group_size_builds_the_format_that_has_it(name: str, text: str | None) -> None:
    setting = parse_group_size(name, text)
    fmt = get_format(name, setting, torch.float16)
    assert setting == {"32": 32, "channel": None, "tensor": "tensor", None: 64}[text]
    assert (fmt.name, group_setting(fmt)) == (name, setting)
    assert len(fmt.layout((8, 64))["weight_scale"].shape) == (1 if text == "tensor" else 2)


@pytest.mark.parametrize("name", FIXED_GROUP)
def test_formats_with_one_group_size_refuse_others(name: str) -> None:
    fixed = {"fp8-tensor": "tensor", **dict.fromkeys(("fp4", "fp6", "fp8-searched", "fp8"), "channel")}
    allowed = fixed.get(name, str(FIXED_GROUP[name]))
    for text in ("7", "channel", "tensor", "128", "32", "16"):
        if text == allowed:
            assert parse_group_size(name, text) == FIXED_GROUP[name]
        else:
            with pytest.raises(RecipeError, match=f"{name} has .*, not --group-size {text}"):
                parse_group_size(name, text)


@pytest.mark.parametrize("name", ["fp4", "fp6", "fp8-searched"])
def test_native_formats_have_no_scheme(name: str) -> None:
    fmt = get_format(name, None, torch.bfloat16)
    assert fmt.scheme() is None
    assert fmt.container is None


FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}


def test_left_out_keys_have_the_library_defaults() -> None:
    assert format_from_scheme({"group_size": -1}, "pack-quantized", torch.float32) == IntFormat(8, None, torch.float32)
    assert format_from_scheme({}, "pack-quantized", torch.float32) == IntFormat(8, None, torch.float32, per_tensor=True)
    short = {"num_bits": 4, "group_size": 32}
    assert format_from_scheme(short, "pack-quantized", torch.float32) == IntFormat(4, 32, torch.float32)


@pytest.mark.parametrize(
    ("changes", "container", "reason"),
    [
        ({"symmetric": False, "zp_dtype": "torch.uint8"}, "pack-quantized", "zp_dtype"),
        ({**FP8, "symmetric": False}, "float-quantized", "symmetric"),
        ({"actorder": "group"}, "pack-quantized", "actorder"),
        ({"dynamic": True}, "pack-quantized", "dynamic"),
        ({"strategy": "token", "group_size": None}, "pack-quantized", "strategy"),
        ({"num_bits": 1}, "pack-quantized", "num_bits"),
        ({"type": "float"}, "pack-quantized", "type"),
        ({"type": "float", "strategy": "tensor_group", "group_size": 32}, "nvfp4-pack-quantized", "group_size"),
        ({"type": "float", "group_size": 16}, "mxfp4-pack-quantized", "group_size"),
        ({}, "float-quantized", "float-quantized"),
        ({}, "mxfp8-quantized", "mxfp8-quantized"),
        ({**FP8, "num_bits": 4}, "float-quantized", "num_bits"),
        ({**FP8, "strategy": "group", "group_size": 128}, "float-quantized", "strategy"),
        ({**FP8, "strategy": "block", "block_structure": [64, 128]}, "float-quantized", r"\[64, 128\]"),
        ({**FP8, "strategy": "block", "block_structure": None}, "float-quantized", "block_structure"),
        ({**FP8, "strategy": "group", "group_size": 16}, "mxfp8-quantized", "group_size"),
        ({**FP8, "num_bits": 4, "strategy": "group", "group_size": 32}, "mxfp8-quantized", "num_bits"),
    ],
)
def test_what_is_not_ours_is_refused_by_name(changes: dict[str, Any], container: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        format_from_scheme({**INT4, **changes}, container, torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"quant_method": "gptq"}, CheckpointError, "gptq"),
        ({"quantization_status": "frozen"}, CheckpointError, "frozen"),
        ({"quantization_status": None}, CheckpointError, "None"),
        ({"config_groups": {}}, CheckpointError, "config_groups"),
        ({"config_groups": {"g": {"targets": ["Linear"]}}}, CheckpointError, "g: has no weights"),
        ({"ignore": "lm_head"}, CheckpointError, "ignore"),
        ({"ignore": ["re:("]}, CheckpointError, "ignore"),
        ({"kv_cache_scheme": {"num_bits": 8}}, UnsupportedError, "kv_cache_scheme"),
        ({"transform_config": {"config_groups": {"u": {}}}}, UnsupportedError, "transform_config"),
        ({"sparsity_config": {"format": "sparse-bitmask"}}, UnsupportedError, "sparsity_config"),
    ],
)
def test_configs_that_cannot_be_trusted_or_run(changes: dict[str, Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        Schemes.parse(config(**changes))


def test_activation_quantization_is_refused() -> None:
    group = {**CONFIG["config_groups"]["group_0"], "input_activations": {"num_bits": 8, "dynamic": True}}
    with pytest.raises(UnsupportedError, match="input_activations"):
        Schemes.parse(config(config_groups={"group_0": group}))


def test_the_group_format_defaults_to_the_top_level_one() -> None:
    group = {"targets": ["Linear"], "weights": INT4}
    (parsed,) = Schemes.parse(config(config_groups={"g": group})).groups
    assert parsed.container == "pack-quantized"
    with pytest.raises(CheckpointError, match="mixed-precision"):
        Schemes.parse(config(config_groups={"g": group}, format="mixed-precision"))


def test_exact_names_beat_patterns_and_patterns_beat_classes() -> None:
    groups = {
        name: {"targets": [target], "format": "pack-quantized", "weights": {**INT4, "num_bits": bits}}
        for name, target, bits in (
            ("by_class", "Linear", 8),
            ("by_pattern", r"re:.*down_proj$", 3),
            ("by_name", "model.layers.0.mlp.down_proj", 2),
        )
    }
    schemes = Schemes.parse(config(config_groups=groups, ignore=["re:.*gate$", "Embedding"]))

    def chosen(module: str, *classes: str) -> str | None:
        group = schemes.group_of(module, classes or ("Linear", "Module"))
        return group.name if group else None

    assert chosen("model.layers.0.mlp.down_proj") == "by_name"
    assert chosen("model.layers.1.mlp.down_proj") == "by_pattern"
    assert chosen("model.layers.1.mlp.up_proj") == "by_class"
    assert chosen("model.layers.1.mlp.gate") is None
    assert chosen("model.embed_tokens", "Embedding", "Linear") is None
    assert chosen("model.norm", "LlamaRMSNorm") is None


@pytest.mark.parametrize(
    "target", ["Linear", "Module", "Conv2d", "a.b", "a", "re:a", "re:b", r"re:.*b$", r"re:.*\.b", "re:a.b.c", "re:"]
)
def test_matching_agrees_with_the_library(target: str) -> None:
    group = {"targets": [target], "format": "pack-quantized", "weights": INT4}
    schemes = Schemes.parse(config(config_groups={"g": group}, ignore=[]))
    ignoring = Schemes.parse(config(ignore=[target]))
    module = nn.Linear(1, 1)
    classes = [cls.__name__ for cls in type(module).__mro__]
    for name in ("a", "a.b", "a.bc", "x.a.b"):
        assert (schemes.group_of(name, classes) is not None) == is_match(name, module, target), name
        assert (ignoring.group_of(name, classes) is not None) == is_match(name, module, "Linear", target), name
