"""A `config.json` that says how wide a cut model is, where the model's own config has words for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import init_empty_weights
from transformers import PreTrainedModel

from compressor.checkpoint.config import model_class, quiet, read_config
from compressor.checkpoint.cuts import cuts_of
from compressor.checkpoint.source import Source
from compressor.structured.units import Unit


def plain_config(
    source: Source, model: PreTrainedModel, kept: Sequence[Unit], trust_remote_code: bool = False
) -> dict[str, Any] | None:
    """Return the `config.json` from which the class builds the cut model, or None if there is none.

    There is one where every layer has as many heads and neurons as the others, and the class takes the number of heads,
    their size and the number of neurons from its config. Whether it does is tried, by building the model.

    Args:
        source: The original.
        model: The cut model.
        kept: The units it has left.
        trust_remote_code: Run code that comes with the checkpoint.
    """
    if cuts_of(source.config) is not None or model.config.get_text_config() is not model.config:
        return None
    sizes: dict[tuple[str, str], int] = {}
    for unit in kept:
        key = unit.part.kind, unit.part.reader
        sizes[key] = sizes.get(key, 0) + unit.size
    by_kind = {kind: {size for (k, _), size in sizes.items() if k == kind} for kind in ("heads", "neurons")}
    if any(len(found) > 1 for found in by_kind.values()):
        return None
    changed: dict[str, Any] = {}
    for part in {unit.part for unit in kept if unit.part.kind == "heads"}:
        size = part.width // part.heads
        n_heads = by_kind["heads"].copy().pop() // size
        changed |= {"num_attention_heads": n_heads, "num_key_value_heads": n_heads // part.heads, "head_dim": size}
    if by_kind["neurons"]:
        changed["intermediate_size"] = by_kind["neurons"].pop()
    names = {**getattr(type(model.config), "attribute_map", {})}
    config = {**source.config, **{names.get(key, key): value for key, value in changed.items()}}
    return config if _builds(source, config, model, trust_remote_code) else None


def _builds(source: Source, content: dict[str, Any], model: PreTrainedModel, trust_remote_code: bool) -> bool:
    """Return whether the class builds a model of the same shapes from this config."""
    config = read_config(source.path, trust_remote_code)
    try:
        config = type(config).from_dict(content)
        with init_empty_weights(), quiet():
            built = model_class(source.path, config, trust_remote_code)._from_config(config)
    except (ValueError, TypeError, RuntimeError):
        return False  # such as a width that the number of heads does not divide
    except Exception as error:  # what transformers validates configs with raises errors of its own
        if type(error).__module__.startswith("huggingface_hub"):
            return False
        raise
    shapes = ({name: value.shape for name, value in one.state_dict().items()} for one in (built, model))
    return next(shapes) == next(shapes)
