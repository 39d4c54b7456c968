"""Outputs of IBM's autocontrastive-gen, reproduced: ids exactly, numbers within rounding.

Everything is read from acd/manifest.json; see its notes.
"""

import functools
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multiexit_engine import Contrast, Engine, Exit, Original, SamplingParams
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.compat.ibm import (
    AutoMultiExitModel,
    MultiExitConfiguration,
    calculate_contrasted_logits,
)

FOLDER = Path(__file__).with_name("acd")
CASES = json.loads((FOLDER / "manifest.json").read_text())["cases"]
TOLERANCE = 1e-4


def linear(upper, lower):
    return 1.5 * upper - 0.5 * lower


def logratio(upper, lower):
    return upper.log_softmax(-1) - lower.log_softmax(-1)


CUSTOM_FUNCTIONS = {
    "linear": linear,
    "logratio": logratio,
    "acd_a0.3_m5": partial(calculate_contrasted_logits, minimum_candidates=5, alpha=0.3),
}


def config_of(case, name):
    return next(config for config in CASES[case]["configs"] if config["name"] == name)


def decoding_of(config):
    if config["use_original_head"]:
        return Original()
    if "output_layer_index" in config:
        return Exit(config["output_layer_index"])
    pair = config["contrast_layer_indices"]
    custom = config.get("custom")
    if custom is None:
        return Contrast(*pair)
    if custom == "acd_a0.3_m5":
        return Contrast(*pair, alpha=0.3, min_candidates=5)
    return Contrast(*pair, function=CUSTOM_FUNCTIONS[custom])


@functools.cache
def expected_of(case):
    return load_file(FOLDER / CASES[case]["expected"])


def new_engine(case, **options):
    return Engine.from_pretrained(
        FOLDER / CASES[case]["checkpoint"],
        device="cpu",
        dtype="float32",
        vocab_projection_mode=CASES[case]["vocab_projection_mode"],
        lm_head_layer_indices=CASES[case]["lm_head_layer_indices_passed"],
        **options,
    )


def block_bytes(case, block_size):
    config = engine_of(case).model_config
    return PagedKVCache.bytes_per_block(
        config.num_layers, block_size, config.num_kv_heads, config.head_dim, torch.float32
    )


engine_of = functools.cache(new_engine)


@functools.cache
def model_of(case, name):
    """The case through IBM's interface."""
    config = {key: v for key, v in config_of(case, name).items() if key not in ("name", "custom")}
    if (custom := config_of(case, name).get("custom")) is not None:
        config["contrast_function"] = CUSTOM_FUNCTIONS[custom]
    return AutoMultiExitModel.from_pretrained(
        str(FOLDER / CASES[case]["checkpoint"]),
        multi_exit_config=MultiExitConfiguration(
            vocab_projection_mode=CASES[case]["vocab_projection_mode"],
            lm_head_layer_indices=CASES[case]["lm_head_layer_indices_passed"],
            **config,
        ),
        device_map="cpu",
    )


def cases_and_configs():
    return [
        pytest.param(case, config["name"], id=f"{case}-{config['name']}")
        for case, content in CASES.items()
        for config in content["configs"]
    ]


def calls(kind, is_batch):
    return [
        pytest.param(case, call, id=f"{case}-{call['tensor']}")
        for case, content in CASES.items()
        for call in content["generate"]
        if call["kind"] == kind and (call["prompt"] == "batch") == is_batch
    ]


def greedy_calls(case, name):
    return [
        call
        for call in CASES[case]["generate"]
        if (call["kind"], call["config"]) == ("greedy", name) and call["prompt"] != "batch"
    ]


def never_chooses_padding(case, call):
    """Whether token 0 must be forbidden to choose as transformers does.

    There padding counts as text, so the penalty falls on the padding token, which here ends texts
    too. The engine sees no padding, and another request's length never changes its tokens.
    """
    has_none = not bool(
        (expected_of(case)[call["tensor"]][:, -call["max_new_tokens"] :] == 0).any()
    )
    return "repetition_penalty" in call and has_none


