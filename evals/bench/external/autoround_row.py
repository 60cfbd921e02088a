"""One row made by AutoRound, run with the interpreter of an environment that has it (never imported here).

Reads a checkpoint folder and the calibration token ids, writes the dequantized weights as a plain checkpoint (the
tool's "fake" export: it exists for every bit width and every reader takes it) and a small JSON with the tool's
versions and the seconds the tool itself took. All linear layers but the output head.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np


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
    parser.add_argument("--iters", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()

    # Imported here: --help and wrong flags should not cost the seconds that these take.
    import torch
    from auto_round import AutoRound
    from auto_round.schemes import QuantizationScheme

    tokens = torch.from_numpy(np.load(arguments.tokens))  # [samples, seq_len]
    scheme = QuantizationScheme(
        bits=arguments.bits, group_size=arguments.group_size, sym=True, data_type="int", act_bits=16
    )
    started = time.perf_counter()
    tuner = AutoRound(
        arguments.model,
        scheme=scheme,
        iters=arguments.iters,
        dataset=list(tokens.split(arguments.batch_size)),
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        device_map=arguments.device,
        enable_torch_compile=False,
    )
    tuner.quantize_and_save(arguments.output, format="fake")
    seconds = time.perf_counter() - started
    lift(Path(arguments.output))
    versions = {name: version(name) for name in ("auto-round", "torch", "transformers")}
    Path(arguments.report).write_text(json.dumps({"versions": versions, "tool_seconds": seconds}))


def lift(output: Path) -> None:
    """Bring the checkpoint to the folder that was asked for: the tool puts it into one that it names itself."""
    inner = [path.parent for path in output.glob("*/config.json")]
    if (output / "config.json").is_file():
        return
    if len(inner) != 1:
        raise SystemExit(f"{len(inner)} checkpoints in the tool's output, expected one")
    for path in inner[0].iterdir():
        path.rename(output / path.name)
    inner[0].rmdir()


if __name__ == "__main__":
    main()
