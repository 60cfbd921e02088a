"""Executes a sealed plan: streams blocks through method and format, one resident at a time, and can stop anywhere.

For each block: load it, run the calibration samples through it while statistics are collected, let the method decide,
put the decided values back, write the packed bytes, append a journal line, free the block. A unit counts as finished
when its journal line is on the disk; a rerun continues behind the last one and writes the same bytes.
"""

from __future__ import annotations

from compressor.engine.engine import Engine

__all__ = ["Engine"]
