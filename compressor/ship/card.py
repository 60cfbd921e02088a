"""The model card: what was done to a checkpoint, how well it does, how to load it, and what it cannot do.

Everything in it is read from the files that lie beside the checkpoint; the same folder gives the same card, byte for
byte, so that uploading it twice changes nothing.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from compressor.checkpoint.source import read_json
from compressor.evals.compare import difference, is_perplexity
from compressor.evals.results import Evaluation
from compressor.evals.scores import Estimate
from compressor.evals.verdict import read_verdict
from compressor.formats.native import MODEL_TYPE_PREFIX
from compressor.formats.pruned import PRUNED
from compressor.measure import BASELINE_EVALUATION, EVALUATION
from compressor.pruning import PRUNERS
from compressor.ship.origin import Origin, report_of
from compressor.ship.run import RESOLVED

MARK = "<!-- written by compress -->"
"""Tells a card of ours from one a person wrote."""

_LABELS = {
    "kl": "KL divergence to the original (nats per token)",
    "kl_p99": "its 99th percentile over tokens",
    "agreement": "same most likely token as the original",
    "nll": "nats per token",
}
_DEFAULTS = {"n_samples": 32, "seq_len": 512}
_SEARCHES = ("icbs", "m-fac", "optin")
"""Methods that look at the calibration text themselves: no tensor's row counts its tokens."""


def make_card(folder: Path, repo: str, origin: Origin) -> str:
    """Return the card of a result.

    Args:
        folder: The result.
        repo: `owner/name` it is uploaded to.
        origin: The model it was made from.

    Raises:
        CheckpointError: There is no finished result in the folder, or a file beside it is damaged.
    """
    report, config = report_of(folder), read_json(folder / "config.json")
    native = str(config.get("model_type", "")).startswith(MODEL_TYPE_PREFIX)
    sections = [
        _front(report, config, origin, native),
        f"{MARK}\n# {repo.rpartition('/')[2]}",
        _what(report, origin),
        _scores(folder),
        _loading(repo, config, native, _packed(report)),
        _how(folder, report),
        _limits(report, native, folder),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def command_of(recipe: Mapping[str, Any]) -> str:
    """Return the `compress quantize` or `compress prune` call that a saved recipe came from, or an equal one."""
    prunes = recipe["method"] in PRUNERS
    words = ["compress", "prune" if prunes else "quantize", _name(str(recipe["model"]))]
    words += ["--method", str(recipe["method"])]
    options = dict(recipe.get("options") or {})
    for key in ("sparsity", "pattern", "macs", "finetune") if prunes else ():
        amount = options.pop(key, None) or recipe.get(key)
        words += [f"--{key}", str(amount)] if amount else []
    for key, flag in (("format", "--format"), ("group_size", "--group-size"), ("inputs", "--inputs")):
        if recipe.get(key) not in (None, PRUNED):
            words += [flag, str(recipe[key])]
    for key, value in options.items():
        words += ["--option", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    for override in recipe.get("overrides") or ():
        if override.get("keep"):
            words += ["--skip", override["match"]]
        else:
            size = f":{override['group_size']}" if override.get("group_size") else ""
            words += ["--set", f"{override['match']}={override['format']}{size}"]
    for glob in recipe.get("skip") or ():
        words += ["--skip", glob]
    for glob in recipe.get("skip_inputs") or ():
        words += ["--skip-inputs", glob]
    if recipe.get("kv_cache"):
        words += ["--kv-cache", recipe["kv_cache"]]
    if recipe.get("attention"):
        words += ["--attention", recipe["attention"]]
    if recipe.get("batch_norm"):
        words += ["--batch-norm", recipe["batch_norm"]]
    calibration = recipe.get("calibration") or {}
    words += ["--data", _name(str(recipe["data"]))] if recipe.get("data") else []
    if calibration.get("data", "python-docs") != "python-docs":
        words += ["--data", _name(calibration["data"])]
    for key, default in _DEFAULTS.items():
        if calibration.get(key, default) != default:
            words += [f"--{key.replace('_', '-')}", str(calibration[key])]
    if recipe.get("seed"):
        words += ["--seed", str(recipe["seed"])]
    words += ["--trust-remote-code"] if recipe.get("trust_remote_code") else []
    return shlex.join(words)


def _front(report: Mapping[str, Any], config: Mapping[str, Any], origin: Origin, native: bool) -> str:
    """Return the metadata block the Hub reads."""
    recipe = report["recipe"]
    data: dict[str, Any] = {"library_name": "transformers"}
    if origin.licence:
        data["license"] = origin.licence
    if origin.repo:
        data |= {"base_model": [origin.repo], "base_model_relation": "quantized"}
    if origin.languages:
        data["language"] = list(origin.languages)
    if any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ()):
        data["pipeline_tag"] = "text-generation"
    container = ["compress-hf"] if native else ["compressed-tensors"] if _packed(report) else []
    tags = [*container, recipe["method"], *_formats(report)]
    data["tags"] = list(dict.fromkeys([*tags, *([recipe["inputs"]] if recipe.get("inputs") else [])]))
    return "---\n" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True) + "---"


