"""Triton kernels that multiply by weights which stay packed; everything here imports Triton only when it is used."""
