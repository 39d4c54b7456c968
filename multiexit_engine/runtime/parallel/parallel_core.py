"""The step loop of an engine whose requests are answered in one piece.

Requests wait in order of arrival; a step answers as many as fit into it, to their end. Knows
nothing of prompts' origin; there are no KV blocks, and nothing stays between steps.
"""

from __future__ import annotations

from collections import Counter, deque
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter

import torch
from torch import Tensor

from multiexit_engine.config import EngineConfig
from multiexit_engine.decoding.parallel import collapse_words, num_kept, tested_layers
from multiexit_engine.models.elmer import ElmerModel
from multiexit_engine.ops import use_backend
from multiexit_engine.outputs import EngineStats, FinishReason
from multiexit_engine.params import DecodingMode, Parallel, SamplingParams
from multiexit_engine.request import ChosenToken, Request, Sequence, SequenceStatus
from multiexit_engine.runtime.early_exit.exit_readings import ExitReadings
from multiexit_engine.runtime.parallel.answer_pieces import AnswerPieces
from multiexit_engine.runtime.parallel.answers import Answer, LayerRows
from multiexit_engine.runtime.parallel.captured_pass import CapturedBatch, warm_up
from multiexit_engine.runtime.parallel.parallel_pass import ParallelBatch
from multiexit_engine.runtime.parallel.parallel_readings import read_parallel_exits
from multiexit_engine.runtime.parallel.ragged_pass import new_batch
from multiexit_engine.runtime.requests.detokenizer import Detokenizer, Tokenizer