def sampling_of(call, forbidden=()):
    eos = call.get("eos_token_id")
    return SamplingParams(
        max_new_tokens=call["max_new_tokens"],
        repetition_penalty=call.get("repetition_penalty", 1.0),
        bad_words=forbidden,
        ignore_eos=eos is not None or bool(forbidden),
        stop_token_ids=() if eos is None else (eos,),
        num_beams=call.get("num_beams", 1),
        length_penalty=call.get("length_penalty", 1.0),
        early_stopping=call.get("early_stopping", False),
    )


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(
    ("case", "name"), [p for p in cases_and_configs() if greedy_calls(*p.values)]
)
def test_greedy_ids_are_equal(case, name, backend):
    if backend == "native":
        pytest.importorskip("multiexit_engine._C", reason="the C++ extension is not built")
    wanted = greedy_calls(case, name)
    prompts = [CASES[case]["prompts"][call["prompt"]] for call in wanted]
    outputs = engine_of(case, backend=backend).generate(
        prompts, [sampling_of(call) for call in wanted], decoding_of(config_of(case, name))
    )
    found = {
        call["tensor"]: prompt + output.outputs[0].token_ids
        for call, prompt, output in zip(wanted, prompts, outputs, strict=True)
    }
    assert found == {call["tensor"]: expected_of(case)[call["tensor"]].tolist() for call in wanted}


@pytest.mark.parametrize(("case", "name"), cases_and_configs())
def test_distributions_of_the_next_token_are_equal(case, name):
    engine, decoding = engine_of(case), decoding_of(config_of(case, name))
    names = [key for key in expected_of(case) if key.startswith(f"logits/{name}/")]
    prompts = [CASES[case]["prompts"][key.split("/")[-1]] for key in names]
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=1, logprobs=-1), decoding)
    for key, output in zip(names, outputs, strict=True):
        alternatives = output.outputs[0].logprobs[0]
        found = torch.tensor([alternatives[token].logprob for token in range(len(alternatives))])
        wanted = expected_of(case)[key].log_softmax(-1)
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("case", "name"), cases_and_configs())
def test_logits_of_the_ibm_interface_are_equal(case, name):
    for key in (key for key in expected_of(case) if key.startswith(f"logits/{name}/")):
        prompt = torch.tensor([CASES[case]["prompts"][key.split("/")[-1]]])
        found = model_of(case, name)(prompt).logits
        assert found.shape == (1, prompt.shape[1], expected_of(case)[key].shape[0])
        torch.testing.assert_close(found[0, -1], expected_of(case)[key], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("case", "call"), calls("beam", is_batch=False))
def test_beams_and_their_scores_are_equal(case, call):
    prompt = CASES[case]["prompts"][call["prompt"]]
    decoding = decoding_of(config_of(case, call["config"]))
    found = engine_of(case).generate([prompt], sampling_of(call), decoding)[0].outputs[0]
    assert prompt + found.token_ids == expected_of(case)[call["tensor"]].tolist()
    score = expected_of(case)[call["score_tensor"]].item()
    assert found.cumulative_logprob == pytest.approx(score, abs=TOLERANCE)


@pytest.mark.parametrize(("case", "call"), calls("beam", is_batch=False))
def test_beams_through_the_ibm_interface_are_equal(case, call):
    prompt = torch.tensor([CASES[case]["prompts"][call["prompt"]]])
    found = model_of(case, call["config"]).generate(
        prompt,
        max_new_tokens=call["max_new_tokens"],
        num_beams=call["num_beams"],
        length_penalty=call["length_penalty"],
        early_stopping=call["early_stopping"],
        pad_token_id=0,
    )
    assert found[0].tolist() == expected_of(case)[call["tensor"]].tolist()


