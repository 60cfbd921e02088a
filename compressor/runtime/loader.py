"""Loading a checkpoint, dense or compressed, with packed weights staying packed in memory.

The result computes what stock transformers computes with the decompressed weights: dequantized weights are bit-equal
in the same dtype (decoded in float32, rounded once).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from compressor.calibration import kv_cache
from compressor.checkpoint import operands
from compressor.checkpoint.building import building
from compressor.checkpoint.config import model_class, quiet, read_config
from compressor.checkpoint.cuts import apply_cuts, cuts_of
from compressor.checkpoint.skeleton import Skeleton
from compressor.checkpoint.source import Source, check_finite, read_json
from compressor.errors import CheckpointError, UnsupportedError
from compressor.formats.base import PackedTensor
from compressor.formats.native import NativeSchemes
from compressor.formats.schemes import Schemes
from compressor.inputs import InputOp
from compressor.kernels import dispatch
from compressor.kernels.gpu.kernel import TRITON
from compressor.runtime.convolution import PackedConv2d
from compressor.runtime.embedding import PackedEmbedding, tie_heads
from compressor.runtime.layout import Layout, PackedWeight, read_layout
from compressor.runtime.modules import PackedExperts, PackedLinear
from compressor.runtime.pruned import PrunedLinear, leave_out_zeros
from compressor.runtime.stored import assemble, assemble_inputs, open_checkpoint
from compressor.stacks import refuse_stack

BATCH_BYTES = 256 << 20
"""About how much is read from disk at once."""


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint folder in eval mode, without gradients.

    Args:
        path: A folder with `config.json` and safetensors: dense, or `compressed-tensors` in compressed state.
        dtype: What floating-point weights are cast to, and decoded weights are rounded to.
        device: Where the model goes.
        trust_remote_code: Run model code that comes with the checkpoint, where transformers has none of its own.

    Raises:
        CheckpointError: Unreadable, incomplete or inconsistent; missing, unexpected, mis-shaped or non-finite tensors.
        UnsupportedError: An architecture or format that cannot be run.
    """
    path, device = Path(path), torch.device(device)
    source, schemes = open_checkpoint(path)
    model = _build(path, dtype, trust_remote_code)
    _keep_float32(model, dtype)
    if isinstance(schemes, Schemes) and schemes.kv_cache:
        _quantize_caches(model, source, dtype)
    if isinstance(schemes, NativeSchemes) and schemes.attention_format:
        operands.prepare_empty(model, schemes.attention, schemes.attention_format)
    layout = read_layout(model, source, schemes, dtype)
    _fill_dense(model, source, layout, device)
    for name, weight in layout.linears.items():
        linear = model.get_submodule(name)
        packed, inputs = _read_packed(source, [weight], dtype, device)[0]
        if isinstance(linear, nn.Conv2d):
            model.set_submodule(name, PackedConv2d(packed, weight.fmt, linear, dtype))
            continue
        if isinstance(linear, nn.Embedding):
            model.set_submodule(name, PackedEmbedding(packed, weight.fmt, linear, dtype))
            continue
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, PackedLinear(packed, weight.fmt, linear.bias, inputs, dtype))
    for name, weights in layout.experts.items():
        model.set_submodule(name, _experts(model.get_submodule(name), name, source, weights, dtype, device))
    tie_heads(model)
    model.tie_weights(recompute_mapping=False)  # without the heads that were tied just now
    return _finish(model, path, device)


