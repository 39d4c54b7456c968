"""The rules of non-autoregressive decoding: who leaves, who is computed again, what is kept.

Host data and small tensors; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from multiexit_engine.ops.heads import HeadStatistics
from multiexit_engine.parallel_mode import Parallel
from multiexit_engine.transfer import to_device

# More than what log-probabilities, sums of float32 numbers, are off.
_ROUNDING = 2.0**-15


def tested_layers(mode: Parallel, num_layers: int) -> tuple[int, ...]:
    """The 1-based layers after which a mode tests positions; after the last one all leave."""
    if mode.exit != "confidence":
        return ()
    layers = range(1, num_layers) if mode.layers is None else mode.layers
    return tuple(sorted(layer for layer in layers if layer < num_layers))


def sure_rows(found: HeadStatistics, modes: Sequence[Parallel]) -> Tensor:
    """[rows] bool: whether each row's prediction is as sure as its mode asks; NaN never is."""
    device = found.entropy.device
    thresholds = to_device([mode.threshold for mode in modes], device)
    by_entropy = to_device([mode.measure == "entropy" for mode in modes], device)
    return is_sure(found, thresholds.to(found.entropy.dtype), by_entropy)


def is_sure(found: HeadStatistics, thresholds: Tensor, by_entropy: Tensor) -> Tensor:
    """``sure_rows`` of modes that the device knows.

    Args:
        found: of the rows.
        thresholds: [rows] in the dtype of ``found``.
        by_entropy: [rows] bool, whether a row's measure is the entropy.
    """
    return torch.where(by_entropy, found.entropy <= thresholds, found.log_probs.exp() >= thresholds)


def certain_rows(
    found: HeadStatistics, errors: Tensor, modes: Sequence[Parallel]
) -> tuple[Tensor, Tensor]:
    """Which rows are sure, and which are not, whatever logits lie this near to the rough ones.

    With every logit x within e of its rough one, and m the greatest of a row: (1 - p) / p of a
    token is the sum of exp(x' - x) over the others, of which each stays within a factor exp(w) with
    w = 2e, so the logit of max p moves by at most w. On the straight way from the rough logits to
    the others the entropy H changes by dH = -sum p dx (x - E x), and E |x - E x| <= 2 E (m - x) =
    2 D. Each p stays within a factor exp(w) and each m - x within w, so D <= exp(u) (D' + u) where
    the way is u / w done, and |H - H'| is at most the integral from u = 0 to w of exp(u) (D' + u).

    Args:
        found: of the rough logits.
        errors: [rows] float64, the e of each row.
        modes: of each row.

    Returns:
        Two [rows] bool tensors; a row in neither needs the exact logits, as one with NaN does.
    """
    thresholds = torch.tensor([mode.threshold for mode in modes], dtype=torch.float64)
    by_entropy = torch.tensor([mode.measure == "entropy" for mode in modes])
    thresholds = thresholds.to(torch.float32).double()
    wide = 2 * errors
    best, entropy = found.log_probs.double(), found.entropy.double()
    drop = (entropy + best).clamp_min(0.0)
    change = drop * wide.expm1() + (wide - 1) * wide.exp() + 1
    # log-probabilities are rounded, by far less than logits may be off
    change = change + wide / 16
    lowest = torch.sigmoid(_log_odds(best - _ROUNDING) - wide) * (1 - _ROUNDING)
    highest = torch.sigmoid(_log_odds(best + _ROUNDING) + wide) * (1 + _ROUNDING)
    # no entropy is below that of a row whose tokens all have its greatest probability
    least = torch.maximum(entropy - change, -highest.log())
    sure = torch.where(by_entropy, entropy + change <= thresholds, lowest >= thresholds)
    unsure = torch.where(by_entropy, least > thresholds, highest < thresholds)
    is_known = errors.isfinite() & entropy.isfinite()
    return sure & is_known, unsure & is_known


def lone_best_tokens(found: HeadStatistics, errors: Tensor) -> Tensor:
    """[rows] bool: whether the best token of rough logits is that of all logits this near to them.

    No other one reaches it where the runner-up is more than twice the error below it.

    Args:
        found: of the rough logits.
        errors: [rows] float64, how far any of them is from the others.
    """
    lead = found.log_probs.double() - found.second_log_probs.double()
    return lead > 2 * errors + _ROUNDING


def _log_odds(log_probs: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p; infinite from log 1 on."""
    below = log_probs.clamp_max(0.0)
    return below - (-below.expm1()).log()


def rows_to_refine(log_probs: Sequence[float], turn: int, num_turns: int) -> list[int]:
    """The positions that a further pass computes again: those with the least likely tokens.

    Args:
        log_probs: of each position's token.
        turn: of this pass, 1 to ``num_turns``.
        num_turns: further passes in all.

    Returns:
        Positions, ascending: a share of them that falls evenly with the turns, towards zero after
        the last one; of equals the first.

    Source: Ghazvininejad et al. 2019, arXiv:1904.09324, section 4.1.
    """
    count = len(log_probs) * (num_turns + 1 - turn) // (num_turns + 1)
    order = sorted(range(len(log_probs)), key=lambda position: (log_probs[position], position))
    return sorted(order[:count])


def num_kept(token_ids: Sequence[int], ending: Collection[int]) -> int:
    """How many tokens an answer has: up to and with the first that ends it, or all."""
    found = next((place for place, token in enumerate(token_ids) if token in ending), None)
    return len(token_ids) if found is None else found + 1


def collapse_words(text: str) -> str:
    """The text with every run of equal words as one word, and single spaces between words.

    Source: the post-processing in ELMER's ``test``.
    """
    words = text.split()
    kept = [word for place, word in enumerate(words) if place == 0 or word != words[place - 1]]
    return " ".join(kept)
