"""The list of checks, and running all of them on one checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.check import on_config, on_files, on_readers, on_reload, on_structure, on_tensors, on_values
from compressor.check.checkpoint import DENSE, Checkpoint
from compressor.check.finding import Finding, Reader, Severity, error
from compressor.check.kernels import KernelRow, kernel_table
from compressor.check.opening import open_checkpoint
from compressor.errors import CompressorError, VerificationError
from compressor.report import Progress, Silent


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        id: Stable name, `group.what`.
        title: What must hold, in a few words.
        run: The check itself.
        quantized: Only for checkpoints that are quantized.
        model: Needs the model that config.json names.
        whole: Needs every file to be readable.
        readers: Readers it has something to say to; None is a check for no reader in particular.
    """

    id: str
    title: str
    run: Callable[[Checkpoint], Iterable[Finding]]
    quantized: bool = True
    model: bool = False
    whole: bool = True
    readers: tuple[Reader | None, ...] = (None, "transformers", "vllm")

    @property
    def group(self) -> str:
        """The heading it is shown under."""
        return self.id.partition(".")[0]


@dataclass(frozen=True)
class Checked:
    """What one check found.

    Attributes:
        check: The check.
        findings: What it had to say.
        skipped: Why it did not run, or None.
    """

    check: Check
    findings: tuple[Finding, ...] = ()
    skipped: str | None = None

    @property
    def status(self) -> str:
        """`skipped`, or the worst severity found, or `ok`."""
        if self.skipped is not None:
            return "skipped"
        found = {finding.severity for finding in self.findings}
        return next((str(severity) for severity in (Severity.ERROR, Severity.WARNING) if severity in found), "ok")

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "id": self.check.id,
            "title": self.check.title,
            "status": self.status,
            "skipped": self.skipped,
            "findings": [finding.to_json() for finding in self.findings],
        }


@dataclass(frozen=True)
class CheckReport:
    """Everything that was found.

    Attributes:
        path: The folder.
        container: `compressed-tensors`, `native` or `dense`.
        reader: The program it was checked for, or None.
        stored: Scheme -> number of modules stored so.
        checks: One entry per check, in order.
        kernels: Which kernel would run what; see `kernel_table`.
        device: Where those kernels would run.
        dtype: Dtype of their activations.
        seconds: Wall time.
    """

    path: str
    container: str
    reader: Reader | None
    stored: dict[str, int]
    checks: tuple[Checked, ...]
    kernels: tuple[KernelRow, ...]
    device: str
    dtype: str
    seconds: float

    def findings(self, severity: Severity | None = None) -> list[tuple[str, Finding]]:
        """Return check id and finding, of one severity or all."""
        return [
            (checked.check.id, finding)
            for checked in self.checks
            for finding in checked.findings
            if severity in (None, finding.severity)
        ]

    @property
    def ok(self) -> bool:
        """Whether nothing says that the checkpoint cannot be trusted."""
        return not self.findings(Severity.ERROR)

    def raise_for_errors(self) -> None:
        """Raise if the checkpoint cannot be trusted.

        Raises:
            VerificationError: Names the number of errors and the first of them.
        """
        errors = self.findings(Severity.ERROR)
        if errors:
            count = "1 error" if len(errors) == 1 else f"{len(errors)} errors, the first"
            check, first = errors[0]
            raise VerificationError(f"{self.path}: {count}: {check}: {first}", first.hint)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        counts = {str(severity): len(self.findings(severity)) for severity in Severity}
        return {
            "path": self.path,
            "ok": self.ok,
            "container": self.container,
            "reader": self.reader,
            "stored": self.stored,
            "counts": counts,
            "checks": [checked.to_json() for checked in self.checks],
            "kernels": [row.to_json() for row in self.kernels],
            "device": self.device,
            "dtype": self.dtype,
            "seconds": self.seconds,
        }


def _model(checkpoint: Checkpoint) -> Iterator[Finding]:
    if isinstance(checkpoint.model, CompressorError):
        yield error("config.json", f"no model can be built from it: {checkpoint.model.message}", checkpoint.model.hint)


