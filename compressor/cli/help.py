"""How every `--help` reads: examples at its end, options under headings, defaults in words, what the shell completes.

The verbs say what an option means. What is the same for all of them is said here, by the parameter's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

from typer.models import OptionInfo, ParameterInfo

from compressor.cli import complete

MODEL = "smollm2-135m"
OUT = f"{MODEL}-gptq-int4"

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        f"compress quantize {MODEL} --method gptq",
        f"compress eval {OUT}",
        "compress list methods",
    ),
    "quantize": (
        f"compress quantize {MODEL} --method gptq --format int4",
        f"compress quantize {MODEL} -m rtn -f int8 --dry-run",
        "compress quantize MODEL -m gptq --set '*.down_proj=int8' --skip '*.o_proj'",
    ),
    "prune": (
        f"compress prune {MODEL} --method wanda --sparsity 0.5",
        f"compress prune {MODEL} --method sparsegpt --pattern 2:4",
    ),
    "eval": (
        f"compress eval {OUT}",
        f"compress eval {OUT} --tasks perplexity,kl,minimal-pairs -o results",
    ),
    "gate": ("compress gate base.json new.json --rule 'ppl <= +2%' --rule 'kl <= 0.05'",),
    "generate": (f"compress generate {OUT} -b {MODEL} -p 'Why is the sky blue?'",),
    "check": (f"compress check {OUT} --for vllm",),
    "inspect": (
        f"compress inspect {OUT} --layer '*.down_proj'",
        f"compress inspect {OUT} --baseline {MODEL} --html page.html",
    ),
    "bench": (f"compress bench {OUT} --threads 1",),
    "run": (
        f"compress run w4-gptq --model {MODEL} --output out",
        "compress run recipe.yaml --set 'gate.rules=[\"kl <= 0.05\"]' --dry-run",
    ),
    "auto": (f"compress auto {MODEL} --size 4.25bpw --for transformers",),
    "export": ("compress export path/to/resnet --onnx resnet.onnx --image-size 224",),
    "push": (
        f"compress push {OUT} owner/name --private",
        f"compress push {OUT} owner/name --card",
    ),
    "list": ("compress list methods", "compress list methods gptq", "compress list formats --json"),
}
"""Verb -> commands to start from; `` is the program itself."""

PAGES = {
    "quantize": "choosing",
    "prune": "pruning",
    "eval": "evaluation",
    "gate": "gate",
    "check": "check",
    "inspect": "inspect",
    "bench": "bench",
    "run": "recipes",
    "auto": "recipes",
    "export": "vision",
    "push": "ship",
}
"""Verb -> the page of `docs` about it."""

_CALIBRATION = ("data", "n_samples", "seq_len", "min_expert_tokens", "seed")
_RUN = ("output", "device", "max_memory", "force", "trust_remote_code", "allow_pickle", "dry_run", "json_", "quiet")
PANELS: dict[str, dict[str, tuple[str, ...]]] = {
    "quantize": {
        "Which tensors": ("skip", "skip_inputs", "set_", "target_bits", "menu", "bits_by"),
        "Calibration": _CALIBRATION,
        "The run": _RUN,
    },
    "prune": {"Calibration": _CALIBRATION, "The run": _RUN},
    "eval": {"The run": (*_RUN, "batch_size", "cache", "list_")},
    "auto": {"Calibration": _CALIBRATION, "The run": _RUN},
}
"""Verb -> heading -> parameters under it; the others are under `Options`."""

METAVARS = {
    "batch": "N",
    "batch_size": "N",
    "confidence": "SHARE",
    "context": "N",
    "data": "TEXT",
    "device": "DEVICE",
    "dtype": "DTYPE",
    "effort": "EFFORT",
    "finetune": "EPOCHS",
    "format": "FORMAT",
    "group_size": "GROUP",
    "inputs": "FORMAT",
    "limit": "N",
    "image_size": "N",
    "macs": "SHARE",
    "max_new_tokens": "N",
    "max_tokens": "N",
    "method": "METHOD",
    "min_expert_tokens": "N",
    "minutes": "N",
    "model": "MODEL",
    "n_samples": "N",
    "new_tokens": "N",
    "num_fewshot": "N",
    "output": "FOLDER",
    "prompt": "TEXT",
    "prompt_tokens": "N",
    "reader": "READER",
    "repeats": "N",
    "seed": "N",
    "seq_len": "N",
    "size_": "SIZE",
    "sparsity": "SHARE",
    "suite": "SUITE",
    "target_bits": "BITS",
    "tasks": "A,B,...",
    "text": "TEXT",
    "threads": "N",
    "baseline": "MODEL",
}
"""Parameter -> what stands for its value, where the verb does not say it."""

DEFAULTS: dict[str, dict[str, str]] = {
    "": {
        "attention": "none",
        "baseline": "none",
        "batch_norm": "left as it is",
        "bits_by": "measured",
        "data": "python-docs",
        "device": "auto",
        "effort": "balanced",
        "group_size": "64 for integers",
        "image_size": "the checkpoint's",
        "inputs": "not rounded",
        "junit": "none",
        "kv_cache": "none",
        "limit": "all",
        "markdown": "none",
        "max_memory": "no bound",
        "menu": "int2,int3,int4,int6,int8",
        "method": "by --minutes",
        "min_expert_tokens": "0.5 % of all",
        "model": "the recipe's",
        "n_samples": "32, or what --effort asks for",
        "num_fewshot": "the task's",
        "output": "a name of model, method, format",
        "reader": "none",
        "rules": "none",
        "runs": "beside DIR",
        "seq_len": "512",
        "suite": "none",
        "target_bits": "one format for all",
        "threads": "PyTorch's choice",
    },
    "quantize": {"format": "int4; fp4: nvfp4; nupes: power4"},
    "prune": {
        "data": "python-docs; images: none",
        "finetune": "0",
        "format": "not rounded",
        "macs": "by --sparsity",
        "n_samples": "the method's",
        "pattern": "none",
        "seq_len": "the method's",
        "sparsity": "0.5",
    },
    "eval": {
        "baseline": "the recipe's model",
        "output": "DIR",
        "tasks": "perplexity,kl; embeddings for encoders",
    },
    "bench": {"baseline": "the recipe's model", "output": "nothing is written"},
    "inspect": {"against": "none", "html": "none"},
    "run": {"output": "the recipe's"},
}
"""Verb -> parameter -> its default in words, where the code's own is None; `` holds for every verb."""

