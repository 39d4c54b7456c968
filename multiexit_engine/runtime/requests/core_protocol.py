"""What the engine's face asks of a core, whether it writes token by token or all at once."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from multiexit_engine.outputs import EngineStats
from multiexit_engine.params import DecodingMode, SamplingParams
from multiexit_engine.request import Request, Sequence
from multiexit_engine.runtime.early_exit.exit_readings import ExitReadings
from multiexit_engine.runtime.requests.detokenizer import Detokenizer, Tokenizer


class Core(Protocol):
    """Living requests, and the step that advances them.

    Attributes:
        requests: all requests that were added and not yet forgotten.
        streamed: ids of the requests whose text is looked at while it grows.
        tokenizer: makes texts of tokens; None where the checkpoint has none.
        num_generated_tokens: tokens chosen since the engine was made.
    """

    requests: dict[str, Request]
    streamed: set[str]
    tokenizer: Tokenizer | None
    num_generated_tokens: int

    @property
    def has_unfinished(self) -> bool: ...

    def check_fits(self, request: Request) -> None:
        """Raise ValueError if the request could never run, however empty the engine is."""

    def add(self, request: Request, *, streamed: bool = False) -> None:
        """Queue a checked request; ``streamed`` keeps its text current after every step."""

    def abort(self, request_id: str) -> Request | None:
        """End a request at once and free what it holds; None when there is no such request."""

    def step(self) -> list[Request]:
        """Run one step; returns the requests that it changed, finished ones included."""

    def warm_up(self, mode: DecodingMode, depth: int, sampling: list[SamplingParams]) -> None:
        """Capture what steps in a mode will replay that runs so many layers.

        Args:
            mode: the mode.
            depth: the layers.
            sampling: what requests ask for besides greedy tokens and draws.
        """

    def prompt_scores(self, request: Request) -> Tensor:
        """[positions, vocab] float32 raw scores of a request that is run alone."""

    def exit_readings(self, request: Request) -> ExitReadings:
        """What exits measure at every position of a request that is run alone."""

    def stats(self) -> EngineStats:
        """How full the engine is, and what it has done."""

    def text(self, sequence: Sequence) -> Detokenizer | None:
        """The text of a sequence's output so far; None without a tokenizer."""

    def forget(self, request_id: str) -> None:
        """End a request if it still runs, and keep nothing of it; unknown ids are fine."""
