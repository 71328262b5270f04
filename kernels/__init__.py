"""Triton kernels of the feedback rules' products, packaged as ``pyfeedback.kernels``.

Importing this package does not import triton, which is optional; importing ``pyfeedback.kernels.backward`` does. The
package imports nothing else of pyfeedback. No speed is claimed: nothing here was measured on a GPU.
"""
