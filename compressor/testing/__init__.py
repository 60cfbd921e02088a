"""Conformance suites and tiny models for tests, ours and those of plug-in authors. Needs pytest."""

from __future__ import annotations

from compressor.testing.block_methods import BlockMethodConformance
from compressor.testing.formats import FormatConformance
from compressor.testing.methods import MethodConformance

__all__ = ["BlockMethodConformance", "FormatConformance", "MethodConformance"]
