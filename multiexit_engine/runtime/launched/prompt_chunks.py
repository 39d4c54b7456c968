"""Chunks of prompts beside the pieces of a step, run from Python.

So do rows of outputs that are computed again after a preemption, and leave where they left at first
if their keys and values were copied. Knows nothing of pieces' keys, or of how tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from multiexit_engine.batch import ScheduledBatch, ScheduledSequence
from multiexit_engine.cache.exit_states import ExitStates
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.decoding.plan import plan_segments
from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.request import Joining
from multiexit_engine.request import Sequence as TokenSequence
from multiexit_engine.runtime.drafts.draft_rounds import Items
from multiexit_engine.runtime.launched.decode_pieces import DecodePieces
from multiexit_engine.runtime.launched.exit_layout import waits_after
from multiexit_engine.runtime.rows.flight import Flight, Place
from multiexit_engine.transfer import to_device


class PromptChunks:
    """Runs chunks through one model.

    Args:
        model: the decoder.
        kv_cache: of the model.
        states: where rows wait at exits.
        pieces: in whose memory the states of last rows go.
    """

    def __init__(
        self,
        model: MultiExitModel,
        kv_cache: PagedKVCache,
        states: ExitStates,
        pieces: DecodePieces,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._exit_states = states
        self._pieces = pieces

    def run(
        self,
        batch: ScheduledBatch,
        chunks: Items,
        layers: Collection[int],
        places: Mapping[Place, int],
        scored: Collection[int],
        keep: Callable[[int, Flight], None],
    ) -> None:
        """Run chunks beside the pieces; the states of last rows go to the memory.

        They have a pass of their own: the rows of others then have the same bits beside them as
        without them, and these are under way while Python launches the pass.

        Args:
            batch: the step.
            chunks: those of its items that are not run by pieces.
            layers: after which states of last rows are looked at.
            places: the rows of last positions.
            scored: layers after which ``keep`` takes the states of rows that score.
            keep: is called where they are there.
        """
        joining = {i: item.sequence.waiting for i, item in chunks if item.sequence.waiting}
        flight = Flight(self._model, self._kv_cache, self._exit_states, dict(chunks), joining)
        last = {
            (index, item.stop - 1): places[index, item.stop - 1]
            for index, item in chunks
            if item.reaches_end
        }
        depths = [item.sequence.request.depth for item in batch.scheduled]
        for segment in plan_segments(depths, {*layers, *scored, *_ways(chunks)}):
            flight.narrow(segment.num_seqs)
            if not flight.aboard:
                break
            flight.run(segment.start, segment.stop)
            keep(segment.stop, flight)
            if segment.stop in layers:
                self._put_states(segment.stop, flight, last)
            leaving = [index for index, item in chunks if _leaves_at(item) == segment.stop]
            if leaving:
                flight.keep(leaving)
                flight.leave(leaving)
            flight.join(segment.stop)

    def _put_states(self, layer: int, flight: Flight, last: Mapping[Place, int]) -> None:
        found = zip(flight.rows_of([*last]), last.values(), strict=True)
        here = [(row, place) for row, place in found if row is not None]
        if here:
            states = flight.take([row for row, _ in here])
            rows = to_device([place for _, place in here], self._kv_cache.device)
            self._pieces.put_states(layer, rows, states)


def waiting_again(chunks: Items) -> dict[TokenSequence, tuple[Joining, ...]]:
    """What of sequences waits after their rows left where they left at first."""
    return {
        item.sequence: waits_after(item.sequence, item.start, left_at, is_completed=False)
        for _, item in chunks
        if (left_at := _leaves_at(item)) is not None
    }


def _leaves_at(item: ScheduledSequence) -> int | None:
    """The layer below the last at which an item's rows have to leave, if there is one."""
    left_at = item.left_at
    return left_at if left_at is not None and left_at < item.sequence.request.depth else None


def _ways(chunks: Items) -> set[int]:
    """Layers after which rows of chunks leave, or earlier ones join them."""
    left = {at for _, item in chunks if (at := _leaves_at(item)) is not None}
    return left | {entry.layer for _, item in chunks for entry in item.sequence.waiting}
