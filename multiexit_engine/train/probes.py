"""Trains exit probes on a finished model: small classifiers of the states at its exits.

Knows the engine's readings of texts and gradient descent on states; the model's own weights stay as
they are, and thresholds are found elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from multiexit_engine.checkpoint.probes import ProbeWeights, probe_file, write_probes
from multiexit_engine.engine import Engine
from multiexit_engine.layers.exit_probes import probe_chances
from multiexit_engine.modes import EarlyExit
from multiexit_engine.train.probe_network import fit_network

WINDOW = 128
# one window of so many is kept from training and tells how good the probes are
WINDOWS_PER_HELD_OUT = 10


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What a new probe is worth on windows that it did not learn from.

    Attributes:
        layer: of its exit.
        num_tokens: tokens it learned from.
        agreement: share of the held-out tokens at which exit and last layer agree.
        ranking: chance that it ranks a token at which they agree above one at which they do not;
            0.5 is a guess.
    """

    layer: int
    num_tokens: int
    agreement: float
    ranking: float


def train_probes(
    engine: Engine,
    texts: Iterable[str | Sequence[int]],
    output: Path | None = None,
    *,
    layers: tuple[int, ...] | None = None,
    units: int = 64,
    epochs: int = 10,
    learning_rate: float = 2e-3,
    num_windows: int = 800,
    seed: int = 0,
) -> list[ProbeReport]:
    """Train a probe for each exit and save them as ``exit_probes.safetensors``.

    A probe learns from the states of texts, new to the model, whether the exit's best token is that
    of the model's own head. The states of all exits are held in memory, in float32.

    Args:
        engine: on the model, best in the type that it is to be used in; holds no requests.
        texts: texts or token ids; windows of 128 tokens are taken from all over them.
        output: folder of the result; None for the model's own.
        layers: exits that get a probe; None for all below the last layer.
        units: of the hidden layer; so many times the hidden size is what a probe multiplies.
        epochs: passes over the states.
        learning_rate: peak rate of AdamW; it rises over the first and falls over the other steps.
        num_windows: most windows of 128 tokens that are read.
        seed: of the order of the tokens and of the first weights.

    Raises:
        ValueError: an argument is wrong, or the texts hold too few windows.
    """
    for name, count in (("units", units), ("epochs", epochs), ("num_windows", num_windows)):
        if count < 1:
            raise ValueError(f"{name}={count}: must be 1 or more")
    windows = _windows(engine, texts, num_windows)
    if len(windows) < 2:
        raise ValueError(f"the texts hold {len(windows)} windows of {WINDOW} tokens: give more")
    # the threshold stands for nothing: readings are of all exits
    mode = EarlyExit(1.0, layers=layers)
    readings = [engine.exit_readings(window, mode) for window in windows]
    is_held_out = [place % WINDOWS_PER_HELD_OUT == 0 for place in range(len(windows))]
    mask = torch.tensor(is_held_out).repeat_interleave(WINDOW)
    tokens = torch.cat([reading.tokens for reading in readings]).cpu()
    probes, reports = {}, []
    for place, layer in enumerate(readings[0].layers):
        states = torch.cat([reading.states[:, place] for reading in readings]).float().cpu()
        agrees = tokens[:, place] == tokens[:, -1]
        torch.manual_seed(seed)
        probe = fit_probe(states[~mask], agrees[~mask], units, epochs, learning_rate)
        found = probe_chances(probe, states[mask])
        agreement = float(agrees[mask].double().mean())
        ranking = _ranking(found, agrees[mask])
        reports.append(ProbeReport(layer, int((~mask).sum()), agreement, ranking))
        probes[layer] = probe
    weights = engine.checkpoint.weights
    path = probe_file(weights) if output is None else output / probe_file(weights).name
    write_probes(path, probes, weights)
    return reports


def fit_probe(
    states: Tensor, agrees: Tensor, units: int, epochs: int, learning_rate: float
) -> ProbeWeights:
    """A probe for states [tokens, hidden] float32 of which ``agrees`` [tokens] bool is known.

    Source: Schuster et al. 2022, arXiv:2207.07061, section 3.5: every exit's classifier on its own.
    """
    wanted = agrees.float()

    def loss(outputs: Tensor, rows: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(outputs[:, 0], wanted[rows])

    return fit_network(states, loss, units, 1, epochs, learning_rate)


def _ranking(chances: Tensor, agrees: Tensor) -> float:
    """Area under the ROC curve, by the sum of ranks; NaN where all agree or none does."""
    ranks = torch.empty(len(chances), dtype=torch.float64)
    ranks[chances.argsort()] = torch.arange(1, len(chances) + 1, dtype=torch.float64)
    right, wrong = int(agrees.sum()), int((~agrees).sum())
    if not right or not wrong:
        return float("nan")
    return (float(ranks[agrees].sum()) - right * (right + 1) / 2) / (right * wrong)


def _windows(engine: Engine, texts: Iterable[str | Sequence[int]], count: int) -> list[list[int]]:
    """At most so many windows, evenly spread over all texts."""
    found: list[list[int]] = []
    for text in texts:
        is_text = isinstance(text, str)
        ids = list(engine.tokenizer(text, verbose=False)["input_ids"] if is_text else text)
        found += [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    step = max(len(found) / count, 1)
    return [found[int(place * step)] for place in range(min(count, len(found)))]
