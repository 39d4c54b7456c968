import math
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from multiexit_engine.decoding import warpers
from multiexit_engine.decoding.warpers import narrowing_of, warp_scores
from multiexit_engine.ops.narrowing import narrowed_scores
from multiexit_engine.params import SamplingParams


def random_scores(rows, vocab, seed=0):
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def by_transformers(scores, params):
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(params.temperature))])
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        processors.append(TypicalLogitsWarper(params.typical_p))
    return processors(None, scores[None])[0]


def params_of(**values):
    return SamplingParams(**{"temperature": 1.0, "top_k": 0, **values})


ANY_PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([1.0, 0.7, 1.6]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 99, 100, 200]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    typical_p=st.sampled_from([1.0, 0.9, 0.2]),
)


@settings(deadline=None, max_examples=300)
@given(
    params=st.lists(ANY_PARAMS, min_size=1, max_size=5),
    vocab=st.sampled_from([1, 7, 100, 257]),
    seed=st.integers(0, 1000),
)
def test_equals_transformers_warpers(params, vocab, seed):
    scores = random_scores(len(params), vocab, seed)
    expected = torch.stack([by_transformers(s, p) for s, p in zip(scores, params, strict=True)])
    assert torch.equal(warp_scores(scores, params), expected)


@settings(deadline=None, max_examples=100)
@given(
    params=st.lists(ANY_PARAMS, min_size=1, max_size=5),
    vocab=st.sampled_from([1, 7, 100, 257]),
    seed=st.integers(0, 1000),
)
def test_what_ops_narrow_by_is_what_warpers_do(params, vocab, seed):
    params = [replace(own, typical_p=1.0) for own in params]
    scores = random_scores(len(params), vocab, seed).round(decimals=1)
    narrowing = narrowing_of(params, scores.device)
    heat = torch.tensor([own.temperature for own in params])[:, None]
    found = scores / heat if narrowing is None else narrowed_scores(scores / heat, narrowing)
    assert torch.equal(found, warp_scores(scores, params))


def test_greedy_rows_are_not_narrowed():
    greedy, drawn = (SamplingParams(temperature=heat, top_p=0.5) for heat in (0.0, 1.0))
    assert narrowing_of([greedy], torch.device("cpu")) is None
    found = narrowing_of([greedy, drawn], torch.device("cpu"))
    assert found.top_k.tolist() == [0, 50]
    assert found.unlikely.tolist() == [-1.0, 0.5]


def test_tokens_that_tie_with_the_last_of_top_k_stay():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    kept = warp_scores(scores, [params_of(top_k=2)])
    assert kept.isfinite().tolist() == [[True, False, True, True, True, False]]


def test_more_ties_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(warpers, "TIES", 2)
    scores = random_scores(3, 100).round()
    params = [params_of(top_k=5, typical_p=0.8, min_p=0.1)] * 3
    expected = torch.stack([by_transformers(s, params[0]) for s in scores])
    assert torch.equal(warp_scores(scores, params), expected)


def test_of_ties_at_the_edge_of_top_p_as_many_stay_as_in_transformers():
    """Which of them stay is up to an unstable sort there; here it is the highest ids."""
    scores = random_scores(5, 100).round()
    params = [params_of(top_k=k, top_p=0.8) for k in (0, 3, 10, 30, 60)]
    expected = torch.stack([by_transformers(s, p) for s, p in zip(scores, params, strict=True)])
    assert torch.equal(warp_scores(scores, params).sort(-1).values, expected.sort(-1).values)


def test_of_equal_tokens_top_p_keeps_the_highest_ids():
    for top_k in (0, 100):
        kept = warp_scores(torch.zeros(1, 200), [params_of(top_k=top_k, top_p=0.0149)])
        assert kept.isfinite().nonzero()[:, 1].tolist() == [197, 198, 199]


def test_banned_tokens_stay_banned():
    scores = random_scores(2, 100)
    scores[:, 10:] = -math.inf
    params = [params_of(top_k=50, top_p=0.9), params_of(typical_p=0.9, min_p=0.01)]
    assert warp_scores(scores, params)[:, 10:].isneginf().all()


def test_a_row_does_not_depend_on_the_others():
    params = [
        params_of(top_k=50, top_p=0.9),
        params_of(),
        params_of(top_p=0.3),
        params_of(top_k=7, typical_p=0.5),
        params_of(min_p=0.2, temperature=0.5),
    ]
    scores = random_scores(5, 1031)
    together = warp_scores(scores, params)
    for index, item in enumerate(params):
        alone = warp_scores(scores[index : index + 1], [item])
        assert torch.equal(together[index : index + 1], alone)


def test_scores_are_left_alone():
    scores = random_scores(1, 20)
    before = scores.clone()
    warp_scores(scores, [params_of(top_k=3, top_p=0.5, temperature=0.5)])
    assert torch.equal(scores, before)
