import pytest

from multiexit_engine.batch import ScheduledBatch
from multiexit_engine.outputs import FinishReason
from multiexit_engine.request import SequenceStatus
from multiexit_engine.runtime.scheduling.scheduler import Scheduler
from tests.runtime.scheduler_harness import FakeEngine, make_config, make_request


def planned(batch: ScheduledBatch | None) -> list[tuple[str, int, int]]:
    """(request id, start, number of tokens) of each chunk."""
    chunks = batch.scheduled if batch is not None else ()
    return [(c.sequence.request.request_id, c.start, c.num_tokens) for c in chunks]


def with_requests(*requests, **limits) -> FakeEngine:
    engine = FakeEngine(make_config(**limits))
    for request in requests:
        engine.add(request)
    return engine


def test_an_empty_scheduler_has_nothing_to_run():
    scheduler = Scheduler(make_config())
    assert scheduler.schedule() is None
    assert not scheduler.has_unfinished


def test_a_prompt_is_computed_in_one_step_and_then_token_by_token():
    engine = with_requests(make_request("a", range(10)))
    assert planned(engine.step()) == [("a", 0, 10)]
    assert planned(engine.step()) == [("a", 10, 1)]


def test_a_prompt_longer_than_the_budget_is_cut():
    engine = with_requests(make_request("a", range(10)), max_num_batched_tokens=4)
    plans = [planned(engine.step()) for _ in range(4)]
    assert plans == [[("a", 0, 4)], [("a", 4, 4)], [("a", 8, 2)], [("a", 10, 1)]]


def test_decoding_goes_on_beside_a_long_prompt():
    engine = with_requests(make_request("a", range(3)), max_num_batched_tokens=4)
    engine.step()
    engine.add(make_request("b", range(10)))
    assert planned(engine.step()) == [("a", 3, 1), ("b", 0, 3)]
    assert planned(engine.step()) == [("a", 4, 1), ("b", 3, 3)]


def test_a_prompt_begun_in_the_rest_of_a_step_goes_on_in_the_next():
    engine = with_requests(make_request("a", [7]), max_num_batched_tokens=6)
    engine.step()
    engine.add(make_request("b", range(9)))
    engine.step()
    engine.add(make_request("c", range(20, 29)))
    assert planned(engine.step()) == [("a", 2, 1), ("b", 5, 4), ("c", 0, 1)]
    assert planned(engine.step()) == [("a", 3, 1), ("b", 9, 1), ("c", 1, 4)]


def test_requests_are_admitted_in_the_order_in_which_they_came():
    names = ["c", "a", "b"]
    engine = with_requests(*(make_request(name) for name in names), max_batch_size=2)
    assert [name for name, _, _ in planned(engine.step())] == ["c", "a"]
    assert engine.scheduler.num_waiting == 1


def test_a_small_request_does_not_pass_a_big_one_that_waits():
    engine = with_requests(
        make_request("runs", range(8)),
        make_request("big", range(20, 32), max_new_tokens=1),
        make_request("small", [1]),
        num_kv_blocks=4,
    )
    assert planned(engine.step()) == [("runs", 0, 8)]
    assert engine.scheduler.num_waiting == 2


def test_every_sequence_gets_its_turn_when_the_budget_is_smaller_than_their_number():
    engine = with_requests(
        make_request("a", [1], n=4, temperature=1.0, max_new_tokens=9), max_num_batched_tokens=3
    )
    engine.step()
    steps = [[c.sequence.index for c in engine.step().scheduled] for _ in range(4)]
    assert steps == [[0, 1, 2], [3, 0, 1], [2, 3, 0], [1, 2, 3]]


def test_a_request_keeps_seats_for_the_sequences_it_will_fork():
    engine = with_requests(
        make_request("wide", n=3, temperature=1.0), make_request("b"), max_batch_size=3
    )
    assert [name for name, _, _ in planned(engine.step())] == ["wide"]
    assert engine.scheduler.num_running == 3
    assert [name for name, _, _ in planned(engine.step())] == ["wide"] * 3


