"""PyTorch's packed CPU operators behind the dispatch of kernels."""
