"""The order of steps: each run to its end, or the next one launched before the last one is known.

A step that was launched says before it ends what the next one computes, all but the tokens
themselves and which rows left at exits, and these are on the device. So the next step is planned
and launched while this one runs. A sequence that turns out to have ended was planned in vain: its
row is computed and thrown away. Its blocks may have another owner by then, whose writes the device
makes later.

Knows nothing of texts, of what ends a sequence by its content, or of how steps run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

from multiexit_engine.batch import ScheduledBatch, StepOutput
from multiexit_engine.config import EngineConfig
from multiexit_engine.request import Sequence, SequenceStatus
from multiexit_engine.runtime.launched.launched_step import LaunchedStep
from multiexit_engine.runtime.runner import ModelRunner
from multiexit_engine.runtime.scheduling.scheduler import Scheduler


class StepLoop:
    """Gives one step's output after the other."""

    def __init__(self, config: EngineConfig, scheduler: Scheduler, runner: ModelRunner) -> None:
        self._config = config
        self._scheduler = scheduler
        self._runner = runner
        self._next: ScheduledBatch | LaunchedStep | None = None

    def run(self) -> StepOutput | None:
        """The output of the next step, which is waited for; None when nothing is left to do.

        The step after it may be on its way by then, but every sequence stands as if it were not.
        """
        step = self._take_next()
        if step is None:
            return None
        if isinstance(step, ScheduledBatch):
            output = self._runner.run(step)
            self._scheduler.advance(step, output.waiting, output.held)
            return output
        if self._config.async_scheduling and step.coming.may_be_followed:
            coming = step.coming
            self._scheduler.advance(step.batch, coming.waiting, unsettled=coming.leaving)
            self._look_ahead(step)
            output = self._runner.finish(step)
            self._scheduler.advance(_only(step.batch, step.coming.leaving), output.waiting)
            return output
        output = self._runner.finish(step)
        self._scheduler.advance(step.batch, output.waiting, output.held)
        return output

    def _take_next(self) -> ScheduledBatch | LaunchedStep | None:
        """What was planned, if it still makes sense, else a new plan; launched if it fits."""
        planned, self._next = self._next, None
        if isinstance(planned, LaunchedStep):
            if _living(planned.batch) is not None:
                return planned
            # its inputs may not be overwritten before the device has read them
            planned.wait()
            planned = None
        batch = _living(planned) if planned is not None else None
        if batch is None:
            batch = self._scheduler.schedule()
        return batch and (self._runner.launch(batch) or batch)

    def _look_ahead(self, step: LaunchedStep) -> None:
        """Plan what follows a step that is on its way, and launch it if it needs no more."""
        with self._one_more_token(step.batch):
            batch = self._scheduler.schedule()
            if batch is not None:
                self._next = self._runner.launch(batch, before=step) or batch

    @contextmanager
    def _one_more_token(self, batch: ScheduledBatch) -> Iterator[None]:
        """Count the tokens that a step chooses, of those sequences that may go on after them."""
        going_on = [
            item.sequence
            for item in batch.scheduled
            if item.sequence.status is SequenceStatus.RUNNING
            and item.sequence.num_tokens == item.stop
            and item.sequence.request.score_from is None
            and item.stop + 1 < self._config.max_model_len
            and item.stop + 1 - len(item.sequence.request.prompt_token_ids)
            < item.sequence.request.sampling.max_new_tokens
        ]
        for sequence in going_on:
            sequence.num_expected = 1
        try:
            yield
        finally:
            for sequence in going_on:
                sequence.num_expected = 0


def _only(batch: ScheduledBatch, sequences: Collection[Sequence]) -> ScheduledBatch:
    """The part of a batch that is of some sequences."""
    own = tuple(item for item in batch.scheduled if item.sequence in sequences)
    return replace(batch, scheduled=own)


def _living(batch: ScheduledBatch) -> ScheduledBatch | None:
    """What is left of a plan after some of its sequences ended; None if nothing is."""
    scheduled = tuple(
        item for item in batch.scheduled if item.sequence.status is SequenceStatus.RUNNING
    )
    unread = tuple(s for s in batch.unread if s.status is SequenceStatus.RUNNING)
    return replace(batch, scheduled=scheduled, unread=unread) if scheduled else None
