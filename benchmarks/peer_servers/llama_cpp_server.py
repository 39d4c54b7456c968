"""llama.cpp through its Python package, on a GGUF file written when first asked for."""

from __future__ import annotations

import argparse
import itertools
import os

import llama_cpp
from gpt2_gguf import write_gguf
from protocol import Generate, serve


def load(arguments: argparse.Namespace) -> Generate:
    """Greedy generation of one prompt at a time: the package has no batches of requests."""
    path = arguments.model.with_name(f"{arguments.model.name}-{arguments.weights}.gguf")
    if not path.exists():
        part = path.with_suffix(".part")
        write_gguf(arguments.model, part, arguments.weights)
        os.replace(part, path)
    model = llama_cpp.Llama(
        str(path),
        n_ctx=256,
        n_threads=arguments.threads,
        n_threads_batch=arguments.threads,
        verbose=False,
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        found = []
        for prompt in prompts:
            model.reset()
            tokens = model.generate(prompt, temp=0.0, repeat_penalty=1.0)
            found.append(list(itertools.islice(tokens, new_tokens)))
        return found

    return generate


if __name__ == "__main__":
    serve(load, lambda: llama_cpp.__version__)
