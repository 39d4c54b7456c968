"""Encodes sources and stores what decoder layers read of them in the paged cache.

Knows sequences and their source blocks; nothing of who is scheduled or of what follows.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.models.encoder_decoder import EncoderDecoderModel
from multiexit_engine.request import Sequence as TokenSequence
from multiexit_engine.transfer import to_device


def read_sources(
    model: MultiExitModel, kv_cache: PagedKVCache, sequences: Sequence[TokenSequence]
) -> None:
    """Encode the sources of some sequences, packed, and fill their source blocks."""
    assert isinstance(model, EncoderDecoderModel), "only an encoder-decoder has sources"
    size = kv_cache.block_size
    sources = [sequence.request.source_token_ids for sequence in sequences]
    slots = [
        sequence.source_table[place // size] * size + place % size
        for sequence, source in zip(sequences, sources, strict=True)
        for place in range(len(source))
    ]

    def on_device(values: list[int]) -> Tensor:
        return to_device(values, kv_cache.device)

    token_ids = on_device([token for source in sources for token in source])
    encoded = model.encode(token_ids, [len(source) for source in sources])
    model.store_cross(model.cross_keys_values(encoded), kv_cache, on_device(slots))
