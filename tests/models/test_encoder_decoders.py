"""Encoder-decoder families against transformers: encoder, decoder step by step, decoder at once."""

from dataclasses import replace

import pytest
import torch
import transformers

from multiexit_engine.batch import CopiedRows, ForwardBatch, ScheduledBatch, ScheduledSequence
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.models import build_model
from multiexit_engine.ops import PackedSources, PackedTexts, packed_blocks, use_backend
from multiexit_engine.params import Original, SamplingParams
from multiexit_engine.request import Request, Sequence
from tests.models.harness import (
    CPU,
    ENCODER_DECODERS,
    VOCAB,
    assert_equal_up_to_rounding,
    save,
)

BLOCK_SIZE = 3
GENERATOR = torch.Generator().manual_seed(3)
SOURCES = [
    torch.randint(3, VOCAB, (count,), generator=GENERATOR).tolist() for count in (7, 1, 19, 19)
]
TARGETS = [
    torch.randint(3, VOCAB, (count,), generator=GENERATOR).tolist() for count in (11, 5, 1, 8)
]
EVERY_TARGET = tuple(range(len(TARGETS)))


def transformers_model(model_type, values):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **values)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
        if model_type == "bart":
            model.final_logits_bias.normal_(generator=generator)
    return model.eval()


@pytest.fixture(scope="module", params=ENCODER_DECODERS)
def pair(request, tmp_path_factory):
    """transformers' model and ours, of the same weights."""
    theirs = transformers_model(*ENCODER_DECODERS[request.param])
    folder = save(theirs, tmp_path_factory.mktemp("checkpoint"))
    return theirs, build_model(open_checkpoint(folder), CPU, torch.float32)


def packed(texts):
    return torch.tensor([token for text in texts for token in text]), [len(text) for text in texts]


def encode(model, sources):
    with torch.inference_mode():
        return model.encode(*packed(sources))


def logits(model, tap):
    with torch.inference_mode():
        operands = model.heads.operands(model.heads.original, tap)
        product = operands.hidden @ operands.weight.T
    return product if operands.bias is None else product + operands.bias


def new_cache(model, num_blocks):
    dtype, config = model.embedding.tokens.dtype, model.config
    shape = config.num_layers, num_blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim
    kv_cache = PagedKVCache(*shape, dtype, CPU)
    for layer in range(config.num_layers):
        kv_cache.key(layer).fill_(float("nan"))
        kv_cache.value(layer).fill_(float("nan"))
    return kv_cache


