"""What stock transformers makes of a checkpoint; runs as a script of its own that never imports this package.

Reads a job as JSON on stdin, prints one JSON object: names that did not fit, hashes of the weights it multiplies with
once the first forward pass has decompressed them, and whether the output is finite. The logits go to a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from typing import Any


def weight_hash(tensor: Any) -> str:
    """Return the SHA-256 of a tensor's values; both zeros count as one."""
    import torch

    values = (tensor.detach() + 0).contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def load(job: dict[str, Any]) -> dict[str, Any]:
    """Load, run once, and describe.

    Args:
        job: `folder`, `architecture`, `dtype`, `probe` (a safetensors file with `inputs`), `out` (where logits go), and
            `weights`: name -> [parameter, expert or null, rows or null].
    """
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    cls = getattr(transformers, job["architecture"])
    model, info = cls.from_pretrained(
        job["folder"], dtype=getattr(torch, job["dtype"]), output_loading_info=True, local_files_only=True
    )
    model.eval()
    inputs = load_file(job["probe"])["inputs"]
    if inputs.is_floating_point():
        inputs = inputs.to(model.dtype)
    with torch.no_grad():
        output = model(**{model.main_input_name: inputs})
    logits = output.logits if hasattr(output, "logits") else output[0]
    save_file({"logits": logits.float().contiguous()}, job["out"])
    state = model.state_dict()
    hashes = {}
    for name, (param, expert, rows) in job["weights"].items():
        if param in state:
            value = state[param] if expert is None else state[param][expert]
            hashes[name] = weight_hash(value if rows is None else value[rows[0] : rows[1]])
    wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
    bad = int((~torch.isfinite(logits.float())).sum())
    return {"wrong": wrong, "hashes": hashes, "not_finite": bad, "values": logits.numel(), "error": None}


def main() -> None:
    """Do the job on stdin; whatever goes wrong while loading is the answer, not a crash."""
    job = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer = load(job)
        except Exception as problem:  # transformers raises whatever the files provoke
            text = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            answer = {
                "wrong": {},
                "hashes": {},
                "not_finite": 0,
                "values": 0,
                "error": f"{type(problem).__name__}: {text}",
            }
    if "compressor" in sys.modules:
        raise SystemExit("this package was imported: the reader was not a stock one")
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
