"""Puts stored tensors where a model wants them: shape checked, on its device, in its dtype.

Weight matrices become quantized here, one at a time, from the numbers as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from multiexit_engine.checkpoint.huge_pages import HugePages
from multiexit_engine.checkpoint.weights import Weights
from multiexit_engine.errors import CheckpointError
from multiexit_engine.quantization import Quantization, Weight, quantize


@dataclass(frozen=True)
class TensorLoader:
    """Loads weights for one device and dtype.

    Matrices for the CPU are copied, into huge pages, also where their type fits: a page of the
    file's mapping that is read for every token takes memory all the same. Of other tensors one
    that fits is not copied.
    """

    weights: Weights
    device: torch.device
    dtype: torch.dtype
    quantization: Quantization | None = None
    _pages: HugePages = field(default_factory=HugePages, repr=False)

    def load(self, name: str, *shape: int) -> Tensor:
        """The contiguous tensor ``name``; raises CheckpointError when missing or misshapen."""
        return self._place(self._checked(name, shape))

    def load_weight(self, name: str, rows: int, columns: int) -> Weight:
        """A weight matrix, quantized where the loader says so."""
        return self._compress(name, self._checked(name, (rows, columns)))

    def load_transposed(self, name: str, rows: int, columns: int) -> Weight:
        """A weight matrix that is stored transposed, as GPT-2's Conv1D weights are."""
        return self._compress(name, self._checked(name, (columns, rows)).t())

    def load_stacked(self, names: list[str], rows: list[int], columns: int) -> Weight:
        """Several weight matrices as one, above each other."""
        shapes: list[tuple[int, ...]] = [(count, columns) for count in rows]
        return self._compress(" and ".join(names), self._joined(names, shapes))

    def load_stacked_biases(self, names: list[str], rows: list[int]) -> Tensor:
        """Several vectors as one, behind each other."""
        return self._place(self._joined(names, [(count,) for count in rows]))

    def _joined(self, names: list[str], shapes: list[tuple[int, ...]]) -> Tensor:
        parts = [self._checked(name, shape) for name, shape in zip(names, shapes, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _compress(self, name: str, tensor: Tensor) -> Weight:
        if self.quantization is None:
            return self._place(tensor)
        try:
            weight = quantize(tensor, self.quantization)
        except ValueError as error:
            raise CheckpointError(f"tensor {name!r}: {error}") from error
        parts = (weight.codes, weight.scales)
        codes, scales = (self._place(part, part.dtype) for part in parts)
        return replace(weight, codes=codes, scales=scales)

    def _place(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """On the device, in the loader's dtype unless another is given."""
        dtype = dtype or self.dtype
        if self.device.type == "cpu" and tensor.ndim == 2:
            return self._paged(tensor, dtype)
        return tensor.to(self.device, dtype).contiguous()

    def _paged(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return self._pages.empty(tensor.shape, dtype).copy_(tensor)

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
