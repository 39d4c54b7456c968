import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from multiexit_engine.cache.block_manager import BlockManager


def computed(blocks: BlockManager, token_ids, depth=12) -> list[int]:
    """The table of a sequence whose tokens were all computed by itself."""
    table: list[int] = []
    assert blocks.make_writable(table, 0, len(token_ids)) == []
    blocks.commit(table, token_ids, 0, len(token_ids), depth)
    return table


def test_a_table_grows_to_the_blocks_it_needs():
    blocks, table = BlockManager(8, 4, prefix_caching=True), []
    sizes = []
    for stop in (1, 4, 5, 12):
        blocks.make_writable(table, stop - 1, stop)
        sizes.append(len(table))
    assert sizes == [1, 1, 2, 3]
    assert blocks.num_free_blocks == 5


def test_a_table_that_cannot_grow_is_left_as_it_is():
    blocks = BlockManager(3, 4, prefix_caching=True)
    table = computed(blocks, range(8))
    before = list(table)
    assert blocks.make_writable(table, 8, 17) is None
    assert (table, blocks.num_free_blocks) == (before, 1)
    blocks.check_integrity([table])


def test_a_shared_block_is_copied_before_it_is_written():
    blocks = BlockManager(8, 4, prefix_caching=True)
    table = computed(blocks, range(6))
    other = blocks.fork(table)
    assert blocks.make_writable(other, 6, 7) == [(table[1], other[1])]
    assert table[0] == other[0]
    assert blocks.make_writable(table, 6, 7) == []


def test_a_full_shared_block_is_not_copied_to_write_behind_it():
    blocks = BlockManager(8, 4, prefix_caching=True)
    other = blocks.fork(table := computed(blocks, range(8)))
    assert blocks.make_writable(other, 8, 9) == []
    assert other[:2] == table


def test_no_copy_is_made_when_not_all_can_be():
    blocks = BlockManager(3, 4, prefix_caching=True)
    table = computed(blocks, range(6))
    other = blocks.fork(table)
    assert blocks.make_writable(other, 6, 9) is None
    assert other == table
    blocks.check_integrity([table, other])


def test_the_longest_known_beginning_is_found():
    blocks = BlockManager(8, 4, prefix_caching=True)
    table = computed(blocks, range(10))
    found, num_tokens = blocks.match_prefix([*range(8), 77, 78, 79, 80], depth=12)
    assert (found, num_tokens) == (table[:2], 8)
    blocks.check_integrity([table, found])


def test_equal_tokens_after_another_beginning_are_not_found():
    blocks = BlockManager(8, 4, prefix_caching=True)
    computed(blocks, [1, 1, 1, 1, 2, 2, 2, 2])
    assert blocks.match_prefix([2, 2, 2, 2], depth=12) == ([], 0)


def test_contents_of_another_kind_are_not_found():
    blocks = BlockManager(8, 4, prefix_caching=True)
    computed(blocks, [1, 1, 1, 1])
    assert blocks.match_prefix([1, 1, 1, 1], depth=12, extra=b"copied K/V") == ([], 0)


def test_nothing_is_found_without_prefix_caching():
    blocks = BlockManager(8, 4, prefix_caching=False)
    computed(blocks, range(8))
    assert blocks.match_prefix(list(range(8)), depth=12) == ([], 0)


def test_freed_blocks_can_be_found_until_they_are_reused():
    blocks = BlockManager(2, 4, prefix_caching=True)
    table = computed(blocks, range(8))
    blocks.free(table)
    assert (blocks.num_free_blocks, blocks.num_cached_blocks) == (2, 2)
    found, _ = blocks.match_prefix(list(range(8)), depth=12)
    assert found == table
    blocks.free(found)
    computed(blocks, range(50, 58))
    assert blocks.match_prefix(list(range(8)), depth=12) == ([], 0)


def test_tails_are_reused_before_beginnings():
    blocks = BlockManager(2, 4, prefix_caching=True)
    table = computed(blocks, range(8))
    blocks.free(table)
    blocks.make_writable([], 0, 4)
    assert blocks.match_prefix(list(range(8)), depth=12) == ([table[0]], 4)


def test_the_blocks_freed_longest_ago_are_reused_first():
    blocks = BlockManager(2, 4, prefix_caching=True)
    old, new = computed(blocks, range(4)), computed(blocks, range(10, 14))
    blocks.free(old)
    blocks.free(new)
    blocks.make_writable([], 0, 4)
    assert blocks.match_prefix(list(range(4)), depth=12) == ([], 0)
    assert blocks.match_prefix(list(range(10, 14)), depth=12) == (new, 4)


def test_blank_blocks_are_used_before_cached_ones():
    blocks = BlockManager(3, 4, prefix_caching=True)
    blocks.free(computed(blocks, range(8)))
    blocks.make_writable([], 0, 4)
    assert blocks.num_cached_blocks == 2


