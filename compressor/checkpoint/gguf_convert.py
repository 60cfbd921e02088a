"""Turn a GGUF file into an ordinary checkpoint, and on request move a Llama's weights off every quantization lattice.

GGUF linear weights are `scale * code + minimum` per group of 32 inputs. Left as they are, integer rounding in groups of
32 would find that lattice again and look lossless. That is what a user's own file is; for the embedded model, which
demonstrates compression, it would be a lie. The rewrites below move every weight off the lattice without changing what
the model computes, because each is undone by its neighbour: RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4)
multiplies by a gain right before a linear map, and a gated MLP and attention's values are linear in `up_proj` and
`v_proj`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging
from transformers.utils import quantization_config as transformers_quantization

from compressor.checkpoint.skeleton import names_on_disk
from compressor.errors import CheckpointError, CompressorError, UnsupportedError

# transformers' classes are untyped for mypy's purposes: every attribute below comes from the loaded architecture.
Model: TypeAlias = Any
Tokenizer: TypeAlias = Any

_LOG = logging.getLogger("compressor")
_SUPPORTED = ("llama",)


def load_gguf(folder: Path, file: str) -> tuple[Model, Tokenizer]:
    """Load `folder/file` with every tensor dequantized to float32.

    The model still carries a GGUF quantization config, so it refuses `save_pretrained` and `.float()`;
    `write_checkpoint` does not need either.

    Raises:
        CheckpointError: The file is missing, or is not GGUF that transformers can read.
        UnsupportedError: The file holds something transformers would leave out: tensors, a rule for splitting text.
    """
    path = folder / file
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file", "check the path")
    try:
        with _quiet():
            both: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=file,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **_unpacked(),
            )
            model, loaded = both
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        _check_complete(model.eval(), loaded, path)
        _restore_splitting(tokenizer, path)
    except CompressorError:
        raise
    except Exception as error:  # a parser of foreign bytes can raise anything
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path}: not readable as GGUF: {type(error).__name__}: {reason[0] if reason else ''}",
            "check that the file is complete and that its architecture is one transformers reads from GGUF",
        ) from error
    return model, tokenizer


@torch.no_grad()
def off_lattice(model: Model) -> None:
    """Move the weights of every decoder layer off their group lattice, in place, leaving the function unchanged.

    1. Each RMSNorm gain goes into the linear maps that read it and becomes one. The final norm keeps its gain: its
       reader is the head, which may be the embedding itself.
    2. Each row of `up_proj` is divided by its RMS relative to the mean RMS; the matching column of `down_proj` is
       multiplied by it.
    3. The same for rows of `v_proj` and columns of `o_proj`; one key/value head feeds `heads / kv_heads` query heads.

    Factors and products are computed in float64 and stored in the parameters' dtype, so a float32 model differs from
    the original by float32 rounding only.

    Raises:
        UnsupportedError: The model is not of the Llama architecture, for which these rewrites are exact.
    """
    config = model.config
    if config.model_type not in _SUPPORTED:
        raise UnsupportedError(
            f"model type {config.model_type!r}: exact rewrites are known for {', '.join(_SUPPORTED)} only",
            "convert a Llama checkpoint, or use the checkpoint as it is",
        )
    repeats = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _fold_gain(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj))
        _fold_gain(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))
        _scale_columns(mlp.down_proj, _equalize_rows(mlp.up_proj))
        values = _equalize_rows(attention.v_proj).unflatten(0, (config.num_key_value_heads, -1))  # [kv_heads, head_dim]
        _scale_columns(attention.o_proj, values.repeat_interleave(repeats, dim=0).flatten())


def write_checkpoint(
    model: Model,
    tokenizer: Tokenizer,
    out_dir: Path,
    dtype: torch.dtype = torch.bfloat16,
    exact: Callable[[Tensor], bool] = lambda _: False,
) -> None:
    """Write config, weights, generation config and tokenizer as stock transformers reads them.

    Weights go into one `model.safetensors`; tied weights are stored once. The same model gives the same bytes on every
    call.

    Args:
        model: The model, in float32.
        tokenizer: Its tokenizer.
        out_dir: Where to write.
        dtype: The checkpoint's dtype, which weights are rounded to.
        exact: Whether a tensor must keep its values; such a tensor stays in float32 where `dtype` would change it.

    Raises:
        CheckpointError: A weight is not finite in `dtype`.
        OSError: The operating system refused to write, a full disk included.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    _save(_stored_tensors(model, dtype, exact), out_dir / "model.safetensors")
    config = copy.deepcopy(model.config)
    for stray in ("quantization_config", "_model_name_or_path"):  # both describe the GGUF file, not this checkpoint
        if hasattr(config, stray):
            delattr(config, stray)
    config.name_or_path = ""
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(out_dir)
    generation = copy.deepcopy(model.generation_config)
    generation._from_model_config = False  # a file of its own, not something to derive again on loading
    generation.save_pretrained(out_dir)
    tokenizer = copy.deepcopy(tokenizer)
    if limit := getattr(config, "max_position_embeddings", None):
        tokenizer.model_max_length = limit  # GGUF does not carry it
    for stray in ("vocab_file", "name_or_path", "is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(stray, None)
    tokenizer.name_or_path = ""
    tokenizer.save_pretrained(out_dir)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # it hides the system's error number in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error), str(path)) from error


def _stored_tensors(model: Model, dtype: torch.dtype, exact: Callable[[Tensor], bool]) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:  # a tied weight is stored once: readers tie it again from the config
            held[name] = tensor
        seen.add(tensor.data_ptr())
    stored: dict[str, Tensor] = {}
    for name, tensor in names_on_disk(model, held).items():
        rounded = tensor.to(dtype)
        stored[name] = tensor if exact(tensor) and not torch.equal(rounded.float(), tensor) else rounded
        stored[name] = stored[name].contiguous().clone()  # experts are views of one stack, which safetensors refuses
        if not stored[name].isfinite().all():
            bad = int((~stored[name].isfinite()).sum())
            raise CheckpointError(f"{name}: {bad} of {tensor.numel()} values are not finite", "the source is damaged")
    return stored


def _unpacked() -> dict[str, Any]:
    """Return the option that unpacks every weight, where transformers could keep some packed on a GPU."""
    config: Any = getattr(transformers_quantization, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _check_complete(model: Model, loaded: dict[str, Any], path: Path) -> None:
    """Raise unless every parameter got its values from the file and every value in the file went somewhere."""
    if loaded["mismatched_keys"]:
        name, in_file, in_model = min(loaded["mismatched_keys"])
        raise CheckpointError(
            f"{path}: {name} is {list(in_file)}, but transformers reads a config that makes it {list(in_model)}",
            "the file is damaged, or holds a variant of its architecture that transformers does not know",
        )
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} parameters of {type(model).__name__} are not in the file, the first is "
            f"{missing[0]}",
            "the file is incomplete, or holds a variant of its architecture that transformers does not know",
        )
    tensors = gguf.GGUFReader(path).tensors
    in_file = sum(int(tensor.n_elements) for tensor in tensors)
    in_model = sum(tensor.numel() for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    factors = next((tensor for tensor in tensors if tensor.name == "rope_freqs.weight"), None)
    if factors is not None:
        _restore_rope(model.config, torch.tensor(factors.data.copy(), dtype=torch.float32), path)
        in_file -= int(factors.n_elements)
    if in_file != in_model:
        raise UnsupportedError(
            f"{path}: holds {in_file} values, but transformers makes {in_model} of a {type(model).__name__} out of it",
            "use the model's original checkpoint instead of the GGUF file",
        )


def _restore_rope(config: Any, factors: Tensor, path: Path) -> None:
    """Put the frequency scaling of Llama 3.1 back into the config: the file has its result, transformers drops it.

    Frequencies with a wavelength above `original / low` are divided by `factor`, those below `original / high` stay,
    and between the two the divisor moves smoothly (Llama 3.1 reference code; all its models use 8192, 1 and 4).
    """
    if torch.equal(factors, torch.ones_like(factors)):
        return
    rope, original, low, high = dict(config.rope_parameters), 8192, 1.0, 4.0
    size = 2 * len(factors)
    wavelength = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(0, size, 2).double() / size)
    share = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    factor = float(factors.max())
    if not torch.allclose(1 / ((1 - share) / factor + share), factors.double(), rtol=1e-4):
        raise UnsupportedError(
            f"{path}: scales its rotary frequencies (rope_freqs.weight, up to {factor:g}) in a way that is not known",
            "use the model's original checkpoint instead of the GGUF file",
        )
    rope.update(rope_type="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high)
    config.rope_parameters = {**rope, "original_max_position_embeddings": original}


def _fold_gain(norm: nn.Module, readers: Sequence[nn.Linear]) -> None:
    gain = norm.weight
    assert isinstance(gain, Tensor)
    for linear in readers:
        _scale_columns(linear, gain.double())
    gain.fill_(1)


def _equalize_rows(linear: nn.Linear) -> Tensor:
    """Divide each row (and bias) by its RMS relative to the mean RMS; return those factors, float64 `[out]`."""
    rms = linear.weight.double().square().mean(dim=1).sqrt()  # [out]
    factors = rms / rms.mean()
    factors = torch.where(factors > 0, factors, torch.ones_like(factors))  # a dead row has no size to equalize
    linear.weight.copy_(linear.weight.double() / factors[:, None])
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.double() / factors)
    return factors


