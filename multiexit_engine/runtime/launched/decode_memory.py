"""Where decode steps read and write on the device: always the same memory, filled in one copy.

Rows, and a spare one that padding points to. Knows nothing of layers or heads, or of whose a row
is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from multiexit_engine.decoding.warpers import NOT_NARROWED
from multiexit_engine.runtime.device.packed import TURNS, Packed
from multiexit_engine.runtime.drafts.draft_rounds import NumKeys
from multiexit_engine.transfer import to_device

# groups of rows with different heads that a step may have
MAX_GROUPS = 8
# entries of a block table: kernels read rows that begin at multiples of 16 bytes otherwise
_TABLE_STEP = 4
# the inputs that make up a ``Narrowing``
NARROWING = ("top_k", "unlikely", "min_p")
# the results that make up ``BestTokens``
BEST = ("best_ids", "best_logprobs", "ranks")


class DecodeRow(NamedTuple):
    """What a step has to know of one sequence.

    Attributes:
        token: its last token, or 0 where only the device knows it.
        chosen_by: then the row that chooses it, else -1: of the step before, or of the round of
            drafts before.
        position: of that token, 0-based.
        block_table: its KV blocks.
        seed: of its random numbers.
        num_output_tokens: before the one to be chosen.
        temperature: 0 is greedy.
        alpha: of its contrast; any number without one.
        narrowing: its numbers in a ``Narrowing``.
        min_candidates: of its contrast.
        logprobs: how many best tokens it lists; -1 for none, nor a rank.
        source_table: the KV blocks of its source, if it has one.
        source_len: tokens of that.
    """

    token: int
    chosen_by: int
    position: int
    block_table: list[int]
    seed: int
    num_output_tokens: int
    temperature: float
    alpha: float
    narrowing: tuple[int, float, float]
    min_candidates: int = 1
    logprobs: int = -1
    source_table: Sequence[int] = ()
    source_len: int = 0


_Tables: TypeAlias = tuple[Sequence[int], Sequence[int]]
_NO_TABLES: _Tables = ([], [])


class DecodeMemory:
    """The inputs of decode steps and their results.

    Args:
        num_rows: most rows of a step, padding included.
        most_keys: most tokens of a sequence, and of a source.
        block_size: tokens of a KV block.
        spare_block: a block of the KV cache that nobody owns: padding writes there.
        most_listed: best tokens that a row may list.
        device: where it lies.

    Attributes:
        spare_row: the row whose results nobody reads.
        most_keys: as given.
        inputs: by name, [rows, ...]. Rows that are sequences of their own have "tables" and
            "contexts", and of their sources "source_tables" and "source_lens".
        results: by name, [rows, ...].
    """

    def __init__(
        self,
        num_rows: int,
        most_keys: NumKeys,
        block_size: int,
        spare_block: int,
        most_listed: int,
        device: torch.device,
    ) -> None:
        self.spare_row = num_rows
        self.most_keys = most_keys
        self._block_size = block_size
        # of a row's own table, and of that and its source's, which stands behind it
        self._own_width = _table_width(most_keys.own, block_size)
        self._width = self._own_width + _table_width(most_keys.source, block_size)
        source = ([spare_block], 1) if most_keys.source else ()
        self._padding = DecodeRow(
            0, -1, 0, [spare_block], 0, 0, 0.0, 1.0, NOT_NARROWED, 1, -1, *source
        )
        rows = (num_rows + 1,)
        listed = (*rows, most_listed)
        self._inputs = Packed(
            [
                *((name, torch.int64, rows) for name in ("tokens", "chosen_by", "positions")),
                *((name, torch.int64, rows) for name in ("slots", "seeds", "counts")),
                ("min_candidates", torch.int64, rows),
                ("groups", torch.int64, (MAX_GROUPS, *rows)),
                ("contexts", torch.int32, rows),
                ("source_lens", torch.int32, rows),
                ("logprobs", torch.int32, rows),
                ("temperatures", torch.float32, rows),
                ("alphas", torch.float32, rows),
                (NARROWING[0], torch.int32, rows),
                *((name, torch.float32, rows) for name in NARROWING[1:]),
                ("tables", torch.int32, (*rows, self._width)),
            ],
            device,
        )
        self._results = Packed(
            [
                ("tokens", torch.int64, rows),
                ("drafts", torch.int64, rows),
                ("logprobs", torch.float32, rows),
                ("candidates", torch.int32, rows),
                ("ranks", torch.int64, rows),
                ("best_ids", torch.int64, listed),
                ("best_logprobs", torch.float32, listed),
            ],
            device,
        )
        tables = self._inputs.on_device["tables"]
        self.inputs = {
            **self._inputs.on_device,
            "tables": tables[:, : self._own_width],
            "source_tables": tables[:, self._own_width :],
        }
        self.results = self._results.on_device
        self._tables: list[list[_Tables]] = [[_NO_TABLES] * (num_rows + 1) for _ in range(TURNS)]
        for turn in range(TURNS):
            self._inputs.on_host(turn)["tables"].fill(-1)

    def send(
        self,
        turn: int,
        rows: Sequence[DecodeRow | None],
        others: Sequence[DecodeRow | None],
        groups: Sequence[Sequence[int]],
    ) -> None:
        """Copy a step's inputs to the device.

        Args:
            turn: which twin; the step that used it last must be over.
            rows: the first rows of the memory, which run through pieces; None is padding.
            others: rows behind them, which read the tables of those before them, or of which heads
                alone read.
            groups: rows with the same heads, each list to be padded to the longest size there is.
        """
        arrays = self._inputs.on_host(turn)
        every = [row or self._padding for row in (*rows, *others)]
        running = every[: len(rows)]
        size, count, block = len(running), len(every), self._block_size
        arrays["tokens"][:count] = [row.token for row in every]
        arrays["chosen_by"][:count] = [row.chosen_by for row in every]
        arrays["positions"][:count] = [row.position for row in every]
        arrays["slots"][:count] = [
            row.block_table[row.position // block] * block + row.position % block for row in every
        ]
        arrays["seeds"][:count] = [row.seed for row in every]
        arrays["counts"][:count] = [row.num_output_tokens for row in every]
        arrays["contexts"][:count] = [row.position + 1 for row in every]
        arrays["source_lens"][:count] = [row.source_len for row in every]
        arrays["temperatures"][:count] = [row.temperature for row in every]
        arrays["alphas"][:count] = [row.alpha for row in every]
        arrays["min_candidates"][:count] = [row.min_candidates for row in every]
        arrays["logprobs"][:count] = [row.logprobs for row in every]
        for number, name in enumerate(NARROWING):
            arrays[name][:count] = [row.narrowing[number] for row in every]
        for place, members in enumerate(groups):
            own = arrays["groups"][place]
            own[: len(members)] = members
            own[len(members) :] = self.spare_row
        self._fill_tables(turn, arrays["tables"], running)
        self._inputs.send(turn, "tables", size * self._width * 4)

    def put(self, name: str, rows: Sequence[int], values: Tensor) -> None:
        """Take what others found, [rows] values, for some rows of a result."""
        self.results[name].index_copy_(0, to_device(rows, values.device), values)

    def fetch(self, turn: int, *, are_told: bool) -> None:
        """Copy the results to a twin, best tokens and ranks only if rows tell them."""
        self._results.fetch(turn, None if are_told else "ranks")

    def found(self, turn: int, rows: Sequence[int]) -> tuple[list[int], list[float], list[int]]:
        """Tokens, log-probabilities and plausible tokens of rows, once they were waited for."""
        arrays = self._results.on_host(turn)
        tokens, logprobs, counts = (
            arrays[name][rows].tolist() for name in ("tokens", "logprobs", "candidates")
        )
        return tokens, logprobs, counts

    def told(self, turn: int, rows: Sequence[int]) -> list[list[Any]]:
        """Ids and log-probabilities of best tokens, and ranks of chosen ones, likewise."""
        arrays = self._results.on_host(turn)
        return [arrays[name][rows].tolist() for name in BEST]

    def drafts(self, turn: int, rows: Sequence[int]) -> list[int]:
        """What rows drafted, once they were waited for."""
        found: list[int] = self._results.on_host(turn)["drafts"][rows].tolist()
        return found

    def _fill_tables(self, turn: int, tables: Any, rows: Sequence[DecodeRow]) -> None:
        """Write the block tables that are not what they were when this twin was sent last."""
        known = self._tables[turn]
        for place, row in enumerate(rows):
            own, source = known[place]
            if own != row.block_table:
                own = list(row.block_table)
                tables[place, : len(own)] = own
            if source != row.source_table:
                source = list(row.source_table)
                tables[place, self._own_width : self._own_width + len(source)] = source
            known[place] = own, source


def _table_width(num_keys: int, block_size: int) -> int:
    """Entries of a block table for so many keys, and for none."""
    return -(-num_keys // (block_size * _TABLE_STEP)) * _TABLE_STEP
