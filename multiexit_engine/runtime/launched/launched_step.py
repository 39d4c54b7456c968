"""A step that is on its way: what it will give, and where the next step finds its tokens.

Knows nothing of how the step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from multiexit_engine.batch import ScheduledBatch, StepOutput
from multiexit_engine.request import Joining, ScoredToken
from multiexit_engine.request import Sequence as TokenSequence
from multiexit_engine.runtime.device.step_clock import StepClock
from multiexit_engine.runtime.rows.chosen_rows import Choice, Coming
from multiexit_engine.runtime.rows.handing_out import hand_out, hand_out_scores


class Leaving(NamedTuple):
    """A row that may leave a step before the last layer.

    Attributes:
        row: of the memory.
        completes: whether those that waited for it run through all layers anyway.
    """

    row: int
    completes: bool


@dataclass(frozen=True, slots=True)
class ComingStep:
    """What the device makes of a step.

    Attributes:
        choices: of rows that choose.
        scores: of rows that score.
        token_rows: for each sequence whose next token lies in the decode memory its row there.
        leaving: for each sequence whose last row may leave at an exit that row.
        waiting: of other sequences what waits after the step.
        may_be_followed: whether the next step is known but for tokens and for who left where.
        drafts: gives the drafts of each drafted item of the step, once it was waited for.
    """

    choices: Sequence[Coming[Choice]]
    scores: Sequence[Coming[ScoredToken]]
    token_rows: Mapping[TokenSequence, int]
    leaving: Mapping[TokenSequence, Leaving]
    waiting: Mapping[TokenSequence, tuple[Joining, ...]]
    may_be_followed: bool
    drafts: Callable[[], Mapping[int, list[int]]]


class LaunchedStep:
    """A step that is on its way.

    Attributes:
        batch: what it computes.
        coming: what it will give.
        clock: what the step takes.
    """

    def __init__(
        self, batch: ScheduledBatch, coming: ComingStep, clock: StepClock, device: torch.device
    ) -> None:
        self.batch = batch
        self.coming = coming
        self.clock = clock
        self._done = torch.get_device_module(device).Event()
        self._done.record()

    def wait(self) -> StepOutput:
        """What it gave, as soon as it is known; what ended meanwhile is left out."""
        self._done.synchronize()
        output = StepOutput(waiting={**self.coming.waiting})
        chosen = [pair for part in self.coming.choices for pair in part.read(output)]
        hand_out(chosen, self.coming.drafts(), output)
        hand_out_scores([p for part in self.coming.scores for p in part.read(output)], output)
        return _living(output, [item.sequence for item in self.batch.scheduled])


def _living(output: StepOutput, sequences: Collection[TokenSequence]) -> StepOutput:
    """What a step gave to sequences and requests that have not ended."""
    ended = {s.request.request_id for s in sequences if s.request.is_finished}
    output.tokens = [pair for pair in output.tokens if not pair[0].is_finished]
    output.checked = [pair for pair in output.checked if not pair[0].is_finished]
    output.beams = [pair for pair in output.beams if pair[0].request_id not in ended]
    output.scored = [pair for pair in output.scored if pair[0].request_id not in ended]
    output.failures = {name: why for name, why in output.failures.items() if name not in ended}
    return output
