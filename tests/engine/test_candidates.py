"""How many tokens contrasts found plausible, as the engine counts them."""

import pytest

from multiexit_engine import Contrast, Engine, Exit, Original, SamplingParams, SelfSpeculative

PROMPTS = ["The old house", "She said", "He", "In the morning"]
MODES = [Contrast(8, 4), Original(), Contrast(8, 2, alpha=0.5), Exit(6)]


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("demo", dtype="float32", device="cpu")


def counted(engine, prompts, modes, **params):
    before = engine.stats()
    engine.generate(prompts, SamplingParams(max_new_tokens=12, ignore_eos=True, **params), modes)
    after = engine.stats()
    pairs = zip(after.contrasts_by_candidates, before.contrasts_by_candidates, strict=True)
    return [a - b for a, b in pairs], after.num_candidates - before.num_candidates


def test_a_batch_of_modes_counts_what_its_requests_count_alone(engine):
    together = counted(engine, PROMPTS, MODES)
    alone = [counted(engine, [p], [m]) for p, m in zip(PROMPTS, MODES, strict=True)]
    assert together[0] == [sum(column) for column in zip(*(one[0] for one in alone), strict=True)]
    assert together[1] == sum(one[1] for one in alone)
    assert sum(together[0]) == 2 * 12


@pytest.mark.parametrize("more", [{"logprobs": 0}, {"repetition_penalty": 1.0001}], ids=str)
def test_requests_whose_scores_are_looked_at_count_the_same(engine, more):
    assert counted(engine, PROMPTS, MODES, **more) == counted(engine, PROMPTS, MODES)


def test_no_plausible_set_is_smaller_than_asked(engine):
    by_size, _ = counted(engine, PROMPTS, Contrast(8, 4, alpha=1.0, min_candidates=4))
    assert sum(by_size[:3]) == 0 and sum(by_size) == 4 * 12


def test_beams_and_checked_drafts_count(engine):
    contrast = Contrast(8, 4)
    assert sum(counted(engine, PROMPTS[:1], contrast, num_beams=3)[0]) >= 12
    assert sum(counted(engine, PROMPTS[:1], SelfSpeculative(4, target=contrast))[0]) >= 12


def test_a_function_of_ones_own_counts_nothing(engine):
    mode = Contrast(8, 4, function=lambda upper, lower: upper)
    assert counted(engine, PROMPTS[:1], mode)[1] == 0
