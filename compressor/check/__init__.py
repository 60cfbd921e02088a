"""Checking a finished checkpoint: is it what it says, can it be trusted, and who can load it."""

from compressor.check.finding import Finding, Reader, Severity
from compressor.check.run import CHECKS, CheckReport, check

__all__ = ["CHECKS", "CheckReport", "Finding", "Reader", "Severity", "check"]
