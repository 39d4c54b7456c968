"""A peer's side of the conversation: one JSON line asks, one JSON line answers.

Runs in the peer's own Python, whatever it has installed: standard library only. Asked is
``{"prompts": [[id, ...], ...], "new_tokens": n}``; answered are the greedy tokens of each prompt
and the seconds that they took: ``{"tokens": [[id, ...], ...], "seconds": s}``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

Generate = Callable[[list[list[int]], int], list[list[int]]]
Load = Callable[[argparse.Namespace], Generate]


def serve(load: Load, version: Callable[[], str]) -> None:
    """Load a model as the command line says, then answer until the input ends.

    What libraries print goes to standard error: the answers' stream is kept for answers.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", type=Path, help="folder of the checkpoint")
    arguments.add_argument("--weights", help="float32, bfloat16 or int8")
    arguments.add_argument("--threads", type=int)
    arguments.add_argument("--way", default="", help="of those that the peer has")
    arguments.add_argument("--max-batch", type=int, default=1)
    generate = load(arguments.parse_args())
    _say(answers, {"version": version()})
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        tokens = generate(asked["prompts"], asked["new_tokens"])
        _say(answers, {"tokens": tokens, "seconds": time.perf_counter() - started})


def _say(answers, message: dict) -> None:  # type: ignore[no-untyped-def,type-arg]
    answers.write(json.dumps(message) + "\n")
    answers.flush()
