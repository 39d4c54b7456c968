"""CTranslate2 on a GPT-2 checkpoint, converted with its own converter when first asked for."""

from __future__ import annotations

import argparse
from pathlib import Path

import ctranslate2
from protocol import Generate, serve

QUANTIZATION = {"float32": "float32", "int8": "int8_float32"}


def load(arguments: argparse.Namespace) -> Generate:
    """Greedy generation with ``arguments.threads`` threads, one batch at a time."""
    kind = QUANTIZATION[arguments.weights]
    folder = _converted(arguments.model, kind)
    generator = ctranslate2.Generator(
        str(folder),
        device="cpu",
        compute_type=kind,
        inter_threads=1,
        intra_threads=arguments.threads,
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        results = generator.generate_batch(
            [[str(token) for token in prompt] for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    return generate


def _converted(model: Path, kind: str) -> Path:
    target = model.with_name(f"{model.name}-ctranslate2-{kind}")
    if (target / "config.json").exists():
        return target
    from ctranslate2.converters.transformers import GPT2Loader
    from transformers import GPT2LMHeadModel

    loaded = GPT2LMHeadModel.from_pretrained(model)
    spec = GPT2Loader().get_model_spec(loaded)
    names = [str(token) for token in range(loaded.config.vocab_size)]
    spec.register_vocabulary(names)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = names[-1]
    spec.validate()
    spec.optimize(quantization=kind)
    target.mkdir(parents=True, exist_ok=True)
    spec.save(str(target))
    return target


if __name__ == "__main__":
    serve(load, lambda: ctranslate2.__version__)
