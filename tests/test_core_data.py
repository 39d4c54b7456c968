import math
from dataclasses import fields

import pytest
import torch

from multiexit_engine.batch import ForwardBatch, ScheduledBatch, ScheduledSequence
from multiexit_engine.config import VocabularyProjectionMode
from multiexit_engine.params import (
    Original,
    SamplingParams,
    StructuredOutputs,
)
from multiexit_engine.request import Request, Sequence

BAD_COUNT = ("many", 1.0, 1.5, True, None)
BAD_NUMBER = ("much", True, None, math.nan, math.inf, -math.inf, 10**400)
REJECTED = {
    "max_new_tokens": (*BAD_COUNT, 0, -1),
    "min_new_tokens": (*BAD_COUNT, -1, 21),
    "temperature": (*BAD_NUMBER, -0.1),
    "top_k": (*BAD_COUNT, -1),
    "top_p": (*BAD_NUMBER, 0.0, -0.1, 1.1),
    "min_p": (*BAD_NUMBER, -0.1, 1.1),
    "typical_p": (*BAD_NUMBER, 0.0, 1.1),
    "repetition_penalty": (*BAD_NUMBER, 0.0, -1.0),
    "presence_penalty": BAD_NUMBER,
    "frequency_penalty": BAD_NUMBER,
    "no_repeat_ngram_size": (*BAD_COUNT, -1),
    "logit_bias": (5, [5], {-1: 1.0}, {"5": 1.0}, {5: math.nan}, {5: "much"}, {True: 1.0}),
    "bad_words": (5, [5], ("",), ((),), ((-1,),), ((1.5,),), ((True,),)),
    "stop": (5, ("",), (5,), ("a", None), ""),
    "stop_token_ids": (5, (-1,), (1.5,), ("a",), (True,)),
    "forced_bos_token_id": (-1, 1.5, True, "2"),
    "forced_eos_token_id": (-1, 1.5, True, "2"),
    "ignore_eos": (1, None, "yes"),
    "seed": ("x", -1, 1.0, True, 2**63),
    "n": (*BAD_COUNT, 0, 2),
    "num_beams": (*BAD_COUNT, 0),
    "length_penalty": BAD_NUMBER,
    "early_stopping": (None, "always", 1, 0, 2),
    "logprobs": ("x", -2, 1.0, True),
    "prompt_logprobs": ("x", -2, 1.0, True),
    "confidences": (1, None, "yes"),
    "skip_special_tokens": (1, None, "yes"),
    "structured_outputs": (5, "x", {}, {"choice": [""]}, {"regex": 1}, {"regex": "a", "json": {}}),
}
ACCEPTED = {
    "max_new_tokens": (1, 10**6),
    "min_new_tokens": (0, 20),
    "temperature": (0, 0.0, 1, 5.5),
    "top_k": (0, 1),
    "top_p": (1, 1e-9),
    "min_p": (0, 1),
    "typical_p": (1, 1e-9),
    "repetition_penalty": (1e-9, 2),
    "presence_penalty": (-3, 3.5),
    "frequency_penalty": (-3, 3.5),
    "no_repeat_ngram_size": (0, 3),
    "logit_bias": (None, {}, {0: -100}, {5: 1.5}),
    "bad_words": ((), ("a", (1, 2))),
    "stop": ((), ("a", "bc")),
    "stop_token_ids": ((), (0, 7)),
    "forced_bos_token_id": (None, 0, 7),
    "forced_eos_token_id": (None, 0, 7),
    "ignore_eos": (True, False),
    "seed": (None, 0, 2**63 - 1),
    "n": (1,),
    "num_beams": (1, 4),
    "length_penalty": (-1.0, 0, 2),
    "early_stopping": (True, False, "never"),
    "logprobs": (None, -1, 0, 5),
    "prompt_logprobs": (None, -1, 0, 5),
    "confidences": (True, False),
    "skip_special_tokens": (True, False),
    "structured_outputs": (None, StructuredOutputs(regex="a")),
}


def each(table):
    return [pytest.param(name, v, id=f"{name}-{v!r:.12}") for name in table for v in table[name]]


def test_every_sampling_field_is_tested():
    names = {field.name for field in fields(SamplingParams)}
    assert names == REJECTED.keys() == ACCEPTED.keys()


