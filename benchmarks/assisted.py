"""Self-speculation beside transformers' assisted generation from an exit, on the same weights.

python benchmarks/assisted.py --json results/assisted.json

transformers drafts with ``assistant_early_exit`` only in families whose forward pass follows
``config.num_hidden_layers``, so the model has Llama's layout. Its weights are made so that an exit
is right about as often as wanted: the embedding of each token points at one next token, which the
lower layers leave alone, and the upper layers, by the noise that they add, overrule now and then.
Its vocabulary has no order, so both draft among all tokens.
What it prints are speeds at the acceptance that it also prints, not properties of a trained model.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
import typer
from report import alternate, median, show, timed, write_json
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from multiexit_engine import DecodingMode, Engine, Original, SamplingParams, SelfSpeculative

CONFIG = LlamaConfig(
    hidden_size=1024,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=4,
    intermediate_size=2816,
    vocab_size=32000,
    max_position_embeddings=2048,
    bos_token_id=None,
    eos_token_id=None,
)
EXIT = 4
DraftLen: TypeAlias = int | Literal["auto"]


def make_model(noise: float) -> LlamaForCausalLM:
    """A model whose exit 4 knows the next token unless the layers above overrule it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight.normal_()
        follower = torch.randperm(CONFIG.vocab_size)
        model.lm_head.weight[follower] = embedding * CONFIG.hidden_size**-0.5
        for layer in model.model.layers[EXIT:]:
            layer.mlp.down_proj.weight.mul_(noise)
    return model


def assisted(
    model: LlamaForCausalLM,
    prompt: torch.Tensor,
    new_tokens: int,
    draft_len: int | None = None,
    **options: Any,
) -> list[int]:
    """Greedy tokens of transformers, which takes the lengths of drafts from the model's config."""
    config = model.generation_config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False)
    if draft_len is not None:
        config.num_assistant_tokens = draft_len
        config.num_assistant_tokens_schedule = "constant"
        config.assistant_confidence_threshold = 0.0
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return found[0, prompt.shape[1] :].tolist()


def main(
    noise: Annotated[float, typer.Option(help="more of it: the exit is wrong more often")] = 8.0,
    draft_len: Annotated[list[int] | None, typer.Option(help="fixed lengths beside auto")] = None,
    new_tokens: int = 64,
    rounds: int = 5,
    threads: int = 2,
    json: Annotated[Path | None, typer.Option(help="write the figures here")] = None,
) -> None:
    """Measure both at batch 1, greedy, in float32."""
    torch.set_num_threads(threads)
    model = make_model(noise)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = Engine.from_pretrained(
            folder,
            dtype=torch.float32,
            vocab_projection_mode="SHARED_PROJECTION_DIRECT",
            lm_head_layer_indices=[EXIT, CONFIG.num_hidden_layers],
            prefix_caching=False,
        )
    prompt = torch.randint(CONFIG.vocab_size, (1, 32))
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)

    def ours(draft_len: DraftLen | None = None) -> list[int]:
        mode: DecodingMode = Original()
        if draft_len is not None:
            mode = SelfSpeculative(EXIT, draft_len, draft_vocab=CONFIG.vocab_size)
        (output,) = engine.generate([prompt[0].tolist()], sampling, mode)
        return output.outputs[0].token_ids

    theirs = partial(assisted, model, prompt, new_tokens)
    runs = {"engine, plain": ours, "engine, draft auto": partial(ours, "auto")}
    runs |= {"transformers, plain": theirs}
    runs |= {"transformers, its defaults": partial(theirs, assistant_early_exit=EXIT)}
    for length in draft_len or [2, 4]:
        runs[f"engine, draft {length}"] = partial(ours, length)
        theirs_drafted = partial(theirs, draft_len=length, assistant_early_exit=EXIT)
        runs[f"transformers, draft {length}"] = theirs_drafted
    expected = ours()
    for name, run in runs.items():
        assert run() == expected, f"{name}: other tokens"
    before = engine.stats()
    ours(1)
    after = engine.stats()
    accepted = after.num_accepted_tokens - before.num_accepted_tokens
    acceptance = accepted / (after.num_drafted_tokens - before.num_drafted_tokens)
    seconds = alternate({name: timed(run) for name, run in runs.items()}, rounds)
    rows = [
        {
            "way": name,
            "tokens_per_s": new_tokens / median(values),
            "acceptance": acceptance,
            "seconds": values,
        }
        for name, values in seconds.items()
    ]
    cells = [[str(row["way"]), f"{row['tokens_per_s']:.1f}"] for row in rows]
    title = f"Llama's layout, exit 4 of 16, fp32, {threads} threads, acceptance {acceptance:.2f}"
    show(title, ["way", "tokens/s"], cells)
    write_json(json, rows)


if __name__ == "__main__":
    typer.run(main)
