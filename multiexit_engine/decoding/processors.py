"""What a request's parameters do to its scores before a token is picked: biases, penalties, bans.

The host lists the tokens that change; a few scattered writes on the device change them. Knows
nothing of how tokens are picked afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from multiexit_engine.ops.edits import WORD_BITS, TokenEdits, edited_scores
from multiexit_engine.params import SamplingParams
from multiexit_engine.score_edits import BIAS, LOSS, PENALTY, ScoreEdits, TextEdits
from multiexit_engine.transfer import to_device


class TokenRow(NamedTuple):
    """What picking the next token of one score row needs to know.

    Attributes:
        params: of its request.
        prompt_token_ids: tokens of the prompt.
        output_token_ids: tokens generated so far.
        seed: of its random numbers.
        eos_token_ids: tokens that may not come before ``min_new_tokens``.
        bad_words: sequences of token ids that must not be completed.
        forced_token_id: the only token that may be chosen, if there is one.
        allowed: [vocab] bool, the only tokens that may come; None for all.
        num_unknown: tokens that follow ``output_token_ids`` and that only the device knows.
        edits: of its text, which others may have brought to another place; None: not kept yet.
    """

    params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    seed: int
    eos_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    forced_token_id: int | None = None
    allowed: Tensor | None = None
    num_unknown: int = 0
    edits: TextEdits | None = None

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the output before the one that is picked."""
        return len(self.output_token_ids) + self.num_unknown


def process_scores(scores: Tensor, rows: Sequence[TokenRow]) -> Tensor:
    """Apply every request's bias, penalties and bans to its row.

    In this order: logit_bias, repetition_penalty (prompt and output), presence and frequency
    penalty (output only), then -inf for tokens that would repeat an n-gram, complete a bad word or
    end the text before min_new_tokens, and for those that are not allowed; last, 0 for a forced
    token and -inf for all others. A row's result does not depend on the other rows.

    Args:
        scores: [rows, vocab] float32 scores of the rows' modes; left as they are.
        rows: one for each score row.

    Returns:
        [rows, vocab] float32; ``scores`` itself when no row asks for anything.

    Source: transformers' ``_get_logits_processor`` and the processors it lists; the presence and
        frequency penalties of vLLM.
    """
    asking = [(index, row) for index, row in enumerate(rows) if is_processed(row)]
    if not asking:
        return scores
    edits = {place: row_edits(row) for place, row in asking}
    numbers = _numbers(edits, scores.device, scores.dtype)
    scores = edited_scores(scores, TokenEdits(*numbers, None, numbers[0]))
    for index, row in asking:
        if row.allowed is not None:
            scores[index].masked_fill_(~row.allowed, -math.inf)
    _force(scores, asking)
    return scores


def allowed_tokens(masks: Sequence[bytes], vocab_size: int, device: torch.device) -> Tensor:
    """[masks, vocab] bool of bit masks: bit t % 8 of byte t // 8 is token t."""
    if not masks:
        return torch.empty(0, vocab_size, dtype=torch.bool, device=device)
    bits = torch.frombuffer(bytearray().join(masks), dtype=torch.uint8)
    bits = to_device(bits.view(len(masks), -1, 1), device)
    places = torch.arange(8, dtype=torch.uint8, device=device)
    return (bits >> places & 1).view(len(masks), -1)[:, :vocab_size].bool()


def token_edits(
    rows: Sequence[TokenRow],
    masks: Sequence[bytes | None],
    vocab_size: int,
    device: torch.device,
) -> TokenEdits:
    """What ``process_scores`` does to rows, none of them forced, for ops that choose tokens.

    Args:
        rows: one for each score row; their ``allowed`` is not looked at.
        masks: for each row bits of the tokens that may come, see ``allowed_tokens``, or None.
        vocab_size: of the model.
        device: where the tensors go.
    """
    edits = dict(enumerate(map(row_edits, rows)))
    is_edited = [
        len(own.tokens) > 0 or mask is not None
        for own, mask in zip(edits.values(), masks, strict=True)
    ]
    return TokenEdits(
        *_numbers(edits, device, torch.float32),
        _allowed_words(masks, vocab_size, device),
        to_device([int(edited) for edited in is_edited], device, torch.int32),
    )


