"""What ``heads`` is given of its rows: states, contrasts, and how tokens are drawn.

Knows nothing of tiles, launches or of how a token is chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multiexit_engine.kernels.head_edits import PackedEdits
from multiexit_engine.kernels.matrices import Matrix, stored


class Upper(NamedTuple):
    """The head: ``hidden @ weight.T + bias``."""

    hidden: Tensor
    weight: Matrix
    bias: Tensor | None


class Drawing(NamedTuple):
    """[rows] each: 0 is greedy; what the noise of the others depends on."""

    temperature: Tensor
    seeds: Tensor
    positions: Tensor


class Narrowing(NamedTuple):
    """See ``multiexit_engine.ops.narrowing``."""

    top_k: Tensor
    unlikely: Tensor
    min_p: Tensor


class Best(NamedTuple):
    """See ``multiexit_engine.ops.best_tokens``."""

    asked: Tensor
    ids: Tensor
    log_probs: Tensor
    ranks: Tensor


class Changes(NamedTuple):
    """What is done to the rows beside contrast and temperature; None for what is done to none."""

    edits: PackedEdits | None = None
    narrowing: Narrowing | None = None
    best: Best | None = None

    def rows(self, part: slice) -> Changes:
        """Those of some rows."""
        return Changes(
            self.edits and self.edits.rows(part),
            self.narrowing and Narrowing(*(column[part] for column in self.narrowing)),
            self.best and Best(*(column[part] for column in self.best)),
        )

    @property
    def kinds(self) -> dict[str, bool]:
        """As kernels are told."""
        names = "EDITED", "NARROWED", "TOLD"
        return {name: part is not None for name, part in zip(names, self, strict=True)}


class Lower(NamedTuple):
    """What rows are contrasted with.

    Attributes:
        hidden: [rows, width]; whatever it is in rows without lower head.
        weight: [vocab, width] of one lower head; all heads are stored alike.
        alpha: [rows] float32.
        least: [rows] int64, or None for 1 in every row.
        table: [lower heads, 3] int64: address of each one's weight, whether its logits have the
            bias, and the address of its scales, if there are some; None where all rows have the
            head ``weight``.
        groups: [rows] int32: which of these heads a row has, -1 for none; None as the table.
        num_candidates: [rows] int32 that takes the sizes of plausible sets, or None.
    """

    hidden: Tensor
    weight: Matrix
    alpha: Tensor
    least: Tensor | None = None
    table: Tensor | None = None
    groups: Tensor | None = None
    num_candidates: Tensor | None = None

    def rows(self, part: slice) -> Lower:
        """Those of some rows."""
        return Lower(
            self.hidden[part],
            self.weight,
            self.alpha[part],
            None if self.least is None else self.least[part],
            self.table,
            None if self.groups is None else self.groups[part],
            None if self.num_candidates is None else self.num_candidates[part],
        )


def lower_of(
    groups: Sequence[Any],
    hidden: Tensor,
    bias: Tensor | None,
    alpha: Tensor,
    least: Tensor | None,
    is_plain: bool,
) -> Lower | None:
    """What rows are contrasted with; where scores are changed as if each had a head of its own."""
    contrasted = [group for group in groups if group.lower_weight is not None]
    if not contrasted:
        return None
    first = contrasted[0].lower_weight
    if len(groups) == 1 and bias is None and is_plain:
        return Lower(groups[0].lower_hidden, first, alpha, least)
    heads = {_addresses(group): None for group in contrasted}
    places = {head: place for place, head in enumerate(heads)}
    parts, named, start = [], [], 0
    for group in groups:
        place, own = -1, hidden[start : start + group.num_rows]
        if group.lower_weight is not None:
            own = group.lower_hidden
            place = places[_addresses(group)]
        parts.append(own)
        named.append((place, group.num_rows))
        start += group.num_rows
    table, rows = _table(tuple(heads), hidden.device), _named(tuple(named), hidden.device)
    return Lower(torch.cat(parts), first, alpha, least, table, rows)


def _addresses(group: Any) -> tuple[int, bool, int]:
    """A row of ``Lower.table``."""
    own = stored(group.lower_weight)
    scales = 0 if own.scales is None else own.scales.data_ptr()
    return own.numbers.data_ptr(), group.lower_bias is not None, scales


@functools.lru_cache(maxsize=256)
def _table(heads: tuple[tuple[int, bool, int], ...], device: torch.device) -> Tensor:
    """[heads, 3] int64. Kept, so that a step copies nothing to the device that it had before."""
    return torch.tensor(heads, dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=256)
def _named(groups: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """[rows] int32: each place as often as its group has rows."""
    places = [place for place, count in groups for _ in range(count)]
    return torch.tensor(places, dtype=torch.int32, device=device)
