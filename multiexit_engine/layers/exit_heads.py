"""The heads of a model: its own, and one for each exit in any of the three projection modes.

Gives what a head multiplies; does not multiply with the vocabulary, since most callers need only
part of that product.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from multiexit_engine.checkpoint import TensorLoader, exit_weight_name
from multiexit_engine.config import ModelConfig, VocabularyProjectionMode
from multiexit_engine.layers.exit_probes import ExitProbes
from multiexit_engine.layers.norm import LayerNorm, RMSNorm
from multiexit_engine.layers.rough_heads import RoughHeads
from multiexit_engine.ops.linear import linear
from multiexit_engine.quantization import Weight, first_rows


class Head(NamedTuple):
    """One head of a model.

    Attributes:
        layer: 1-based layer whose output it reads; the last one for the original head.
        is_original: the model's own head, not an exit's.
        is_raw: the model's own matrix on a hidden state before any norm, as DoLa reads layers from
            0, the embeddings, to the last but one.
    """

    layer: int
    is_original: bool = False
    is_raw: bool = False


class HeadOperands(NamedTuple):
    """The logits of a head are ``hidden @ weight.T + bias``.

    Attributes:
        hidden: [rows, hidden], normalised (unless raw) and, under CAST, converted.
        weight: [vocab, hidden], may be quantized.
        bias: [vocab] or None.
    """

    hidden: Tensor
    weight: Weight
    bias: Tensor | None

    def first(self, num_tokens: int) -> HeadOperands:
        """What gives the logits of the first tokens of the vocabulary only."""
        if num_tokens == self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[:num_tokens]
        return HeadOperands(self.hidden, first_rows(self.weight, num_tokens), bias)


class ExitHeads:
    """All heads of a model; an exit's own weights are loaded when they are first required.

    Args:
        config: which exits there are and how they project.
        loader: of their weights.
        final_norm: the model's norm after its last block, which every head shares; None where
            blocks end with a norm of their own.
        weight: [vocab, hidden] of the original head.
        bias: [vocab] of the original head, if it has one.

    Attributes:
        probes: tell where an exit's token is that of the original head, if there are any.
        rough: finds best tokens by codes of these heads.
    """

    def __init__(
        self,
        config: ModelConfig,
        loader: TensorLoader,
        final_norm: LayerNorm | RMSNorm | None,
        weight: Weight,
        bias: Tensor | None = None,
    ) -> None:
        self.probes = ExitProbes(config, loader)
        self.rough = RoughHeads()
        self._config = config
        self._loader = loader
        self._final_norm = final_norm
        self._weight = weight
        self._bias = bias
        self._loaded: dict[int, Weight] = {}
        self._ready: set[Head] = set()

    @property
    def original(self) -> Head:
        """The model's own head."""
        return Head(self._config.num_layers, is_original=True)

    @property
    def has_bias(self) -> bool:
        """Whether the model's own head adds a bias."""
        return self._bias is not None

    def require(self, head: Head) -> None:
        """Have this head's weights in memory from now on.

        Raises:
            ValueError: the model has no such head.
            CheckpointError: its weights are missing or misshapen.
        """
        if head in self._ready:
            return
        self._check(head)
        name = self._weight_name(head)
        if name is not None and head.layer not in self._loaded:
            self._load(name, head)
        self._ready.add(head)

    def _load(self, name: str, head: Head) -> None:
        config = self._config
        is_cast = config.projection is VocabularyProjectionMode.SHARED_PROJECTION_CAST_OUTPUTS
        rows = config.hidden_size if is_cast else config.vocab_size
        self._loaded[head.layer] = self._loader.load_weight(name, rows, config.hidden_size)

    def operands(self, head: Head, tap: Tensor) -> HeadOperands:
        """What gives this head's logits for some rows.

        Args:
            head: loaded first if it was not yet required.
            tap: [rows, hidden], output of block ``head.layer`` before the final norm, in the dtype
                of the weights or in float32; the embeddings for layer 0.

        Raises:
            ValueError: the model has no such head.
        """
        self.require(head)
        dtype = self._loader.dtype
        if head.is_raw:
            return HeadOperands(tap.to(dtype), self._weight, self._bias)
        hidden = self.normed(tap)
        own = None if head.is_original else self._loaded.get(head.layer)
        if own is None:
            return HeadOperands(hidden, self._weight, self._bias)
        if self._config.projection is VocabularyProjectionMode.LAYER_SPECIFIC_PROJECTION:
            return HeadOperands(hidden, own, None)
        return HeadOperands(linear(hidden, own, None), self._weight, self._bias)

    def last_matrix(self) -> Weight:
        """What is read first for the last layer: its exit's own weights if loaded, or the head."""
        return self._loaded.get(self._config.num_layers, self._weight)

    def normed(self, tap: Tensor) -> Tensor:
        """[rows, hidden] in the dtype of the weights: a block's output after the final norm."""
        hidden = tap if self._final_norm is None else self._final_norm(tap)
        # asked, since `to` takes longer to give back what it got
        return hidden if hidden.dtype is self._loader.dtype else hidden.to(self._loader.dtype)

    def _weight_name(self, head: Head) -> str | None:
        if head.is_original or head.is_raw or self._config.projection is None:
            return None
        return exit_weight_name(self._config.projection, head.layer, self._config.num_layers)

    def _check(self, head: Head) -> None:
        last, exits = self._config.num_layers, self._config.exit_layers
        if head.is_raw:
            if not 0 <= head.layer < last:
                raise ValueError(f"{head}: hidden states are raw at layers 0 to {last - 1}")
            return
        if head.is_original and head.layer != last:
            raise ValueError(f"{head}: the original head reads layer {last}")
        if not head.is_original and head.layer not in exits:
            has = f"exits at the layers {list(exits)}" if exits else "no exits"
            raise ValueError(
                f"layer {head.layer} has no exit: this model has {has}. Exits are chosen when the "
                "checkpoint is opened, by lm_head_layer_indices"
            )
