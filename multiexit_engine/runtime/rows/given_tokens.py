"""How given tokens stand in the distributions of their rows, without a wait.

Knows scores that are there; nothing of heads or of modes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from multiexit_engine.batch import StepOutput
from multiexit_engine.decoding.sampler import token_logprobs
from multiexit_engine.request import ScoredToken
from multiexit_engine.runtime.rows.chosen_rows import Coming, scored_tokens
from multiexit_engine.runtime.rows.logit_rows import LogitRow
from multiexit_engine.transfer import ToHost, to_device

NO_FAILURES: Mapping[str, str] = MappingProxyType({})


def score_tokens(
    rows: Sequence[LogitRow], scores: Tensor, failures: Mapping[str, str] = NO_FAILURES
) -> Coming[ScoredToken]:
    """The score of each row's given token; nobody waits for it here.

    Args:
        rows: that score.
        scores: [rows, vocab] float32.
        failures: by request, why it has none.
    """
    asked = [row.sequence.request.sampling.prompt_logprobs for row in rows]
    num_top = num_alternatives(asked, scores.shape[1]) or 0
    wanted = to_device([row.target for row in rows], scores.device)
    coming = ToHost([scores.argmax(-1), *token_logprobs(scores, wanted, num_top)])

    def read(output: StepOutput) -> list[tuple[LogitRow, ScoredToken]]:
        output.failures |= failures
        greedy, *logprobs = coming.lists()
        return scored_tokens(rows, greedy, logprobs, output)

    return Coming([], None, read)


def num_alternatives(asked: Sequence[int | None], vocab_size: int) -> int | None:
    """The most alternatives that any row asks for; None when no row asks."""
    counts = [vocab_size if k == -1 else min(k, vocab_size) for k in asked if k is not None]
    return max(counts, default=None)
