"""Tensor-level front of the CUDA C++ kernels in csrc/cuda.

Imports without them; ``built`` does not.
"""