def _formats(report: Mapping[str, Any]) -> list[str]:
    """Return the formats of a report's tensors, the most frequent first."""
    counts = Counter(row["action"] for row in report["rows"] if row["action"] not in ("kept", "rewritten"))
    return [name for name, _ in counts.most_common()]


def _packed(report: Mapping[str, Any]) -> bool:
    """Return whether any weight is stored packed: pruned and cut ones are dense."""
    return any(name != PRUNED for name in _formats(report))


def _what(report: Mapping[str, Any], origin: Origin) -> str:
    recipe = report["recipe"]
    name = (
        f"[{origin.repo}](https://huggingface.co/{origin.repo})" if origin.repo else f"`{Path(recipe['model']).name}`"
    )
    at = f" at commit `{origin.revision[:12]}`" if origin.revision else ""
    before, after = report["bytes_before"], report["bytes_after"]
    rows: dict[str, list[int]] = {}
    for row in report["rows"]:
        entry = rows.setdefault(row["action"], [0, 0, 0])
        entry[0], entry[1], entry[2] = entry[0] + 1, entry[1] + row["bytes_before"], entry[2] + row["bytes_after"]
    bits = f", {report['bits_per_weight']:.3f} bits per compressed weight with scales" if _packed(report) else ""
    lines = [
        f"{name}{at}, compressed after training with `{recipe['method']}`: weights take {_mb(after)} instead of "
        f"{_mb(before)} ({before / max(after, 1):.2f} times smaller){bits}."
        + _removed(report)
        + (f" Inputs of layers are rounded to `{recipe['inputs']}` at run time." if recipe.get("inputs") else ""),
        "",
        "| tensors | stored as | before | after |",
        "|---|---|---|---|",
        *(f"| {n} | {action} | {_mb(size)} | {_mb(left)} |" for action, (n, size, left) in sorted(rows.items())),
    ]
    if not origin.licence:
        lines += ["", "The licence of the original applies; it was not found in its files."]
    return "\n".join(lines)


def _removed(report: Mapping[str, Any]) -> str:
    """Return what pruning left, as a sentence; nothing where nothing was pruned."""
    if report.get("sparsity") and report["recipe"]["method"] in PRUNERS:
        return f" {report['sparsity']:.1%} of the pruned layers' weights are zero."
    measured = report.get("measured") or {}
    before, after = measured.get("before"), measured.get("finetuned") or measured.get("pruned") or measured.get("after")
    if not before or not after:
        return ""
    share, parameters = after["macs"] / before["macs"], after["parameters"] / before["parameters"]
    return f" {share:.1%} of the multiply-adds and {parameters:.1%} of the parameters are left."


def _scores(folder: Path) -> str:
    """Return the evaluation as a table, and what the gate said; empty if it was not evaluated."""
    if not (folder / EVALUATION).is_file():
        return "## Evaluation\n\nNot evaluated."
    ours = Evaluation.read(folder / EVALUATION)
    base = folder / BASELINE_EVALUATION
    theirs = Evaluation.read(base) if base.is_file() else None
    lines = ["## Evaluation", "", "| metric | original | this model | paired difference |", "|---|---|---|---|"]
    for name, task in ours.tasks.items():
        reference = theirs.tasks.get(name) if theirs else None
        for metric, estimate in task.metrics.items():
            change = difference(task, reference, metric) if reference else None
            before = reference.metrics.get(metric) if reference else None
            relative = is_perplexity(task, metric)
            cells = (_number(before), _number(estimate), _number(change, relative=relative, signed=True))
            label = _LABELS.get(metric) or (metric if metric in (name, "perplexity") else f"{name} {metric}")
            lines.append(f"| {label} | {' | '.join(cells)} |")
    settings = "; ".join(
        f"{name}: {chosen['n_tokens']} tokens of {chosen['text']} in windows of {chosen['context']}"
        for name, chosen in ((name, task.settings) for name, task in ours.tasks.items())
        if "n_tokens" in chosen
    )
    lines += [
        "",
        f"± is one standard error. Computed in {ours.model.dtype} by `{ours.model.execution_path}`. {settings}",
    ]
    verdict = read_verdict(folder)
    if verdict is not None:
        rules = [f"- `{entry['rule']}`: {entry['verdict']}" for entry in verdict["rules"]]
        said = "passed" if verdict["passed"] else "**did not pass**"
        lines += ["", f"It {said} the gate (one-sided bounds at {verdict['confidence']:g}):", "", *rules]
    return "\n".join(lines)