class ParallelCore:
    """Living requests and the model that answers them.

    Args:
        config: the engine's limits.
        model: that answers.
        tokenizer: makes texts of tokens; None where the checkpoint has none.
        pieces: run captured passes; None where nothing is captured.

    Attributes:
        requests: all requests that were added and not yet forgotten.
        streamed: ids of the requests whose text is asked for with each step.
        rows: the work that was done, layer by layer.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ElmerModel,
        tokenizer: Tokenizer | None,
        pieces: AnswerPieces | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.requests: dict[str, Request] = {}
        self.streamed: set[str] = set()
        self.num_steps = 0
        self.num_generated_tokens = 0
        self.num_tokens_by_layer: Counter[int] = Counter()
        self.rows = LayerRows.none(model.config.num_layers)
        self._pieces = pieces
        self._waiting: deque[Request] = deque()
        self._texts: dict[Sequence, Detokenizer] = {}

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting)

    def check_fits(self, request: Request) -> None:
        """Raise ValueError if a step could never hold the request's candidates."""
        count = len(_target_lens(request))
        if count > self.config.max_batch_size:
            raise ValueError(
                f"Parallel.length names {count} lengths: must not exceed "
                f"max_batch_size={self.config.max_batch_size}"
            )

    def add(self, request: Request, *, streamed: bool = False) -> None:
        """Queue a checked request; raises ValueError for one that only scores its prompt."""
        if request.score_from is not None:
            raise ValueError(
                "score: a decoder that finds all tokens at once gives no token a probability "
                "after those before it; open the checkpoint with architecture='bart' to score"
            )
        self.check_fits(request)
        self.requests[request.request_id] = request
        if streamed:
            self.streamed.add(request.request_id)
        request.sequences = [Sequence(request, 0, list(request.prompt_token_ids))]
        self._waiting.append(request)

    def abort(self, request_id: str) -> Request | None:
        """End a request that waits; None when there is no such request."""
        request = next((r for r in self._waiting if r.request_id == request_id), None)
        if request is not None:
            self._waiting.remove(request)
            _finish(request.sequences[0], FinishReason.ABORT)
        return request

    def step(self) -> list[Request]:
        """Answer the oldest requests, as many as fit; returns them."""
        requests = self._admitted()
        if not requests:
            return []
        for request in requests:
            request.admitted_at = perf_counter()
        answers, _ = self._computed(requests)
        for request, own in zip(requests, answers, strict=True):
            self._take(request, own)
        self.num_steps += 1
        return requests

    def warm_up(self, mode: DecodingMode, depth: int, sampling: list[SamplingParams]) -> None:
        """Capture what passes in a mode will replay, whatever requests ask for; see ``Core``."""
        assert self._pieces is not None, "asked for where something is captured"
        assert isinstance(mode, Parallel), "the intake allows nothing else"
        with torch.inference_mode(), self._backend():
            warm_up(self.model, self._pieces, mode)

    def prompt_scores(self, request: Request) -> Tensor:
        """[positions, vocab] float32 logits of the request's answer, run alone."""
        ((best, *_),), batch = self._computed([request])
        first = sum(n for n in _target_lens(request) if n < best.length)
        with torch.inference_mode(), self._backend():
            return batch.logits()[first : first + best.length]

    def exit_readings(self, request: Request) -> ExitReadings:
        """What tested layers measure in the shortest answer to a request, run alone."""
        mode = _mode(request)
        if not tested_layers(mode, self.model.config.num_layers):
            raise ValueError(f"decoding={mode!r}: there is no tested layer to read")
        length, *_ = _target_lens(request)
        with torch.inference_mode(), self._backend():
            return read_parallel_exits(self.model, request.prompt_token_ids, mode, length)

    def stats(self) -> EngineStats:
        """What the engine has done; it holds no blocks and no prefixes."""
        return EngineStats(
            num_running=0,
            num_waiting=len(self._waiting),
            num_steps=self.num_steps,
            num_generated_tokens=self.num_generated_tokens,
            num_drafted_tokens=0,
            num_accepted_tokens=0,
            num_preemptions=0,
            num_kv_blocks=0,
            num_free_kv_blocks=0,
            prefix_query_tokens=0,
            prefix_hit_tokens=0,
            num_tokens_by_layer=dict(sorted(self.num_tokens_by_layer.items())),
            rows_per_layer=tuple(self.rows.computed),
            keyed_rows_per_layer=tuple(self.rows.keyed),
            tested_rows_per_layer=tuple(self.rows.tested),
        )

    def text(self, sequence: Sequence) -> Detokenizer | None:
        """The text of a finished answer, empty before; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        if sequence not in self._texts:
            request = sequence.request
            text = Detokenizer(
                self.tokenizer, [], skip_special_tokens=request.sampling.skip_special_tokens
            )
            if not sequence.is_finished:
                return text
            ids = sequence.output_token_ids
            has_ended = bool(ids) and ids[-1] in request.ending_token_ids
            text.append_unseen(ids[:-1] if has_ended else ids)
            text.finish()
            if isinstance(request.decoding, Parallel) and request.decoding.collapse_repeats:
                text.text = collapse_words(text.text)
            self._texts[sequence] = text
        return self._texts[sequence]

    def forget(self, request_id: str) -> None:
        """End a request if it still waits, and keep nothing of it; unknown ids are fine."""
        self.abort(request_id)
        self.streamed.discard(request_id)
        request = self.requests.pop(request_id, None)
        for sequence in request.sequences if request is not None else ():
            self._texts.pop(sequence, None)

    def _admitted(self) -> list[Request]:
        """The oldest requests whose rows fit into one step, the very first in any case."""
        admitted: list[Request] = []
        num_rows = num_answers = 0
        while self._waiting:
            lens = _target_lens(self._waiting[0])
            num_rows += len(self._waiting[0].prompt_token_ids) + sum(lens)
            num_answers += len(lens)
            is_full = num_rows > self.config.max_num_batched_tokens
            if admitted and (is_full or num_answers > self.config.max_batch_size):
                break
            admitted.append(self._waiting.popleft())
        return admitted

    def _computed(self, requests: list[Request]) -> tuple[list[list[Answer]], ParallelBatch]:
        """For each request its answers, the best first."""
        answers = [
            [
                Answer(place, _mode(request), length, _needs_log_probs(request))
                for length in _target_lens(request)
            ]
            for place, request in enumerate(requests)
        ]
        with torch.inference_mode(), self._backend():
            batch = self._batch(
                [request.prompt_token_ids for request in requests],
                [answer for own in answers for answer in own],
            )
            batch.run()
        for request, own in zip(requests, answers, strict=True):
            ending = request.ending_token_ids
            # of equals the shortest, which stands first
            own.sort(key=lambda answer: -answer.score(num_kept(answer.token_ids, ending)))
        return answers, batch

    def _batch(
        self, sources: list[list[int]] | list[tuple[int, ...]], answers: list[Answer]
    ) -> ParallelBatch:
        """Captured where it fits."""
        pieces, num_rows = self._pieces, sum(answer.length for answer in answers)
        if pieces is not None and pieces.fits(num_rows, sum(map(len, sources))):
            return CapturedBatch(self.model, sources, answers, self.rows, pieces)
        return new_batch(self.model, sources, answers, self.rows)

    def _take(self, request: Request, answers: list[Answer]) -> None:
        """Give a request the best of its answers, cut where it ends."""
        (sequence,), best = request.sequences, answers[0]
        count = num_kept(best.token_ids, request.ending_token_ids)
        if any(value != value for value in best.log_probs[:count]):
            request.error = "the model's numbers are NaN"
            _finish(sequence, FinishReason.ERROR)
            return
        for token_id, log_prob in zip(best.token_ids[:count], best.log_probs, strict=False):
            sequence.token_ids.append(token_id)
            alternatives = ((token_id, log_prob),) if request.sampling.logprobs else ()
            sequence.chosen.append(ChosenToken(token_id, log_prob, 1, alternatives))
            sequence.cumulative_logprob += log_prob
        sequence.exit_layers = best.exit_layers[:count]
        sequence.drafted = [False] * count
        self.num_generated_tokens += count
        self.num_tokens_by_layer.update(sequence.exit_layers)
        last = best.token_ids[count - 1]
        if last not in request.ending_token_ids:
            _finish(sequence, FinishReason.LENGTH)
            return
        sequence.stop_reason = None if last in request.eos_token_ids else last
        _finish(sequence, FinishReason.STOP)

    def _backend(self) -> AbstractContextManager[None]:
        name = self.config.backend
        return nullcontext() if name == "auto" else use_backend(name)


def _mode(request: Request) -> Parallel:
    assert isinstance(request.decoding, Parallel), "the intake allows nothing else"
    return request.decoding


def _needs_log_probs(request: Request) -> bool:
    """Whether the request asks for them, or they choose among its answers or positions."""
    mode = _mode(request)
    return request.sampling.logprobs is not None or mode.refine > 0 or len(mode.lengths) > 1


def _target_lens(request: Request) -> tuple[int, ...]:
    num_source = len(request.prompt_token_ids)
    return _mode(request).target_lens(num_source, request.sampling.max_new_tokens)


def _finish(sequence: Sequence, reason: FinishReason) -> None:
    sequence.status = SequenceStatus.FINISHED
    sequence.finish_reason = reason
