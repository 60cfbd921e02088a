"""One row made by GPTQModel, run with the interpreter of an environment that has it (never imported here).

Reads a checkpoint folder and the calibration token ids, quantizes with the tool's defaults (symmetric), loads what the
tool saved and writes its dequantized weights as a plain checkpoint: stock transformers reads the tool's own format
through the tool alone. A small JSON says the tool's versions and the seconds it took. All linear layers but the output
head.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

PACKED = "packed"
"""Folder, beside the output, of the checkpoint in the tool's own format."""


def main() -> None:
    """Quantize one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True, help=".npy, int64 [samples, seq_len]")
    parser.add_argument("--output", required=True)
    parser.add_argument("--report", required=True, help="JSON to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    # Version 7.6 fails on machines with two cores: it counts one worker there and asks for two.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    # Imported here: --help and wrong flags should not cost the seconds that these take.
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(arguments.seed)
    tokens = np.load(arguments.tokens)  # [samples, seq_len]
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    config = QuantizeConfig(bits=arguments.bits, group_size=arguments.group_size, sym=True, device=arguments.device)
    packed = Path(arguments.output).with_name(PACKED)
    started = time.perf_counter()
    tuner = GPTQModel.load(arguments.model, config)
    tuner.quantize(samples, batch_size=1)
    tuner.save(str(packed))
    seconds = time.perf_counter() - started
    saved = GPTQModel.load(str(packed), device=arguments.device, backend=BACKEND.TORCH)
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    filled = fill(dense, saved.model)
    dense.save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)
    report = {
        "versions": {name: version(name) for name in ("gptqmodel", "torch", "transformers")},
        "tool_seconds": seconds,
        "layers": filled,
    }
    Path(arguments.report).write_text(json.dumps(report))


def fill(dense: Any, saved: Any) -> int:
    """Put the dequantized weights of a loaded model into a plain one; return how many layers had any.

    The tool's kernels give weights as `[in, out]`.
    """
    import torch

    layers = {name: module for name, module in saved.named_modules() if hasattr(module, "dequantize_weight")}
    if not layers:
        raise SystemExit("the saved checkpoint has no quantized layer")
    with torch.no_grad():
        for name, module in layers.items():
            target = dense.get_submodule(name).weight
            target.copy_(module.dequantize_weight().T.to(target.dtype))
    return len(layers)


if __name__ == "__main__":
    main()
