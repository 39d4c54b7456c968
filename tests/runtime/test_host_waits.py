"""What the host makes the device wait for, and the other way round, in a decode step."""

from __future__ import annotations

import pytest

from multiexit_engine import (
    Contrast,
    DoLa,
    EarlyExit,
    Exit,
    Original,
    SamplingParams,
    SelfSpeculative,
)
from tests.runtime.on_simulated_device import counts_of_a_decode_step, on_cpu, on_device, token_ids
from tests.tiny import save_gpt2

GREEDY = SamplingParams(max_new_tokens=4, ignore_eos=True)
DRAWN = SamplingParams(max_new_tokens=4, ignore_eos=True, temperature=0.9, top_k=0, seed=1)
NARROWED = SamplingParams(
    max_new_tokens=4, ignore_eos=True, temperature=0.9, top_k=20, top_p=0.8, min_p=0.01, seed=1
)
WARPED = SamplingParams(max_new_tokens=4, ignore_eos=True, temperature=0.9, typical_p=0.8, seed=1)
PENALISED = SamplingParams(max_new_tokens=4, repetition_penalty=1.3)
LISTED = SamplingParams(max_new_tokens=4, ignore_eos=True, logprobs=2)
ALL_LISTED = SamplingParams(max_new_tokens=4, ignore_eos=True, logprobs=-1)
BEAMS = SamplingParams(max_new_tokens=4, num_beams=2)

PLAIN = {
    "original": ([GREEDY], [Original()]),
    "contrast": ([GREEDY], [Contrast(4, 2)]),
    "drawn": ([DRAWN, DRAWN], [Original(), Contrast(4, 2)]),
    "mixed": ([GREEDY, DRAWN, GREEDY, GREEDY], [Original(), Exit(2), Contrast(4, 2), Exit(4)]),
    "narrowed": ([NARROWED, GREEDY, NARROWED], [Original(), Exit(2), Contrast(4, 2)]),
    "listed": ([LISTED, GREEDY], [Contrast(4, 2), Original()]),
    "least": ([GREEDY, GREEDY], [Contrast(4, 2, min_candidates=3), Contrast(4, 2)]),
}
EDITED = {
    "penalised": ([PENALISED], [Contrast(4, 2)]),
    "biased": (
        [SamplingParams(max_new_tokens=4, min_new_tokens=4, logit_bias={5: 2.0, 9: -3.0}), GREEDY],
        [Exit(2), Original()],
    ),
}
OTHERS = {
    "warped": ([WARPED], [Original()]),
    "all listed": ([ALL_LISTED], [Contrast(4, 2)]),
    "beams": ([BEAMS], [Exit(4)]),
    "dola": ([GREEDY], [DoLa("low")]),
    "early": ([GREEDY], [EarlyExit(threshold=0.5)]),
    "speculative": ([GREEDY], [SelfSpeculative(2)]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "gpt2"
    return save_gpt2(path, num_layers=4, num_heads=2, exits=(2, 4))


@pytest.mark.parametrize("name", ["mixed", "narrowed", "listed", "least", *EDITED, *OTHERS])
def test_the_simulated_device_gives_the_ids_of_the_cpu(folder, name):
    sampling, modes = {**PLAIN, **EDITED, **OTHERS}[name]
    prompts = [[7 * i + 1, 5, 9] for i in range(len(modes))]
    wanted = token_ids(on_cpu(folder).generate(prompts, sampling, modes))
    with on_device(folder) as (engine, _):
        assert token_ids(engine.generate(prompts, sampling, modes)) == wanted


@pytest.mark.parametrize("name", OTHERS)
def test_every_copy_to_the_device_comes_from_pinned_memory(folder, name):
    assert "pageable copies" not in counts_of_a_decode_step(folder, *OTHERS[name])


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_step_copies_once_each_way_and_waits_once(folder, name):
    counts = counts_of_a_decode_step(folder, *PLAIN[name])
    assert counts == {"pinned copies": 1, "copies to the host": 1, "synchronisations": 1}


@pytest.mark.parametrize("name", EDITED)
def test_edits_of_scores_are_one_copy_more(folder, name):
    counts = counts_of_a_decode_step(folder, *EDITED[name])
    assert counts == {"pinned copies": 2, "copies to the host": 1, "synchronisations": 1}


@pytest.mark.parametrize("name", OTHERS)
def test_a_step_waits_once_whatever_its_rows_want(folder, name):
    counts = counts_of_a_decode_step(folder, *OTHERS[name])
    assert counts.get("waits", 0) + counts["synchronisations"] == 1


def test_rows_that_want_different_things_share_the_wait(folder):
    kinds = [OTHERS[name] for name in ("warped", "all listed", "beams", "dola", "speculative")]
    sampling, modes = ([pair[i][0] for pair in kinds] for i in range(2))
    counts = counts_of_a_decode_step(folder, sampling, modes)
    assert counts.get("waits", 0) + counts["synchronisations"] == 1


def test_a_step_of_a_prompt_alone_that_does_not_end_gives_the_ids_of_the_cpu(folder):
    options = {"max_num_batched_tokens": 8}
    wanted = token_ids(on_cpu(folder, **options).generate([[5] * 20], GREEDY, Original()))
    with on_device(folder, **options) as (engine, _):
        assert token_ids(engine.generate([[5] * 20], GREEDY, Original())) == wanted
