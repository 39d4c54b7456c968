"""Which KV blocks can be found by the tokens that they hold.

A full block's key is a SHA-256 chain over all tokens up to its end, so equal keys mean equal
beginnings. Knows nothing of who owns a block or whether it is in use: that is ``block_manager``'s.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import sha256


def root_key(extra: bytes = b"") -> bytes:
    """The parent key of a first block; ``extra`` keeps contents apart that tokens do not tell."""
    return sha256(b"root" + extra).digest()


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a full block of these tokens after the block whose key is ``parent``."""
    return sha256(parent + array("q", token_ids).tobytes()).digest()


def block_keys(token_ids: Sequence[int], block_size: int, extra: bytes = b"") -> list[bytes]:
    """The keys of all full blocks of a sequence."""
    keys = []
    key = root_key(extra)
    for stop in range(block_size, len(token_ids) + 1, block_size):
        key = block_key(key, token_ids[stop - block_size : stop])
        keys.append(key)
    return keys


class PrefixIndex:
    """Finds blocks by key. One block for each key: the one that holds the most layers."""

    def __init__(self, num_blocks: int) -> None:
        self._found: dict[bytes, int] = {}
        self._keys: list[bytes | None] = [None] * num_blocks
        self._depths = [0] * num_blocks

    def __contains__(self, block: int) -> bool:
        """Whether a lookup can return this block."""
        key = self._keys[block]
        return key is not None and self._found.get(key) == block

    def key(self, block: int) -> bytes | None:
        """The key of a block's contents, None until it is full; a second copy has one too."""
        return self._keys[block]

    def find(self, keys: Iterable[bytes], depth: int) -> list[int]:
        """Blocks of the longest beginning of ``keys`` that hold at least ``depth`` layers."""
        blocks = []
        for key in keys:
            block = self._found.get(key)
            if block is None or self._depths[block] < depth:
                break
            blocks.append(block)
        return blocks

    def insert(self, block: int, key: bytes, depth: int) -> int | None:
        """Record what a block holds; returns the shallower block that it displaces, if any.

        A block that is not deeper than the one already found by this key stays unfindable.
        """
        self._keys[block] = key
        self._depths[block] = depth
        known = self._found.get(key)
        if known is not None and self._depths[known] >= depth:
            return None
        self._found[key] = block
        return known

    def forget(self, block: int) -> None:
        """The block's contents are gone."""
        if block in self:
            del self._found[self._keys[block]]  # type: ignore[arg-type]
        self._keys[block] = None