@pytest.mark.parametrize(("name", "value"), each(REJECTED))
def test_a_wrong_value_is_rejected_by_the_name_of_its_field(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), each(ACCEPTED))
def test_an_allowed_value_is_kept(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("given_value", "kept"),
    [
        ({"stop": "end"}, ("end",)),
        ({"stop": ["a", "b"]}, ("a", "b")),
        ({"stop": None}, ()),
        ({"structured_outputs": {"regex": "a"}}, StructuredOutputs(regex="a")),
        ({"structured_outputs": '{"choice": ["a"]}'}, StructuredOutputs(choice=("a",))),
        ({"stop_token_ids": [1, 2]}, (1, 2)),
        ({"bad_words": "no"}, ("no",)),
        ({"bad_words": [[1, 2], "no"]}, ((1, 2), "no")),
    ],
)
def test_lists_and_single_strings_become_tuples(given_value, kept):
    (name,) = given_value
    assert getattr(SamplingParams(**given_value), name) == kept


def test_a_bias_changed_afterwards_does_not_change_the_request():
    bias = {5: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[5] = math.nan
    assert params.logit_bias == {5: 1.0}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens=5.*max_new_tokens=4"),
        ({"num_beams": 2, "temperature": 1.0}, "temperature=1.0.*num_beams"),
        ({"num_beams": 2, "n": 3}, "n=3.*num_beams=2"),
        ({"num_beams": 2, "stop": "x"}, "stop.*stop_token_ids"),
        ({"num_beams": 2, "logprobs": 1}, "logprobs=1.*beam"),
        ({"n": 2}, "n=2.*temperature=0"),
    ],
)
def test_contradictory_fields_are_rejected(choices, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**choices)


@pytest.mark.parametrize("name", ["SHARED_PROJECTION_DIRECT", "shared_projection_direct"])
def test_a_projection_mode_is_found_by_its_name_in_any_case(name):
    mode = VocabularyProjectionMode.SHARED_PROJECTION_DIRECT
    assert VocabularyProjectionMode.parse(name) is mode
    assert VocabularyProjectionMode.parse(mode) is mode


@pytest.mark.parametrize("value", ["direct", "", None, 1])
def test_an_unknown_projection_mode_is_rejected_with_the_allowed_ones(value):
    with pytest.raises(ValueError, match="vocab_projection_mode=.*LAYER_SPECIFIC_PROJECTION"):
        VocabularyProjectionMode.parse(value)


def chunk(token_ids, table, start, num_tokens) -> ScheduledSequence:
    request = Request("a", [1], SamplingParams(), Original(), 12, 0)
    sequence = Sequence(request, 0, list(token_ids), block_table=table)
    return ScheduledSequence(sequence, start, num_tokens)


def three_chunks() -> ForwardBatch:
    """The end of a prompt, a decoded token on a block boundary, a prompt's first chunk."""
    chunks = (
        chunk([10, 11, 12, 13, 14, 15, 16], [5, 2], 3, 4),
        chunk([20, 21, 22, 23, 24], [1, 7, 6], 4, 1),
        chunk([30, 31, 32, 33, 34, 35], [3, 4], 0, 2),
    )
    return ForwardBatch.build(ScheduledBatch(chunks), 4, torch.device("cpu"))


def test_a_forward_batch_lies_flat_in_the_order_of_its_chunks():
    batch = three_chunks()
    assert batch.token_ids.tolist() == [13, 14, 15, 16, 24, 30, 31]
    assert batch.positions.tolist() == [3, 4, 5, 6, 4, 0, 1]
    assert batch.slot_mapping.tolist() == [23, 8, 9, 10, 28, 12, 13]
    assert (batch.num_tokens, batch.token_ids.dtype) == (7, torch.int64)


def test_a_layout_tells_where_each_sequence_lies():
    layout = three_chunks().layout
    assert (layout.query_lens, layout.context_lens) == ((4, 1, 2), (7, 5, 2))
    assert layout.query_starts == (0, 4, 5, 7)
    assert layout.cu_query_lens.tolist() == [0, 4, 5, 7]
    assert layout.context_lens_device.tolist() == [7, 5, 2]
    assert layout.block_tables.tolist() == [[5, 2], [1, 7], [3, -1]]
    assert layout.block_tables.dtype == torch.int32


def test_the_first_sequences_of_a_batch_are_a_batch():
    batch = three_chunks()
    first = batch.first(2)
    assert first.token_ids.tolist() == [13, 14, 15, 16, 24]
    assert first.layout.query_starts == (0, 4, 5)
    assert first.layout.block_tables.tolist() == [[5, 2], [1, 7]]
    assert first.token_ids.data_ptr() == batch.token_ids.data_ptr()
    assert batch.first(3) is batch


def test_a_chunk_reaches_the_end_with_its_last_known_token():
    table = [0, 1]
    assert chunk(range(6), table, 2, 4).reaches_end
    assert not chunk(range(6), table, 2, 3).reaches_end