@pytest.mark.parametrize(("depth", "num_tokens"), [(6, 4), (12, 4), (13, 0)])
def test_a_block_is_found_by_those_who_need_no_more_layers_than_it_holds(depth, num_tokens):
    blocks = BlockManager(3, 4, prefix_caching=True)
    computed(blocks, range(4), depth=12)
    assert blocks.match_prefix(list(range(4)), depth)[1] == num_tokens


def test_a_deeper_block_takes_the_place_of_a_shallow_one():
    blocks = BlockManager(3, 4, prefix_caching=True)
    shallow = computed(blocks, range(4), depth=6)
    deep = computed(blocks, range(4), depth=12)
    assert blocks.match_prefix(list(range(4)), depth=6)[0] == deep
    blocks.free(shallow)
    assert blocks.num_cached_blocks == 0


def test_a_shallow_block_does_not_displace_a_deep_one():
    blocks = BlockManager(3, 4, prefix_caching=True)
    deep = computed(blocks, range(4), depth=12)
    computed(blocks, range(4), depth=6)
    assert blocks.match_prefix(list(range(4)), depth=6)[0] == deep


def test_a_displaced_free_block_is_blank_at_once():
    blocks = BlockManager(3, 4, prefix_caching=True)
    blocks.free(computed(blocks, range(4), depth=6))
    deep = computed(blocks, range(4), depth=12)
    assert (blocks.num_free_blocks, blocks.num_cached_blocks) == (2, 0)
    blocks.check_integrity([deep])


@pytest.mark.parametrize("tables", [[[0]], [[0, 1], [1]], []])
def test_the_integrity_check_sees_a_wrong_number_of_owners(tables):
    blocks = BlockManager(3, 4, prefix_caching=True)
    blocks.make_writable([], 0, 8)
    with pytest.raises(AssertionError, match="references"):
        blocks.check_integrity(tables)


class Row:
    """A sequence as its owner sees it: tokens, how many are computed, and its table."""

    def __init__(self, token_ids, depth, table=(), num_computed=0):
        self.token_ids = list(token_ids)
        self.depth = depth
        self.table = list(table)
        self.num_computed = num_computed


class BlockMachine(RuleBasedStateMachine):
    """Rows grow, fork, and end on few blocks; a model remembers each slot's contents."""

    rows = Bundle("rows")

    @initialize(
        num_blocks=st.integers(1, 12), block_size=st.integers(1, 3), prefix_caching=st.booleans()
    )
    def start(self, num_blocks, block_size, prefix_caching):
        self.blocks = BlockManager(num_blocks, block_size, prefix_caching)
        self.slots = [None] * (num_blocks * block_size)
        self.living: list[Row] = []

    @rule(
        target=rows,
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        depth=st.integers(1, 3),
    )
    def begin(self, tokens, depth):
        table, num_computed = self.blocks.match_prefix(tokens[:-1], depth)
        row = Row(tokens, depth, table, num_computed)
        self.living.append(row)
        return row

    @rule(row=rows, tokens=st.lists(st.integers(0, 1), max_size=4))
    def compute(self, row, tokens):
        row.token_ids += tokens
        start, stop = row.num_computed, len(row.token_ids)
        free, table = self.blocks.num_free_blocks, list(row.table)
        copies = self.blocks.make_writable(row.table, start, stop)
        if copies is None:
            assert (self.blocks.num_free_blocks, row.table) == (free, table)
            return
        for source, target in copies:
            self.slots[self.span(target)] = self.slots[self.span(source)]
        for position in range(start, stop):
            block = row.table[position // self.blocks.block_size]
            assert sum(block in other.table for other in self.living) == 1
            self.slots[self.slot(row, position)] = (row.token_ids[: position + 1], row.depth)
        self.blocks.commit(row.table, row.token_ids, start, stop, row.depth)
        row.num_computed = stop

    @rule(target=rows, row=rows)
    def fork(self, row):
        table = self.blocks.fork(row.table)
        child = Row(row.token_ids, row.depth, table, row.num_computed)
        self.living.append(child)
        return child

    @rule(target=rows, row=consumes(rows))
    def end(self, row):
        self.living.remove(row)
        self.blocks.free(row.table)
        return multiple()

    @invariant()
    def every_computed_token_is_in_its_slot(self):
        if not hasattr(self, "blocks"):
            return
        self.blocks.check_integrity([row.table for row in self.living])
        for row in self.living:
            for position in range(row.num_computed):
                tokens, depth = self.slots[self.slot(row, position)]
                assert tokens == row.token_ids[: position + 1]
                assert depth >= row.depth

    def teardown(self):
        if not hasattr(self, "blocks"):
            return
        for row in self.living:
            self.blocks.free(row.table)
        self.blocks.check_integrity([])
        assert self.blocks.num_free_blocks == self.blocks.num_blocks

    def span(self, block):
        return slice(block * self.blocks.block_size, (block + 1) * self.blocks.block_size)

    def slot(self, row, position):
        size = self.blocks.block_size
        return row.table[position // size] * size + position % size


TestBlocks = BlockMachine.TestCase
TestBlocks.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
