"""Model types of native checkpoints: `compressor_llama` is a Llama whose weights only this package can read.

Stock transformers raises on such a type. With this package imported it resolves to the base type's own config class, so
that every auto class finds the base model.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from compressor.formats.native import MODEL_TYPE_PREFIX


def register(auto: ModuleType) -> None:
    """Add a native twin of every model type transformers knows.

    Args:
        auto: `transformers.models.auto.configuration_auto`. Only names are touched: no config class is imported.
    """
    mapping = auto.CONFIG_MAPPING
    for base in list(auto.CONFIG_MAPPING_NAMES):
        mapping.register(MODEL_TYPE_PREFIX + base, _twin(mapping, base), exist_ok=True)


def _twin(mapping: Any, base: str) -> type:
    """Return a stand-in whose constructors give the base type's config."""

    def from_dict(config_dict: dict[str, Any], **kwargs: Any) -> Any:
        plain = {key: value for key, value in config_dict.items() if key != "base_model_type"}
        return mapping[base].from_dict({**plain, "model_type": base}, **kwargs)

    def from_pretrained(path: Any, **kwargs: Any) -> Any:
        config_dict, rest = mapping[base].get_config_dict(path, **kwargs)
        return from_dict(config_dict, **rest)

    methods = {"from_dict": staticmethod(from_dict), "from_pretrained": staticmethod(from_pretrained)}
    return type(f"Compressor_{base}_Config", (), {"model_type": MODEL_TYPE_PREFIX + base, **methods})
