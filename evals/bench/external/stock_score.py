"""Score a checkpoint through stock transformers, without this package, beside the model it was made from.

Perplexity, KL divergence and top-1 agreement as in `evals.perplexity` and `evals.compare`: windows that do not overlap,
the first token of each is not predicted, softmax in float32, sums in float64 over segments of consecutive predictions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

ROWS = 128
"""Rows of logits that are turned into probabilities at once."""


def main() -> None:
    """Score one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--baseline", required=True)
    parser.add_argument("--tokens", required=True, help=".npy, int64 [n]")
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--segment", type=int, default=128)
    parser.add_argument("--report", required=True, help="JSON to write")
    arguments = parser.parse_args()
    started = time.perf_counter()
    tokens = torch.from_numpy(np.load(arguments.tokens))
    candidate, baseline = (load(folder) for folder in (arguments.model, arguments.baseline))
    parts = []
    for start in range(0, len(tokens) - 1, arguments.context):
        window = tokens[start : start + arguments.context]
        parts.append(score(candidate, baseline, window))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    cuts = [column.split(arguments.segment) for column in columns]
    kl = columns[2]
    names = ("nll", "baseline_nll", "kl", "agreement")
    report: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torch", "transformers", "compressed-tensors")},
        "rounds_inputs": bool(input_schemes(Path(arguments.model))),
        "fingerprint": fingerprint(Path(arguments.model)),
        "weight": [len(part) for part in cuts[0]],
        "text_sha256": hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest(),
        **{name: [float(part.sum()) for part in cut] for name, cut in zip(names, cuts, strict=True)},
        "kl_p99": float(kl.kthvalue(max(1, math.ceil(0.99 * len(kl)))).values),
        "seconds": time.perf_counter() - started,
    }
    Path(arguments.report).write_text(json.dumps(report))


def load(folder: str) -> Any:
    """Load a causal language model in float32.

    Packed weights are dequantized: NVFP4 and MXFP4 run packed in bfloat16. Where inputs are rounded the weights stay as
    they are stored, since a dequantized model is a plain one that rounds nothing.
    """
    how: dict[str, Any] = {}
    if quantization(Path(folder)).get("quant_method") == "compressed-tensors":
        inputs = input_schemes(Path(folder))
        if any(entry["type"] == "float" and entry["num_bits"] == 4 for entry in inputs):
            raise SystemExit("stock transformers rounds inputs to 4-bit floats in bfloat16 alone")
        how["quantization_config"] = CompressedTensorsConfig(dequantize=not inputs)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()


def quantization(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint's config says about quantization; empty for a dense one."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    return found


def input_schemes(folder: Path) -> list[dict[str, Any]]:
    """Return how inputs are rounded, one entry for each group of layers that has them rounded."""
    groups = quantization(folder).get("config_groups", {}).values()
    return [group["input_activations"] for group in groups if group.get("input_activations")]


@torch.no_grad()
def score(candidate: Any, baseline: Any, window: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the two losses, the divergence and the agreement of every prediction in a window, float64 `[n]` each."""
    ours, theirs = (model(input_ids=window[None], use_cache=False).logits[0, :-1] for model in (candidate, baseline))
    if not (torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        raise SystemExit("logits are NaN or Inf")
    columns: list[list[torch.Tensor]] = [[], [], [], []]
    for a, b, wanted in zip(ours.split(ROWS), theirs.split(ROWS), window[1:].split(ROWS), strict=True):
        log_q, log_p = a.float().log_softmax(-1), b.float().log_softmax(-1)
        columns[0].append(-log_q.gather(-1, wanted[:, None])[:, 0].double())
        columns[1].append(-log_p.gather(-1, wanted[:, None])[:, 0].double())
        columns[2].append((log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64).clamp(min=0))
        columns[3].append((a.argmax(-1) == b.argmax(-1)).double())
    return tuple(torch.cat(column) for column in columns)


def fingerprint(folder: Path) -> str:
    """Return the hex SHA-256 over the config and every weight file of a checkpoint."""
    total = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        total.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


if __name__ == "__main__":
    main()
