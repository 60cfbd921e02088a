"""Bits per layer for a size that is wished for: formats chosen from measured errors, or by rule."""

from compressor.bits.chooser import MENU, BitChooser, Bits
from compressor.bits.rules import RULED_MENU

__all__ = ["MENU", "RULED_MENU", "BitChooser", "Bits"]