def test_seats_of_finished_siblings_are_given_to_others():
    wide = make_request("wide", n=3, temperature=1.0)
    engine = with_requests(wide, make_request("b"), max_batch_size=3)
    engine.step()
    engine.scheduler.finish(wide.sequences[1], FinishReason.STOP)
    assert [name for name, _, _ in planned(engine.step())] == ["wide", "wide", "b"]


def test_rows_stand_in_order_of_falling_depth():
    requests = [make_request(name, depth=depth) for name, depth in [("a", 3), ("b", 9), ("c", 3)]]
    engine = with_requests(*requests)
    assert [name for name, _, _ in planned(engine.step())] == ["b", "a", "c"]


def test_the_youngest_sequence_gives_way_when_blocks_run_out():
    old, young = (make_request(name, range(4), max_new_tokens=12) for name in ("old", "young"))
    engine = with_requests(old, young, num_kv_blocks=4, block_size=4, prefix_caching=False)
    for _ in range(6):
        engine.step()
    assert engine.scheduler.num_preemptions == 1
    assert young.sequences[0].status is SequenceStatus.WAITING
    assert old.sequences[0].status is SequenceStatus.RUNNING


def test_a_preempted_sequence_computes_its_own_output_again():
    old, young = (make_request(name, range(4), max_new_tokens=12) for name in ("old", "young"))
    engine = with_requests(old, young, num_kv_blocks=4, block_size=4, prefix_caching=False)
    engine.run_to_the_end()
    resumed = [c for b in engine.batches for c in b.scheduled if c.sequence is young.sequences[0]]
    chunks = [(c.start, c.num_tokens) for c in resumed if c.num_tokens > 1]
    assert chunks == [(0, 4), (0, 9)]
    assert young.sequences[0].num_output_tokens == 12


def test_a_preempted_sequence_finds_its_blocks_in_the_prefix_cache():
    old, young = make_request("old", range(5)), make_request("young", range(20, 29))
    engine = with_requests(old, young)
    engine.step()
    engine.scheduler._preempt_youngest()
    assert planned(engine.step()) == [("old", 5, 1)] + [("young", 8, 2)]


def test_preempted_sequences_return_before_those_that_never_ran():
    names = ["a", "b", "c", "d"]
    engine = with_requests(*(make_request(name) for name in names), max_batch_size=3)
    engine.step()
    engine.scheduler._preempt_youngest()
    engine.scheduler._preempt_youngest()
    assert [name for name, _, _ in planned(engine.step())] == ["a", "b", "c"]


def test_a_request_is_not_admitted_into_the_blocks_that_others_grow_into():
    engine = with_requests(make_request("a", range(8)), make_request("b", [1]), num_kv_blocks=3)
    assert [name for name, _, _ in planned(engine.step())] == ["a"]


def test_beams_move_in_lockstep():
    beams = make_request("beams", range(5), num_beams=3)
    engine = with_requests(beams, make_request("b"))
    engine.step()
    assert planned(engine.step())[:3] == [("beams", 5, 1)] * 3


def test_beams_share_the_blocks_of_the_prompt():
    engine = with_requests(make_request("beams", range(8), num_beams=3), block_size=4)
    engine.step()
    assert engine.scheduler.num_blocks - engine.scheduler.num_free_blocks == 2
    engine.step()
    assert engine.scheduler.num_blocks - engine.scheduler.num_free_blocks == 5


def test_a_shared_partial_block_is_copied_for_all_but_one_beam():
    engine = with_requests(make_request("beams", range(6), num_beams=3), block_size=4)
    engine.step()
    copies = engine.step().block_copies
    assert len(copies) == 2
    assert len({source for source, _ in copies}) == 1