def new_sequences(model):
    """Sequences whose sources stand in a cache of scrambled blocks, NaN everywhere else."""
    kv_cache = new_cache(model, 60)
    order = iter(torch.randperm(60, generator=torch.Generator().manual_seed(2)).tolist())

    def table(text):
        return [next(order) for _ in range(-(-len(text) // BLOCK_SIZE))]

    sequences, slots = [], []
    for source, target in zip(SOURCES, TARGETS, strict=True):
        request = Request(
            "r", target, SamplingParams(), Original(), 4, 0, source_token_ids=tuple(source)
        )
        sequence = Sequence(
            request, 0, target, block_table=table(target), source_table=table(source)
        )
        sequences.append(sequence)
        slots += [
            sequence.source_table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE
            for i in range(len(source))
        ]
    with torch.inference_mode():
        cross = model.cross_keys_values(encode(model, SOURCES))
        model.store_cross(cross, kv_cache, torch.tensor(slots))
    return sequences, kv_cache


def run_in_chunks(model, chunk, wanted=EVERY_TARGET):
    """The last tap of the wanted targets, ``chunk`` tokens at a time, all side by side."""
    sequences, kv_cache = new_sequences(model)
    taps = [[] for _ in sequences]
    for start in range(0, max(len(TARGETS[i]) for i in wanted), chunk):
        places = [i for i in wanted if len(TARGETS[i]) > start]
        items = [
            ScheduledSequence(sequences[i], start, min(chunk, len(TARGETS[i]) - start))
            for i in places
        ]
        batch = ForwardBatch.build(ScheduledBatch(tuple(items)), BLOCK_SIZE, CPU)
        with torch.inference_mode():
            hidden = model.embed(batch.token_ids, batch.positions)
            hidden = model.run_layers(hidden, 0, model.config.num_layers, kv_cache, batch)
        for i, part in zip(places, hidden.split(list(batch.layout.query_lens)), strict=True):
            taps[i].append(part)
    return [torch.cat(taps[i]) for i in wanted]


def test_packed_sources_are_encoded_as_transformers_encodes_each_alone(pair):
    theirs, ours = pair
    for source, found in zip(
        SOURCES, encode(ours, SOURCES).split([len(s) for s in SOURCES]), strict=True
    ):
        with torch.inference_mode():
            wanted = theirs.get_encoder()(torch.tensor([source])).last_hidden_state[0]
        assert_equal_up_to_rounding(found, wanted)


@pytest.mark.parametrize("chunk", [40, 3, 1])
def test_decoder_logits_equal_transformers_however_targets_are_cut(pair, chunk):
    theirs, ours = pair
    for source, target, tap in zip(SOURCES, TARGETS, run_in_chunks(ours, chunk), strict=True):
        with torch.inference_mode():
            wanted = theirs(
                input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target])
            ).logits[0]
        assert_equal_up_to_rounding(logits(ours, tap), wanted)


@pytest.fixture(scope="module", params=["bart", "t5", "t5 gated and untied"])
def opened(request, tmp_path_factory):
    """Opens the same random checkpoint in any dtype."""
    theirs = transformers_model(*ENCODER_DECODERS[request.param])
    folder = save(theirs, tmp_path_factory.mktemp("checkpoint"))
    return lambda dtype: build_model(open_checkpoint(folder), CPU, dtype)


def test_native_rows_are_the_same_however_cut_and_beside_any_others(opened):
    pytest.importorskip("multiexit_engine._C")
    model = opened(torch.float32)
    whole = run_in_chunks(model, 40)
    for chunk in (3, 1):
        for one, other in zip(run_in_chunks(model, chunk), whole, strict=True):
            assert torch.equal(one, other)
    for i, other in enumerate(whole):
        assert torch.equal(run_in_chunks(model, 2, [i])[0], other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_native_half_precision_is_as_near_to_float32_as_the_modules(opened, dtype):
    pytest.importorskip("multiexit_engine._C")
    model, exact = opened(dtype), opened(torch.float32)
    for own, rounded in zip(exact.parameters(), model.parameters(), strict=True):
        own.data = rounded.data.float()
    with use_backend("reference"):
        truth, reference = run_in_chunks(exact, 3), run_in_chunks(model, 3)
    for one, other, true in zip(run_in_chunks(model, 3), reference, truth, strict=True):
        own_error = (one.float() - true).abs().mean()
        assert own_error <= 1.2 * (other.float() - true).abs().mean() + 1e-6


def test_native_sources_are_the_same_beside_any_others(opened):
    pytest.importorskip("multiexit_engine._C")
    model = opened(torch.float32)
    together = encode(model, SOURCES).split([len(source) for source in SOURCES])
    for source, one in zip(SOURCES, together, strict=True):
        assert torch.equal(encode(model, [source]), one)


def test_one_pass_equals_transformers_without_its_causal_mask(pair):
    theirs, ours = pair
    if ours.config.model_type == "t5":
        pytest.skip("T5 is not run in one pass")
    token_ids, target_lens = packed(TARGETS)
    with torch.inference_mode():
        positions = torch.cat([torch.arange(count) for count in target_lens])
        cross = ours.cross_keys_values(encode(ours, SOURCES))
        sources = PackedSources(cross, [len(source) for source in SOURCES], target_lens)
        texts = PackedTexts.whole(target_lens)
        hidden = packed_blocks(ours.embed(token_ids, positions), list(ours.blocks), texts, sources)
    for source, target, tap in zip(SOURCES, TARGETS, hidden.split(target_lens), strict=True):
        with torch.inference_mode():
            seen = torch.zeros(1, 1, len(target), len(target))
            wanted = theirs(
                input_ids=torch.tensor([source]),
                decoder_input_ids=torch.tensor([target]),
                decoder_attention_mask=seen,
            ).logits[0]
        assert_equal_up_to_rounding(logits(ours, tap), wanted)


def test_keys_and_values_of_copied_rows_are_those_that_layers_write(pair):
    _, ours = pair
    sequences, ran = new_sequences(ours)
    wrote = new_cache(ours, 60)
    items = [ScheduledSequence(s, 0, s.num_tokens) for s in sequences]
    batch = ForwardBatch.build(ScheduledBatch(tuple(items)), BLOCK_SIZE, CPU)
    slots = batch.slot_mapping
    last = [ScheduledSequence(s, s.num_tokens - 1, 1) for s in sequences]
    last_batch = ForwardBatch.build(ScheduledBatch(tuple(last)), BLOCK_SIZE, CPU)
    ends = torch.tensor([item.num_tokens for item in items]).cumsum(0) - 1
    earlier = torch.ones(batch.num_tokens, dtype=torch.bool)
    earlier[ends] = False
    with torch.inference_mode():
        hidden = ours.embed(batch.token_ids, batch.positions)
        for layer in range(ours.config.num_layers):
            copied = CopiedRows(hidden[earlier], batch.positions[earlier], slots[earlier])
            one = replace(last_batch, copied=copied)
            ours.run_layers(hidden[ends], layer, layer + 1, wrote, one)
            hidden = ours.run_layers(hidden, layer, layer + 1, ran, batch)
    for layer in range(ours.config.num_layers):
        for kind in ("key", "value"):
            expected, found = (getattr(c, kind)(layer).flatten(0, 1)[slots] for c in (ran, wrote))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
