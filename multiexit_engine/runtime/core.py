"""The step loop: schedule, run, update, and nothing else.

Works on requests whose arguments were checked; knows nothing of texts' origin or of prompts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from multiexit_engine.batch import BeamCandidates, CheckedDrafts, ScheduledBatch, StepOutput
from multiexit_engine.config import EngineConfig
from multiexit_engine.decoding.beam import BeamSearch
from multiexit_engine.decoding.plan import resolve_mode
from multiexit_engine.ops import use_backend
from multiexit_engine.outputs import CANDIDATE_BOUNDS, EngineStats, FinishReason
from multiexit_engine.params import DecodingMode, SamplingParams
from multiexit_engine.request import ChosenToken, Request, Sequence, SequenceStatus
from multiexit_engine.runtime.early_exit.exit_readings import ExitReadings, join_readings
from multiexit_engine.runtime.lookahead import StepLoop
from multiexit_engine.runtime.requests.detokenizer import Detokenizer, Tokenizer
from multiexit_engine.runtime.runner import ModelRunner
from multiexit_engine.runtime.scheduling.scheduler import Scheduler

T = TypeVar("T")


class EngineCore:
    """Living requests, their scheduler and their runner.

    Attributes:
        requests: all requests that were added and not yet forgotten.
        streamed: ids of the requests whose text is looked at while it grows.
    """

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        runner: ModelRunner,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.config = config
        self.scheduler = scheduler
        self.runner = runner
        self.tokenizer = tokenizer
        self._steps = StepLoop(config, scheduler, runner)
        self.requests: dict[str, Request] = {}
        self.streamed: set[str] = set()
        self.num_steps = 0
        self.num_generated_tokens = 0
        self.num_drafted_tokens = 0
        self.num_accepted_tokens = 0
        self.num_tokens_by_layer: Counter[int] = Counter()
        self.num_candidates = 0
        self.contrasts_by_candidates = [0] * len(CANDIDATE_BOUNDS)
        self._exit_layers: dict[str, int] = {}
        self._beams: dict[str, BeamSearch] = {}
        self._texts: dict[Sequence, Detokenizer] = {}

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def check_fits(self, request: Request) -> None:
        """Raise ValueError if the request could never run, however empty the engine is."""
        self.scheduler.check_fits(request)

    def add(self, request: Request, *, streamed: bool = False) -> None:
        """Queue a checked request; ``streamed`` keeps its text current after every step."""
        self.scheduler.check_fits(request)
        self.requests[request.request_id] = request
        if streamed:
            self.streamed.add(request.request_id)
        request.sequences = [
            Sequence(request, 0, list(request.prompt_token_ids), grammar=request.grammar)
        ]
        if request.is_beam_search:
            self._beams[request.request_id] = self._new_beam_search(request)
        self.scheduler.add(request)

    def abort(self, request_id: str) -> Request | None:
        """End a request at once and free what it holds; None when there is no such request."""
        request = self.scheduler.abort(request_id)
        self._beams.pop(request_id, None)
        return request

    def step(self) -> list[Request]:
        """Run one step; returns the requests that it changed, finished ones included."""
        with self._backend():
            output = self._steps.run()
        if output is None:
            return []
        self.num_steps += 1
        self._count_candidates(output.num_candidates)
        for request_id, reason in output.failures.items():
            self._fail(self.requests[request_id], reason)
        return self._update(output)

    def warm_up(self, mode: DecodingMode, depth: int, sampling: list[SamplingParams]) -> None:
        """Capture what steps in a mode will replay that runs so many layers; see ``Core``."""
        with self._backend():
            self.runner.warm_up(mode, depth, sampling)

    def prompt_scores(self, request: Request) -> Tensor:
        """[tokens, vocab] float32 raw scores of a scoring request, run alone to its end.

        Raises:
            RequestFailed: its contrast function failed.
        """
        return torch.cat(self._run_alone(request, self.runner.prompt_scores))

    def exit_readings(self, request: Request) -> ExitReadings:
        """What exits measure at every position of a scoring request, run alone to its end."""
        return join_readings(self._run_alone(request, self.runner.exit_readings))

    def _run_alone(self, request: Request, run: Callable[[ScheduledBatch], T]) -> list[T]:
        self.add(request)
        try:
            parts = []
            while (batch := self.scheduler.schedule()) is not None:
                with self._backend():
                    parts.append(run(batch))
                self.scheduler.advance(batch)
                self._finish_scored({request.request_id: request})
            return parts
        finally:
            self.forget(request.request_id)

    def stats(self) -> EngineStats:
        """How full the engine is, and what it has done."""
        scheduler = self.scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_steps=self.num_steps,
            num_generated_tokens=self.num_generated_tokens,
            num_drafted_tokens=self.num_drafted_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            num_tokens_by_layer=dict(sorted(self.num_tokens_by_layer.items())),
            num_preemptions=scheduler.num_preemptions,
            num_kv_blocks=self.config.num_kv_blocks,
            num_free_kv_blocks=scheduler.num_free_blocks,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            contrasts_by_candidates=tuple(self.contrasts_by_candidates),
            num_candidates=self.num_candidates,
        )

    def text(self, sequence: Sequence) -> Detokenizer | None:
        """The text of a sequence's output so far; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        if sequence not in self._texts:
            self._texts[sequence] = self._new_text(sequence)
            self._texts[sequence].append_unseen(_visible(sequence))
        return self._texts[sequence]

    def forget(self, request_id: str) -> None:
        """End a request if it still runs, and keep nothing of it; unknown ids are fine."""
        self.abort(request_id)
        self.streamed.discard(request_id)
        self._exit_layers.pop(request_id, None)
        request = self.requests.pop(request_id, None)
        for sequence in request.sequences if request is not None else ():
            self._texts.pop(sequence, None)

    def _backend(self) -> AbstractContextManager[None]:
        name = self.config.backend
        return nullcontext() if name == "auto" else use_backend(name)

    def _update(self, output: StepOutput) -> list[Request]:
        changed = {request_id: self.requests[request_id] for request_id in output.failures}
        for request, scored in output.scored:
            request.scored += scored
            changed[request.request_id] = request
        for sequence, chosen in output.tokens:
            if sequence.request.request_id not in output.failures:
                changed[sequence.request.request_id] = sequence.request
                self._append(sequence, chosen)
        for sequence, checked in output.checked:
            if sequence.request.request_id not in output.failures:
                changed[sequence.request.request_id] = sequence.request
                self._append_checked(sequence, checked)
        for request, candidates in output.beams:
            changed[request.request_id] = request
            self._advance_beams(request, candidates)
        self._finish_scored(changed)
        return list(changed.values())

    def _count_candidates(self, counts: list[int]) -> None:
        self.num_candidates += sum(counts)
        for count in counts:
            self.contrasts_by_candidates[bisect_left(CANDIDATE_BOUNDS, count)] += 1

    def _append(self, sequence: Sequence, chosen: list[ChosenToken]) -> None:
        """Give a sequence its next token, or its first one to each of ``n`` siblings."""
        if len(chosen) == 1:
            self._append_one(sequence, chosen[0])
            return
        siblings = [self.scheduler.fork(sequence, i) for i in range(1, len(chosen))]
        if sequence.grammar is not None:
            for sibling in siblings:
                sibling.grammar = sequence.grammar.fork()
        sequence.request.sequences = sequence.request.sequences + siblings
        for sibling, token in zip([sequence, *siblings], chosen, strict=True):
            self._append_one(sibling, token)

    def _append_checked(self, sequence: Sequence, checked: CheckedDrafts) -> None:
        """Give a sequence its accepted drafts and the token after them, up to where it ends."""
        num_accepted = checked.num_accepted
        sequence.acceptance.record(checked.num_drafts, checked.num_right)
        self.num_drafted_tokens += checked.num_drafts + checked.num_alternatives
        self.num_accepted_tokens += num_accepted
        for place, token in enumerate(checked.tokens):
            self._append_one(sequence, token, is_draft=place < num_accepted)
            if sequence.is_finished:
                return
        self.scheduler.accept_drafts(sequence, num_accepted)

    def _append_one(
        self, sequence: Sequence, token: ChosenToken, *, is_draft: bool = False
    ) -> None:
        request = sequence.request
        given = request.continuation and request.continuation[sequence.num_output_tokens :]
        sequence.token_ids.append(given[0] if given else token.token_id)
        sequence.chosen.append(token)
        sequence.cumulative_logprob += token.logprob or 0.0
        layer = token.exit_layer or self._exit_layer(request)
        sequence.exit_layers.append(layer)
        sequence.drafted.append(is_draft)
        if request.sampling.confidences and token.confidence is not None:
            sequence.confidences.append(token.confidence)
        self.num_generated_tokens += 1
        self.num_tokens_by_layer[layer] += 1
        if sequence.grammar is not None:
            sequence.grammar.advance(token.token_id)
        self._follow_text(sequence, token.token_id)
        self._finish_if_ended(sequence, token.token_id)

    def _follow_text(self, sequence: Sequence, token_id: int) -> None:
        """Decode as the tokens come, for those whose text is streamed or searched for stops."""
        request = sequence.request
        if not request.sampling.stop and request.request_id not in self.streamed:
            return
        if token_id in request.ending_token_ids or self.tokenizer is None:
            return
        if sequence not in self._texts:
            self._texts[sequence] = self._new_text(sequence)
        may_stop = sequence.num_output_tokens >= request.sampling.min_new_tokens
        self._texts[sequence].append(token_id, may_stop=may_stop)

    def _finish_if_ended(self, sequence: Sequence, token_id: int) -> None:
        request, params = sequence.request, sequence.request.sampling
        text = self._texts.get(sequence)
        if token_id in request.eos_token_ids:
            self._finish(sequence, FinishReason.STOP)
        elif token_id in params.stop_token_ids:
            sequence.stop_reason = token_id
            self._finish(sequence, FinishReason.STOP)
        elif text is not None and text.stop_string is not None:
            sequence.stop_reason = text.stop_string
            self._finish(sequence, FinishReason.STOP)
        elif sequence.grammar is not None and sequence.grammar.is_complete:
            self._finish(sequence, FinishReason.STOP)
        elif self._is_full(sequence):
            self._finish(sequence, FinishReason.LENGTH)

    def _is_full(self, sequence: Sequence) -> bool:
        request, num_tokens = sequence.request, sequence.num_tokens
        most = len(request.prompt_token_ids) + request.sampling.max_new_tokens
        return num_tokens >= min(most, self.config.max_model_len)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.finish(sequence, reason)

    def _fail(self, request: Request, reason: str) -> None:
        request.error = reason
        self._beams.pop(request.request_id, None)
        for sequence in request.sequences:
            if not sequence.is_finished:
                self._finish(sequence, FinishReason.ERROR)

    def _finish_scored(self, changed: dict[str, Request]) -> None:
        for request in changed.values():
            sequence = request.sequences[0]
            if request.score_from is None or sequence.is_finished:
                continue
            # the last token is scored by the one before it: a step may not have reached it yet
            num_tokens = len(request.prompt_token_ids)
            is_scored = request.score_from + len(request.scored) >= num_tokens
            if is_scored or sequence.num_computed_tokens == num_tokens:
                self._finish(sequence, FinishReason.STOP)

    def _advance_beams(self, request: Request, candidates: BeamCandidates) -> None:
        search = self._beams[request.request_id]
        beams = request.sequences
        step = search.advance(candidates.values, candidates.token_ids)
        self.num_generated_tokens += len(step.tokens)
        self.num_tokens_by_layer[self._exit_layer(request)] += len(step.tokens)
        if search.is_done:
            self._finish_beams(request, search)
            return
        taken: set[int] = set()
        children: list[Sequence] = []
        for index, parent in enumerate(step.parents):
            is_new = parent in taken
            taken.add(parent)
            children.append(self.scheduler.fork(beams[parent], index) if is_new else beams[parent])
        layer = self._exit_layer(request)
        for index, child in enumerate(children):
            child.index = index
            child.token_ids.append(step.tokens[index])
            child.cumulative_logprob = step.scores[index]
            child.exit_layers.append(layer)
            child.drafted.append(False)
        request.sequences = children
        self.scheduler.replace(request, children)

    def _finish_beams(self, request: Request, search: BeamSearch) -> None:
        """Put the best hypotheses in the place of the beams that led to them."""
        for sequence in request.sequences:
            self._finish(sequence, FinishReason.STOP)
        layer = self._exit_layer(request)
        request.sequences = []
        for index, found in enumerate(search.results()):
            has_ended = bool(found.token_ids) and found.token_ids[-1] in request.ending_token_ids
            request.sequences.append(
                Sequence(
                    request,
                    index,
                    [*request.prompt_token_ids, *found.token_ids],
                    status=SequenceStatus.FINISHED,
                    cumulative_logprob=found.score,
                    exit_layers=[layer] * len(found.token_ids),
                    drafted=[False] * len(found.token_ids),
                    finish_reason=FinishReason.STOP if has_ended else FinishReason.LENGTH,
                )
            )

    def _exit_layer(self, request: Request) -> int:
        layer = self._exit_layers.get(request.request_id)
        if layer is None:
            layer = resolve_mode(request.decoding, self.runner.model.config).upper.layer
            self._exit_layers[request.request_id] = layer
        return layer

    def _new_beam_search(self, request: Request) -> BeamSearch:
        prompt_len = len(request.prompt_token_ids)
        params = request.sampling
        return BeamSearch(
            num_beams=params.num_beams,
            num_return=params.n,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            eos_token_ids=request.ending_token_ids,
            prompt_len=prompt_len,
            max_len=min(prompt_len + params.max_new_tokens, self.config.max_model_len),
        )

    def _new_text(self, sequence: Sequence) -> Detokenizer:
        assert self.tokenizer is not None
        request = sequence.request
        return Detokenizer(
            self.tokenizer,
            request.prompt_token_ids,
            request.sampling.stop,
            request.sampling.skip_special_tokens,
        )


def _visible(sequence: Sequence) -> list[int]:
    """The output tokens that belong to the text: all but the one that ended it."""
    tokens = sequence.output_token_ids
    if tokens and tokens[-1] in sequence.request.ending_token_ids:
        return tokens[:-1]
    return tokens