def test_resumed_beams_wait_for_each_other():
    beams = make_request("beams", range(6), num_beams=2)
    engine = with_requests(beams, max_num_batched_tokens=4, prefix_caching=False)
    for _ in range(3):
        engine.step()
    engine.scheduler._preempt_youngest()
    plans = [planned(engine.step()) for _ in range(5)]
    assert [[(start, num) for _, start, num in plan] for plan in plans] == [
        [(0, 4)],
        [(4, 3), (0, 1)],
        [(1, 4)],
        [(5, 2)],
        [(7, 1), (7, 1)],
    ]


def test_resumed_beams_do_not_start_on_a_budget_too_small_for_all_of_them():
    engine = with_requests(make_request("a", [7]), max_num_batched_tokens=3, block_size=1)
    engine.step()
    beams = engine.add(make_request("beams", [1, 2], num_beams=3, max_new_tokens=8))
    while len(beams.sequences) < 3:
        engine.step()
    engine.scheduler._preempt_youngest()
    engine.run_to_the_end()
    assert all(len(sequence.output_token_ids) == 8 for sequence in beams.sequences)


def test_beams_that_must_give_way_themselves_leave_no_copies_behind():
    old = make_request("old", range(4), max_new_tokens=16)
    beams = make_request("beams", range(20, 22), num_beams=3, max_new_tokens=8)
    engine = with_requests(old, beams, num_kv_blocks=10, block_size=4, prefix_caching=False)
    engine.step()
    # two more copies of the beams' block are wanted, one block is left
    blocks = engine.scheduler._blocks
    blocks.make_writable(taken := [], 0, 4 * (blocks.num_free_blocks - 2))
    batch = engine.scheduler.schedule()
    assert planned(batch) == [("old", 4, 1)]
    assert batch.block_copies == ()
    blocks.free(taken)


def test_a_wide_request_alone_may_take_the_last_block():
    wide = make_request("wide", range(15), n=3, temperature=1.0, max_new_tokens=1)
    engine = with_requests(wide, num_kv_blocks=4)
    assert planned(engine.step()) == [("wide", 0, 15)]


def test_replaced_beams_lose_their_blocks():
    request = make_request("beams", range(6), num_beams=2)
    engine = with_requests(request)
    engine.step()
    first, second = request.sequences
    engine.scheduler.replace(request, [second, third := engine.scheduler.fork(second, 2)])
    assert (first.status, first.block_table) == (SequenceStatus.FINISHED, [])
    assert third.status is SequenceStatus.RUNNING
    engine.scheduler.check_integrity()


def test_an_equal_beginning_is_not_computed_twice():
    engine = with_requests(make_request("a", range(9)))
    engine.step()
    other = engine.add(make_request("b", [*range(8), 50, 51]))
    assert planned(engine.step()) == [("a", 9, 1), ("b", 8, 2)]
    assert other.num_cached_tokens == 8
    scheduler = engine.scheduler
    assert (scheduler.prefix_query_tokens, scheduler.prefix_hit_tokens) == (19, 8)


def test_the_last_token_of_a_known_prompt_is_computed():
    engine = with_requests(make_request("a", range(8)))
    engine.step()
    engine.add(make_request("b", range(8)))
    assert ("b", 4, 4) in planned(engine.step())


def test_shallow_blocks_are_no_hit_for_a_deeper_request():
    engine = with_requests(make_request("shallow", range(9), depth=6))
    engine.step()
    engine.add(make_request("deep", range(9), depth=12))
    assert ("deep", 0, 9) in planned(engine.step())
    engine.add(make_request("deep too", range(9), depth=12))
    assert ("deep too", 8, 1) in planned(engine.step())


def test_deep_blocks_are_a_hit_for_a_shallow_request():
    engine = with_requests(make_request("deep", range(9), depth=12))
    engine.step()
    engine.add(make_request("shallow", range(9), depth=6))
    assert ("shallow", 8, 1) in planned(engine.step())


