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
from multiexit_engine.decoding.gates import HeadReading, bounds, read_head, similarity
from multiexit_engine.decoding.plan import resolve_mode
from multiexit_engine.layers.exit_heads import Head, HeadOperands
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.modes import HEAD_MEASURES, EarlyExit
from multiexit_engine.ops import head_statistics
from multiexit_engine.runtime.flight import Flight


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
    values, tokens, normed = [], [], []
    for start, stop in zip([0, *stops], stops, strict=False):
        before = flight.hidden
        flight.run(start, stop)
        if stop not in exits:
            continue
        normed.append(model.heads.normed(flight.hidden))
        operands = model.heads.operands(Head(stop), flight.hidden)
        if mode.measure in HEAD_MEASURES or mode.measure == "patience":
            reading = _read_head(mode, operands)
        else:
            value = (
                similarity(before, flight.hidden)
                if compares
                else model.heads.probes.chances(stop, normed[-1])
            )
            reading = HeadReading(value, head_statistics(*operands).tokens)
        values.append(reading.values)
        tokens.append(reading.tokens)
    best = head_statistics(*model.heads.operands(model.heads.original, flight.hidden)).tokens
    columns = torch.stack(values, 1)
    if mode.measure == "patience":
        columns = _streaks(torch.stack(tokens, 1))
    found = torch.stack([*tokens, best], 1)
    return ExitReadings(tuple(exits), columns, found, torch.stack(normed, 1))


def _read_head(mode: EarlyExit, operands: HeadOperands) -> HeadReading:
    measures = [mode.measure] * len(operands.hidden)
    reading = read_head(measures, operands)
    if mode.shortlist is None:
        return reading
    stricter = torch.maximum if mode.measure == "entropy" else torch.minimum
    values = stricter(reading.values, bounds(measures, operands, mode.shortlist))
    return HeadReading(values, reading.tokens)


def _streaks(tokens: Tensor) -> Tensor:
    """[positions, exits] float32: exits in a row with the same token, each included."""
    streaks = [torch.ones(tokens.shape[0])]
    for place in range(1, tokens.shape[1]):
        same = tokens[:, place] == tokens[:, place - 1]
        streaks.append(torch.where(same, streaks[-1] + 1, 1.0))
    return torch.stack(streaks, 1)
