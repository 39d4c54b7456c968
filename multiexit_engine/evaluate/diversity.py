"""How repetitive generated texts are: rep-n and diversity over whitespace words.

Knows texts only, no models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NGRAM_SIZES = (2, 3, 4)


@dataclass(frozen=True, slots=True)
class Diversity:
    """Repetition of a set of texts.

    Attributes:
        repetition: for each n-gram size the percentage of n-grams that occurred before in the same
            text, with two decimals; None where no text is long enough.
        diversity: product of ``1 - repetition / 100`` over the sizes; 0 where one is None.
    """

    repetition: dict[int, float | None]
    diversity: float


def measure_diversity(texts: str | Sequence[str], *, drop_last_ngram: bool = False) -> Diversity:
    """Repetition and diversity of one text, or of several together.

    Distinct n-grams are counted within each text, then summed over the texts.

    Args:
        texts: generated texts, without their prompts.
        drop_last_ngram: leave out the last n-gram of each text, as simctg does whose figures the
            papers quote (its loop ends one step early). Figures of both kinds must not be mixed.

    Source: ``measure_repetition_and_diversity`` of simctg 0.7, which IBM's evaluation calls.
    """
    words = [text.split() for text in ([texts] if isinstance(texts, str) else texts)]
    repetition = {n: _repetition(words, n, drop_last_ngram) for n in NGRAM_SIZES}
    kept = [0.0 if rep is None else 1 - rep / 100 for rep in repetition.values()]
    return Diversity(repetition, math.prod(kept))


def _repetition(texts: Sequence[Sequence[str]], size: int, drop_last: bool) -> float | None:
    num_distinct = num_total = 0
    for words in texts:
        stop = len(words) - size + (0 if drop_last else 1)
        ngrams = [tuple(words[start : start + size]) for start in range(stop)]
        num_distinct += len(set(ngrams))
        num_total += len(ngrams)
    return round(100 * (1 - num_distinct / num_total), 2) if num_total else None
