"""Every op composed of PyTorch's own kernels, on any device."""