def _scale_columns(linear: nn.Linear, factors: Tensor) -> None:
    linear.weight.copy_(linear.weight.double() * factors)  # factors [in]


def _restore_splitting(tokenizer: Tokenizer, path: Path) -> None:
    """Set the rule that splits text before merging where transformers takes it as GPT-2's whatever the file says."""
    reader = gguf.GGUFReader(path)
    kind, field = reader.get_field("tokenizer.ggml.model"), reader.get_field("tokenizer.ggml.pre")
    rule = "default" if field is None else field.contents()
    backend = tokenizer.backend_tokenizer
    if rule == "smollm":  # every digit alone, then GPT-2's rule
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
        return
    # The rule concerns byte-level vocabularies alone; a Split is a rule transformers knows and has set.
    splits = kind is None or kind.contents() == "gpt2"
    if splits and rule not in ("default", "gpt-2") and '"type":"Split"' not in backend.to_str():
        raise UnsupportedError(
            f"{path}: the tokenizer splits text by rule {rule!r}, which neither transformers nor this package knows",
            "use the model's original checkpoint instead of the GGUF file",
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the loader's own progress bars off the terminal, which belongs to the command line."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):  # the GGUF reader's bar does not ask transformers' switch
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
        _LOG.debug("GGUF loader: %s", written.getvalue())