def _allowed_words(
    masks: Sequence[bytes | None], vocab_size: int, device: torch.device
) -> Tensor | None:
    """[rows, words] int32, all bits set in rows without mask; None where no row has one."""
    masked = {place: mask for place, mask in enumerate(masks) if mask is not None}
    if not masked:
        return None
    num_bytes = -(-vocab_size // WORD_BITS) * WORD_BITS // 8
    own = bytearray().join(mask[:num_bytes].ljust(num_bytes, b"\0") for mask in masked.values())
    bits = torch.frombuffer(own, dtype=torch.int32).view(len(masked), -1)
    words = torch.full((len(masks), bits.shape[1]), -1, dtype=torch.int32, device=device)
    words[to_device([*masked], device)] = to_device(bits, device)
    return words


def row_edits(row: TokenRow) -> ScoreEdits:
    """What ``process_scores`` does to a row that is not forced, its ``allowed`` apart."""
    edits = row.edits or TextEdits(row.params, row.prompt_token_ids)
    return edits.after(row.output_token_ids, _banned(row))


def _numbers(
    edits: Mapping[int, ScoreEdits], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows, tokens, bias, penalty and loss of the edits of some rows."""
    own = [*edits.values()]
    rows = np.repeat([*edits], [len(each.tokens) for each in own])
    index = np.stack([rows, np.concatenate([each.tokens for each in own])])
    numbers = np.concatenate([each.numbers[:, [BIAS, PENALTY, LOSS]] for each in own]).T
    places = to_device(torch.from_numpy(index), device)
    values = to_device(torch.from_numpy(numbers).to(dtype).contiguous(), device)
    return places[0], places[1], values[0], values[1], values[2]


def is_processed(row: TokenRow) -> bool:
    """Whether ``process_scores`` changes this row."""
    return row.forced_token_id is not None or asks_for_processing(
        row.params, row.num_output_tokens, row.bad_words
    )


def asks_for_processing(
    params: SamplingParams, num_output_tokens: int, bad_words: tuple[tuple[int, ...], ...]
) -> bool:
    """``is_processed`` of a row that need not be made for it."""
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.no_repeat_ngram_size
        or num_output_tokens < params.min_new_tokens
        or bad_words
        or params.structured_outputs is not None
    )


def most_edits(
    params: SamplingParams,
    num_tokens: int,
    num_endings: int,
    bad_words: tuple[tuple[int, ...], ...],
) -> int:
    """No fewer than ``row_edits`` gives.

    Args:
        params: of the row.
        num_tokens: of its text.
        num_endings: tokens that may end it.
        bad_words: see ``TokenRow``.
    """
    seen = num_tokens if looks_at_tokens(params, bad_words) else 0
    return len(params.logit_bias or ()) + num_endings + len(bad_words) + seen


def follows_tokens(params: SamplingParams, bad_words: tuple[tuple[int, ...], ...]) -> bool:
    """Whether what is done to a row's scores depends on more than the tokens' numbers."""
    return bool(
        params.no_repeat_ngram_size > 1
        or params.structured_outputs is not None
        or any(len(word) > 1 for word in bad_words)
    )


def looks_at_tokens(params: SamplingParams, bad_words: tuple[tuple[int, ...], ...]) -> bool:
    """Whether what is done to a row's scores depends on the tokens before, not on their number."""
    return bool(
        params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.no_repeat_ngram_size
        or bad_words
        or params.structured_outputs is not None
    )


def _force(scores: Tensor, rows: list[tuple[int, TokenRow]]) -> None:
    forced = [
        (index, row.forced_token_id) for index, row in rows if row.forced_token_id is not None
    ]
    if not forced:
        return
    places = to_device(forced, scores.device)
    scores[places[:, 0]] = -math.inf
    scores[places[:, 0], places[:, 1]] = 0


def _banned(row: TokenRow) -> Iterator[int]:
    params = row.params
    if row.num_output_tokens < params.min_new_tokens:
        yield from row.eos_token_ids
    if params.no_repeat_ngram_size > 1 or row.bad_words:
        context = row.prompt_token_ids + row.output_token_ids
        if params.no_repeat_ngram_size > 1:
            yield from _repeating(context, params.no_repeat_ngram_size)
        yield from _completing(context, row.bad_words, row.eos_token_ids)


def _repeating(context: list[int], size: int) -> Iterator[int]:
    """Tokens that would end an n-gram of two and more tokens of the context once more."""
    prefix = context[len(context) - size + 1 :] if len(context) >= size else []
    if not prefix:
        return
    last = prefix[-1]
    for end, token in enumerate(context[:-1], 1):
        if token == last and end >= size - 1 and context[end - size + 1 : end] == prefix:
            yield context[end]


def _completing(
    context: list[int], bad_words: tuple[tuple[int, ...], ...], eos_token_ids: tuple[int, ...]
) -> Iterator[int]:
    """Last tokens of the bad words that the context has begun.

    A word that is just an ending token is no bad word, as in transformers.
    """
    for word in bad_words:
        prefix = list(word[:-1])
        if not prefix and word[0] in eos_token_ids:
            continue
        if len(prefix) <= len(context) and context[len(context) - len(prefix) :] == prefix:
            yield word[-1]
