"""Thresholds of early exits with a guarantee: how often tokens are still those of full depth.

Learn then test: thresholds are tried from the strictest one on, each by a test that full depth is
missed too often, until one cannot be ruled out. Knows the engine's readings; nothing of layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from multiexit_engine.checkpoint.calibration import Calibration
from multiexit_engine.checkpoint.probes import probe_digest
from multiexit_engine.engine import Engine
from multiexit_engine.modes import EarlyExit, Measure
from multiexit_engine.runtime.early_exit.exit_readings import ExitReadings

WINDOW = 128
# of a window, the part that is context only
CONTEXT = 32
NUM_THRESHOLDS = 80
# with copied keys and values, where each threshold takes a pass over the texts of its own
NUM_PASSES = 20


def calibrate(
    engine: Engine,
    texts: Iterable[str | Sequence[int]],
    *,
    measure: Measure = "max_prob",
    layers: tuple[int, ...] | None = None,
    min_layer: int = 1,
    shortlist: int | None = None,
    kv: Literal["recompute", "copy"] = "recompute",
    agreement: float = 0.95,
    confidence: float = 0.95,
) -> Calibration:
    """The laxest threshold of ``EarlyExit`` that keeps a share of full depth's greedy tokens.

    With at least ``confidence`` the expected share, over texts like the given ones, of tokens that
    are those of the model's own head given the same text before them is ``agreement`` or more.
    The given texts must be new to the model. They are cut into windows of 128 tokens, the first 32
    of them context only, and the windows are taken for independent. With ``kv="copy"`` the keys and
    values before each token are those that the threshold itself leaves there, so every threshold
    that is tried takes a pass over the windows, a token at a time; a quarter of them are tried.

    Args:
        engine: on the model; holds no requests.
        texts: held-out texts or token ids; what is left behind the last whole window of each is
            not used.
        measure: of the mode, like the next three.
        layers: the exits that may be taken; None for all below the last layer.
        min_layer: no exit before it.
        shortlist: as in the mode.
        kv: as in the mode.
        agreement: wanted share, in (0, 1).
        confidence: of the statement, in (0, 1).

    Raises:
        ValueError: an argument is wrong, the texts are too short, or no threshold can be shown to
            keep as much with so little text.

    Source: Schuster et al. 2022, arXiv:2207.07061, section 3.4; Angelopoulos et al. 2021,
        arXiv:2110.01052 (fixed sequences); Bates et al. 2021, arXiv:2101.02703, section 3.1
        (Hoeffding-Bentkus).
    """
    for name, share in (("agreement", agreement), ("confidence", confidence)):
        if not 0 < share < 1:
            raise ValueError(f"{name}={share!r}: must be in (0, 1)")
    mode = EarlyExit(2.0, measure, layers, min_layer, shortlist, kv=kv)
    windows = list(_windows(engine, texts))
    if not windows:
        raise ValueError(f"the texts hold no window of {WINDOW} tokens: give longer ones")
    # without the states, of which only probes learn
    readings = [
        engine.exit_readings(window, mode)._replace(states=torch.empty(0)) for window in windows
    ]
    exits = readings[0].layers
    tried = thresholds(measure, len(exits), engine.model_config.vocab_size)
    best: Calibration | None = None
    for threshold in tried[:: max(len(tried) // NUM_PASSES, 1)] if kv == "copy" else tried:
        if kv == "copy":
            found = _followed(engine, windows, readings, replace(mode, threshold=threshold))
        else:
            found = _read(engine, readings, measure, threshold)
        agrees, depths = found
        missed = 1 - float(agrees.mean())
        if p_value(missed, len(windows), 1 - agreement) > 1 - confidence:
            break
        best = Calibration(
            measure=measure,
            layers=exits,
            shortlist=shortlist,
            agreement=agreement,
            confidence=confidence,
            threshold=threshold,
            found_agreement=1 - missed,
            mean_layer=float(depths.mean()),
            num_windows=len(windows),
            num_tokens=agrees.numel(),
            kv=kv,
            probes=probe_digest(engine.checkpoint.weights) if measure == "probe" else None,
        )
    if best is None:
        raise ValueError(
            f"agreement={agreement}, confidence={confidence}: {len(windows)} windows of text show "
            "it for no threshold; give more text or ask for less"
        )
    return best


def _read(
    engine: Engine, readings: Sequence[ExitReadings], measure: Measure, threshold: float
) -> tuple[Tensor, Tensor]:
    """[windows, tokens] float64 each: 1 where the token is full depth's, and where it left."""
    layers = torch.tensor([*readings[0].layers, engine.model_config.num_layers]).double()
    left = torch.stack([taken_exits(r, measure, threshold)[CONTEXT:] for r in readings])
    agrees = torch.stack([agreements(r, measure, threshold)[CONTEXT:] for r in readings])
    return agrees.double(), layers[left]


