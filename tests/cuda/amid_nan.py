"""Tensors in memory that is NaN around them."""

import torch


def amid_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in memory that has 128 bytes of NaN on both sides."""
    beside = 128 // tensor.element_size()
    around = torch.full((tensor.numel() + 2 * beside,), torch.nan, dtype=tensor.dtype)
    return around[beside:-beside].view(tensor.shape).copy_(tensor)
