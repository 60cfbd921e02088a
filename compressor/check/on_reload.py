"""Checks that load the checkpoint in fresh processes: with this package, and with stock transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compressor.check.checkpoint import CONTAINER, Checkpoint
from compressor.check.finding import Finding, error, info
from compressor.check.reload import (
    CPU,
    PROBE_TOKENS,
    Job,
    Reloaded,
    decoded_source,
    fresh_process,
    relative_error,
    reload_fresh,
)
from compressor.check.stock import weight_hash
from compressor.checkpoint.ends import example_inputs
from compressor.errors import CompressorError, UnsupportedError
from compressor.verify import TOLERANCE

TOLERANCES = {"float32": TOLERANCE, "bfloat16": 2e-2, "float16": 2e-3}
"""Allowed relative error of logits between two readers with equal weights, by the dtype they compute in."""


def reload(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Load in a fresh process; nothing missing, nothing unexpected, the output that of the decoded weights."""
    with tempfile.TemporaryDirectory(prefix="compress-check-") as scratch:
        stock_too = checkpoint.reader == "transformers" and checkpoint.container == CONTAINER
        outputs = Path(scratch) / "ours.safetensors"
        dtype = str(checkpoint.dtype).removeprefix("torch.")
        found = reload_fresh(
            Job(str(checkpoint.path), checkpoint.trust_remote_code, str(outputs) if stock_too else None, dtype)
        )
        yield from _ours(checkpoint, found)
        if stock_too or (found.unsupported and checkpoint.container == CONTAINER):
            yield from _stock(checkpoint, outputs, dtype)
        elif found.unsupported:
            yield error("reload", f"no reader could be tried: {found.unsupported}", "check it with the one it is for")


def _ours(checkpoint: Checkpoint, found: Reloaded) -> Iterator[Finding]:
    for kind, names in (("missing", found.missing), ("unexpected", found.unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield error(names[0], f"{kind} when loaded{more}", "does config.json belong to these weights?")
    if found.unsupported:
        yield info("compressor.load", f"does not run this checkpoint: {found.unsupported}")
    elif found.error:
        yield error("compressor.load", found.error)
    elif found.not_finite:
        yield error("output", f"{found.not_finite} of {found.values} values are NaN or Inf", "the weights are damaged")
    elif found.no_reference:
        yield info("output", f"is finite, but was not compared: {found.no_reference}")
    elif found.relative_error is not None:
        said = f"differs from that of the decoded weights by {found.relative_error:.1e} (allowed {TOLERANCE:.0e})"
        if found.relative_error > TOLERANCE:
            yield error("output", said, "this is a bug: please report it with the model's config.json")
        else:
            yield info("output", f"{said}, {found.path}, {found.seconds:.1f} s")


def _stock(checkpoint: Checkpoint, ours: Path, dtype: str) -> Iterator[Finding]:
    """Load with stock transformers and compare weights bit by bit, and logits."""
    model = checkpoint.model
    assert not isinstance(model, CompressorError)
    probe, out = ours.with_name("probe.safetensors"), ours.with_name("stock.safetensors")
    inputs = example_inputs(model.module, CPU, length=PROBE_TOKENS)
    save_file({"inputs": next(iter(inputs.values()))}, probe)
    weights = {
        f"{module}.weight": [target.param, target.where.expert, target.where.rows]
        for module in checkpoint.modules
        if (target := model.targets.get(f"{module}.weight")) is not None and target.simple and target.param
    }
    job = {
        **{"folder": str(checkpoint.path), "architecture": type(model.module).__name__, "dtype": dtype},
        **{"probe": str(probe), "out": str(out), "weights": weights},
    }
    answer = fresh_process([str(Path(__file__).with_name("stock.py"))], job, str(checkpoint.path))
    if answer["error"]:
        yield error("stock transformers", f"cannot load it: {answer['error']}", "load it with compressor.load")
        return
    for kind, names in answer["wrong"].items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield error(names[0], f"{kind.replace('_', ' ')} in stock transformers{more}", "its weights are wrong there")
    if answer["not_finite"]:
        said = f"{answer['not_finite']} of {answer['values']} values are NaN or Inf in stock transformers"
        yield error("output", said, "the weights overflow there")
        return
    yield from _same_weights(checkpoint, answer["hashes"], getattr(torch, dtype))
    if ours.is_file():
        yield from _same_logits(checkpoint, ours, out, dtype)


def _same_weights(checkpoint: Checkpoint, hashes: dict[str, Any], dtype: torch.dtype) -> Iterator[Finding]:
    model = checkpoint.model
    assert not isinstance(model, CompressorError)
    try:
        source = decoded_source(checkpoint.path, model.skeleton)
    except UnsupportedError as problem:
        yield info("weights", f"were not compared: {problem.message}")
        return
    wrong = [name for name in sorted(hashes) if weight_hash(source.read([name])[name].to(dtype)) != hashes[name]]
    if wrong:
        said = f"and {len(wrong) - 1} more of {len(hashes)} weights differ" if len(wrong) > 1 else "differs"
        yield error(
            wrong[0], f"{said} in stock transformers from what the format means", "load it with compressor.load"
        )
    else:
        yield info("weights", f"{len(hashes)} are bit-equal in stock transformers ({dtype})")


def _same_logits(checkpoint: Checkpoint, ours: Path, stock: Path, dtype: str) -> Iterator[Finding]:
    if (checkpoint.section or {}).get("kv_cache_scheme"):
        yield info("output", "was not compared with stock transformers: the key/value cache is quantized")
        return
    allowed = TOLERANCES[dtype]
    difference = relative_error(load_file(ours)["logits"].float(), load_file(stock)["logits"])
    said = f"stock transformers differs by {difference:.1e} (allowed {allowed:.0e} in {dtype})"
    yield (error if difference > allowed else info)("output", said)
