"""OutlierTune where norms sit differently: before adding, after adding, and one norm for attention and MLP."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import OPTConfig, OPTForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedModel

import compressor
import compressor.verify
from compressor.check import check
from compressor.formats.activations import INPUT_FORMATS
from compressor.inputs import Quantize, apply_ops, carried
from compressor.report import RunReport
from compressor.runtime import PackedLinear
from compressor.testing import models
from compressor.testing.tools import save_checkpoint, write_text

LOUD = [3, 17, 40]
TEXT: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}


def tiny_opt(before: bool) -> PreTrainedModel:
    """A decoder with biases that normalizes before adding, or after it as OPT-350m does."""
    config = OPTConfig(
        **TEXT, num_hidden_layers=2, ffn_dim=64, word_embed_proj_dim=64, pad_token_id=2, bos_token_id=0, eos_token_id=1,
        init_std=0.2, do_layer_norm_before=before,
    )  # fmt: skip
    return models.random_model(lambda: OPTForCausalLM(config), 0)


def tiny_phi() -> PreTrainedModel:
    """A decoder whose attention and MLP read the same norm."""
    config = PhiConfig(**TEXT, num_hidden_layers=2, intermediate_size=64, initializer_range=0.2)
    return models.random_model(lambda: PhiForCausalLM(config), 0)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": models.tiny_llama,
    "opt": lambda: tiny_opt(before=True),
    "phi": tiny_phi,
    "opt-after": lambda: tiny_opt(before=False),
    "bert": models.tiny_bert,
}
AFTER = ("opt-after", "bert")
"""Those that normalize after adding."""

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1", "query", "key", "value", "intermediate.dense")


def norms(model: PreTrainedModel) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if "norm" in type(module).__name__.lower() and "." in name]


def loud_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Give norms a few loud channels, far from zero where the norm has a bias."""
    with torch.no_grad():
        for norm in norms(model):
            norm.get_parameter("weight")[LOUD] *= 8
            if "bias" in dict(norm.named_parameters()):
                norm.get_parameter("bias")[LOUD] = torch.tensor([30.0, -40, 25])
    return model


