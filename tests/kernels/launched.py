"""Engines whose steps are launched in pieces, on the GPU's kernels, wherever their tensors lie."""

from __future__ import annotations

from multiexit_engine import Engine
from multiexit_engine.runtime.device.graphs import Graphs
from multiexit_engine.runtime.launched.decode_steps import DecodeSteps, most_keys


def in_pieces(engine: Engine, sizes: tuple[int, ...]) -> Graphs:
    """Launch an engine's steps in pieces for these numbers of rows.

    Pieces are called again instead of captured, with what their first call was given.
    """
    runner = engine._core.runner
    longest = max(most_keys(engine._model.config, engine.config))
    pieces = Graphs(sizes, longest, capture=lambda call: call)
    kept = runner.kv_cache, runner._states, runner._chooser
    runner._decode = DecodeSteps(engine._model, *kept, engine.config, pieces)
    return pieces
