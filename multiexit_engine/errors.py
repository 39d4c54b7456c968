"""Exceptions a user of the engine can see.

* EngineError
  x BackendUnavailable   a forced op backend cannot run here, or not with these arguments
  x CheckpointError      a checkpoint is damaged, incomplete, or of a kind the engine does not know
  x RequestFailed        a request's own code (a contrast function) or numbers failed while running

Wrong values of arguments are plain ``ValueError``: they name the field, the value and the remedy.
"""


class EngineError(Exception):
    """Base class of every error that the engine raises on purpose."""


class BackendUnavailable(EngineError):
    """The backend that was asked for by name cannot run this call."""


class CheckpointError(EngineError, ValueError):
    """A checkpoint cannot be loaded: what was found, and what would be needed."""


class RequestFailed(EngineError):
    """One request failed while it ran; the others of its batch are unharmed."""


class QueueFull(EngineError):
    """As many requests live already as may; the same request can succeed a moment later."""


class EngineClosed(EngineError):
    """The engine takes no further requests: it is being shut down."""
