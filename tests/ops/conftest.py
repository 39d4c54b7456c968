"""Triton backends run in the repaired interpreter where there is no GPU."""

import contextlib

import torch

if not torch.cuda.is_available():
    with contextlib.suppress(ImportError):
        from tests.kernels import interpreter  # noqa: F401
