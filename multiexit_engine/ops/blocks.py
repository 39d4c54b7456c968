"""A span of decoder blocks as one op, so that a backend can run them without Python between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from multiexit_engine.batch import ForwardBatch
from multiexit_engine.ops.operands import is_plain, is_streamed
from multiexit_engine.ops.registry import register_op
from multiexit_engine.quantization import Weight


class KVCache(Protocol):
    """What blocks need of ``PagedKVCache``, which stands above the ops."""

    def key(self, layer: int) -> Tensor: ...

    def value(self, layer: int) -> Tensor: ...


@register_op
def decoder_blocks(
    hidden: Tensor,
    blocks: Sequence[Any],
    kv_cache: KVCache,
    batch: ForwardBatch,
    then: Weight | None = None,
) -> Tensor:
    """Run decoder blocks one after the other.

    Backends for half precision may keep what lies between input and result in float32. Running
    two spans one after the other gives the same bits as running both in one call.

    Args:
        hidden: [tokens, hidden] in the dtype of the weights, or what an earlier span gave.
        blocks: at least one ``layers.block.DecoderBlock``, or block of an encoder-decoder, whose
            parts a backend reads; its weights and the cache stay where they are from the first
            call on.
        kv_cache: the keys and values of these layers are written for all tokens of ``batch`` and
            its copied rows.
        batch: the tokens.
        then: the matrix that is read first when these blocks have run, if the caller knows; a
            backend may ask memory for its first bytes meanwhile. Changes no result.

    Returns:
        A new tensor of the shape of ``hidden``, in its dtype or in float32.

    Source: Radford et al. 2019, "Language models are unsupervised multitask learners", 2.3; for
        encoder-decoders Vaswani et al. 2017, arXiv:1706.03762, 3.1; for copied rows Schuster et al.
        2022, arXiv:2207.07061, section 3.4.
    """
    copied = batch.copied
    for block in blocks:
        if copied is not None:
            block.write_kv(copied.states, kv_cache, copied.positions, copied.slot_mapping)
        hidden = block(hidden, kv_cache, batch)
    return hidden


def _has_matrices_to_stream(
    hidden: Tensor,
    blocks: Sequence[Any],
    kv_cache: KVCache,
    batch: ForwardBatch,
    then: Weight | None = None,
) -> bool:
    """Whether the GPU's kernels read the matrices: all of a model's, or none.

    They know no copied rows.
    """
    is_read = is_streamed(blocks[0].attention.qkv.weight)
    return is_read and batch.copied is None and is_plain(hidden)


def _runs_in_one_launch(
    hidden: Tensor,
    blocks: Sequence[Any],
    kv_cache: KVCache,
    batch: ForwardBatch,
    then: Weight | None = None,
) -> bool:
    """Whether the persistent kernel was asked for, and rows are newest tokens of sequences each."""
    return (
        hidden.shape[0] <= blocks[0].most_persistent_rows
        and batch.copied is None
        and len(batch.layout.query_lens) == hidden.shape[0]
    )


decoder_blocks.backend(
    "cuda",
    "multiexit_engine._cuda.built:decoder_blocks",
    device="cuda",
    supports=_runs_in_one_launch,
)
decoder_blocks.backend(
    "triton",
    "multiexit_engine.kernels.blocks:decoder_blocks",
    device="cuda",
    supports=_has_matrices_to_stream,
)
decoder_blocks.backend(
    "cpu",
    "multiexit_engine._native:decoder_blocks",
    device="cpu",
    supports=lambda hidden, *_, **__: is_plain(hidden),
)
