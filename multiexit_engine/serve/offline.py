"""Files instead of sockets: JSON lines with prompts in, JSON lines with outputs out.

A run that was killed goes on where it stood: what is in the output file is not computed again.
Knows the engine's face and the two files; nothing of HTTP.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from multiexit_engine.engine import Engine
from multiexit_engine.mode_forms import decoding_from_json, parse_decoding
from multiexit_engine.modes import DecodingMode
from multiexit_engine.outputs import RequestPiece, join_pieces
from multiexit_engine.params import SamplingParams
from multiexit_engine.runtime.requests.intake import Prompt

_SAMPLING = tuple(f.name for f in dataclasses.fields(SamplingParams))
_FIELDS = ("id", "prompt", "decoding", *_SAMPLING)


@dataclass(frozen=True, slots=True)
class OfflineReport:
    """What a run did.

    Attributes:
        num_done: lines answered by this run.
        num_failed: those of them that got an error instead of an output.
        num_kept: lines that the output file held already.
    """

    num_done: int
    num_failed: int
    num_kept: int


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    text: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text).hexdigest()[:16]


@dataclass(slots=True)
class _Running:
    """A line that the engine works on."""

    line: _Line
    id: Any
    prompt: Prompt
    pieces: list[RequestPiece]


def generate_file(
    engine: Engine,
    source: Path,
    target: Path,
    sampling: Mapping[str, Any] | None = None,
    decoding: DecodingMode | None = None,
) -> OfflineReport:
    """Answer every line of ``source``, one JSON object each, with a line in ``target``.

    A line has ``prompt`` (a text or token ids) and may have ``id``, ``decoding`` (a mode as JSON or
    in its command-line form) and any field of SamplingParams. Answers are the fields of
    RequestOutput beside ``line`` (counted from 1), ``digest`` (of the line) and ``id``; they stand
    in the order in which they were finished, each written whole before the next. A line that cannot
    be run gets ``error`` and harms no other. A line that samples without a ``seed`` takes its
    number for one, so a run that was killed and taken up again gives what one run would have given.

    Args:
        engine: runs the requests; nobody else may step it meanwhile.
        source: prompts; read as the work goes on, never as a whole.
        target: made, or continued: lines that it answers are skipped.
        sampling: fields of SamplingParams for lines that do not give their own.
        decoding: mode of lines that name none; the engine's default for None.

    Raises:
        ValueError: target does not belong to source, or a default is wrong.
        OSError: a file cannot be read or written.
    """
    defaults = dict(sampling or {})
    SamplingParams(**defaults)
    if source.resolve() == target.resolve():
        raise ValueError(f"{target}: input and output must be two files")
    with source.open("rb") as lines, target.open("a+b") as answers:
        done = _kept(answers, target)
        run = _Run(engine, answers, defaults, decoding)
        for line in _lines_to_do(lines, done, source, target):
            run.add(line)
            while run.is_full:
                run.step()
        while run.running:
            run.step()
        os.fsync(answers.fileno())
    return OfflineReport(run.num_done, run.num_failed, len(done))


class _Run:
    """The lines that the engine works on, and where their answers go."""

    def __init__(
        self,
        engine: Engine,
        answers: BinaryIO,
        defaults: Mapping[str, Any],
        decoding: DecodingMode | None,
    ) -> None:
        self._engine = engine
        self._answers = answers
        self._defaults = defaults
        self._decoding = decoding
        self.running: dict[str, _Running] = {}
        self.num_done = 0
        self.num_failed = 0

    @property
    def is_full(self) -> bool:
        # as many again wait, so that a finished request's place never stays empty
        return len(self.running) >= 2 * self._engine.config.max_batch_size

    def add(self, line: _Line) -> None:
        """Hand a line to the engine; one that is wrong is answered at once."""
        given: dict[str, Any] = {}
        try:
            given = _parsed(line)
            values = {name: given[name] for name in _SAMPLING if name in given}
            name = self._engine.add_request(
                given["prompt"],
                SamplingParams(**{"seed": line.number, **self._defaults, **values}),
                _mode(given["decoding"]) if "decoding" in given else self._decoding,
                streamed=False,
            )
        except (ValueError, TypeError) as error:
            self._write(line, given.get("id"), {"error": str(error)})
            return
        self.running[name] = _Running(line, given.get("id"), given["prompt"], [])

    def step(self) -> None:
        """Run one step and write the answers that it finished."""
        for piece in self._engine.step_pieces():
            running = self.running[piece.request_id]
            running.pieces.append(piece)
            if piece.finished:
                del self.running[piece.request_id]
                prompt = running.prompt if isinstance(running.prompt, str) else None
                answer = dataclasses.asdict(join_pieces(running.pieces, prompt))
                del answer["request_id"]
                self._write(running.line, running.id, answer)

    def _write(self, line: _Line, name: Any, answer: Mapping[str, Any]) -> None:
        record = {"line": line.number, "digest": line.digest, "id": name, **answer}
        # one write of a whole line: a kill leaves at most half of the last one
        self._answers.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._answers.flush()
        self.num_done += 1
        self.num_failed += answer["error"] is not None


def _kept(answers: BinaryIO, target: Path) -> dict[int, str]:
    """Digests of the lines that are answered; half a line at the end is cut off."""
    answers.seek(0)
    done: dict[int, str] = {}
    end = 0
    for text in answers:
        if not text.endswith(b"\n"):
            break
        try:
            record = json.loads(text)
            done[record["line"]] = record["digest"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{target}: its line {text[:40]!r} is no answer of an earlier run; give --output "
                "another file"
            ) from None
        end += len(text)
    answers.truncate(end)
    return done


def _lines_to_do(
    lines: BinaryIO, done: Mapping[int, str], source: Path, target: Path
) -> Iterator[_Line]:
    for number, text in enumerate(lines, 1):
        line = _Line(number, text.strip())
        if number in done and done[number] != line.digest:
            raise ValueError(
                f"{target}: holds the answer to another line {number} than {source} has; give "
                "--output another file"
            )
        if line.text and number not in done:
            yield line


def _parsed(line: _Line) -> dict[str, Any]:
    try:
        given = json.loads(line.text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(given, dict) or "prompt" not in given:
        raise ValueError('not an object with a "prompt"')
    if unknown := sorted(given.keys() - set(_FIELDS)):
        raise ValueError(f"unknown field {unknown[0]!r}: allowed are {', '.join(_FIELDS)}")
    if isinstance(biases := given.get("logit_bias"), dict):
        # JSON's keys are strings
        given["logit_bias"] = {int(token): bias for token, bias in biases.items()}
    return given


def _mode(given: object) -> DecodingMode:
    if isinstance(given, str):
        return parse_decoding(given)
    if isinstance(given, dict):
        return decoding_from_json(given)
    raise ValueError(f"decoding={given!r}: must be an object or a text")
