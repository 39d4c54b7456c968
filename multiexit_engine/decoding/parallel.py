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
