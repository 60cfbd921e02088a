"""The quantizer that lets `AutoModel....from_pretrained` load native checkpoints, packed in memory."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from compressor.formats.native import QUANT_METHOD


def register(auto: ModuleType) -> None:
    """Add quantizer and quantization config under our name.

    Args:
        auto: `transformers.quantizers.auto`.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class CompressorConfig(QuantizationConfigMixin):
        """A native `quantization_config`, kept as it is."""

        def __init__(self, **fields: Any) -> None:
            fields.pop("quant_method", None)
            self.quant_method: Any = QUANT_METHOD
            for key, value in fields.items():
                setattr(self, key, value)

    class CompressorQuantizer(HfQuantizer):
        """Swaps packed modules in before transformers fills tensors by name."""

        requires_calibration = True  # there is nothing to quantize on the fly

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            from compressor.runtime.swap import swap_native

            swap_native(model, self.quantization_config.to_dict())

        def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
            from compressor.runtime.swap import without_stacking

            return without_stacking(weight_conversions, model)

        def is_serializable(self) -> bool:
            """Say no: saving would need the original names; copy the folder instead."""
            return False

        @property
        def is_trainable(self) -> bool:
            """Say no where anything is packed: codes have no gradients. A model that is only cut can be trained."""
            return not self.quantization_config.to_dict().get("modules")

    auto.register_quantization_config(QUANT_METHOD)(CompressorConfig)
    auto.register_quantizer(QUANT_METHOD)(CompressorQuantizer)
