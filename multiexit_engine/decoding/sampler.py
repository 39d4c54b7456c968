"""Picks tokens from score rows, and looks up what the rows thought of them.

Knows a request's sampling parameters; nothing of the mode that made the scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multiexit_engine.decoding.processors import TokenRow, asks_for_processing, process_scores
from multiexit_engine.decoding.warpers import TIES, is_warped, warp_scores
from multiexit_engine.ops import sample_tokens
from multiexit_engine.ops.best_tokens import MOST_LISTED
from multiexit_engine.params import SamplingParams
from multiexit_engine.transfer import to_device

__all__ = [
    "LogprobTensors",
    "TokenRow",
    "choose_several",
    "choose_tokens",
    "needs_distribution",
    "needs_scores",
    "needs_whole_distribution",
    "pick_tokens",
    "token_logprobs",
]


class LogprobTensors(NamedTuple):
    """Log-probabilities of the best tokens of each row, and of one token of it.

    Attributes:
        values: [rows, k] float32, best first.
        ids: [rows, k] int64 tokens they belong to.
        chosen: [rows] float32 log-probability of the given token.
        ranks: [rows] int64: 1 + the number of tokens with a higher one.
    """

    values: Tensor
    ids: Tensor
    chosen: Tensor
    ranks: Tensor


def needs_scores(
    params: SamplingParams, num_output_tokens: int, bad_words: tuple[tuple[int, ...], ...] = ()
) -> bool:
    """Whether the next token is not just the best, or a draw, of what its mode gives."""
    return needs_distribution(params) or asks_for_processing(params, num_output_tokens, bad_words)


def needs_distribution(params: SamplingParams) -> bool:
    """Whether more of its distribution is wanted than a token, after changes of single scores."""
    return params.logprobs is not None or (not params.is_greedy and is_warped(params))


def needs_whole_distribution(params: SamplingParams) -> bool:
    """Whether more is wanted than ops that choose tokens give: they bring no scores to memory.

    They draw from what top_k, top_p and min_p leave, and list a few log-probabilities.
    """
    lists_many = not -1 < (params.logprobs or 0) <= MOST_LISTED
    return lists_many or (not params.is_greedy and params.typical_p < 1)


def choose_tokens(scores: Tensor, rows: Sequence[TokenRow]) -> Tensor:
    """Pick the next token of every row.

    Scores are processed (``process_scores``); greedy rows then take the best token, the lowest id
    among equals; the others draw one after temperature, top_k, top_p, min_p and typical_p. A
    row's token depends on its own scores, parameters, seed and number of output tokens alone.

    Args:
        scores: [rows, vocab] float32 raw scores of the rows' modes; left as they are.
        rows: one for each score row.

    Returns:
        [rows] int64 token ids.

    Source: transformers' ``_sample`` with its processors; drawing by Gumbel-max.
    """
    return pick_tokens(process_scores(scores, rows), rows)


def choose_several(scores: Tensor, rows: Sequence[TokenRow], count: int) -> Tensor:
    """[rows, count] int64: the token of ``choose_tokens``, then that without the ones before."""
    scores = process_scores(scores, rows)
    tokens = [pick_tokens(scores, rows)[:, None]]
    for _ in range(1, count):
        scores = scores.scatter(1, tokens[-1], -math.inf)
        tokens.append(pick_tokens(scores, rows)[:, None])
    return torch.cat(tokens, 1)


def pick_tokens(scores: Tensor, rows: Sequence[TokenRow]) -> Tensor:
    """``choose_tokens`` of scores that are processed already.

    A row of nothing but -inf gives some token; its score tells.
    """
    sampled = [index for index, row in enumerate(rows) if not row.params.is_greedy]
    if not sampled:
        return scores.argmax(-1)
    if len(sampled) == len(rows):
        return _draw(scores, rows)
    tokens = scores.argmax(-1)
    places = to_device(sampled, scores.device)
    tokens[places] = _draw(scores[places], [rows[index] for index in sampled])
    return tokens


def _draw(scores: Tensor, rows: Sequence[TokenRow]) -> Tensor:
    device = scores.device
    state = [[row.seed, row.num_output_tokens] for row in rows]
    seeds, positions = to_device(state, device).unbind(1)
    return sample_tokens(warp_scores(scores, [row.params for row in rows]), seeds, positions)


def token_logprobs(scores: Tensor, tokens: Tensor, num_top: int) -> LogprobTensors:
    """Log-probabilities of given tokens and of the best ones, before any processing.

    Args:
        scores: [rows, vocab] float32 raw scores of the rows' modes.
        tokens: [rows] int64.
        num_top: how many best tokens to list, of equal ones the lowest ids; at most the
            vocabulary; may be 0.
    """
    logprobs = scores.log_softmax(-1)
    chosen = logprobs.gather(1, tokens[:, None])
    values, ids = _best(logprobs, min(num_top, logprobs.shape[1]))
    ranks = (logprobs > chosen).sum(-1) + 1
    return LogprobTensors(values, ids, chosen[:, 0], ranks)


def _best(logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[rows, count] values, best first, and ids, of equal ones the lowest.

    Which of equal values topk gives depends on the count, which is that of the neediest row: of
    DoLa's many tokens at -inf a row would list others in company.
    """
    if count == 0:
        return logprobs[:, :0], logprobs[:, :0].long()
    width = min(count + TIES, logprobs.shape[1])
    best = logprobs.topk(width, -1)
    ids = best.indices
    # a device is not asked whether more tokens tie than there is room for
    if logprobs.device.type != "cpu" or (best.values[:, count - 1] == best.values[:, -1]).any():
        ids = _lowest_of_best(logprobs, best.values[:, count - 1 : count], count)
    ids = ids.sort(-1).values
    values, order = logprobs.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values[:, :count], ids.gather(1, order)[:, :count]


def _lowest_of_best(logprobs: Tensor, last: Tensor, count: int) -> Tensor:
    """[rows, count] ids of those above ``last`` [rows, 1], and the lowest of those equal to it."""
    equal, better = logprobs == last, logprobs > last
    room = count - better.sum(-1, keepdim=True)
    kept = better | (equal & (equal.cumsum(-1) <= room))
    vocab = logprobs.shape[1]
    places = torch.arange(vocab, device=logprobs.device).where(kept, vocab)
    # of a row of NaN, which ends its request, nothing was kept
    return places.topk(count, -1, largest=False).values.clamp(max=vocab - 1)
