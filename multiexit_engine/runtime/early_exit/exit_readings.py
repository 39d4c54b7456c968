"""What the exits of a mode measure at every position of a text, whoever would have left before.

Knows nothing of thresholds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.batch import ScheduledBatch
from multiexit_engine.cache.exit_states import ExitStates
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.decoding.gates import bounds, joint_statistics, reading_of, similarity
from multiexit_engine.decoding.plan import resolve_mode
from multiexit_engine.layers.exit_heads import Head, HeadOperands
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.modes import EarlyExit
from multiexit_engine.ops import HeadStatistics
from multiexit_engine.runtime.rows.flight import Flight


class ExitReadings(NamedTuple):
    """Measures at every position of a text and every exit that a mode may take.

    Attributes:
        layers: of the exits, ascending.
        values: [positions, exits] float32, what the threshold is compared with; where a shortlist
            is looked at first, the stricter of its bound and the measure.
        tokens: [positions, exits + 1] int64, the best token of each exit and of the model's head.
        states: [positions, exits, hidden], what probes read.
    """

    layers: tuple[int, ...]
    values: Tensor
    tokens: Tensor
    states: Tensor


def join_readings(parts: list[ExitReadings]) -> ExitReadings:
    """The readings of a text that was computed in parts."""
    return ExitReadings(
        parts[0].layers,
        torch.cat([part.values for part in parts]),
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.states for part in parts]),
    )


def read_exits(
    model: MultiExitModel, kv_cache: PagedKVCache, states: ExitStates, batch: ScheduledBatch
) -> ExitReadings:
    """Run all layers of one scheduled text and measure at each exit of its mode."""
    (item,) = batch.scheduled
    mode = item.sequence.request.decoding
    assert isinstance(mode, EarlyExit), "only this mode measures"
    exits = [head.layer for head in resolve_mode(mode, model.config).exits]
    last = model.config.num_layers
    compares = mode.measure == "similarity"
    stops = sorted({*exits, last, *(layer - 1 for layer in exits if compares)} - {0})
    flight = Flight(model, kv_cache, states, {0: item})
    values: list[Tensor] = []
    heads, normed = [], []
    for start, stop in zip([0, *stops], stops, strict=False):
        before = flight.hidden
        flight.run(start, stop)
        if stop not in exits:
            continue
        normed.append(model.heads.normed(flight.hidden))
        heads.append(model.heads.operands(Head(stop), flight.hidden))
        if compares:
            values.append(similarity(before, flight.hidden))
        elif mode.measure == "probe":
            values.append(model.heads.probes.chances(stop, normed[-1]))
    heads.append(model.heads.operands(model.heads.original, flight.hidden))
    found = joint_statistics(heads)
    tokens = torch.stack([own.tokens for own in found], 1)
    if not values:
        values = [_measured(mode, *pair) for pair in zip(heads[:-1], found[:-1], strict=True)]
    columns = _streaks(tokens[:, :-1]) if mode.measure == "patience" else torch.stack(values, 1)
    return ExitReadings(tuple(exits), columns, tokens, torch.stack(normed, 1))


def _measured(mode: EarlyExit, operands: HeadOperands, found: HeadStatistics) -> Tensor:
    measures = [mode.measure] * len(operands.hidden)
    values = reading_of(measures, found).values
    if mode.shortlist is None:
        return values
    stricter = torch.maximum if mode.measure == "entropy" else torch.minimum
    return stricter(values, bounds(measures, operands, mode.shortlist))


def _streaks(tokens: Tensor) -> Tensor:
    """[positions, exits] float32: exits in a row with the same token, each included."""
    streaks = [torch.ones(tokens.shape[0])]
    for place in range(1, tokens.shape[1]):
        same = tokens[:, place] == tokens[:, place - 1]
        streaks.append(torch.where(same, streaks[-1] + 1, 1.0))
    return torch.stack(streaks, 1)
