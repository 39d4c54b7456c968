"""Where captured passes of non-autoregressive answers read and write: always the same memory.

Inputs come in one copy, and results go in one. Knows nothing of layers that run or of heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multiexit_engine.config import ModelConfig
from multiexit_engine.decoding.forecasts import GateRules, gate_least, gate_threshold, least_gain
from multiexit_engine.parallel_mode import Parallel
from multiexit_engine.runtime.device.packed import Packed

# a pass is over before the next one is sent
_TURN = 0


class AnswerRow(NamedTuple):
    """What a pass has to know of one of its rows.

    Attributes:
        mode: how it leaves.
        leaves: 1-based layer after which it leaves at the latest.
        tested: the layers after which it leaves if it is sure.
    """

    mode: Parallel
    leaves: int
    tested: tuple[int, ...]


class Lens(NamedTuple):
    """How the texts of a batch lie.

    Attributes:
        sources: tokens of each source.
        answers: rows of each answer.
        source_of: of each answer, ascending.
    """

    sources: Sequence[int]
    answers: Sequence[int]
    source_of: Sequence[int]


class AnswerMemory:
    """The inputs of passes, what becomes of their rows, and their results.

    Args:
        num_rows: most rows of a pass, padding included.
        num_tokens: most tokens of all its sources, padding included.
        num_texts: most answers, and sources; one more of both has no rows, and owns the padding.
        config: of the model.
        dtype: of its weights.
        device: where it lies.

    Attributes:
        inputs: by name, in place.
        results: by name, in place.
        goes_on: [rows] bool, whether a row does.
        is_unread: [rows] bool, whether it left, and its token has still to be read.
        begun: [rows, hidden] float32, what rows begin a pass with.
        states: [rows, hidden] float32, how far they are.
        encoded: [tokens, hidden], of the sources.
    """

    def __init__(
        self,
        num_rows: int,
        num_tokens: int,
        num_texts: int,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_texts = num_texts
        self._config = config
        rows, tokens, starts = (num_rows,), (num_tokens,), (num_texts + 2,)
        layers = config.num_layers + 1
        marks = (layers, num_rows)
        self._inputs = Packed(
            [
                *((name, torch.int64, tokens) for name in ("tokens", "places", "source_owners")),
                *((name, torch.int64, rows) for name in ("owners", "gains")),
                ("first_rows", torch.int64, starts),
                ("source_starts", torch.int32, starts),
                ("starts", torch.int32, starts),
                *((name, torch.float32, rows) for name in ("thresholds", "forecasts", "least")),
                *((name, torch.bool, rows) for name in ("by_entropy", "is_soft", "computed")),
                *((name, torch.bool, marks) for name in ("leaves", "tested", "tested_plain")),
            ],
            device,
        )
        self._num_mark_bytes = layers * num_rows
        self._results = Packed(
            [
                ("tokens", torch.int64, rows),
                ("log_probs", torch.float32, rows),
                ("exit_layers", torch.int32, rows),
                *((name, torch.int32, (layers,)) for name in ("computed", "keyed", "tested")),
            ],
            device,
        )
        self.inputs = self._inputs.on_device
        self.results = self._results.on_device
        self.goes_on, self.is_unread = torch.zeros(2, num_rows, dtype=torch.bool, device=device)
        self.begun, self.states = torch.zeros(2, num_rows, config.hidden_size, device=device)
        self.encoded = torch.zeros(num_tokens, config.hidden_size, dtype=dtype, device=device)
        self._keys_values: dict[int, Tensor] = {}

    def num_texts_of(self, num_rows: int) -> int:
        """Answers that so many rows may belong to."""
        return min(num_rows, self.num_texts)

    def send_sources(self, sources: Sequence[Sequence[int]]) -> None:
        """Note the tokens of the sources of the next pass, for ``send``."""
        arrays = self._inputs.on_host(_TURN)
        count = sum(map(len, sources))
        arrays["tokens"][:count] = [token for source in sources for token in source]
        arrays["places"][:count] = [place for source in sources for place in range(len(source))]
        arrays["source_owners"][:] = self.num_texts
        arrays["source_owners"][:count] = _owners([len(source) for source in sources])

    def send(self, lens: Lens, rows: Sequence[AnswerRow | None], size: int) -> None:
        """Copy a pass's inputs to the device.

        Args:
            lens: how its texts lie.
            rows: of all answers; None for one that is not of this pass.
            size: rows that run, padding included.
        """
        arrays, count = self._inputs.on_host(_TURN), len(rows)
        rows_of_source = [0] * len(lens.sources)
        for length, source in zip(lens.answers, lens.source_of, strict=True):
            rows_of_source[source] += length
        for name, each in (
            ("source_starts", lens.sources),
            ("starts", lens.answers),
            ("first_rows", rows_of_source),
        ):
            starts = [*accumulate(each, initial=0)]
            arrays[name][: len(starts)] = starts
            arrays[name][len(starts) :] = starts[-1]
        arrays["owners"][:count] = _owners(lens.answers)
        arrays["owners"][count:] = self.num_texts_of(size)
        for name in ("computed", "is_soft", "by_entropy", "leaves", "tested", "tested_plain"):
            arrays[name][...] = False
        for place, row in enumerate(rows):
            if row is not None:
                _fill(arrays, place, row, self._config)
        self._inputs.send(_TURN, "tested_plain", self._num_mark_bytes)

    def fetch(self) -> None:
        """Copy the results to the host; they are there when the device was waited for."""
        self._results.fetch(_TURN)

    def found(self, name: str, count: int) -> list[Any]:
        """The first numbers of a result, once they were waited for."""
        values: list[Any] = self._results.on_host(_TURN)[name][:count].tolist()
        return values

    def keys_values(self, num_layers: int) -> Tensor:
        """[tokens, layers, 2, heads, head_dim]: of the sources, for a span of so many layers."""
        if num_layers not in self._keys_values:
            config = self._config
            shape = len(self.encoded), num_layers, 2, config.num_kv_heads, config.head_dim
            self._keys_values[num_layers] = self.encoded.new_zeros(shape)
        return self._keys_values[num_layers]

    def gate_rules(self, rows: slice) -> GateRules:
        """What some rows ask of forecasts."""
        names = "forecasts", "by_entropy", "least", "gains"
        return GateRules(*(self.inputs[name][rows] for name in names))


def _fill(arrays: dict[str, Any], place: int, row: AnswerRow, config: ModelConfig) -> None:
    mode = row.mode
    arrays["thresholds"][place] = mode.threshold or 0.0
    arrays["forecasts"][place] = gate_threshold(mode)
    arrays["least"][place] = gate_least(mode)
    arrays["gains"][place] = least_gain(mode, config)
    arrays["by_entropy"][place] = mode.measure == "entropy"
    arrays["is_soft"][place] = mode.exit == "soft"
    arrays["computed"][place] = True
    arrays["leaves"][row.leaves, place] = True
    arrays["tested" if mode.gate_bias else "tested_plain"][[*row.tested], place] = True


def _owners(lens: Sequence[int]) -> list[int]:
    return [owner for owner, count in enumerate(lens) for _ in range(count)]