COMPLETIONS: dict[str, Callable[[str], Any]] = {
    "baseline": complete.models,
    "data": complete.data,
    "directory": complete.checkpoints,
    "effort": complete.efforts,
    "format": complete.formats,
    "inputs": complete.inputs,
    "method": complete.methods,
    "model": complete.models,
    "reader": complete.readers,
    "recipe": complete.recipes,
    "what": complete.lists,
}
"""Parameter -> what completes its value."""


def epilog(verb: str) -> str:
    """Return the text below a verb's options; Typer joins lines that no blank line keeps apart."""
    lines = ["Examples:" if len(EXAMPLES[verb]) > 1 else "Example:", *(f"$ {text}" for text in EXAMPLES[verb])]
    if verb in PAGES:
        lines.append(f"More: docs/{PAGES[verb]}.md")
    return "\n\n".join(_plain(line) for line in lines)


def dressed(verb: str, function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb's parameters headings, values, defaults in words and completion; return the function."""
    hints = get_type_hints(function, include_extras=True)
    headings = {name: heading for heading, names in PANELS.get(verb, {}).items() for name in names}
    words = {**DEFAULTS[""], **DEFAULTS.get(verb, {})}
    for name, hint in hints.items():
        info = next((part for part in getattr(hint, "__metadata__", ()) if isinstance(part, ParameterInfo)), None)
        if info is None:
            continue
        info.help = _plain(info.help or "")
        if info.autocompletion is None:
            info.autocompletion = complete.pruners if (verb, name) == ("prune", "method") else COMPLETIONS.get(name)
        if not isinstance(info, OptionInfo):
            continue
        info.metavar = info.metavar or METAVARS.get(name)
        info.rich_help_panel = info.rich_help_panel or headings.get(name)
        if name in words and _default_of(function, name) is None:
            info.show_default = words[name]
    function.__annotations__ = hints
    return function


def _default_of(function: Callable[..., None], name: str) -> object:
    import inspect

    return inspect.signature(function).parameters[name].default


def _plain(text: str) -> str:
    """Return text whose brackets are no markup."""
    return text.replace("\\[", "[").replace("[", "\\[")