def execution_path(model: nn.Module, m: int = 1) -> str:
    """Say what computes the model's linear layers, e.g. `reference-float32 (packed int4)` or `dense-float32`.

    Args:
        model: A model from `load`, or any other.
        m: Rows of activations the kernels will see.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    dtype = str(layers[0].dtype if layers else next(model.parameters()).dtype).removeprefix("torch.")
    if not layers:
        pruned = any(isinstance(module, PrunedLinear) and module.is_packed for module in model.modules())
        return f"{TRITON}-{dtype} (2:4)" if pruned else f"dense-{dtype}"
    kernels, formats, inputs = set(), set(), set()
    for layer in layers:
        decoded = isinstance(layer, PackedConv2d | PackedEmbedding)
        kernels.add("reference" if decoded else dispatch.pick(layer.problem(m)).name)
        formats.add(layer.fmt.name)
        inputs |= {str(step.describe().get("format", step.describe()["op"])) for step in layer.inputs}
    rounded = f", inputs {'+'.join(sorted(inputs))}" if inputs else ""
    return f"{'+'.join(sorted(kernels))}-{dtype} (packed {'+'.join(sorted(formats))}{rounded})"


def _build(path: Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Build the class named in the config: parameters on meta, buffers real, as many are computed and not stored."""
    config = read_config(path, trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers would build its own quantized layers
    cls = model_class(path, config, trust_remote_code)
    with building(path), init_empty_weights(include_buffers=False), quiet():
        model: PreTrainedModel = cls._from_config(config, dtype=dtype)
    apply_cuts(model, cuts_of(read_json(path / "config.json")))
    return model


def _quantize_caches(model: PreTrainedModel, source: Source, dtype: torch.dtype) -> None:
    """Give attention modules the cache scales the checkpoint has for them, and let them compute with them.

    Raises:
        CheckpointError: The config promises scales, but there are none.
    """
    found = {
        name.rpartition(".")[0] for name in source.tensors if name.endswith(tuple(f".{s}" for s in kv_cache.SCALES))
    }
    if not found:
        raise CheckpointError(f"{source.path}: has a kv_cache_scheme but no k_scale", "the checkpoint is incomplete")
    for name in sorted(found & {name for name, _ in model.named_modules()}):
        module = model.get_submodule(name)
        for suffix in kv_cache.SCALES:
            module.register_buffer(suffix, torch.empty(1, dtype=dtype, device="meta"))
        kv_cache.simulate(module)


def _keep_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Widen the parameters and buffers a model insists on keeping in float32, by its own list."""
    names = set(model._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else set()
    if dtype == torch.float16:
        names |= set(model._keep_in_fp32_modules or ())
    if not names:
        return
    pattern = re.compile("|".join(name.replace("*", ".*") for name in names))
    stored = model.state_dict(keep_vars=True)
    for name in stored:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if not pattern.search(name) or not stored[name].is_floating_point():
            continue
        if leaf in module._buffers:
            module._buffers[leaf] = stored[name].float()
        else:
            module._parameters[leaf] = nn.Parameter(stored[name].float(), requires_grad=False)


def _fill_dense(model: PreTrainedModel, source: Source, layout: Layout, device: torch.device) -> None:
    """Read and convert dense tensors in batches; what makes up one parameter stays together."""
    _check_ties(model, source, layout)
    skeleton = Skeleton(model, device)
    batch: list[str] = []
    size = 0
    for names in layout.dense.values():
        batch.extend(names)
        size += sum(source.tensors[name].nbytes for name in names)
        if size >= BATCH_BYTES:
            skeleton.load(source.read(batch))
            batch, size = [], 0
    if batch:
        skeleton.load(source.read(batch))


def _check_ties(model: PreTrainedModel, source: Source, layout: Layout) -> None:
    """Raise if the config ties two weights that are stored with different values: one would be lost."""
    for name, other in model.all_tied_weights_keys.items():
        module, origin = name.removesuffix(".weight"), other.removesuffix(".weight")
        if origin in layout.linears and module not in layout.linears and name not in layout.dense:
            continue  # one packed table for both
        if module in layout.linears or origin in layout.linears:
            raise CheckpointError(
                f"{name} is stored packed, but the config ties it to {other}", "set tie_word_embeddings to false"
            )
        if name in layout.dense and other in layout.dense:
            names = (*layout.dense[name], *layout.dense[other])
            first, *rest = source.read(names).values()
            if not all(torch.equal(first, tensor) for tensor in rest):
                raise CheckpointError(
                    f"the config ties {name} to {other}, but they are stored with different values",
                    "set tie_word_embeddings to false",
                )


def _read_packed(
    source: Source, weights: Sequence[PackedWeight], dtype: torch.dtype, device: torch.device
) -> list[tuple[PackedTensor, tuple[InputOp, ...]]]:
    """Read packed weights, and what happens to their inputs, in one pass over their files."""
    stored = source.read(name for weight in weights for name in weight.names)
    out = []
    for weight in weights:
        tensors = {name: stored.pop(name) for name in weight.names}
        packed = assemble(weight.module, weight.fmt, weight.shape, tensors)
        inputs = assemble_inputs(weight.module, weight.steps, weight.shape, tensors, dtype)
        packed = replace(packed, tensors={key: value.to(device) for key, value in packed.tensors.items()})
        out.append((packed, inputs))
    return out


def _experts(
    module: nn.Module,
    name: str,
    source: Source,
    weights: Sequence[PackedWeight],
    dtype: torch.dtype,
    device: torch.device,
) -> PackedExperts:
    """Build the packed stand-in of one experts module."""
    if reason := refuse_stack(module):
        raise UnsupportedError(f"{name} ({type(module).__name__}): {reason}", "leave these experts uncompressed")
    experts: dict[int, dict[str, PackedLinear]] = {}
    roles: dict[str, str] = {}
    for weight, (packed, inputs) in zip(weights, _read_packed(source, weights, dtype, device), strict=True):
        leaf = weight.module.rpartition(".")[2]
        assert weight.target.where.expert is not None
        roles[weight.role] = leaf
        layers = experts.setdefault(weight.target.where.expert, {})
        layers[leaf] = PackedLinear(packed, weight.fmt, inputs=inputs, dtype=dtype)
    return PackedExperts(module, [experts[index] for index in sorted(experts)], roles)


def _finish(model: PreTrainedModel, path: Path, device: torch.device) -> PreTrainedModel:
    """Check that nothing is left without values, and set what a loaded model has."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CheckpointError(f"{path}: {name} has no values", "does config.json belong to these weights?")
        if isinstance(tensor, nn.Parameter):
            check_finite(name, tensor)  # again: casting to float16 can overflow
    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    nn.Module.to(model, device)
    nn.Module.eval(model)
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        head.register_forward_pre_hook(_row_after_row)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.prepare()
    leave_out_zeros(model)
    return model


def _row_after_row(head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Lay out what enters an output head like a matrix.

    The last token of every row, which is all that generating wants of a prompt, keeps the strides of the whole. For
    those PyTorch copies a weight without gradients before it multiplies, which takes twenty times as long.
    """
    x, *others = arguments
    return x.flatten(0, -2).contiguous().unflatten(0, x.shape[:-1]), *others