@pytest.mark.parametrize(("case", "call"), calls("greedy", is_batch=True))
def test_left_padded_batches_through_the_ibm_interface_are_equal(case, call):
    options = {k: call[k] for k in ("eos_token_id", "repetition_penalty") if k in call}
    if never_chooses_padding(case, call):
        options |= {"bad_words_ids": [[0]], "eos_token_id": None}
    batch = CASES[case]["batch"]
    found = model_of(case, call["config"]).generate(
        torch.tensor(batch["input_ids"]),
        attention_mask=torch.tensor(batch["attention_mask"]),
        max_new_tokens=call["max_new_tokens"],
        pad_token_id=0,
        **options,
    )
    assert found.dtype == torch.int64
    assert found.tolist() == expected_of(case)[call["tensor"]].tolist()


@pytest.mark.parametrize(("case", "call"), calls("greedy", is_batch=True))
def test_batches_as_requests_of_unequal_length_are_equal(case, call):
    batch = CASES[case]["batch"]
    prompts = [
        ids[len(mask) - sum(mask) :]
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    decoding = decoding_of(config_of(case, call["config"]))
    forbidden = ((0,),) if never_chooses_padding(case, call) else ()
    outputs = engine_of(case).generate(prompts, sampling_of(call, forbidden), decoding)
    width = len(batch["input_ids"][0])
    for row, output in zip(expected_of(case)[call["tensor"]].tolist(), outputs, strict=True):
        new = output.outputs[0].token_ids
        assert new + [0] * (len(row) - width - len(new)) == row[width:]


@pytest.mark.parametrize("case", CASES)
def test_all_requests_at_once_in_a_tight_cache_give_the_same_ids(case):
    """Modes and beams mixed, prompts in chunks, sequences preempted."""
    engine = new_engine(
        case,
        block_size=3,
        max_batch_size=7,
        max_num_batched_tokens=11,
        kv_cache_memory=50 * block_bytes(case, block_size=3),
    )
    wanted = [call for call in CASES[case]["generate"] if call["prompt"] != "batch"]
    prompts = [CASES[case]["prompts"][call["prompt"]] for call in wanted]
    outputs = engine.generate(
        prompts,
        [sampling_of(call) for call in wanted],
        [decoding_of(config_of(case, call["config"])) for call in wanted],
    )
    found = {
        call["tensor"]: prompt + output.outputs[0].token_ids
        for call, prompt, output in zip(wanted, prompts, outputs, strict=True)
    }
    assert found == {call["tensor"]: expected_of(case)[call["tensor"]].tolist() for call in wanted}
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_free_kv_blocks == engine.stats().num_kv_blocks == 50


@pytest.mark.parametrize(
    ("case", "entry"),
    [
        pytest.param(case, entry, id=f"{case}-{entry['config']}")
        for case, content in CASES.items()
        for entry in content.get("scoring", ())
    ],
)
def test_scores_of_every_position_are_equal(case, entry):
    sequence = CASES[case]["scoring_sequence"]
    found = engine_of(case).score([sequence], decoding_of(config_of(case, entry["config"])))[0]
    wanted = expected_of(case)[entry["tensor"]]
    torch.testing.assert_close(
        torch.tensor(found.token_logprobs[1:]), wanted, atol=TOLERANCE, rtol=0
    )
    best = expected_of(case)[entry["argmax_tensor"]].tolist()
    assert found.is_greedy[1:] == [a == b for a, b in zip(best, sequence[1:], strict=True)]


@pytest.mark.parametrize("case", [case for case in CASES if "scoring" in CASES[case]])
def test_logits_of_every_position_give_the_same_scores(case):
    sequence = CASES[case]["scoring_sequence"]
    for entry in CASES[case]["scoring"]:
        logits = model_of(case, entry["config"])(torch.tensor([sequence])).logits[0, :-1]
        found = logits.log_softmax(-1).gather(-1, torch.tensor(sequence[1:])[:, None])[:, 0]
        wanted = expected_of(case)[entry["tensor"]]
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
        assert logits.argmax(-1).tolist() == expected_of(case)[entry["argmax_tensor"]].tolist()
