"""Puts stored tensors where a model wants them: shape checked, on its device, in its dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multiexit_engine.checkpoint.weights import Weights
from multiexit_engine.errors import CheckpointError


@dataclass(frozen=True)
class TensorLoader:
    """Loads weights for one device and dtype; a tensor that fits already is not copied."""

    weights: Weights
    device: torch.device
    dtype: torch.dtype

    def load(self, name: str, *shape: int) -> Tensor:
        """The contiguous tensor ``name``; raises CheckpointError when missing or misshapen."""
        return self._place(self._checked(name, shape))

    def load_transposed(self, name: str, *shape: int) -> Tensor:
        """A matrix of ``shape`` that is stored transposed, as GPT-2's Conv1D weights are."""
        return self._place(self._checked(name, shape[::-1]).t())

    def load_stacked(self, names: list[str], shapes: list[tuple[int, ...]]) -> Tensor:
        """Several tensors as one, joined along their first dimension; one alone is not copied."""
        parts = [self._checked(name, shape) for name, shape in zip(names, shapes, strict=True)]
        if len(parts) == 1:
            return self._place(parts[0])
        return self._place(torch.cat([part.to(self.dtype) for part in parts]))

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype).contiguous()

    def _checked(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.weights.get(name)
        if tensor.shape != shape:
            raise CheckpointError(
                f"tensor {name!r} has the shape {list(tensor.shape)}, but config.json asks for "
                f"{list(shape)}: the two files belong to different models"
            )
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise CheckpointError(
                f"tensor {name!r} is stored as {tensor.dtype}: allowed are float16, bfloat16, "
                "float32 and float64; quantized checkpoints are not read"
            )
        return tensor
