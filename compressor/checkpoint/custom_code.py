"""Checkpoints whose model class is no part of transformers but Python code that lies beside the weights.

Loading such a class runs that code, so it happens only when the user asked for it and only when there is no other way:
an architecture that transformers has is always taken from transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from compressor.errors import CheckpointError, UnsupportedError


def needs_code(config: Mapping[str, Any], where: object, trust_remote_code: bool) -> bool:
    """Return whether a checkpoint's classes come from its own code; runs none of it.

    Args:
        config: Parsed `config.json`.
        where: The checkpoint's path or id, for messages.
        trust_remote_code: The user's permission.

    Raises:
        UnsupportedError: They do, and the user has not allowed it, or the code lies in another repository.
    """
    references = _references(config)
    architecture = _architecture(config)
    if not references or (_is_native(architecture) and config.get("model_type") in CONFIG_MAPPING):
        return False
    if not trust_remote_code:
        files = sorted({f"{reference.rpartition('--')[2].partition('.')[0]}.py" for reference in references.values()})
        raise UnsupportedError(
            f"{where}: architecture {architecture!r} is not in transformers {transformers.__version__}; "
            f"it is code of the checkpoint's own ({', '.join(files)}), which was not run",
            "read that code, and if you trust it, allow it: compress quantize --trust-remote-code, "
            "or trust_remote_code=True in Python",
        )
    for reference in references.values():
        if "--" in reference:
            raise UnsupportedError(
                f"{where}: its code lies in another repository ({reference.partition('--')[0]}), "
                "whose content no revision pins",
                "download that code into the checkpoint's folder and name it in `auto_map` without the repository",
            )
    return True


def custom_class(path: Path, config: Mapping[str, Any]) -> type[PreTrainedModel]:
    """Import the model class a checkpoint brings along; call it only where `needs_code` returned True.

    Raises:
        CheckpointError: `auto_map` does not name the architecture, or its code cannot be imported.
    """
    architecture = _architecture(config)
    references = _references(config).values()
    reference = next((r for r in references if r.rpartition(".")[2] == architecture), None)
    if reference is None:
        raise CheckpointError(
            f"{path / 'config.json'}: `auto_map` names no file for {architecture!r}",
            'add it, for example "AutoModelForCausalLM": "modeling_name.ClassName"',
        )
    try:
        found = get_class_from_dynamic_module(reference, str(path))
    except Exception as error:  # whatever a stranger's code raises when imported
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: {reference}: {reason}", "does it import packages that are missing?") from error
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise CheckpointError(f"{path}: {reference} is no PreTrainedModel", "only transformers models can be loaded")
    return found


def _references(config: Mapping[str, Any]) -> dict[str, str]:
    """Return auto class -> `file.Class` for the classes a model is made of; tokenizers are not among them."""
    entries = config.get("auto_map")
    if not isinstance(entries, Mapping):
        return {}
    return {
        str(key): value
        for key, value in entries.items()
        if isinstance(value, str) and (key == "AutoConfig" or str(key).startswith("AutoModel"))
    }


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "(none)"


def _is_native(architecture: str) -> bool:
    found = getattr(transformers, architecture, None)
    return isinstance(found, type) and issubclass(found, PreTrainedModel)
