"""The engine's face: load a checkpoint, generate, stream, score.

Knows how the parts are put together; the work is done in ``runtime``.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from multiexit_engine.checkpoint import Checkpoint, open_checkpoint, text_decoder
from multiexit_engine.config import BackendName, EngineConfig, ModelConfig, VocabularyProjectionMode
from multiexit_engine.models.elmer import ElmerModel
from multiexit_engine.models.registry import build_model
from multiexit_engine.outputs import (
    CompletionOutput,
    EngineStats,
    FollowedText,
    RequestOutput,
    RequestPiece,
    ScoreOutput,
)
from multiexit_engine.params import DecodingMode, EarlyExit, Original, Parallel, SamplingParams
from multiexit_engine.request import Request
from multiexit_engine.runtime.assembly import autoregressive_core, parallel_core
from multiexit_engine.runtime.early_exit.exit_readings import ExitReadings
from multiexit_engine.runtime.launched.warm_prompts import warm_prompts
from multiexit_engine.runtime.parallel.parallel_intake import ParallelIntake
from multiexit_engine.runtime.requests.core_protocol import Core
from multiexit_engine.runtime.requests.intake import Intake, Prompt, as_prompts, one_for_each
from multiexit_engine.runtime.requests.progress import run_all
from multiexit_engine.runtime.requests.report import followed_text, request_output
from multiexit_engine.runtime.requests.scoring import ScoreItem, run_scored, scored_texts, windows
from multiexit_engine.runtime.requests.streaming import Feeds, stream_request
from multiexit_engine.runtime.settings import make_engine_config

_Reported = TypeVar("_Reported")


class Engine:
    """Inference on one multi-exit model.

    ``generate``, ``stream`` and ``score`` run requests to their end. ``add_request``, ``step`` and
    ``abort`` are what they are made of, for callers with a loop of their own. Not thread-safe.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: EngineConfig, decoding: DecodingMode | None
    ) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.tokenizer: Any = checkpoint.load_tokenizer()
        texts = text_decoder(self.tokenizer)
        self._model = build_model(checkpoint, config.device, config.dtype, config.quantization)
        self._core: Core
        self._intake: Intake
        if isinstance(self._model, ElmerModel):
            mode = decoding or Parallel("soft" if self._model.has_feedback else "none")
            self._core = parallel_core(config, self._model, texts)
            self._intake = ParallelIntake(config, self._model, self.tokenizer, mode)
        else:
            self._core = core = autoregressive_core(config, self._model, texts)
            self._scheduler = core.scheduler
            mode = Original() if decoding is None else decoding
            self._intake = Intake(config, self._model, self.tokenizer, mode, checkpoint.folder)
        self._feeds = Feeds(self._core)
        self._ids = itertools.count()
        self._random = random.Random(config.seed)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        backend: BackendName = "auto",
        decoding: DecodingMode | None = None,
        vocab_projection_mode: str | VocabularyProjectionMode | None = None,
        lm_head_layer_indices: Sequence[int] | str | None = None,
        architecture: str | None = None,
        max_model_len: int | None = None,
        max_batch_size: int = 64,
        max_num_batched_tokens: int | None = None,
        kv_cache_memory: int | None = None,
        block_size: int = 16,
        prefix_caching: bool = True,
        quantization: str | None = None,
        cuda_graphs: bool | Sequence[int] | str = False,
        warm_up: bool = False,
        async_scheduling: bool = False,
        conditional_nodes: bool = False,
        persistent_blocks: bool = False,
        revision: str | None = None,
        seed: int = 0,
    ) -> Engine:
        """An engine on a checkpoint.

        Args:
            model: a local folder, a hub id, or "demo" or "demo-elmer", which ship with the package.
            device: "auto" takes a CUDA device if there is one, else the CPU.
            dtype: "auto" takes the checkpoint's own; on a CPU float32 for float16, and for bfloat16
                where it has no instructions for it. Else "float32", "bfloat16", "float16", a dtype.
            backend: "reference" runs every op in plain PyTorch; "native" takes the fast kernels or
                fails; "auto" takes the CPU's where they are built, and the reference on CUDA.
            decoding: mode of requests that name none; by default the own head, or ELMER's one pass.
            vocab_projection_mode: how exits project, for checkpoints that do not say.
            lm_head_layer_indices: exit layers, instead of the checkpoint's own list.
            architecture: model family, instead of the checkpoint's model_type.
            max_model_len: longest sequence; the checkpoint's own limit by default.
            max_batch_size: most sequences that run at once.
            max_num_batched_tokens: most tokens of one step; longer prompts are read in chunks.
            kv_cache_memory: bytes of the KV pool; by default a share of the free memory.
            block_size: tokens of a KV block.
            prefix_caching: keep the KV blocks of prompts for later prompts that begin alike.
            quantization: "int8" or "int4" stores weight matrices as small integers with a scale for
                each 32 columns ("int8-g64": 64), "fp8" as e4m3; docs/quantization.md. None: dtype.
            cuda_graphs: capture steps for some numbers of rows (True), or [1, 2, 4]; docs/gpu.md.
            warm_up: capture at the start, for the mode ``decoding``, not when first needed.
            async_scheduling: launch a step before the last one's tokens are known; likewise.
            conditional_nodes: graphs pass over layers without rows (MULTIEXIT_CUDA=1); docs/gpu.md.
            persistent_blocks: up to 4 rows run their layers in one launch; likewise.
            revision: of a hub id.
            seed: of requests that bring none.

        Raises:
            CheckpointError: the checkpoint is damaged, incomplete, or of an unknown kind.
            ValueError: an argument has no meaning for this model.
        """
        opened = open_checkpoint(
            model,
            revision=revision,
            architecture=architecture,
            lm_head_layer_indices=lm_head_layer_indices,
            vocab_projection_mode=vocab_projection_mode,
        )
        config = make_engine_config(
            opened,
            device=device,
            dtype=dtype,
            backend=backend,
            max_model_len=max_model_len,
            max_batch_size=max_batch_size,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory=kv_cache_memory,
            block_size=block_size,
            prefix_caching=prefix_caching,
            seed=seed,
            quantization=quantization,
            cuda_graphs=cuda_graphs,
            async_scheduling=async_scheduling,
            conditional_nodes=conditional_nodes,
            persistent_blocks=persistent_blocks,
        )
        engine = cls(opened, config, decoding)
        if warm_up:
            engine.warm_up()
        return engine

    def warm_up(
        self,
        decoding: DecodingMode | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] = (),
    ) -> None:
        """Capture the steps of a mode, or the engine's, before any of its requests comes.

        ``sampling`` is what some ask for besides greedy or drawn tokens: penalties, biases, bans,
        a grammar, ``logprobs``; of its values only these matter. Reads prompts of several lengths,
        too, which ``stats`` counts. ValueError without graphs.
        """
        if not self.config.cuda_graphs:
            raise ValueError("warm_up captures CUDA graphs: give cuda_graphs=True as well")
        mode, depth = self._intake.mode_and_depth(decoding)
        wanted = [sampling] if isinstance(sampling, SamplingParams) else list(sampling)
        encoder = self.model_config.encoder
        longest = self.config.max_model_len - 1 if encoder is None else encoder.max_source_len
        for prompt, own in warm_prompts(mode, wanted, longest):
            self.generate(prompt, own, mode, progress=False)
        self._core.warm_up(mode, depth, wanted)

    @property
    def model_config(self) -> ModelConfig:
        """The model's shape and exits."""
        return self._model.config

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        decoding: DecodingMode | Sequence[DecodingMode | None] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts; the outputs come in the order of the prompts.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            sampling: one for all, or one for each prompt; greedy by default.
            decoding: one for all, or one for each prompt; the engine's default for None.
            progress: show a bar; by default for more than eight prompts on a terminal.

        Raises:
            ValueError: a prompt or a parameter is wrong. Nothing has then been computed.
        """
        many = as_prompts(prompts)
        samplings = one_for_each(sampling or SamplingParams(), len(many), "sampling")
        modes = one_for_each(decoding, len(many), "decoding")
        requests = [
            self._checked(prompt, params, mode, f"prompts[{i}]: " if len(many) > 1 else "")
            for i, (prompt, params, mode) in enumerate(zip(many, samplings, modes, strict=True))
        ]
        run_all(self._core, requests, progress)
        outputs = [request_output(self._core, request) for request in requests]
        for request in requests:
            self._core.forget(request.request_id)
        return outputs

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        decoding: DecodingMode | None = None,
    ) -> Iterator[CompletionOutput]:
        """Continue one prompt; gives what is new after each step.

        Each item's ``text`` and ``token_ids`` hold only what was added. Text is held back while it
        could still turn out to be half a character or part of a stop string, so the pieces of an
        index always add up to the text that ``generate`` gives. The last item of each index has a
        finish reason. Leaving the loop early aborts the request.

        Raises:
            ValueError: as ``generate``, and for beam search, whose text is known at its end only.
            RequestFailed: the request's own contrast function or numbers failed.
        """
        request = self._checked(prompt, sampling or SamplingParams(), decoding, "")
        if request.is_beam_search:
            raise ValueError("num_beams: beam search cannot be streamed, use generate")
        return stream_request(self._core, request)

    def score(
        self,
        items: ScoreItem | Sequence[ScoreItem],
        decoding: DecodingMode | Sequence[DecodingMode | None] | None = None,
        *,
        stride: int | None = None,
        progress: bool | None = None,
    ) -> list[ScoreOutput]:
        """Log-probabilities of given texts, each position from the mode's own distribution.

        Args:
            items: texts, token-id lists, or (context, continuation) tuples of either; one or many.
                Of a pair only the continuation is scored. An encoder-decoder takes (source, target)
                tuples only.
            decoding: one for all, or one for each item.
            stride: for texts longer than the model: tokens scored by each window after the first,
                the rest of the window being context. By default windows hardly overlap.
            progress: as in ``generate``.

        Raises:
            ValueError: an item is wrong. Nothing has then been computed.
            RequestFailed: a contrast function or the model's numbers failed.
        """
        texts = scored_texts(items, self._intake)
        modes = one_for_each(decoding, len(texts), "decoding")
        longest = self.config.max_model_len
        parts = [
            [
                self._intake.scoring_request(self._new_id(), *window, mode, text.source)
                for window in windows(text.token_ids, text.score_from, longest, stride)
            ]
            for text, mode in zip(texts, modes, strict=True)
        ]
        return run_scored(self._core, texts, parts, progress)

    def logits(self, prompt: Prompt, decoding: DecodingMode | None = None) -> Tensor:
        """[tokens, vocab] float32 scores of a mode at every position of a prompt.

        Logits for heads, log-probabilities for ``Contrast``, or a function's results. Runs alone.

        Raises:
            ValueError: the prompt or mode is wrong, or is longer than max_model_len.
            RuntimeError: requests are in flight.
        """
        return self._core.prompt_scores(self._alone(prompt, decoding))

    def exit_readings(self, prompt: Prompt, decoding: EarlyExit | Parallel) -> ExitReadings:
        """What exits measure at every position of a prompt, or of an answer. As ``logits``."""
        return self._core.exit_readings(self._alone(prompt, decoding))

    def follow(
        self, texts: Sequence[Sequence[int]], prompt_len: int, decoding: DecodingMode
    ) -> list[FollowedText]:
        """What a mode chooses greedily in the place of each token of texts from ``prompt_len`` on.

        Texts are fed one token after the other, so that what each token sees is what it would see
        had the mode written the text. Raises ValueError as ``generate``.
        """
        requests = []
        for text in texts:
            sampling = SamplingParams(max_new_tokens=len(text) - prompt_len, ignore_eos=True)
            requests.append(self._checked(text[:prompt_len], sampling, decoding, ""))
            requests[-1].continuation = tuple(text[prompt_len:])
        run_all(self._core, requests, None)
        for request in requests:
            self._core.forget(request.request_id)
        return [followed_text(request) for request in requests]

    def add_request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        decoding: DecodingMode | None = None,
        *,
        request_id: str | None = None,
        streamed: bool = True,
    ) -> str:
        """Queue a request for ``step`` or ``step_pieces``; returns its id, raises as ``generate``.

        With ``streamed`` False its text is made only at its end, or when ``step`` shows it.
        """
        request = self._checked(prompt, sampling or SamplingParams(), decoding, "", request_id)
        self._core.add(request, streamed=streamed)
        return request.request_id

    def compile_structure(self, sampling: SamplingParams) -> None:
        """Compile ``structured_outputs`` for later, in any thread; raises ValueError."""
        if sampling.structured_outputs is not None:
            self._intake.grammars.grammar(sampling.structured_outputs)

    def step(self) -> list[RequestOutput]:
        """Run one step; gives the requests that it changed. Finished ones are then forgotten."""
        return self._step(lambda request: request_output(self._core, request))

    def step_pieces(self) -> list[RequestPiece]:
        """As ``step``, but gives only what is new of each request since the last call."""
        return self._step(self._feeds.take)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request and free what it holds; None when there is no such request."""
        request = self._core.abort(request_id)
        if request is None:
            return None
        output = request_output(self._core, request)
        self._forget(request_id)
        return output

    def has_unfinished(self) -> bool:
        """Whether ``step`` has anything to do."""
        return self._core.has_unfinished

    def stats(self) -> EngineStats:
        """How full the engine is, and what it has done."""
        return self._core.stats()

    def _alone(self, prompt: Prompt, decoding: DecodingMode | None) -> Request:
        if self.has_unfinished():
            raise RuntimeError("this runs alone: finish or abort the other requests first")
        return self._intake.reading_request(self._new_id(), prompt, decoding)

    def _step(self, report: Callable[[Request], _Reported]) -> list[_Reported]:
        changed = self._core.step()
        reported = [report(request) for request in changed]
        for request in changed:
            if request.is_finished:
                self._forget(request.request_id)
        return reported

    def _forget(self, request_id: str) -> None:
        self._core.forget(request_id)
        self._feeds.forget(request_id)

    def _checked(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        decoding: DecodingMode | None,
        where: str,
        request_id: str | None = None,
    ) -> Request:
        if request_id is not None and request_id in self._core.requests:
            raise ValueError(f"request_id={request_id!r} is in use: give another one or None")
        name = self._new_id() if request_id is None else request_id
        try:
            request = self._intake.request(
                name, prompt, sampling, decoding, self._random.getrandbits(63)
            )
            self._core.check_fits(request)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error
        return request

    def _new_id(self) -> str:
        names = (f"request-{number}" for number in self._ids)
        return next(name for name in names if name not in self._core.requests)