def quantize(model: PreTrainedModel, root: Path, out: str, **options: Any) -> RunReport:
    if not (root / "source").exists():
        save_checkpoint(model, root / "source")
        write_text(root / "text.txt", 1500)
    wanted = {"method": "outliertune", "data": str(root / "text.txt"), "n_samples": 8, "seq_len": 32}
    return compressor.quantize(str(root / "source"), output=root / out, **{**wanted, **options})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives a folder with a model of an architecture (`source`) and its result (`out`)."""

    @functools.cache
    def make(name: str) -> Path:
        root = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("compressor.verify.verify", compressor.verify.check)
            report = quantize(loud_norms(BUILDERS[name]()), root, "out")
        assert report.verification["ok"]
        return root

    return make


def outputs(folder: Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = compressor.load(folder)(tokens)[0]
    return found


def text_tokens(root: Path) -> Tensor:
    ids = models.tiny_tokenizer()((root / "text.txt").read_text(encoding="utf-8")[2000:2400]).input_ids
    return torch.tensor([ids[:48]])


@pytest.mark.parametrize("name", BUILDERS)
def test_layers_multiply_integers_that_static_scales_gave(name: str, made: Callable[[str], Path]) -> None:
    """Every layer behind a norm is `s (Q U^T) + b1` with codes of its input; elsewhere scales are per token."""
    root = made(name)
    loaded, tokens = compressor.load(root / "out"), text_tokens(root)
    packed = {n: m for n, m in loaded.named_modules() if isinstance(m, PackedLinear)}
    # What enters the first block of an OPT that normalizes after adding are embeddings: no norm gave them.
    no_norm = "layers.0.self_attn" if name == "opt-after" else "nothing"
    behind = {n: m for n, m in packed.items() if n.endswith(READERS) and no_norm not in n}
    others = {n: m for n, m in packed.items() if n not in behind}
    assert len(behind) == {"llama": 10, "opt-after": 5}.get(name, 8)
    ops = ["shift", "scale", "quantize"] if name in AFTER else ["quantize"]
    assert all([op.describe()["op"] for op in module.inputs] == ops for module in behind.values())
    assert all(op.describe()["format"] == "int8-token" for module in others.values() for op in module.inputs)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for module_name, module in behind.items():
        module.register_forward_hook(lambda _, args, out, at=module_name: seen.update({at: (args[0], out)}))
    with torch.no_grad():
        loaded(tokens)
    for module_name, module in behind.items():
        x, out = seen[module_name]
        *before, rounding = module.inputs
        assert isinstance(rounding, Quantize)
        assert rounding.scale is not None
        codes = (apply_ops(before, x) / rounding.scale).clamp(-128, 127).round()
        carry, bias = carried(module.inputs), module.bias
        b1 = sum((part for part in (carry, bias) if part is not None), torch.zeros(out.shape[-1]))
        product = codes.double() @ module.dequantize().double().T * rounding.scale.double() + b1
        torch.testing.assert_close(out.double(), product, rtol=1e-4, atol=1e-4)
        if name in AFTER:
            assert codes.abs().flatten(0, 1).amax(0).min() > 15, "every channel uses its range"


@pytest.mark.parametrize("name", ["opt", *AFTER])
def test_a_shift_and_static_scales_beat_scales_per_token(name: str, made: Callable[[str], Path]) -> None:
    root = made(name)
    tokens = text_tokens(root)
    expected, errors = outputs(root / "source", tokens), {}
    for label, options in (
        ("out", None),
        ("token", {"method": "rtn", "inputs": "int8-token"}),
        ("unshifted", {"options": {"shift": "none"}}),
    ):
        if options is not None:
            quantize(loud_norms(BUILDERS[name]()), root, label, **options)
        errors[label] = float((outputs(root / label, tokens) - expected).norm() / expected.norm())
    assert errors["out"] < 0.9 * errors["unshifted"], errors
    assert errors["out"] < 0.7 * errors["token"], errors
    config = json.loads((root / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"] == "compressor") == (name in AFTER)
    assert check(root / "out", quick=True).ok


def test_attention_and_mlp_behind_one_norm_share_what_planted_channels_do_not_change(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    """One shift and one scale for all that read it; section 2.7 with a norm that has a bias, and powers of two."""
    plain, loud = made("phi"), loud_norms(tiny_phi())
    source = load_file(plain / "source" / "model.safetensors")
    with torch.no_grad():
        for block in loud.model.layers:
            for parameter in block.input_layernorm.parameters():
                parameter[[5, 9]] *= 32
            for reader in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj, block.mlp.fc1):
                reader.weight[:, [5, 9]] /= 32
    quantize(loud, tmp_path, "out")
    ours, other = (load_file(root / "out" / "model.safetensors") for root in (plain, tmp_path))
    names = [key for key in ours if key.endswith(".weight") and key.removesuffix(".weight").endswith(READERS)]
    assert len(names) == 8
    for key in names:  # the first block sees the same inputs bit for bit, later ones up to float noise
        assert float((ours[key] == other[key]).float().mean()) > (0.9999 if ".0." in key else 0.99), key
        module = key.removesuffix(".weight")
        shared = ours[f"{module.rpartition('layers.')[0]}layers.{key.split('.')[2]}.mlp.fc1.input_scale"]
        assert torch.equal(ours[f"{module}.input_scale"], shared)
        assert not torch.equal(ours[f"{module}.bias"], source[f"{module}.bias"]), "it takes up the shift"


def test_shift_and_scales_in_front_of_a_layer_are_exact(made: Callable[[str], Path]) -> None:
    """Section 2.4: nothing is lost but by rounding, and weights are rounded behind the scales."""
    root, name = made("bert"), "encoder.layer.1.attention.self.query"
    module = compressor.load(root / "out").get_submodule(name)
    assert isinstance(module, PackedLinear)
    *before, rounding = module.inputs
    assert rounding.describe() == INPUT_FORMATS["int8-tensor"].describe()
    weight = load_file(root / "source" / "model.safetensors")[f"{name}.weight"]
    x = 20 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    scaled = weight / before[-1].tensors()["input_factor"]
    torch.testing.assert_close(
        functional.linear(apply_ops(before, x), scaled, carried(module.inputs)), x @ weight.T, rtol=1e-4, atol=1e-3
    )
    steps = module.packed.tensors["weight_scale"].float()
    assert ((module.dequantize() - scaled).abs() <= 0.501 * steps).all()
