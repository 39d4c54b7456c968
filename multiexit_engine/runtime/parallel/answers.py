"""Answers of non-autoregressive decoding, and the work that finding them takes.

Plain data that a pass fills; knows nothing of models or queues.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from multiexit_engine.parallel_mode import Parallel


@dataclass(eq=False)
class Answer:
    """One answer of a given length to one source of the batch.

    Attributes:
        source: which source of the batch; answers stand in the order of their sources.
        mode: where its positions leave.
        length: its positions.
        has_log_probs: whether somebody asks for those of its tokens.
        token_ids: found so far, one for each position.
        log_probs: of the tokens, natural, in the prediction that gave them; where nobody asks NaN
            for those of what is no number, else anything.
        exit_layers: 1-based, where each position left.
    """

    source: int
    mode: Parallel
    length: int
    has_log_probs: bool
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)

    def score(self, num_tokens: int) -> float:
        """Mean log-probability of its first tokens; -inf where one is not a number."""
        mean = math.fsum(self.log_probs[:num_tokens]) / max(1, num_tokens)
        return -math.inf if math.isnan(mean) else mean


@dataclass
class LayerRows:
    """Work that was done, in rows, one number for each decoder layer.

    Attributes:
        computed: rows that ran the layer.
        keyed: rows of which it made keys and values for its self-attention.
        tested: rows whose prediction after it was tested.
    """

    computed: list[int]
    keyed: list[int]
    tested: list[int]

    @classmethod
    def none(cls, num_layers: int) -> LayerRows:
        """Of a model that has done nothing yet."""
        return cls([0] * num_layers, [0] * num_layers, [0] * num_layers)
