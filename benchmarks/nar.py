"""Answers of 32 tokens to sources of 64: one token after the other, or all at once with exits.

python benchmarks/nar.py --threads 2 --batches 1 16 --json benchmarks/results/nar.json

Random weights of BART-base's size. transformers' BART (greedy, four beams), ELMER's own forward
written plainly (every layer and every head for every position, dense), and this engine, all in
turn in one process.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from report import alternate, median, show, timed, write_json
from safetensors.torch import save_file
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

from multiexit_engine import DecodingMode, Engine, Original, Parallel, SamplingParams

SOURCE_LEN, TARGET_LEN = 64, 32
MASK, BOS = 50264, 0
# between these lie the largest probabilities of random weights
ALWAYS, NEVER = 1e-5, 0.5


def main() -> None:
    """Parse the options, measure, and show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, concat = random_bart()
    with tempfile.TemporaryDirectory() as folder:
        save(model, concat, Path(folder))
        elmer = Engine.from_pretrained(folder, dtype=options.dtype)
        bart = Engine.from_pretrained(
            folder, dtype=options.dtype, architecture="bart", prefix_caching=False
        )
        model = model.to(getattr(torch, options.dtype))
        concat = concat.to(model.dtype)
        results = [
            {"batch": batch, "dtype": options.dtype, "way": way, "ms": 1e3 * seconds}
            for batch in options.batches
            for way, seconds in measured(model, concat, elmer, bart, batch, options.rounds).items()
        ]
    greedy = {r["batch"]: r["ms"] for r in results if r["way"] == "transformers greedy"}
    show(
        f"{SOURCE_LEN} source tokens, {TARGET_LEN} target tokens, {options.threads} threads",
        ["way", "batch", "ms", "beside greedy"],
        [[r["way"], str(r["batch"]), f"{r['ms']:.1f}", f"{greedy[r['batch']] / r['ms']:.1f}x"]
         for r in results],
    )  # fmt: skip
    write_json(options.json, results)


def random_bart() -> tuple[BartForConditionalGeneration, Tensor]:
    """A BART of the base size, and the feedback that makes an ELMER of it; always the same."""
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(vocab_size=50265, encoder_layers=6,
        decoder_layers=6, d_model=768, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
        encoder_attention_heads=12, decoder_attention_heads=12)).eval()  # fmt: skip
    return model, torch.randn(768, 1536) * 0.02


def save(model: BartForConditionalGeneration, concat: Tensor, folder: Path) -> None:
    """Write the weights as an ELMER checkpoint."""
    shared = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    tensors = {k: v for k, v in model.state_dict().items() if not k.endswith(shared)}
    save_file({**tensors, "concat_head.weight": concat}, folder / "model.safetensors")
    model.config.save_pretrained(folder)


def measured(
    model: BartForConditionalGeneration,
    concat: Tensor,
    elmer: Engine,
    bart: Engine,
    batch: int,
    rounds: int,
) -> dict[str, float]:
    """Median seconds of each way for a batch of random sources."""
    generator = torch.Generator().manual_seed(batch)
    sources = torch.randint(3, MASK, (batch, SOURCE_LEN), generator=generator)
    turns = {
        "transformers greedy": timed(lambda: autoregressive(model, sources, 1)),
        "transformers beam 4": timed(lambda: autoregressive(model, sources, 4)),
        "ELMER's forward, soft": timed(lambda: elmer_soft(model, concat, sources)),
    }
    sampling, lists = SamplingParams(ignore_eos=True), sources.tolist()
    one_by_one = SamplingParams(max_new_tokens=TARGET_LEN, ignore_eos=True)
    turns["engine BART greedy"] = timed(turn(bart, lists, one_by_one, Original()))
    for name, mode in modes().items():
        turns[f"engine {name}"] = timed(turn(elmer, lists, sampling, mode))
    return {name: median(seconds) for name, seconds in alternate(turns, rounds).items()}


def modes() -> dict[str, Parallel]:
    """The engine's ways; random weights are never sure, so mean exits are forced."""
    between = [1, 2, 3, 4, 5, 6] * TARGET_LEN
    return {
        "none": Parallel(length=TARGET_LEN),
        "soft": Parallel("soft", length=TARGET_LEN),
        "confidence tested at 2, all leave (mean 2)": confidence(ALWAYS, (2,)),
        "confidence tested at 2, none leaves": confidence(NEVER, (2,)),
        "confidence tested everywhere, none leaves": confidence(NEVER, None),
        "prescribed 1 to 3 (mean 2)": Parallel(
            "prescribed", layers=([1, 2, 3, 2] * TARGET_LEN)[:TARGET_LEN]
        ),
        "prescribed 1 to 6 (mean 3.5)": Parallel("prescribed", layers=between[:TARGET_LEN]),
    }


def confidence(threshold: float, layers: tuple[int, ...] | None) -> Parallel:
    """Exits by the largest probability."""
    return Parallel("confidence", "max_prob", threshold, layers=layers, length=TARGET_LEN)


def turn(
    engine: Engine, sources: list[list[int]], sampling: SamplingParams, mode: DecodingMode
) -> Callable[[], object]:
    """What one turn of the engine runs."""
    return lambda: engine.generate(sources, sampling, mode)


@torch.inference_mode()
def autoregressive(model: BartForConditionalGeneration, sources: Tensor, num_beams: int) -> Tensor:
    """The generation of transformers, always of the full length."""
    return model.generate(
        sources, attention_mask=torch.ones_like(sources), num_beams=num_beams, do_sample=False,
        min_new_tokens=TARGET_LEN, max_new_tokens=TARGET_LEN,
    )  # fmt: skip


@torch.inference_mode()
def elmer_soft(model: BartForConditionalGeneration, concat: Tensor, sources: Tensor) -> Tensor:
    """[batch, length] ids: all layers and all heads on all positions, as ELMER's release does.

    transformers' BART layers, called without a causal mask.
    """
    decoder = model.model.decoder
    encoded = model.model.encoder(sources).last_hidden_state
    tokens = torch.full((len(sources), TARGET_LEN), MASK)
    tokens[:, 0] = BOS
    hidden = decoder.embed_tokens(tokens) + decoder.embed_positions(tokens)
    hidden = decoder.layernorm_embedding(hidden)
    # without a mask transformers would make it causal
    everything = hidden.new_zeros(len(sources), 1, TARGET_LEN, TARGET_LEN)
    for place, layer in enumerate(decoder.layers):
        if place:
            guesses = model.lm_head(hidden).argmax(-1)
            pair = torch.cat([hidden, model.model.shared(guesses)], -1)
            hidden = torch.nn.functional.linear(pair, concat)
        found = layer(hidden, everything, encoder_hidden_states=encoded)
        hidden = found[0] if isinstance(found, tuple) else found
    return (model.lm_head(hidden) + model.final_logits_bias).argmax(-1)


if __name__ == "__main__":
    main()
