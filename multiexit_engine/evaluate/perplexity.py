"""Perplexity of a text under a decoding mode: per token, per word and per byte.

Knows the engine's ``score``, which cuts long texts into windows; nothing of models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from multiexit_engine.engine import Engine
from multiexit_engine.params import DecodingMode


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What a text costs a mode.

    Attributes:
        num_tokens: tokens that were scored: all of the text, its first one only if the model has a
            token that begins texts.
        num_words: whitespace words of the text.
        num_bytes: bytes of the text in UTF-8.
        total_logprob: sum of the tokens' natural log-probabilities.
        greedy_accuracy: share of the scored tokens that are the mode's first choice.
    """

    num_tokens: int
    num_words: int
    num_bytes: int
    total_logprob: float
    greedy_accuracy: float

    @property
    def per_token(self) -> float:
        """Perplexity per token; comparable only between modes and models of one tokenizer."""
        return math.exp(-self.total_logprob / self.num_tokens)

    @property
    def per_word(self) -> float:
        """Perplexity per whitespace word, comparable between tokenizers."""
        return math.exp(-self.total_logprob / self.num_words)

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of text, comparable between tokenizers."""
        return -self.total_logprob / self.num_bytes / math.log(2)


def measure_perplexity(
    engine: Engine, text: str, decoding: DecodingMode | None = None, stride: int | None = None
) -> Perplexity:
    """Perplexity of a text.

    A text longer than the model is read in overlapping windows. The first token is scored after
    the model's beginning-of-text token, as lm-eval does, or not at all where there is none.

    Args:
        engine: with a tokenizer.
        text: not empty.
        decoding: the mode to measure; None for the engine's own.
        stride: tokens that each further window scores; smaller means more context for each token
            and more work. None: as many as fit, with one token of context.

    Raises:
        ValueError: the text has no token to score, or an argument is not allowed.
    """
    if engine.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer: score token ids with Engine.score")
    token_ids: list[int] = list(engine.tokenizer(text)["input_ids"])
    if not token_ids:
        raise ValueError("text is empty: give at least one token to score")
    first = engine.model_config.bos_token_id
    if token_ids[0] == first:
        token_ids = token_ids[1:]
    item = token_ids if first is None else ([first], token_ids)
    score = engine.score([item], decoding, stride=stride)[0]
    is_scored = [logprob is not None for logprob in score.token_logprobs]
    if not any(is_scored):
        raise ValueError("text has a single token and nothing before it: give a longer text")
    return Perplexity(
        num_tokens=sum(is_scored),
        num_words=max(1, len(text.split())),
        num_bytes=len(text.encode()),
        total_logprob=score.total,
        greedy_accuracy=sum(score.is_greedy) / sum(is_scored),
    )
