"""The engine against transformers on small random models of every family, in float32."""

import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from multiexit_engine import Engine, SamplingParams

VOCAB_SIZE = 61
# tokens that these models like to choose, so that many texts and beams end early
EOS = [12, 40, 47]
COMMON = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": 1}
ROTARY = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**COMMON, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2)
    ),
    "gpt_neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            **COMMON,
            hidden_size=32,
            num_layers=4,
            num_heads=4,
            attention_types=[[["global", "local"], 2]],
            window_size=5,
            max_position_embeddings=64,
            initializer_range=0.1,
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**ROTARY)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**ROTARY, sliding_window=6)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**ROTARY, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**ROTARY, head_dim=16)),
}
PROMPTS = [
    [5],
    [7, 11, 13],
    [3, 3, 9, 27, 20, 60, 58, 52, 34, 41, 1, 2],
    list(range(2, 40)),
]


class Peers:
    """One random model, in transformers and in the engine."""

    def __init__(self, family, folder):
        torch.manual_seed(0)
        self.transformer = FAMILIES[family]().eval()
        self.transformer.save_pretrained(folder)
        self.engine = Engine.from_pretrained(folder, device="cpu", dtype="float32")

    @torch.no_grad()
    def transformers_output(self, prompt, **options):
        ids = torch.tensor([prompt])
        return self.transformer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )

    def transformers_ids(self, prompt, **options):
        sequences = self.transformers_output(prompt, **options).sequences
        return [_until_end(row[len(prompt) :]) for row in sequences.tolist()]

    def engine_ids(self, prompt, **options):
        output = self.engine.generate(prompt, SamplingParams(**options))[0]
        return [completion.token_ids for completion in output.outputs]


def _until_end(ids):
    ends = [place for place, token in enumerate(ids, 1) if token in EOS]
    return ids[: ends[0]] if ends else ids


@pytest.fixture(scope="module", params=FAMILIES)
def peers(request, tmp_path_factory):
    return Peers(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def two_peers(request, tmp_path_factory):
    return Peers(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return Peers("gpt2", tmp_path_factory.mktemp("gpt2"))


def test_greedy_ids_of_a_batch_are_equal(peers):
    outputs = peers.engine.generate(PROMPTS, SamplingParams(max_new_tokens=20))
    found = [output.outputs[0].token_ids for output in outputs]
    assert found == [peers.transformers_ids(p, max_new_tokens=20)[0] for p in PROMPTS]


@torch.no_grad()
def test_logits_of_every_position_are_equal(peers):
    for prompt in PROMPTS:
        wanted = peers.transformer(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(peers.engine.logits(prompt), wanted, atol=2e-4, rtol=1e-4)


def test_scores_of_a_text_are_equal(peers):
    text = PROMPTS[-1]
    with torch.no_grad():
        logits = peers.transformer(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
    wanted = logits.gather(-1, torch.tensor(text[1:])[:, None])[:, 0]
    found = peers.engine.score([text])[0].token_logprobs[1:]
    torch.testing.assert_close(torch.tensor(found), wanted, atol=2e-4, rtol=1e-4)


def test_beams_of_every_family_are_equal(peers):
    for prompt in PROMPTS:
        assert peers.engine_ids(prompt, num_beams=3, max_new_tokens=12) == peers.transformers_ids(
            prompt, num_beams=3, max_new_tokens=12
        )


@pytest.mark.parametrize("num_beams", [2, 3, 4, 5])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_beams_and_their_scores_are_equal(two_peers, num_beams, early_stopping, length_penalty):
    options = {
        "num_beams": num_beams,
        "early_stopping": early_stopping,
        "length_penalty": length_penalty,
        "max_new_tokens": 10,
    }
    prompts = PROMPTS[:3]
    outputs = two_peers.engine.generate(prompts, SamplingParams(**options, n=num_beams))
    for prompt, output in zip(prompts, outputs, strict=True):
        wanted = two_peers.transformers_output(prompt, **options, num_return_sequences=num_beams)
        ids = [_until_end(row[len(prompt) :]) for row in wanted.sequences.tolist()]
        assert [completion.token_ids for completion in output.outputs] == ids
        scores = torch.tensor([completion.cumulative_logprob for completion in output.outputs])
        torch.testing.assert_close(scores, wanted.sequences_scores, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.7},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 3},
        {"min_new_tokens": 15},
        {"bad_words": [(9,), (20, 60), (3, 9, 27)]},
        {"bad_words": [(token,) for token in range(2, 30)]},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_processed_scores_choose_equal_ids(two_peers, options, num_beams):
    wanted = {("bad_words_ids" if k == "bad_words" else k): v for k, v in options.items()}
    if "bad_words" in options:
        wanted["bad_words_ids"] = [list(word) for word in options["bad_words"]]
    for prompt in PROMPTS:
        found = two_peers.engine_ids(prompt, max_new_tokens=20, num_beams=num_beams, **options)
        assert found == two_peers.transformers_ids(
            prompt, max_new_tokens=20, num_beams=num_beams, **wanted
        )


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({"temperature": 1.0, "top_k": 0}, []),
        ({"temperature": 0.5, "top_k": 0}, [TemperatureLogitsWarper(0.5)]),
        ({"temperature": 1.0, "top_k": 7}, [TopKLogitsWarper(7)]),
        ({"temperature": 1.0, "top_k": 0, "top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 0, "min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"temperature": 1.0, "top_k": 0, "typical_p": 0.6}, [TypicalLogitsWarper(0.6)]),
        (
            {"temperature": 1.7, "top_k": 20, "top_p": 0.9},
            [TemperatureLogitsWarper(1.7), TopKLogitsWarper(20), TopPLogitsWarper(0.9)],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@torch.no_grad()
def test_first_tokens_are_drawn_from_transformers_distribution(gpt2, options, warpers):
    prompt, num_draws = PROMPTS[2], 3000
    ids = torch.tensor([prompt])
    scores = LogitsProcessorList(warpers)(ids, gpt2.transformer(ids).logits[:, -1])
    probabilities = scores.double().softmax(-1)[0]
    outputs = gpt2.engine.generate(
        [prompt] * num_draws,
        [SamplingParams(max_new_tokens=1, seed=seed, **options) for seed in range(num_draws)],
    )
    drawn = torch.tensor([output.outputs[0].token_ids[0] for output in outputs])
    counts = torch.bincount(drawn, minlength=VOCAB_SIZE)
    assert counts[probabilities == 0].sum() == 0
    observed, expected = _pooled(counts.tolist(), (probabilities * num_draws).tolist())
    assert chisquare(observed, expected).pvalue > 1e-3


def _pooled(observed, expected):
    """Rare tokens together, so that every cell expects at least five."""
    pairs = list(zip(observed, expected, strict=True))
    cells = [pair for pair in pairs if pair[1] >= 5]
    rest = [pair for pair in pairs if 0 < pair[1] < 5]
    if sum(pair[1] for pair in rest) >= 5:
        cells.append(tuple(map(sum, zip(*rest, strict=True))))
    else:
        biggest = max(range(len(cells)), key=lambda place: cells[place][1])
        cells[biggest] = tuple(map(sum, zip(cells[biggest], *rest, strict=True)))
    return zip(*cells, strict=True)
