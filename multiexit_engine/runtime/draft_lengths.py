"""How many tokens a scheduled sequence may draft.

Knows its request and the policy; nothing of what else the step computes or of blocks.
"""

from __future__ import annotations

from multiexit_engine.batch import ScheduledSequence
from multiexit_engine.config import EngineConfig
from multiexit_engine.decoding.speculation import DraftPolicy
from multiexit_engine.modes import SelfSpeculative


def num_drafts_of(
    chunk: ScheduledSequence, num_sequences: int, policy: DraftPolicy, config: EngineConfig
) -> int:
    """Drafts that a sequence could use: none before its first token, none beyond its end."""
    sequence, request = chunk.sequence, chunk.sequence.request
    mode = request.decoding
    if not isinstance(mode, SelfSpeculative) or request.score_from is not None:
        return 0
    if chunk.num_tokens > 1 or not chunk.reaches_end or not sequence.num_output_tokens:
        return 0
    most = min(
        request.sampling.max_new_tokens - sequence.num_output_tokens,
        config.max_model_len - sequence.num_tokens,
    )
    length = policy.draft_len(mode.draft_len, sequence.acceptance, num_sequences)
    return min(length, most - 1)
