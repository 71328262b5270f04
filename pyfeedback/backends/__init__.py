"""Implementations by PyTorch's own kernels (composite), the compiled library (extension) and Triton; dispatch."""