CHECKS: tuple[Check, ...] = (
    Check("files.shards", "every shard is whole", on_files.shards, quantized=False, whole=False),
    Check("files.index", "the index names every tensor once", on_files.index, quantized=False, whole=False),
    Check("files.side", "tokenizer, processor, generation config are there", on_files.side_files, False, model=True),
    Check("files.hashes", "files are those the report names", on_files.provenance, quantized=False, whole=False),
    Check("config.model", "config.json names a model that can be built", _model, quantized=False, whole=False),
    Check("config.kind", "the config says how weights are stored", on_config.what, quantized=False),
    Check("config.status", 'quantization_status is "compressed"', on_config.status),
    Check("config.schema", "groups hold what readers accept", on_config.schema),
    Check("config.format", "format is set at both levels", on_config.container),
    Check("config.targets", "targets and ignore match something", on_config.targets),
    Check("config.special", "no sparsity or transform sections", on_config.special),
    Check("tensors.names", "nothing is missing, nothing is left over", on_tensors.names, False, model=True),
    Check("tensors.assigned", "what is targeted is quantized, what is ignored is dense", on_tensors.assigned),
    Check("tensors.groups", "groups divide the inputs", on_tensors.group_sizes),
    Check("tensors.layout", "suffixes, dtypes and shapes fit the scheme", on_tensors.layout),
    Check("tensors.dense", "no dense weight beside a packed one", on_tensors.dense_beside_packed),
    Check("tensors.zero-points", "symmetric schemes store no zero points", on_tensors.zero_points),
    Check("tensors.kv-cache", "cache scales are complete and positive", on_tensors.kv_cache),
    Check("tensors.report", "tensors are what the report says", on_files.rows),
    Check(
        "values.scales", "scales are finite, not zero, and negative only where a grid may be mirrored", on_values.scales
    ),
    Check("values.codes", "codes lie on the grid", on_values.codes),
    Check("values.finite", "dense tensors are finite", on_values.finite, quantized=False),
    Check("values.zero", "no layer or expert is all zero", on_values.zero, quantized=False),
    Check("layers.tied", "a tied output head is ignored", on_structure.tied_head, model=True),
    Check("layers.routers", "routers are dense and ignored", on_structure.routers, model=True),
    Check("layers.fused", "fused layers share a scheme", on_structure.fused, model=True),
    Check("layers.global-scales", "fused NVFP4 layers share a global scale", on_structure.global_scales),
    Check("layers.experts", "all experts are there, stored alike", on_structure.experts, False, model=True),
    Check("layers.calibration", "calibration reached every layer", on_structure.tokens),
    Check(
        "readers.transformers",
        "stock transformers can load it",
        on_readers.transformers,
        readers=(None, "transformers"),
    ),
    Check("readers.vllm", "vLLM can load it, by its source", on_readers.vllm, readers=("vllm",)),
)
"""Every check but the last, which loads the checkpoint."""

RELOAD = Check("reload.output", "a fresh process loads it and computes what it should", on_reload.reload, False)


def check(
    path: str | Path,
    *,
    reader: Reader | None = None,
    quick: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> CheckReport:
    """Check a checkpoint folder; the same as `compress check`.

    Args:
        path: The folder.
        reader: Check for this program: what it cannot load is then an error, not a warning.
        quick: Leave out loading it in fresh processes.
        device: Device the kernel table is for; None means the CPU.
        dtype: Dtype of activations the kernel table is for; None means the checkpoint's.
        trust_remote_code: Run model code that comes with the checkpoint.
        progress: Who is told what is being checked.

    Raises:
        CheckpointError: It is no checkpoint.
        UnsupportedError: It is quantized in a way that is not checked here.
        VerificationError: It failed its verification when it was written, or a process crashed.
    """
    started, progress = time.monotonic(), progress or Silent()
    checkpoint = open_checkpoint(Path(path), reader, trust_remote_code)
    done: list[Checked] = []
    for entry in CHECKS:
        if not done or done[-1].check.group != entry.group:
            progress.stage(f"checking {entry.group}")
        done.append(run_check(entry, checkpoint))
    if not quick:
        progress.stage("loading it in fresh processes")
    done.append(_reload(checkpoint, done, quick))
    device, dtype = device or torch.device("cpu"), dtype or checkpoint.dtype
    readable = not checkpoint.damaged
    kernels = kernel_table(checkpoint, device, dtype) if readable and checkpoint.container != DENSE else []
    stored: dict[str, int] = {}
    for module in checkpoint.modules.values() if readable and checkpoint.container != DENSE else ():
        stored[str(module.scheme)] = stored.get(str(module.scheme), 0) + 1
    name = str(dtype).removeprefix("torch.")
    seconds = time.monotonic() - started
    return CheckReport(
        str(path), checkpoint.container, reader, stored, tuple(done), tuple(kernels), str(device), name, seconds
    )


def run_check(entry: Check, checkpoint: Checkpoint) -> Checked:
    """Run one check, or say why it does not apply."""
    if entry.quantized and checkpoint.container == DENSE:
        return Checked(entry, skipped="nothing is compressed")
    if checkpoint.reader not in entry.readers:
        return Checked(entry, skipped=f"only with --for {entry.readers[-1]}")
    if entry.whole and checkpoint.damaged:
        return Checked(entry, skipped=f"{checkpoint.damaged[0].where} cannot be read")
    if entry.model and isinstance(checkpoint.model, CompressorError):
        return Checked(entry, skipped="no model can be built from config.json")
    try:
        return Checked(entry, tuple(entry.run(checkpoint)))
    except CompressorError as problem:
        return Checked(entry, (error(entry.id, problem.message, problem.hint),))


def _reload(checkpoint: Checkpoint, done: list[Checked], quick: bool) -> Checked:
    if quick:
        return Checked(RELOAD, skipped="left out by --quick")
    errors = sum(finding.severity is Severity.ERROR for entry in done for finding in entry.findings)
    if errors:
        return Checked(RELOAD, skipped=f"not tried: {errors} error{'s' * (errors > 1)} above come first")
    return run_check(RELOAD, checkpoint)
