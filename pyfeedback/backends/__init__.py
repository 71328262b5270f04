"""Implementations: PyTorch's own kernels (composite), the compiled library (extension), Triton; dispatch chooses."""