def _followed(
    engine: Engine,
    windows: Sequence[Sequence[int]],
    readings: Sequence[ExitReadings],
    mode: EarlyExit,
) -> tuple[Tensor, Tensor]:
    """As ``_read``, of a mode that is run over the windows a token at a time."""
    found = engine.follow(windows, CONTEXT, mode)
    chosen = torch.tensor([each.token_ids for each in found])
    full = torch.stack([r.tokens[CONTEXT - 1 : -1, -1] for r in readings])
    layers = torch.tensor([each.exit_layers for each in found])
    return (chosen == full).double(), layers.double()


def thresholds(measure: Measure, num_exits: int, vocab_size: int) -> list[float]:
    """Thresholds from the strictest one to one that everything passes; none depends on data."""
    if measure == "patience":
        return [float(count) for count in range(num_exits + 1, 1, -1)]
    steps = [10 ** (4 * step / NUM_THRESHOLDS - 4) for step in range(NUM_THRESHOLDS + 1)]
    if measure == "entropy":
        return [step * math.log(vocab_size) for step in steps]
    return [1 - step for step in steps]


def taken_exits(readings: ExitReadings, measure: Measure, threshold: float) -> Tensor:
    """[positions] int64: the place of the exit that is taken, the model's own head coming last."""
    values = readings.values
    passes = values <= threshold if measure == "entropy" else values >= threshold
    always = torch.ones(values.shape[0], 1, dtype=torch.bool)
    return torch.cat((passes, always), 1).int().argmax(1)


def agreements(readings: ExitReadings, measure: Measure, threshold: float) -> Tensor:
    """[positions] bool: whether the exit that is taken has the best token of the model's head."""
    taken = taken_exits(readings, measure, threshold)[:, None]
    return readings.tokens.gather(1, taken)[:, 0] == readings.tokens[:, -1]


def p_value(mean: float, count: int, limit: float) -> float:
    """Of "the expected loss is above ``limit``" when ``count`` losses in [0, 1] have this mean.

    Source: Bates et al. 2021, arXiv:2101.02703, eq. 8: Hoeffding-Bentkus.
    """
    if mean >= limit:
        return 1.0
    exponent = mean * math.log(mean / limit) if mean else 0.0
    exponent += (1 - mean) * math.log((1 - mean) / (1 - limit))
    bentkus = math.e * _binomial_cdf(math.ceil(count * mean), count, limit)
    return min(math.exp(-count * exponent), bentkus)


def _binomial_cdf(most: int, count: int, chance: float) -> float:
    def log_choices(k: int) -> float:
        return math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)

    return sum(
        math.exp(log_choices(k) + k * math.log(chance) + (count - k) * math.log1p(-chance))
        for k in range(min(most, count) + 1)
    )


def _windows(engine: Engine, texts: Iterable[str | Sequence[int]]) -> Iterable[list[int]]:
    for text in texts:
        ids = list(engine.tokenizer(text)["input_ids"]) if isinstance(text, str) else list(text)
        for start in range(0, len(ids) - WINDOW + 1, WINDOW):
            yield ids[start : start + WINDOW]
