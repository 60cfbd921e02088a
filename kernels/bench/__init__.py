"""Timing the kernels: `python -m compressor.kernels.bench`."""
