"""What a network writes for held-out sources, and how near that is to their targets.

It knows decoding, text and the metrics' libraries. It does not know training or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from tokenizers import Tokenizer

from multiexit_engine.train.elmer_data import encode_source, encode_target, make_batch
from multiexit_engine.train.elmer_network import END, ElmerNetwork
from multiexit_engine.train.elmer_objectives import (
    PairBatch,
    ParallelTokens,
    decode_by_confidence,
    decode_softly,
)

_ROWS_PER_BATCH = 64

Decode = Callable[[ElmerNetwork, PairBatch], ParallelTokens]
Length = Callable[[int, int], int]


@dataclass(frozen=True)
class Written:
    """A text, its ids without what follows the end, and the layer each id left at, 1-based."""

    text: str
    ids: list[int]
    exit_layers: list[int]


@dataclass(frozen=True)
class TextFigures:
    """How near texts are to their references, each 0 to 100, and where their tokens left.

    Attributes:
        bleu: of the whole corpus, by sacrebleu with its defaults.
        rouge_l: mean F-measure of the longest common subsequence, by rouge-score.
        mean_exit_layer: over all tokens up to the end, 1-based.
    """

    bleu: float
    rouge_l: float
    mean_exit_layer: float


def without_exits(network: ElmerNetwork, batch: PairBatch) -> ParallelTokens:
    """One pass, one head."""
    return confident(-1.0)(network, batch)


def softly(network: ElmerNetwork, batch: PairBatch) -> ParallelTokens:
    """All layers, each fed with the predictions of the one before."""
    return decode_softly(network, batch.source_ids, batch.source_mask, batch.target_mask)


def confident(threshold: float) -> Decode:
    """Exits by entropy, in nats."""

    def decode(network: ElmerNetwork, batch: PairBatch) -> ParallelTokens:
        return decode_by_confidence(
            network, batch.source_ids, batch.source_mask, batch.target_mask, threshold
        )

    return decode


def reference_length(num_source: int, num_target: int) -> int:
    """As many positions as the reference needs: what ELMER's own test gives its network."""
    return num_target


def source_length(ratio: float, limit: int) -> Length:
    """So many positions for each token of the source, as somebody without a reference must.

    Rounded up, as the engine's `Parallel(length=ratio)` does.
    """
    return lambda num_source, num_target: min(limit, max(1, math.ceil(ratio * num_source - 1e-9)))


def write(
    network: ElmerNetwork,
    tokenizer: Tokenizer,
    sources: Sequence[str],
    targets: Sequence[str],
    decode: Decode,
    length: Length,
) -> list[Written]:
    """The network's texts for `sources`, in their order.

    `targets` are the references; only `length` sees how long they are.
    """
    device = network.final_logits_bias.device
    limit = network.shape.max_position_embeddings
    source_ids = encode_source(tokenizer, sources, limit)
    target_ids = encode_target(tokenizer, targets)
    results: list[Written] = []
    for start in range(0, len(sources), _ROWS_PER_BATCH):
        rows = slice(start, start + _ROWS_PER_BATCH)
        lengths = [
            min(limit, length(len(source), len(target)))
            for source, target in zip(source_ids[rows], target_ids[rows], strict=True)
        ]
        # the labels are not read
        batch = make_batch(source_ids[rows], [[END]] * len(lengths), lengths).to(device)
        tokens = decode(network, batch)
        for ids, layers, count in zip(
            tokens.ids.tolist(), tokens.exit_layers.tolist(), lengths, strict=True
        ):
            end = ids.index(END) if END in ids[:count] else count
            text = collapse_repeats(tokenizer.decode(ids[:end]))
            results.append(Written(text, ids[:end], layers[:end]))
    return results


def collapse_repeats(text: str) -> str:
    """Each run of equal words as one, as ELMER's test does; words are what spaces part."""
    return " ".join(word for word, _ in groupby(text.split()))


def text_figures(written: Sequence[Written], references: Sequence[str]) -> TextFigures:
    """Figures of texts against one reference each."""
    texts = [each.text for each in written]
    layers = [layer for each in written for layer in each.exit_layers]
    return TextFigures(
        bleu=corpus_bleu(texts, references),
        rouge_l=mean_rouge_l(texts, references),
        mean_exit_layer=sum(layers) / max(1, len(layers)),
    )


def corpus_bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of a corpus, 0 to 100, by sacrebleu with its defaults."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(texts), [list(references)]).score)


def mean_rouge_l(texts: Sequence[str], references: Sequence[str]) -> float:
    """Mean F-measure of ROUGE-L, 0 to 100, by rouge-score without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    scores = [
        scorer.score(reference, text)["rougeL"].fmeasure
        for text, reference in zip(texts, references, strict=True)
    ]
    return 100.0 * float(sum(scores)) / len(scores)
