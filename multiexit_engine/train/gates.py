"""Trains gate probes of an ELMER: they foretell what its head would say of a state.

Knows the engine's readings of answers and gradient descent on states; the model's own weights stay
as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from multiexit_engine.checkpoint.probes import (
    GATE_PROBES,
    ProbeWeights,
    probe_file,
    write_probes,
)
from multiexit_engine.decoding.forecasts import foretold
from multiexit_engine.engine import Engine
from multiexit_engine.layers.gate_probes import Forecast, probe_forecast
from multiexit_engine.parallel_mode import Parallel
from multiexit_engine.train.probe_network import fit_network

# one source of so many is kept from training and tells how good the probes are
SOURCES_PER_HELD_OUT = 10


@dataclass(frozen=True, slots=True)
class GateReport:
    """What a new probe is worth on positions that it did not learn from.

    Attributes:
        layer: after which it reads states.
        num_rows: positions it learned from.
        explained: share of the variance of each measure that its medians explain, of the best
            token's log-odds and of the logarithm of the entropy.
        one_in_ten: share of the positions that pass the threshold at which the probe gave them one
            chance in ten, of either measure; 0.1 if it knows what it does not know.
    """

    layer: int
    num_rows: int
    explained: tuple[float, float]
    one_in_ten: tuple[float, float]


def train_gates(
    engine: Engine,
    sources: Iterable[str | Sequence[int]],
    output: Path | None = None,
    *,
    length_ratio: float = 1.0,
    units: int = 64,
    epochs: int = 20,
    learning_rate: float = 2e-3,
    num_sources: int = 4000,
    seed: int = 0,
) -> list[GateReport]:
    """Train a probe for each decoder layer but the last; save as ``gate_probes.safetensors``.

    A probe learns from the states of answers, in which nobody leaves, how sure the head is of them.
    The states of all layers are held in memory, in float32.

    Args:
        engine: on an ELMER, best in the type that it is to be used in; holds no requests.
        sources: texts or token ids, such as will be answered; those too long for it are left out.
        output: folder of the result; None for the model's own.
        length_ratio: positions of an answer for each token of its source.
        units: of the hidden layer; so many times the hidden size is what a probe multiplies.
        epochs: passes over the states.
        learning_rate: peak rate of AdamW; it rises over the first and falls over the other steps.
        num_sources: most sources that are read, evenly spread over all.
        seed: of the order of the positions and of the first weights.

    Raises:
        ValueError: an argument is wrong, the model is no ELMER, or the sources are too few.
    """
    for name, count in (("units", units), ("epochs", epochs), ("num_sources", num_sources)):
        if count < 1:
            raise ValueError(f"{name}={count}: must be 1 or more")
    kept = _sources(engine, sources, length_ratio, num_sources)
    if len(kept) < 2:
        raise ValueError(f"{len(kept)} sources are short enough for the model: give more")
    layers, states, wanted, is_held_out = _readings(engine, kept, length_ratio)
    probes, reports = {}, []
    for place, layer in enumerate(layers):
        torch.manual_seed(seed)
        rows, known = states[~is_held_out, place], wanted[~is_held_out, place]
        probe = fit_gate(rows, known, units, epochs, learning_rate)
        held = probe_forecast(probe, states[is_held_out, place]), wanted[is_held_out, place]
        reports.append(GateReport(layer, len(rows), _explained(*held), _one_in_ten(*held)))
        probes[layer] = probe
    weights = engine.checkpoint.weights
    path = probe_file(weights, GATE_PROBES)
    write_probes(path if output is None else output / path.name, probes, weights)
    return reports


def fit_gate(
    states: Tensor, wanted: Tensor, units: int, epochs: int, learning_rate: float
) -> ProbeWeights:
    """A probe for states [rows, hidden] float32 of which the ``foretold`` [rows, 2] are known.

    It maximises the likelihood of a logistic distribution whose scale, too, depends on the state.
    """
    mean, scale = wanted.mean(0), wanted.std(0).clamp_min(1e-6)
    targets = (wanted - mean) / scale

    def loss(outputs: Tensor, rows: Tensor) -> Tensor:
        centres, log_scales = outputs.chunk(2, dim=1)
        distances = (targets[rows] - centres) * (-log_scales).exp()
        return (log_scales + distances + 2 * functional.softplus(-distances)).mean()

    probe = fit_network(states, loss, units, 4, epochs, learning_rate)
    by_scale = torch.cat([scale, torch.ones(2)])
    shift = torch.cat([mean, scale.log()])
    down, down_bias = probe.down * by_scale[:, None], probe.down_bias * by_scale + shift
    return probe._replace(down=down, down_bias=down_bias)


def _sources(
    engine: Engine, sources: Iterable[str | Sequence[int]], ratio: float, count: int
) -> list[list[int]]:
    """At most so many that fit into the model with their answers, evenly spread over all."""
    limit = engine.config.max_model_len
    found = []
    for source in sources:
        is_text = isinstance(source, str)
        ids = list(engine.tokenizer(source, verbose=False)["input_ids"] if is_text else source)
        if 0 < len(ids) <= limit and math.ceil(ratio * len(ids)) <= limit:
            found.append(ids)
    step = max(len(found) / count, 1)
    return [found[int(place * step)] for place in range(min(count, len(found)))]


def _readings(
    engine: Engine, sources: Sequence[Sequence[int]], ratio: float
) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """Layers, [rows, layers, hidden] states, [rows, layers, 2] wanted, [rows] bool held out."""
    # the threshold stands for nothing: readings are of all positions
    by_entropy = Parallel("confidence", "entropy", 0.0, length=ratio)
    by_max_prob = Parallel("confidence", "max_prob", 0.0, length=ratio)
    layers: tuple[int, ...] = ()
    states, wanted, is_held_out = [], [], []
    for place, source in enumerate(sources):
        entropy, max_prob = (
            engine.exit_readings(list(source), mode) for mode in (by_entropy, by_max_prob)
        )
        layers = entropy.layers
        states.append(entropy.states.float().cpu())
        wanted.append(foretold(max_prob.values.log(), entropy.values).float().cpu())
        is_held_out.append(torch.full((len(states[-1]),), place % SOURCES_PER_HELD_OUT == 0))
    return layers, torch.cat(states), torch.cat(wanted), torch.cat(is_held_out)


def _explained(forecast: Forecast, wanted: Tensor) -> tuple[float, float]:
    left = (wanted - forecast.centres).square().mean(0) / wanted.var(0, correction=0)
    odds, entropy = (1 - left).tolist()
    return odds, entropy


def _one_in_ten(forecast: Forecast, wanted: Tensor) -> tuple[float, float]:
    # of the logistic distribution, nine tenths lie below this
    reach = math.log(9.0) * forecast.log_scales.exp()
    odds = (wanted[:, 0] >= (forecast.centres + reach)[:, 0]).float().mean()
    entropy = (wanted[:, 1] <= (forecast.centres - reach)[:, 1]).float().mean()
    return float(odds), float(entropy)
