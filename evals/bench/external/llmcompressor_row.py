"""One row made by llm-compressor, run with the interpreter of an environment that has it (never imported here).

Reads a checkpoint folder and the calibration token ids, writes a compressed-tensors checkpoint and a small JSON with
the tool's versions, its settings and the seconds the tool itself took. All linear layers but the output head.
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
INTEGERS = {f"int{bits}": bits for bits in range(2, 9)}


def main() -> None:
    """Quantize one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True, help=".npy, int64 [samples, seq_len]")
    parser.add_argument("--output", required=True)
    parser.add_argument("--report", required=True, help="JSON to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algorithm", required=True, choices=("gptq", "rtn"))
    parser.add_argument("--format", required=True, choices=(*INTEGERS, *PRESETS))
    parser.add_argument("--group-size", type=int, help="inputs per scale; the presets have their own")
    arguments = parser.parse_args()

    # Imported here: --help and wrong flags should not cost the seconds that these take.
    import torch
    from datasets import Dataset  # type: ignore[import-untyped]
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    modifier = {"gptq": GPTQModifier, "rtn": QuantizationModifier}[arguments.algorithm]
    recipe = modifier(ignore=["lm_head"], **scheme(arguments.format, arguments.group_size))
    call: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "recipe": recipe}
    if arguments.algorithm == "gptq":  # rounding to nearest looks at no data
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
    model.save_pretrained(arguments.output, save_compressed=True)
    tokenizer.save_pretrained(arguments.output)
    names = ("llmcompressor", "compressed-tensors", "torch", "transformers")
    report = {
        "versions": {name: version(name) for name in names},
        "tool_seconds": seconds,
        **stored_size(Path(arguments.output), Path(arguments.model)),
    }
    Path(arguments.report).write_text(json.dumps(report))


def scheme(format: str, group_size: int | None) -> dict[str, Any]:
    """Return the modifier's arguments for a format of ours: a preset of the tool, or symmetric groups of integers."""
    if format in PRESETS:
        if group_size is not None:
            raise SystemExit(f"{format} has its own group size, --group-size {group_size} cannot be set")
        return {"targets": "Linear", "scheme": PRESETS[format]}
    if group_size is None:
        raise SystemExit(f"{format} needs --group-size")
    weights = {
        "num_bits": INTEGERS[format],
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
    }
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


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
