"""What stock transformers makes of a checkpoint, in one process that never imports this package."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

_SCRIPT = """
import json, sys, torch, transformers
from safetensors.torch import save_file
transformers.logging.set_verbosity(50); transformers.logging.disable_progress_bar()

def load(case):
    options = {}
    if case["dequantize"]:
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    cls = getattr(transformers, case["auto_class"])
    model, info = cls.from_pretrained(
        case["folder"], dtype=getattr(torch, case["dtype"]), output_loading_info=True, **options
    )
    with torch.no_grad():
        out = model(torch.tensor([[5, 3]]))  # the reader decompresses on the first forward
    state = {k: v for k, v in model.state_dict().items() if k.endswith(("weight", "proj")) and v.ndim > 1}
    state["<output>"] = out[0]
    save_file({k: v.clone().contiguous() for k, v in state.items()}, case["out"])
    return {k: sorted(map(str, v)) for k, v in info.items()}

answers = {}
for name, case in json.load(sys.stdin).items():
    try:
        answers[name] = {"info": load(case), "error": None}
    except Exception as error:
        answers[name] = {"info": {}, "error": f"{type(error).__name__}: {error}"}
assert "compressor" not in sys.modules
print("\\n" + json.dumps(answers))
"""


@dataclass(frozen=True)
class Case:
    """One folder to load.

    Attributes:
        folder: The checkpoint.
        dtype: Name of the torch dtype to load it in.
        auto_class: The transformers class that loads it.
        dequantize: Ask compressed-tensors to decompress at load time instead of at the first forward.
    """

    folder: Path
    dtype: str = "bfloat16"
    auto_class: str = "AutoModelForCausalLM"
    dequantize: bool = False


@dataclass(frozen=True)
class Loaded:
    """What came of one case.

    Attributes:
        weights: Matrices by their name in memory; empty if loading failed.
        output: Logits (or last hidden states) `[1, 2, ...]` for the tokens 5 and 3; None if loading failed.
        wrong_keys: Missing, unexpected and mismatched names.
        error: What was raised, or None.
    """

    weights: dict[str, Tensor]
    wrong_keys: tuple[str, ...]
    error: str | None
    output: Tensor | None = None


def load_stock(cases: dict[str, Case], scratch: Path) -> dict[str, Loaded]:
    """Load every case with stock transformers.

    Args:
        cases: By any name.
        scratch: Where the process leaves what it loaded.
    """
    outs = {name: scratch / f"stock-{index}.safetensors" for index, name in enumerate(cases)}
    job = {name: {**asdict(case), "folder": str(case.folder), "out": str(outs[name])} for name, case in cases.items()}
    command = [sys.executable, "-c", _SCRIPT]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = {}
    for name, answer in json.loads(done.stdout.splitlines()[-1]).items():
        weights = load_file(outs[name]) if answer["error"] is None else {}
        wrong = tuple(f"{kind}: {key}" for kind, keys in answer["info"].items() for key in keys)
        loaded[name] = Loaded(weights, wrong, answer["error"], weights.pop("<output>", None))
    return loaded
