"""Who owns which KV block: references, copy-on-write, and blocks that wait to be found again.

Knows nothing of tensors, requests or of what a step computes.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from multiexit_engine.cache.prefix import PrefixIndex, block_key, block_keys, root_key


class BlockManager:
    """Reference-counted blocks of one pool.

    A block table is a list of block ids in the order of a sequence's tokens; it owns one reference
    to each. A block without owners is free. If the prefix index can find it, it keeps its contents
    until no other free block is left, the one freed longest ago going first.

    Args:
        num_blocks: blocks of the pool.
        block_size: tokens of one block.
        prefix_caching: whether full blocks can be found by their tokens.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._index = PrefixIndex(num_blocks)
        self._num_owners = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free_blocks(self) -> int:
        """Blocks without an owner, whether or not the prefix index can find them."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        """Free blocks that the prefix index can find."""
        return len(self._cached)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def prefix_keys(self, token_ids: Sequence[int], extra: bytes = b"") -> list[bytes]:
        """Keys for ``match_keys``, one for each full block; none without prefix caching."""
        return block_keys(token_ids, self.block_size, extra) if self._prefix_caching else []

    def match_prefix(
        self, token_ids: Sequence[int], depth: int, extra: bytes = b""
    ) -> tuple[list[int], int]:
        """The longest known beginning in full blocks that hold at least ``depth`` layers.

        Returns a block table, which owns its blocks from now on, and the number of its tokens.
        """
        table = self.match_keys(self.prefix_keys(token_ids, extra), depth)
        return table, len(table) * self.block_size

    def match_keys(self, keys: Sequence[bytes], depth: int) -> list[int]:
        """``match_prefix`` by keys that were computed before."""
        return self.fork(self._index.find(keys, depth))

    def make_writable(
        self, table: list[int], start: int, stop: int
    ) -> list[tuple[int, int]] | None:
        """Give a table blocks of its own for the tokens ``[start, stop)``.

        Appends new blocks to the table and replaces those that it shares with another. Returns the
        (source, target) pairs to copy before anything is written, or None, with nothing changed,
        when there are not enough free blocks.
        """
        num_needed = -(-stop // self.block_size)
        num_new = max(num_needed - len(table), 0)
        written = range(start // self.block_size, min(num_needed, len(table)))
        shared = [i for i in written if self._num_owners[table[i]] > 1]
        if not num_new and not shared:
            return []
        if num_new + len(shared) > self.num_free_blocks:
            return None
        copies = []
        for i in shared:
            copies.append((table[i], self._take()))
            self._num_owners[table[i]] -= 1
            table[i] = copies[-1][1]
        table.extend(self._take() for _ in range(num_new))
        return copies

    def commit(
        self,
        table: Sequence[int],
        token_ids: Sequence[int],
        start: int,
        stop: int,
        depth: int,
        extra: bytes = b"",
    ) -> None:
        """Make the blocks findable that became full when tokens ``[start, stop)`` were computed.

        Every full block before them must have been committed or matched.
        """
        if not self._prefix_caching:
            return
        size = self.block_size
        for i in range(start // size, stop // size):
            parent = self._index.key(table[i - 1]) if i else root_key(extra)
            assert parent is not None, "the blocks before a full block are full"
            key = block_key(parent, token_ids[i * size : (i + 1) * size])
            displaced = self._index.insert(table[i], key, depth)
            if displaced is not None and displaced in self._cached:
                del self._cached[displaced]
                self._index.forget(displaced)
                self._blank.append(displaced)

    def fork(self, table: Sequence[int]) -> list[int]:
        """A second table of the same blocks, with references of its own."""
        for block in table:
            if not self._num_owners[block]:
                # only a findable block can be wanted while nobody owns it
                del self._cached[block]
            self._num_owners[block] += 1
        return list(table)

    def free(self, table: Sequence[int]) -> None:
        """Give a table's references back, its last block first, so that tails are reused first."""
        for block in reversed(table):
            self._num_owners[block] -= 1
            if self._num_owners[block]:
                continue
            if block in self._index:
                self._cached[block] = None
            else:
                self._index.forget(block)
                self._blank.append(block)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless ``tables`` are all owners, and every other block is free."""
        owners = Counter(block for table in tables for block in table)
        for block in range(self.num_blocks):
            counted, found = self._num_owners[block], owners[block]
            assert counted == found, f"block {block}: {counted} references, {found} owners"
        free = [*self._blank, *self._cached]
        assert len(set(free)) == len(free), f"a block is free twice: {sorted(free)}"
        assert set(free) == set(range(self.num_blocks)) - owners.keys(), "a block is lost"
        assert all(block in self._index for block in self._cached), "a cached block is not findable"
        assert all(self._index.key(b) is None for b in self._blank), "a blank block has a key"

    def _take(self) -> int:
        block = self._blank.pop() if self._blank else self._cached.popitem(last=False)[0]
        self._index.forget(block)
        self._num_owners[block] = 1
        return block
