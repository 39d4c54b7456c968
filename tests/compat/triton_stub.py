"""`triton_python_backend_utils` as the python backend documents it, without a server.

Source: README.md of triton-inference-server/python_backend: tensors, responses, errors, decoupled
senders, cancellation. As there, nothing may be sent after the final flag, byte strings are object
arrays, and a request's tensors are read while `execute` runs.
"""

import sys
import threading
import types

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class TritonError(Exception):
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED = range(6)
    ALREADY_EXISTS, CANCELLED = 6, 7

    def __init__(self, message, code=INTERNAL):
        assert isinstance(message, str)
        self._message, self._code = message, code

    def message(self):
        return self._message

    def code(self):
        return self._code


class Tensor:
    def __init__(self, name, array):
        assert isinstance(name, str) and isinstance(array, np.ndarray)
        if array.dtype == object:
            assert all(isinstance(item, bytes) for item in array.reshape(-1))
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        assert all(isinstance(tensor, Tensor) for tensor in output_tensors)
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self):
        return self._tensors

    def has_error(self):
        return self._error is not None

    def error(self):
        return self._error


class InferenceResponseSender:
    def __init__(self):
        self.responses = []
        self.first, self.final, self.cancelled = (threading.Event() for _ in range(3))

    def send(self, response=None, flags=0):
        if self.final.is_set():
            raise RuntimeError("a response was sent after the final one")
        if response is not None:
            self.responses.append(response)
            self.first.set()
        if flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.final.set()

    def is_cancelled(self):
        return self.cancelled.is_set()


class InferenceRequest:
    """A request; strings and numbers are put into tensors of the form that Triton gives."""

    def __init__(self, **inputs):
        self.tensors = {name: Tensor(name, _array(value)) for name, value in inputs.items()}
        self.sender = InferenceResponseSender()

    def get_response_sender(self):
        return self.sender

    def results(self):
        """Per response: output name to array; waits for the final flag."""
        assert self.sender.final.wait(60)
        assert not any(response.has_error() for response in self.sender.responses)
        return [
            {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
            for response in self.sender.responses
        ]

    def error(self):
        """The error that ended it."""
        assert self.sender.final.wait(60)
        return self.sender.responses[-1].error()


def get_input_tensor_by_name(request, name):
    return request.tensors.get(name)


def _array(value):
    if isinstance(value, str):
        return np.array([value.encode()], np.object_)
    if isinstance(value, bool):
        return np.array([value])
    return np.array(value, np.int64)


def install(monkeypatch):
    """Let `import triton_python_backend_utils` find this."""
    name = "triton_python_backend_utils"
    module = types.ModuleType(name)
    for key in ("InferenceRequest", "InferenceResponse", "Tensor", "TritonError"):
        setattr(module, key, globals()[key])
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = TRITONSERVER_RESPONSE_COMPLETE_FINAL
    module.get_input_tensor_by_name = get_input_tensor_by_name
    monkeypatch.setitem(sys.modules, name, module)
