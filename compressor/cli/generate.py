"""`compress generate DIR --prompt TEXT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.flags import Device, Dtype, Json, TrustRemoteCode
from compressor.cli.render import STDOUT, print_json


def generate(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint folder or embedded model.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the model answers or continues.")],
    baseline: Annotated[str | None, typer.Option("--baseline", "-b", help="Show the original's text too.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Upper bound of the answer.")] = 64,
    chat: Annotated[bool, typer.Option("--chat/--plain", help="Use the chat template if there is one.")] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Let a checkpoint answer a prompt, greedily, next to the original if asked."""
    from compressor.checkpoint.resolve import resolve_model
    from compressor.environment import load_tokenizer, pick_device, pick_dtype
    from compressor.evals.generate import generate as answer
    from compressor.runtime import load

    texts = {}
    where = pick_device(device)
    paths = {
        name: Path(name) if Path(name).is_dir() else resolve_model(name, trust_remote_code)[0]
        for name in ((baseline, directory) if baseline else (directory,))
    }
    computed = pick_dtype(dtype, paths[directory], where)
    for name, path in paths.items():
        model = load(path, dtype=computed, device=where, trust_remote_code=trust_remote_code)
        texts[name] = answer(model, load_tokenizer(path, trust_remote_code), prompt, max_new_tokens, chat).text
    if json_:
        print_json({"prompt": prompt, "texts": texts})
        return
    STDOUT.print(f"prompt: {prompt}", soft_wrap=True, markup=False)
    for name, text in texts.items():
        STDOUT.print(f"\n{name}:\n  {text.strip()}", soft_wrap=True, markup=False)
