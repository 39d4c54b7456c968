"""What a request gives does not depend on who runs beside it, nor on how it is cut."""

import random

import pytest

from multiexit_engine import Contrast, DoLa, Engine, Exit, FinishReason, Original, SamplingParams

MODES = [
    Original(),
    Exit(2),
    Exit(4),
    Exit(6),
    Contrast(6, 2),
    Contrast("original", 4),
    DoLa((0, 1, 3)),
    DoLa("high", mature=6, heads="raw"),
    DoLa((2, 4), relative_top=0.01, jsd="reference", mature=6, heads="exits"),
]


def mixed_requests(count, longest):
    draw = random.Random(11)
    requests = []
    for i in range(count):
        prompt = [draw.randrange(256) for _ in range(draw.randint(1, longest))]
        kind = i % 4
        params = SamplingParams(
            max_new_tokens=draw.randint(1, 12),
            temperature=0.0 if kind < 2 else 1.5,
            top_p=0.9 if kind == 2 else 1.0,
            repetition_penalty=1.3 if i % 5 == 0 else 1.0,
            seed=i,
            n=2 if kind == 3 else 1,
            num_beams=3 if kind == 1 and i % 8 == 1 else 1,
        )
        requests.append((prompt, params, MODES[i % len(MODES)]))
    return requests


def tokens(output):
    return [completion.token_ids for completion in output.outputs]


@pytest.fixture(scope="module")
def alone(folder):
    engine = Engine.from_pretrained(folder, dtype="float32", prefix_caching=False)
    requests = mixed_requests(64, 900)
    return requests, [tokens(engine.generate([p], s, m)[0]) for p, s, m in requests]


def test_a_batch_of_64_gives_each_request_what_it_gets_alone(folder, alone):
    engine = Engine.from_pretrained(folder, dtype="float32")
    requests, expected = alone
    aborted = {i for i in range(64) if i % 9 == 4}
    names = {engine.add_request(*request): i for i, request in enumerate(requests)}
    found = {}
    steps = 0
    while engine.has_unfinished():
        for output in engine.step():
            if output.finished:
                found[names[output.request_id]] = tokens(output)
        steps += 1
        if steps == 3:
            for name, i in names.items():
                if i in aborted and i not in found:
                    assert engine.abort(name).outputs[0].finish_reason is FinishReason.ABORT
    assert all(found[i] == expected[i] for i in range(64) if i not in aborted)
    assert engine.stats().num_free_kv_blocks == engine.stats().num_kv_blocks


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 37},
        {"block_size": 7},
        {"max_batch_size": 3},
        {"kv_cache_memory": 9_000_000},
        {"max_num_batched_tokens": 64, "block_size": 32, "kv_cache_memory": 9_000_000},
    ],
    ids=str,
)
def test_chunks_blocks_seats_and_preemption_change_nothing(folder, alone, options):
    engine = Engine.from_pretrained(folder, dtype="float32", **options)
    requests, expected = alone
    prompts, params, modes = (list(x) for x in zip(*requests[:32], strict=True))
    outputs = engine.generate(prompts, params, modes)
    assert [tokens(o) for o in outputs] == expected[:32]
    engine._scheduler.check_integrity()
    assert engine.stats().num_free_kv_blocks == engine.stats().num_kv_blocks


def test_a_small_pool_preempts_and_still_finishes(folder, alone):
    engine = Engine.from_pretrained(folder, dtype="float32", kv_cache_memory=3_200_000)
    prompts = [[i] * 300 for i in range(8)]
    params = SamplingParams(max_new_tokens=200, ignore_eos=True)
    outputs = engine.generate(prompts, params, Exit(2))
    assert engine.stats().num_preemptions > 0
    assert all(len(o.outputs[0].token_ids) == 200 for o in outputs)
