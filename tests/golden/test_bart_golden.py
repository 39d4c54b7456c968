"""Outputs of transformers' BartForConditionalGeneration, reproduced: ids exactly.

The checkpoints are of ELMER's kind, read here as the autoregressive BART that they also are:
random weights, a non-zero ``final_logits_bias``, sources of 3 to 19 tokens.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multiexit_engine import Engine, SamplingParams

FOLDER = Path(__file__).with_name("elmer")
SETS = ("t1", "t2")
PAD, START = 1, 2
TOLERANCE = 1e-4


@functools.cache
def expected(name):
    return load_file(FOLDER / name / "stock_bart.safetensors")


@functools.cache
def calls(name):
    settings = json.loads((FOLDER / name / "stock_bart.json").read_text())
    return {call: content["generation_config"] for call, content in settings.items()}


@functools.cache
def engine_of(name, backend):
    if backend == "native":
        pytest.importorskip("multiexit_engine._C", reason="the C++ extension is not built")
    return Engine.from_pretrained(
        FOLDER / name,
        architecture="bart",
        device="cpu",
        dtype="float32",
        backend=backend,
        block_size=3,
    )


def sources(name):
    pairs = zip(expected(name)["input_ids"], expected(name)["attention_mask"], strict=True)
    return [ids[: int(mask.sum())].tolist() for ids, mask in pairs]


def sampling_of(call):
    # lengths of transformers count the decoder's start token
    return SamplingParams(
        max_new_tokens=call["max_length"] - 1,
        min_new_tokens=max(0, call.get("min_length", 0) - 1),
        num_beams=call["num_beams"],
        n=call.get("num_return_sequences", 1),
        no_repeat_ngram_size=call.get("no_repeat_ngram_size", 0),
        length_penalty=call.get("length_penalty", 1.0),
        early_stopping=call.get("early_stopping", False),
    )


def padded(outputs, width):
    rows = [[START, *o.token_ids] for output in outputs for o in output.outputs]
    return [row + [PAD] * (width - len(row)) for row in rows]


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(("name", "call"), [(name, call) for name in SETS for call in calls(name)])
def test_ids_and_scores_of_beams_are_equal(name, call, backend):
    outputs = engine_of(name, backend).generate(sources(name), sampling_of(calls(name)[call]))
    wanted = expected(name)[f"{call}.sequences"]
    assert padded(outputs, wanted.shape[1]) == wanted.tolist()
    if f"{call}.sequences_scores" in expected(name):
        scores = [o.cumulative_logprob for output in outputs for o in output.outputs]
        wanted_scores = expected(name)[f"{call}.sequences_scores"].tolist()
        assert scores == pytest.approx(wanted_scores, abs=TOLERANCE)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", SETS)
def test_all_calls_at_once_in_a_tight_cache_give_the_same_ids(name, backend):
    """Greedy and beams side by side, sources encoded again after preemption."""
    config = engine_of(name, backend).model_config
    block = config.num_layers * 2 * 3 * config.num_kv_heads * config.head_dim * 4
    engine = Engine.from_pretrained(
        FOLDER / name,
        architecture="bart",
        device="cpu",
        dtype="float32",
        backend=backend,
        block_size=3,
        max_batch_size=13,
        max_num_batched_tokens=14,
        kv_cache_memory=55 * block,
    )
    many = [(call, source) for call in calls(name) for source in sources(name)]
    outputs = engine.generate(
        [source for _, source in many], [sampling_of(calls(name)[call]) for call, _ in many]
    )
    found = {}
    for (call, _), output in zip(many, outputs, strict=True):
        width = expected(name)[f"{call}.sequences"].shape[1]
        found.setdefault(call, []).extend(padded([output], width))
    assert found == {call: expected(name)[f"{call}.sequences"].tolist() for call in calls(name)}
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_free_kv_blocks == engine.stats().num_kv_blocks


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", SETS)
def test_scores_of_given_targets_are_equal(name, backend):
    targets = expected(name)["tf_decoder_input_ids"].tolist()
    assert all(target[0] == START for target in targets)
    items = [(source, target[1:]) for source, target in zip(sources(name), targets, strict=True)]
    outputs = engine_of(name, backend).score(items)
    logprobs = expected(name)["tf_logits"].log_softmax(-1)
    for output, target, own in zip(outputs, targets, logprobs, strict=True):
        wanted = own[:-1].gather(1, torch.tensor(target[1:])[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(output.token_logprobs), wanted, atol=TOLERANCE, rtol=0
        )