def test_without_prefix_caching_every_prompt_is_computed():
    engine = with_requests(make_request("a", range(9)), prefix_caching=False)
    engine.step()
    engine.add(make_request("b", range(9)))
    assert ("b", 0, 9) in planned(engine.step())


@pytest.mark.parametrize(
    ("choices", "start"),
    [({"prompt_logprobs": 0}, 0), ({"score_from": 6}, 4), ({"score_from": 9}, 8), ({}, 8)],
)
def test_tokens_before_a_scored_one_are_computed_again(choices, start):
    engine = with_requests(make_request("a", range(10)))
    engine.step()
    engine.add(make_request("b", range(10), **choices))
    assert ("b", start, 10 - start) in planned(engine.step())


def test_an_aborted_running_request_frees_its_blocks():
    request = make_request("a", n=2, temperature=1.0)
    engine = with_requests(request)
    engine.step()
    assert engine.scheduler.abort("a") is request
    assert engine.scheduler.num_free_blocks == engine.scheduler.num_blocks
    assert [s.finish_reason for s in request.sequences] == [FinishReason.ABORT] * 2
    assert not engine.scheduler.has_unfinished


def test_a_request_aborted_while_its_step_runs_stays_aborted():
    request = make_request("a", range(4))
    engine = with_requests(request, make_request("b", range(4)))
    engine.step(abort_before_advance="a")
    assert request.sequences[0].num_computed_tokens == 0
    engine.run_to_the_end()
    assert engine.scheduler.num_free_blocks == engine.scheduler.num_blocks


def test_an_aborted_waiting_request_never_runs():
    engine = with_requests(make_request("a"), make_request("b"), max_batch_size=1)
    engine.step()
    engine.abort("b")
    engine.run_to_the_end()
    assert {name for batch in engine.batches for name, _, _ in planned(batch)} == {"a"}


def test_an_unknown_request_cannot_be_aborted():
    assert Scheduler(make_config()).abort("nobody") is None


def test_abort_keeps_the_reason_of_what_had_finished():
    request = make_request("a", n=2, temperature=1.0)
    engine = with_requests(request)
    engine.step()
    engine.scheduler.finish(request.sequences[0], FinishReason.STOP)
    engine.scheduler.abort("a")
    reasons = [s.finish_reason for s in request.sequences]
    assert reasons == [FinishReason.STOP, FinishReason.ABORT]


def test_two_living_requests_cannot_have_the_same_id():
    engine = with_requests(make_request("a"))
    with pytest.raises(ValueError, match="request_id='a'"):
        engine.add(make_request("a"))


@pytest.mark.parametrize(
    ("choices", "limits", "message"),
    [
        ({"n": 5, "temperature": 1.0}, {"max_batch_size": 4}, "n=5.*max_batch_size=4"),
        ({"num_beams": 5}, {"max_batch_size": 4}, "num_beams=5.*max_batch_size=4"),
        ({"num_beams": 5}, {"max_num_batched_tokens": 4}, "max_num_batched_tokens=4"),
        ({"max_new_tokens": 12}, {"num_kv_blocks": 4}, "17 tokens.* 5 KV blocks of 4.* has 4"),
        ({"num_beams": 2}, {"num_kv_blocks": 5}, "num_beams=2 need 6 KV blocks"),
    ],
)
def test_a_request_that_can_never_fit_is_rejected_with_the_numbers(choices, limits, message):
    scheduler = Scheduler(make_config(**limits))
    with pytest.raises(ValueError, match=message):
        scheduler.check_fits(make_request(**choices))


def test_the_model_limits_the_length_that_must_fit():
    scheduler = Scheduler(make_config(num_kv_blocks=4, max_model_len=16))
    scheduler.check_fits(make_request(max_new_tokens=1000))


def test_a_scoring_request_needs_no_room_for_output():
    scheduler = Scheduler(make_config(num_kv_blocks=4))
    scheduler.check_fits(make_request(prompt=range(16), score_from=1, max_new_tokens=20))
