"""Outputs of IBM's autocontrastive-gen on T5, reproduced: ids exactly, numbers within rounding.

Its modes work on the decoder; prompts are sources. Everything is read from acd_t5/manifest.json.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multiexit_engine import Engine, SamplingParams
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.compat.ibm import AutoMultiExitModel, MultiExitConfiguration
from multiexit_engine.runtime.requests.progress import run_all
from tests.golden.test_acd_golden import decoding_of

FOLDER = Path(__file__).with_name("acd_t5")
CASES = json.loads((FOLDER / "manifest.json").read_text())["cases"]
TOLERANCE = 1e-4
BACKENDS = ("reference", "native")


@functools.cache
def expected_of(case):
    return load_file(FOLDER / CASES[case]["expected"])


def new_engine(case, backend, **options):
    if backend == "native":
        pytest.importorskip("multiexit_engine._C", reason="the C++ extension is not built")
    return Engine.from_pretrained(
        FOLDER / CASES[case]["checkpoint"],
        device="cpu",
        dtype="float32",
        backend=backend,
        vocab_projection_mode=CASES[case]["vocab_projection_mode"],
        lm_head_layer_indices=CASES[case]["lm_head_layer_indices_passed"],
        **options,
    )


engine_of = functools.cache(new_engine)


def config_named(case, name):
    return next(config for config in CASES[case]["configs"] if config["name"] == name)


def mode_named(case, name):
    return decoding_of(config_named(case, name))


def sampling_of(call):
    eos = call.get("eos_token_id")
    return SamplingParams(
        max_new_tokens=call["max_new_tokens"],
        repetition_penalty=call.get("repetition_penalty", 1.0),
        ignore_eos=eos is not None,
        stop_token_ids=() if eos is None else (eos,),
        num_beams=call.get("num_beams", 1),
        length_penalty=call.get("length_penalty", 1.0),
        early_stopping=call.get("early_stopping", False),
    )


def single_calls(case):
    return [call for call in CASES[case]["generate"] if call["prompt"] != "batch"]


def source_of(case, call):
    prompt = CASES[case]["prompts"][call["prompt"]]
    return prompt["input_ids"] if isinstance(prompt, dict) else prompt


def with_start(output):
    """Ids as transformers gives them: from the decoder's start token on."""
    return [0, *output.outputs[0].token_ids]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_greedy_and_beam_ids_are_equal(case, backend):
    wanted = single_calls(case)
    outputs = engine_of(case, backend).generate(
        [source_of(case, call) for call in wanted],
        [sampling_of(call) for call in wanted],
        [mode_named(case, call["config"]) for call in wanted],
    )
    found = {call["tensor"]: with_start(o) for call, o in zip(wanted, outputs, strict=True)}
    assert found == {call["tensor"]: expected_of(case)[call["tensor"]].tolist() for call in wanted}
    for call, output in zip(wanted, outputs, strict=True):
        if call["kind"] == "beam":
            score = expected_of(case)[call["score_tensor"]].item()
            assert output.outputs[0].cumulative_logprob == pytest.approx(score, abs=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_all_requests_at_once_in_a_tight_cache_give_the_same_ids(case):
    config = engine_of(case, "reference").model_config
    block = PagedKVCache.bytes_per_block(
        config.num_layers, 3, config.num_kv_heads, config.head_dim, torch.float32
    )
    engine = new_engine(
        case,
        "auto",
        block_size=3,
        max_batch_size=7,
        max_num_batched_tokens=11,
        kv_cache_memory=70 * block,
    )
    wanted = single_calls(case)
    outputs = engine.generate(
        [source_of(case, call) for call in wanted],
        [sampling_of(call) for call in wanted],
        [mode_named(case, call["config"]) for call in wanted],
    )
    found = {call["tensor"]: with_start(o) for call, o in zip(wanted, outputs, strict=True)}
    assert found == {call["tensor"]: expected_of(case)[call["tensor"]].tolist() for call in wanted}
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_free_kv_blocks == engine.stats().num_kv_blocks


@pytest.mark.parametrize("case", [case for case in CASES if "batch" in CASES[case]])
def test_batches_as_requests_of_unequal_length_are_equal(case):
    batch = CASES[case]["batch"]
    sources = [
        ids[: sum(mask)]
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    for call in CASES[case]["generate"]:
        if call["prompt"] != "batch":
            continue
        mode = mode_named(case, call["config"])
        outputs = engine_of(case, "auto").generate(sources, sampling_of(call), mode)
        for row, output in zip(expected_of(case)[call["tensor"]].tolist(), outputs, strict=True):
            new = with_start(output)
            assert new + [0] * (len(row) - len(new)) == row


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [case for case in CASES if "scoring_sequence" in CASES[case]])
def test_scores_of_every_position_are_equal(case, backend):
    content = CASES[case]
    start, *target = content["scoring_sequence"]
    for entry in content["scoring"]:
        mode = mode_named(case, entry["config"])
        # the sequence begins with a token that is not the model's own start
        request = engine_of(case, backend)._intake.scoring_request(
            "r", [start, *target], 1, mode, content["scoring_encoder_input_ids"]
        )
        engine = engine_of(case, backend)
        run_all(engine._core, [request], None)
        engine._core.forget("r")
        found = torch.tensor([token.logprob for token in request.scored])
        wanted = expected_of(case)[entry["tensor"]]
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_distributions_after_a_given_beginning_are_equal(case):
    engine = engine_of(case, "auto")
    for config in CASES[case]["configs"]:
        for key in expected_of(case):
            if not key.startswith(f"logits/{config['name']}/"):
                continue
            prompt = CASES[case]["prompts"][key.split("/")[-1]]
            wanted = expected_of(case)[key].log_softmax(-1)
            tokens = wanted.topk(4).indices.tolist()
            begun = prompt["decoder_input_ids"][1:]
            items = [(prompt["input_ids"], [*begun, token]) for token in tokens]
            scores = engine.score(items, decoding_of(config))
            found = torch.tensor([score.token_logprobs[-1] for score in scores])
            torch.testing.assert_close(found, wanted[tokens], atol=TOLERANCE, rtol=0)


def test_the_ibm_interface_refuses_encoder_decoders_by_name():
    with pytest.raises(ValueError, match="the model is an encoder-decoder"):
        AutoMultiExitModel.from_pretrained(
            str(FOLDER / CASES["t5_layer"]["checkpoint"]),
            multi_exit_config=MultiExitConfiguration(use_original_head=True),
        )
