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
from multiexit_engine.decoding.gates import bounds, read_head, similarity
from multiexit_engine.decoding.plan import resolve_mode
from multiexit_engine.layers.exit_heads import Head
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.modes import EarlyExit
from multiexit_engine.ops import head_statistics
from multiexit_engine.runtime.flight import Flight


class ExitReadings(NamedTuple):
    """Measures at every position of a text and every exit that a mode may take.

    Attributes:
        layers: of the exits, ascending.
        values: [positions, exits] float32, what the threshold is compared with; where a shortlist
            is looked at first, the stricter of its bound and the measure.
        tokens: [positions, exits + 1] int64, the best token of each exit and of the model's head.
    """

    layers: tuple[int, ...]
    values: Tensor
    tokens: Tensor


def join_readings(parts: list[ExitReadings]) -> ExitReadings:
    """The readings of a text that was computed in parts."""
    values = torch.cat([part.values for part in parts])
    return ExitReadings(parts[0].layers, values, torch.cat([part.tokens for part in parts]))


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
    values, tokens = [], []
    for start, stop in zip([0, *stops], stops, strict=False):
        before = flight.hidden
        flight.run(start, stop)
        if stop not in exits:
            continue
        operands = model.heads.operands(Head(stop), flight.hidden)
        measures = [mode.measure] * flight.num_rows
        if compares:
            values.append(similarity(before, flight.hidden))
            tokens.append(head_statistics(*operands).tokens)
            continue
        reading = read_head(measures, operands)
        tokens.append(reading.tokens)
        values.append(reading.values)
        if mode.shortlist is not None:
            stricter = torch.maximum if mode.measure == "entropy" else torch.minimum
            values[-1] = stricter(values[-1], bounds(measures, operands, mode.shortlist))
    best = head_statistics(*model.heads.operands(model.heads.original, flight.hidden)).tokens
    columns = torch.stack(values, 1)
    if mode.measure == "patience":
        columns = _streaks(torch.stack(tokens, 1))
    return ExitReadings(tuple(exits), columns, torch.stack([*tokens, best], 1))


def _streaks(tokens: Tensor) -> Tensor:
    """[positions, exits] float32: exits in a row with the same token, each included."""
    streaks = [torch.ones(tokens.shape[0])]
    for place in range(1, tokens.shape[1]):
        same = tokens[:, place] == tokens[:, place - 1]
        streaks.append(torch.where(same, streaks[-1] + 1, 1.0))
    return torch.stack(streaks, 1)