def _loading(repo: str, config: Mapping[str, Any], native: bool, packed: bool) -> str:
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    transformers = [
        "```python",
        *(["import compressor  # pip install compress-hf: stock transformers raises without it"] if native else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="{dtype}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
        "```",
    ]
    vllm = ["```console", f"$ vllm serve {repo}", "```", "", "It has not been run in vLLM here."]
    if native:
        what = (
            "the format has no place in compressed-tensors" if packed else "its config cannot say how wide layers are"
        )
        vllm = [f"vLLM cannot load it: {what}."]
    ours = [
        "```python",
        "import compressor  # pip install compress-hf",
        "from huggingface_hub import snapshot_download",
        "",
        f'model = compressor.load(snapshot_download("{repo}"))'
        + ("  # weights stay packed in memory" if packed else ""),
        "```",
    ]
    parts = ["## Loading", "", "transformers:", "", *transformers, "", "vLLM:", "", *vllm, "", "compress:", "", *ours]
    return "\n".join(parts)


def _how(folder: Path, report: Mapping[str, Any]) -> str:
    recipe = report["recipe"]
    calibration = recipe.get("calibration") or {}
    resolved = folder / RESOLVED
    if resolved.is_file():
        text = yaml.safe_dump(_public(yaml.safe_load(resolved.read_text(encoding="utf-8"))), sort_keys=False, width=120)
        given = ["`compress run` with this recipe:", "", "```yaml", text.strip(), "```"]
    else:
        given = ["```console", f"$ {command_of(recipe)}", "```"]
    data = (
        f"Calibration: {calibration.get('n_samples')} windows of {calibration.get('seq_len')} tokens of "
        f"`{calibration.get('data')}`, seed {recipe.get('seed', 0)}."
        if any(row.get("tokens") for row in report["rows"]) or (calibration and recipe["method"] in _SEARCHES)
        else "No calibration data was used."
    )
    versions = ", ".join(f"{name} {version}" for name, version in sorted(report["versions"].items()))
    return "\n".join(["## How it was made", "", *given, "", data, "", f"Versions: {versions}."])


def _public(document: dict[str, Any]) -> dict[str, Any]:
    """Return a resolved recipe without places on the machine it ran on, and without the upload."""
    kept = {key: value for key, value in document.items() if key != "output" and value}
    steps = [step for step in document.get("steps") or () if "push" not in step]
    return {**kept, "model": _name(str(document.get("model"))), "steps": _without_paths(steps)}


def _without_paths(value: Any) -> Any:
    """Return settings without those that say nothing, and paths cut to their last part."""
    if isinstance(value, dict):
        return {key: _without_paths(entry) for key, entry in value.items() if entry not in (None, "", [], {})}
    if isinstance(value, list):
        return [_without_paths(entry) for entry in value]
    return _name(value) if isinstance(value, str) else value


def _name(text: str) -> str:
    """Return the last part of a path on this machine, and anything else as it is."""
    return Path(text).name if text.startswith(("/", "~", "../")) or Path(text).exists() else text


def _limits(report: Mapping[str, Any], native: bool, folder: Path) -> str:
    verification = report.get("verification") or {}
    error = verification.get("relative_error")
    checked = (
        f"A fresh process loaded it and its logits differed by {error:.1e} (relative) from those it was written with."
        if verification.get("ok") and error is not None
        else "**It was not verified by loading it.**"
    )
    lines = [f"- {checked}"]
    if native:
        lines.append("- Stock transformers, vLLM and other programs cannot load it without the package `compress-hf`.")
    elif _packed(report):
        lines.append(
            "- Stock transformers decompresses it on the first forward pass: the file is small, its memory is not."
        )
    if not (folder / EVALUATION).is_file():
        lines.append("- Nothing was measured: what compression cost is not known.")
    lines += [f"- {event}" for event in dict.fromkeys(report.get("events") or ())][:12]
    lines.append("- It has the biases and gaps of the original, and compression can add to them.")
    return "\n".join(["## Limits", "", *lines])


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _number(estimate: Estimate | None, relative: bool = False, signed: bool = False) -> str:
    """Write an estimate with two digits of its standard error; four digits if it has none."""
    if estimate is None:
        return ""
    factor = 100 if relative else 1
    value, sign = factor * estimate.value, "+" if signed else ""
    if not estimate.standard_error:
        return f"{value:{sign}.4g}{' %' if relative else ''}"
    error = factor * estimate.standard_error
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:{sign}.{digits}f} ± {error:.{digits}f}{' %' if relative else ''}"
