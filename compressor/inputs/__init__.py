"""What happens to a layer's input before the matmul: an ordered list of operations, each with one definition.

Methods that treat activations (LLM-FP4's power-of-two offsets, OutlierTune's shift, EAQuant's rotation) express
themselves as these operations; the loader stores and restores them, kernels may fuse them, and `apply` below is what
any fused version must equal. Weight-only results leave the list empty.
"""

from compressor.inputs.base import OPERANDS, InputOp, apply_ops
from compressor.inputs.floats import RoundFloat
from compressor.inputs.moves import Permute, Pow2, Rotate, Scale, Shift
from compressor.inputs.operands import integer_operands
from compressor.inputs.powers import RoundPower
from compressor.inputs.quantize import Quantize
from compressor.inputs.stored import calibrated, carried, is_static, rebuild, saturated, stored_slots

__all__ = [
    "OPERANDS",
    "InputOp",
    "Permute",
    "Pow2",
    "Quantize",
    "Rotate",
    "RoundFloat",
    "RoundPower",
    "Scale",
    "Shift",
    "apply_ops",
    "calibrated",
    "carried",
    "integer_operands",
    "is_static",
    "rebuild",
    "saturated",
    "stored_slots",
]
