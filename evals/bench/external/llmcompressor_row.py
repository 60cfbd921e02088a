"""One row made by llm-compressor, run with the interpreter of an environment that has it (never imported here).

Reads a checkpoint folder and the calibration token ids, writes a compressed-tensors checkpoint (pruned weights dense)
and a small JSON with the tool's versions and the seconds the tool itself took. All linear layers but the output head.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

PRESETS = {"nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}
ROUNDING, SMOOTH, MASKS = ("gptq", "rtn", "awq"), "smoothquant+gptq", ("wanda", "sparsegpt")
STRENGTH = 0.8
"""SmoothQuant's alpha, as in the tool's own example of W8A8."""

INTEGERS = {f"int{bits}": bits for bits in range(2, 9)}


def main() -> None:
    """Quantize one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True, help=".npy, int64 [samples, seq_len]")
    parser.add_argument("--output", required=True)
    parser.add_argument("--report", required=True, help="JSON to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algorithm", required=True, choices=(*ROUNDING, SMOOTH, *MASKS))
    parser.add_argument("--format", choices=(*INTEGERS, *PRESETS))
    parser.add_argument("--group-size", type=int, help="inputs per scale; the presets have their own")
    parser.add_argument("--inputs", choices=("int8-token",), help=f"with {SMOOTH}")
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--pattern", default="0:0", help="N:M zeros")
    arguments = parser.parse_args()

    # Imported here: --help and wrong flags should not cost the seconds that these take.
    import torch
    from datasets import Dataset  # type: ignore[import-untyped]
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    pruned = arguments.algorithm in MASKS
    call: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "recipe": modifiers(arguments)}
    if arguments.algorithm != "rtn":  # rounding to nearest looks at no data
        tokens = np.load(arguments.tokens)  # [samples, seq_len]
        rows = {"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}
        call |= {
            "dataset": Dataset.from_dict(rows),
            "num_calibration_samples": tokens.shape[0],
            "max_seq_length": tokens.shape[1],
            "shuffle_calibration_samples": False,
        }
    started = time.perf_counter()
    oneshot(**call)
    seconds = time.perf_counter() - started
    model.save_pretrained(arguments.output, save_compressed=not pruned)
    tokenizer.save_pretrained(arguments.output)
    names = ("llmcompressor", "compressed-tensors", "torch", "transformers")
    report = {
        "versions": {name: version(name) for name in names},
        "tool_seconds": seconds,
        **(dense_size(model) if pruned else stored_size(Path(arguments.output), Path(arguments.model))),
    }
    Path(arguments.report).write_text(json.dumps(report))


def modifiers(arguments: argparse.Namespace) -> list[Any]:
    """Return what the tool is to do, in its own words."""
    # Imported here: these exist in the tool's environment only.
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    ignore = {"ignore": ["lm_head"]}
    if arguments.algorithm in MASKS:
        mask = WandaPruningModifier if arguments.algorithm == "wanda" else SparseGPTModifier
        share = pattern_share(arguments.pattern) if arguments.sparsity is None else arguments.sparsity
        return [mask(sparsity=share, mask_structure=arguments.pattern, targets=["Linear"], ignore=["re:.*lm_head"])]
    if arguments.algorithm == SMOOTH:
        if (arguments.format, arguments.inputs) != ("int8", "int8-token"):
            raise SystemExit(f"{SMOOTH} rounds to int8 with inputs int8-token")
        return [
            SmoothQuantModifier(smoothing_strength=STRENGTH),
            GPTQModifier(targets="Linear", scheme="W8A8", **ignore),
        ]
    what = scheme(arguments.format, arguments.group_size)
    if arguments.algorithm == "gptq":
        return [GPTQModifier(**ignore, **what)]
    nearest = QuantizationModifier(**ignore, **what)
    if arguments.algorithm == "rtn":
        return [nearest]
    allow_no_accelerator()
    return [AWQModifier(), nearest]


def allow_no_accelerator() -> None:
    """Let AWQ run where there is no accelerator: version 0.14 pins its cache for copies to one, and fails without."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None


def pattern_share(pattern: str) -> float:
    """Return the share of zeros of `N:M`, N weights kept of M."""
    kept, _, of = pattern.partition(":")
    if not int(of):
        raise SystemExit("pruning needs --sparsity or --pattern N:M")
    return 1 - int(kept) / int(of)


def scheme(format: str | None, group_size: int | None) -> dict[str, Any]:
    """Return the modifier's arguments for a format of ours: a preset of the tool, or symmetric groups of integers."""
    if format in PRESETS:
        if group_size is not None:
            raise SystemExit(f"{format} has its own group size, --group-size {group_size} cannot be set")
        return {"targets": "Linear", "scheme": PRESETS[format]}
    if format is None or group_size is None:
        raise SystemExit(f"{format} needs --group-size")
    weights = {
        "num_bits": INTEGERS[format],
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
    }
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def dense_size(model: Any) -> dict[str, float]:
    """Return bytes and bits of weights that stay dense, and the share of zeros in the linear layers of the blocks."""
    import torch

    weights = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    stored = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}  # tied ones once
    return {
        "weight_bytes": sum(stored.values()),
        "bits_per_weight": 8.0 * weights[0].element_size(),
        "sparsity": zeros / sum(weight.numel() for weight in weights),
    }


def stored_size(output: Path, model: Path) -> dict[str, float]:
    """Return the bytes of all stored tensors, and the bits per weight of the quantized layers, scales included."""
    stored, before = headers(output), headers(model)
    layers = {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
    own = sum(
        nbytes
        for name, (nbytes, _) in stored.items()
        if name.rpartition(".")[0] in layers and not name.endswith(".weight_shape")
    )
    weights = sum(math.prod(before[f"{layer}.weight"][1]) for layer in layers)
    return {"weight_bytes": sum(nbytes for nbytes, _ in stored.values()), "bits_per_weight": 8 * own / weights}


def headers(folder: Path) -> dict[str, tuple[int, list[int]]]:
    """Return name -> (bytes, shape) of every tensor in a folder's safetensors files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            found[name] = (end - start, entry["shape"])
    return found


if __name__ == "__main__":
    main()
