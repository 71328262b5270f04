"""Triton kernels of the feedback rules' products, packaged as ``pyfeedback.kernels``.

Importing this package imports no triton, which may be absent: `pyfeedback.kernels.ops` does. It knows nothing of the
package around it. No speed is claimed: nothing here was measured on a GPU.
"""
