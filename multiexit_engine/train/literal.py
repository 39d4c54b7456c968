"""Targets that follow their sources word for word: what a decoder without an order can learn.

A network that writes all words at once cannot choose between two ways to say something: it mixes
them. So the targets it learns from are made literal: the source's own words, except where a
substitution that is common among the pairs stands in this pair, or is what the pairs make of those
words most of the time. It knows pairs of texts, no tokens and no network.

Source: the purpose is that of sequence-level distillation for non-autoregressive translation (Gu et
al. 2018, arXiv 1711.02281; why it helps: Zhou et al. 2020, arXiv 1911.02727); the teacher here is
a count of substitutions instead of an autoregressive network.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

_WORD = re.compile(r"\s*(?:[\w'-]+|[^\w\s])")
_LONGEST_SPAN = 3

Pair = tuple[str, str]
Words = tuple[str, ...]


@dataclass(frozen=True)
class _Substitution:
    """Words [begin, end) of a source that this pair replaces by a text."""

    begin: int
    end: int
    replaced: Words
    text: str


@dataclass(frozen=True)
class _Aligned:
    """A source's words with the spaces before them, what replaces some, and what stays of it."""

    words: list[str]
    substitutions: list[_Substitution]
    kept: list[Words]


def literal_pairs(pairs: Sequence[Pair], min_count: int) -> list[Pair]:
    """Pairs with targets that differ from their sources only by common substitutions.

    A substitution replaces one to three words (a punctuation mark is a word) by one to three
    others, in the alignment of longest common blocks; it is common if at least `min_count` of
    them occur in `pairs`. A source's other words are replaced too where a common substitution
    occurs more often than those words stay.
    """
    aligned = [_align(source, target) for source, target in pairs]
    counts = Counter((s.replaced, s.text) for each in aligned for s in each.substitutions)
    stays = Counter(words for each in aligned for words in each.kept)
    usual: dict[Words, str] = {}
    for (replaced, text), count in counts.most_common():
        if count >= min_count and count > stays[replaced]:
            usual.setdefault(replaced, text)
    return [
        (
            source,
            _literal(
                each.words,
                [s for s in each.substitutions if counts[s.replaced, s.text] >= min_count],
                usual,
            ),
        )
        for (source, _), each in zip(pairs, aligned, strict=True)
    ]


def _align(source: str, target: str) -> _Aligned:
    words, others = _WORD.findall(source), _WORD.findall(target)
    matcher = SequenceMatcher(None, _bare(words), _bare(others), autojunk=False)
    substitutions, kept = [], []
    for kind, begin, end, target_begin, target_end in matcher.get_opcodes():
        if kind == "equal":
            kept += _spans(_bare(words[begin:end]))
        elif kind == "replace" and max(end - begin, target_end - target_begin) <= _LONGEST_SPAN:
            text = "".join(others[target_begin:target_end]).strip()
            substitutions.append(_Substitution(begin, end, _bare(words[begin:end]), text))
    return _Aligned(words, substitutions, kept)


def _literal(words: list[str], common: list[_Substitution], usual: dict[Words, str]) -> str:
    pieces: list[str] = []
    done = 0
    for substitution in common:
        pieces += _as_usual(words[done : substitution.begin], usual)
        pieces.append(_space(words[substitution.begin]) + substitution.text)
        done = substitution.end
    return "".join(pieces + _as_usual(words[done:], usual)).strip()


def _as_usual(words: list[str], usual: dict[Words, str]) -> list[str]:
    """Words with the longest spans first that are usually replaced."""
    pieces: list[str] = []
    place = 0
    while place < len(words):
        for length in range(min(_LONGEST_SPAN, len(words) - place), 0, -1):
            text = usual.get(_bare(words[place : place + length]))
            if text is not None:
                pieces.append(_space(words[place]) + text)
                break
        else:
            length = 1
            pieces.append(words[place])
        place += length
    return pieces


def _spans(words: Words) -> list[Words]:
    return [
        words[begin : begin + length]
        for length in range(1, _LONGEST_SPAN + 1)
        for begin in range(len(words) - length + 1)
    ]


def _bare(words: Sequence[str]) -> Words:
    return tuple(word.strip() for word in words)


def _space(word: str) -> str:
    return word[: len(word) - len(word.lstrip())]
