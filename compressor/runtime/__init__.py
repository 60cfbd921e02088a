"""Running checkpoints: `load` gives a model whose packed weights stay packed in memory."""

from compressor.runtime.loader import execution_path, load
from compressor.runtime.modules import PackedExperts, PackedLinear
from compressor.runtime.stored import KeyMismatch, dequantized

__all__ = ["KeyMismatch", "PackedExperts", "PackedLinear", "dequantized", "execution_path", "load"]
