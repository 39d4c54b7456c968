"""NVIDIA Triton Inference Server's python backend on top of the engine: a decoupled model.

Can be imported only where Triton runs its python models. Knows Triton's tensors and senders;
nothing of how requests are batched.
"""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from multiexit_engine.async_engine import AsyncEngine
from multiexit_engine.errors import EngineClosed, QueueFull
from multiexit_engine.mode_forms import decoding_from_json, parse_decoding
from multiexit_engine.modes import DecodingMode
from multiexit_engine.outputs import CompletionOutput
from multiexit_engine.params import SamplingParams

# Triton tells nobody of a cancellation: it has to be asked.
SECONDS_BETWEEN_LOOKS = 0.02


@dataclass(frozen=True, slots=True)
class _Job:
    prompt: str | list[int]
    sampling: SamplingParams
    mode: DecodingMode | None
    is_streamed: bool


class TritonPythonModel:
    """One engine for all requests of a model instance, which run in one continuous batch.

    Source: the python backend's interface, README.md of triton-inference-server/python_backend
        (decoupled mode, request cancellation).
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model that config.pbtxt names.

        Args:
            args: Triton's; ``model_config`` is the configuration as JSON. Its parameters are
                ``model`` and, if any, ``options``: a JSON object, as of ``Engine.from_pretrained``.

        Raises:
            ValueError: a parameter is missing or none of these.
        """
        parameters = {
            name: value["string_value"]
            for name, value in json.loads(args["model_config"]).get("parameters", {}).items()
        }
        options = json.loads(parameters.pop("options", "{}"))
        model = parameters.pop("model", None)
        if model is None or parameters:
            raise ValueError(
                f"config.pbtxt: parameters besides 'model' and 'options': {sorted(parameters)}; "
                "'model' must be among them"
            )
        self._engine = AsyncEngine.from_pretrained(model, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="senders", daemon=True)
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Start requests; their answers follow through their senders."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                job = _read(request)
            except (ValueError, TypeError) as error:
                _refuse(sender, error, pb_utils.TritonError.INVALID_ARG)
            else:
                asyncio.run_coroutine_threadsafe(self._serve(sender, job), self._loop)

    def finalize(self) -> None:
        """End all requests and the engine's thread."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        await self._engine.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, sender: Any, job: _Job) -> None:
        work = asyncio.ensure_future(self._answer(sender, job))
        while not work.done():
            await asyncio.wait({work}, timeout=SECONDS_BETWEEN_LOOKS)
            if not work.done() and sender.is_cancelled():
                work.cancel()
        try:
            await work
        except asyncio.CancelledError:
            message = "the request was cancelled by its client"
            _refuse(sender, message, pb_utils.TritonError.CANCELLED)
        except ValueError as error:
            _refuse(sender, error, pb_utils.TritonError.INVALID_ARG)
        except (QueueFull, EngineClosed) as error:
            _refuse(sender, error, pb_utils.TritonError.UNAVAILABLE)
        except Exception as error:
            _refuse(sender, error, pb_utils.TritonError.INTERNAL)
        else:
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    async def _answer(self, sender: Any, job: _Job) -> None:
        if job.is_streamed:
            async for piece in self._engine.stream(job.prompt, job.sampling, job.mode):
                sender.send(_response(piece))
        else:
            answer = await self._engine.generate(job.prompt, job.sampling, job.mode)
            for output in answer.outputs:
                sender.send(_response(output))


def _read(request: Any) -> _Job:
    text, ids = _value(request, "PROMPT"), _tensor(request, "PROMPT_TOKEN_IDS")
    if (text is None) == (ids is None):
        raise ValueError("PROMPT and PROMPT_TOKEN_IDS: give one of them")
    prompt = text if ids is None else [int(token) for token in ids.reshape(-1)]
    sampling = json.loads(_value(request, "SAMPLING") or "{}")
    if not isinstance(sampling, dict):
        raise ValueError('SAMPLING: give a JSON object, such as {"max_new_tokens": 16}')
    return _Job(prompt, SamplingParams(**sampling), _mode(request), bool(_value(request, "STREAM")))


def _mode(request: Any) -> DecodingMode | None:
    text = _value(request, "DECODING")
    if text is None:
        return None
    return decoding_from_json(json.loads(text)) if text.startswith("{") else parse_decoding(text)


def _tensor(request: Any, name: str) -> Any:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _value(request: Any, name: str) -> Any:
    """The only value of a tensor, None without the tensor."""
    array = _tensor(request, name)
    if array is None:
        return None
    if array.size != 1:
        raise ValueError(f"{name}: one value was expected, {array.size} were given")
    value = array.reshape(-1)[0]
    return value.decode() if isinstance(value, bytes) else value


def _response(output: CompletionOutput) -> Any:
    reason = "" if output.finish_reason is None else output.finish_reason.value
    tensors = {
        "INDEX": np.array([output.index], np.int32),
        "TEXT": np.array([output.text.encode()], np.object_),
        "TOKEN_IDS": np.array(output.token_ids, np.int64),
        "EXIT_LAYERS": np.array(output.exit_layers, np.int32),
        "FINISH_REASON": np.array([reason.encode()], np.object_),
    }
    return pb_utils.InferenceResponse([pb_utils.Tensor(*item) for item in tensors.items()])


def _refuse(sender: Any, error: Exception | str, code: int) -> None:
    response = pb_utils.InferenceResponse([], pb_utils.TritonError(str(error), code))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
