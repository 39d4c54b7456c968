"""Transformers' ``generate``, plain or in IBM's way, in a process of its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers
from protocol import Generate, serve

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoints import SHAPES
from peers import generate, load_ibm_way, load_transformers


def load(arguments: argparse.Namespace) -> Generate:
    """Greedy generation: way "" is the original model, "ibm" and "ibm-two-heads" contrast."""
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.weights)
    shape = next(
        shape for name, shape in SHAPES.items() if arguments.model.name.startswith(f"{name}-")
    )
    if arguments.way == "":
        model = load_transformers(shape, arguments.model, dtype)
    else:
        pair = (shape.lower, shape.upper)
        heads = shape.exits if arguments.way == "ibm" else pair
        model = load_ibm_way(shape, arguments.model, dtype, heads)
    return lambda prompts, new_tokens: generate(model, prompts, new_tokens)


if __name__ == "__main__":
    serve(load, lambda: transformers.__version__)
