"""How many tokens the scheduled sequences may draft, and what came of it.

Knows requests, steps and one policy for each mix of modes; nothing of blocks or of layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from multiexit_engine.batch import ScheduledBatch, ScheduledSequence, StepOutput
from multiexit_engine.config import EngineConfig
from multiexit_engine.decoding.speculation import DraftPolicy, Wish
from multiexit_engine.modes import DecodingMode, EarlyExit, SelfSpeculative

# mixes of modes whose times are remembered, those that came last
MAX_MIXES = 64


class DraftLengths:
    """Draft lengths of one engine.

    Steps are compared with steps of the same mix of modes only: what one with a contrast in it
    takes says nothing of one without.
    """

    def __init__(self) -> None:
        self._policies: dict[frozenset[DecodingMode], DraftPolicy] = {}
        # of the step before: its modes by their ids, which is quicker than by their fields
        self._latest: tuple[dict[int, DecodingMode], DraftPolicy] = {}, DraftPolicy()

    def of(self, chunks: Sequence[ScheduledSequence], config: EngineConfig) -> list[int]:
        """Drafts that each of a step's chunks should make.

        None before a sequence's first token, none beyond its end.
        """
        lengths = [0] * len(chunks)
        if not _have_drafts(chunks):
            return lengths
        modes, policy = self._policy(chunks)
        drafting = [mode for mode in modes if isinstance(mode, SelfSpeculative)]
        if all(mode.draft_len == "auto" for mode in drafting) and policy.rests(len(chunks)):
            return lengths
        wishes = {
            place: Wish(mode.draft_len, most, chunk.sequence.acceptance)
            for place, chunk in enumerate(chunks)
            if isinstance(mode := chunk.sequence.request.decoding, SelfSpeculative)
            and (most := _most_drafts(chunk, config)) > 0
        }
        if wishes:
            found = policy.lengths(list(wishes.values()), len(chunks))
            for place, length in zip(wishes, found, strict=True):
                lengths[place] = length
        return lengths

    def record(self, batch: ScheduledBatch, seconds: Sequence[float], output: StepOutput) -> None:
        """Learn from a step in which every sequence got its next tokens.

        Args:
            batch: the step.
            seconds: what its drafts took, and the rest.
            output: what it gave.
        """
        if not _have_drafts(batch.scheduled):
            return
        if any(item.num_tokens > 1 or _is_early(item) for item in batch.scheduled):
            return
        _, policy = self._policy(batch.scheduled)
        drafting, rest = seconds
        lengths = [item.num_drafts for item in batch.scheduled]
        if not any(lengths):
            policy.times.plain.add(len(lengths), rest)
            return
        # rounds of fewer sequences cost about as much as the first one: they read the same weights
        policy.times.drafts.add(sum(map(bool, lengths)), drafting / max(lengths))
        policy.times.checks.add(batch.num_tokens, rest)
        for _, checked in output.checked:
            policy.acceptance.record(checked.num_drafts, checked.num_right)

    def _policy(
        self, chunks: Sequence[ScheduledSequence]
    ) -> tuple[Collection[DecodingMode], DraftPolicy]:
        """The modes of some chunks, each once, and their policy."""
        # requests that came together share one mode
        modes = {id(mode): mode for mode in (c.sequence.request.decoding for c in chunks)}
        if modes.keys() != self._latest[0].keys():
            mix = frozenset(modes.values())
            policy = self._policies.pop(mix, None) or DraftPolicy()
            self._policies[mix] = policy
            if len(self._policies) > MAX_MIXES:
                del self._policies[next(iter(self._policies))]
            self._latest = modes, policy
        return modes.values(), self._latest[1]


def _have_drafts(chunks: Sequence[ScheduledSequence]) -> bool:
    """Whether requests of these may draft at some time."""
    return any(isinstance(c.sequence.request.decoding, SelfSpeculative) for c in chunks)


def _most_drafts(chunk: ScheduledSequence, config: EngineConfig) -> int:
    sequence, request = chunk.sequence, chunk.sequence.request
    num_output_tokens = sequence.num_tokens - len(request.prompt_token_ids)
    if chunk.num_tokens > 1 or not chunk.reaches_end or not num_output_tokens:
        return 0
    if request.score_from is not None:
        return 0
    left = request.sampling.max_new_tokens - num_output_tokens
    return min(left, config.max_model_len - sequence.num_tokens) - 1


def _is_early(item: ScheduledSequence) -> bool:
    return isinstance(item.sequence.request.decoding, EarlyExit)
