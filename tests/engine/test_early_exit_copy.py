"""Rows that leave early give the deeper layers keys and values of the state in which they left."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from multiexit_engine import EarlyExit, Engine, Exit, Original, SamplingParams
from tests.engine.test_early_exit import SAMPLINGS, exit_layers, prompts, tokens

# thresholds that about half of the fixture's rows pass
MODES = [
    EarlyExit(0.3, kv="copy"),
    EarlyExit(2.5, "entropy", shortlist=50, kv="copy"),
    EarlyExit(0.85, "similarity", kv="copy"),
    EarlyExit(2, "patience", kv="copy"),
]
BLOCK_BYTES = 6 * 2 * 8 * 64 * 4


def results(engine, given, sampling, mode):
    outputs = engine.generate(given, sampling, mode)
    return list(zip(tokens(outputs), exit_layers(outputs), strict=True))


class PlainGPT2:
    """The fixture's blocks in float64, one token after the other; a row stops at its layer."""

    def __init__(self, folder):
        weights = load_file(folder / "model.safetensors")
        self.weights = {name: tensor.double() for name, tensor in weights.items()}

    def keys_and_values(self, token_ids, left_at):
        """[layers, tokens, 2 * hidden]: of each layer the keys and values of all tokens."""
        cache = [[] for _ in range(6)]
        for position, (token, depth) in enumerate(zip(token_ids, left_at, strict=True)):
            embeddings = self.weights["transformer.wte.weight"][token]
            hidden = embeddings + self.weights["transformer.wpe.weight"][position]
            for layer in range(6):
                query, key, value = self._conv(
                    self._norm(hidden, layer, "ln_1"), layer, "attn.c_attn"
                ).split(64)
                cache[layer].append(torch.cat((key, value)))
                if layer < depth:
                    hidden = self._run(hidden, query, cache[layer], layer)
        return torch.stack([torch.stack(rows) for rows in cache])

    def _run(self, hidden, query, rows, layer):
        keys, values = (part.view(-1, 4, 16) for part in torch.stack(rows).split(64, dim=1))
        scores = torch.einsum("hd,thd->ht", query.view(4, 16), keys) / 4
        mixed = torch.einsum("ht,thd->hd", scores.softmax(-1), values).flatten()
        hidden = hidden + self._conv(mixed, layer, "attn.c_proj")
        inner = self._conv(self._norm(hidden, layer, "ln_2"), layer, "mlp.c_fc")
        return hidden + self._conv(functional.gelu(inner, approximate="tanh"), layer, "mlp.c_proj")

    def _conv(self, x, layer, name):
        name = f"transformer.h.{layer}.{name}"
        return x @ self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _norm(self, x, layer, name):
        name = f"transformer.h.{layer}.{name}"
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(x, (64,), weight, bias, 1e-5)


@pytest.mark.parametrize("is_preempted", [False, True])
@pytest.mark.parametrize("mode", MODES[:3], ids=str)
def test_the_cache_is_that_of_plain_pytorch(folder, mode, is_preempted):
    engine = Engine.from_pretrained(
        folder,
        dtype="float32",
        block_size=8,
        max_num_batched_tokens=16,
        prefix_caching=False,
    )
    prompt = [3, 1, 4, *range(30)]
    engine.add_request(prompt, SamplingParams(max_new_tokens=60, ignore_eos=True), mode)
    (request,) = engine._core.requests.values()
    (sequence,) = request.sequences
    while sequence.num_output_tokens < 50:
        engine.step()
    if is_preempted:
        engine._scheduler._preempt_youngest()
        engine._core.runner.kv_cache._blocks.fill_(torch.nan)
        while sequence.num_output_tokens < 51 and engine.has_unfinished():
            engine.step()
    count = sequence.num_computed_tokens
    left_at = [6] * len(prompt) + sequence.exit_layers[1:]
    assert len(set(left_at)) > 1
    cache, table = engine._core.runner.kv_cache, sequence.block_table
    expected = PlainGPT2(folder).keys_and_values(sequence.token_ids[:count], left_at[:count])
    # what nothing has looked at yet is not there yet
    written_to = [6] * count
    for entry in sequence.waiting:
        written_to[entry.start :] = [entry.layer] * (count - entry.start)
    for layer in range(6):
        parts = (cache.key(layer)[table], cache.value(layer)[table])
        found = torch.cat([part.flatten(0, 1).flatten(1)[:count] for part in parts], 1)
        here = sum(depth > layer for depth in written_to)
        wanted = expected[layer].float()[:here]
        torch.testing.assert_close(found[:here], wanted, atol=1e-4, rtol=1e-4)
    engine.abort(request.request_id)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_thresholds_that_none_or_all_pass_give_the_tokens_of_one_head(engine, sampling):
    for mode, same in ((EarlyExit(1.1, kv="copy"), Original()), (EarlyExit(0, kv="copy"), Exit(2))):
        found = tokens(engine.generate(prompts(6), sampling, mode))
        assert found == tokens(engine.generate(prompts(6), sampling, same))


@pytest.mark.parametrize("limits", [{"num": 9, "max_batch_size": 3}, {"num": 30}], ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("sampling", ["greedy", "several"])
def test_the_pool_may_be_so_small_that_sequences_are_preempted(folder, limits, mode, sampling):
    limits = dict(limits)
    options = {"dtype": "float32", "block_size": 8, "max_num_batched_tokens": 16}
    big = Engine.from_pretrained(folder, **options)
    memory = limits.pop("num") * BLOCK_BYTES
    small = Engine.from_pretrained(folder, kv_cache_memory=memory, **options, **limits)
    given = prompts(8, 20)
    assert results(small, given, SAMPLINGS[sampling], mode) == results(
        big, given, SAMPLINGS[sampling], mode
    )
    assert small.stats().num_preemptions
    assert small.stats().num_free_kv_blocks == small.stats().num_kv_blocks


def test_only_prompts_are_found_as_prefixes(folder):
    engine = Engine.from_pretrained(folder, dtype="float32", block_size=8)
    fresh = Engine.from_pretrained(folder, dtype="float32", block_size=8, prefix_caching=False)
    prompt, mode = list(range(100)), MODES[0]
    sampling = SamplingParams(max_new_tokens=80, ignore_eos=True)
    (first,) = engine.generate(prompt, sampling, mode)
    longer = prompt + first.outputs[0].token_ids
    (found,) = engine.generate(longer, SamplingParams(max_new_tokens=40))
    assert found.num_cached_tokens == 96
    assert tokens([found]) == tokens(fresh.generate(longer, SamplingParams(max_new_tokens=40)))
    # now blocks of full depth hold the same tokens: they may serve its prompt, not its output
    (again,) = engine.generate(prompt, sampling, mode)
    assert (tokens([again]), exit_layers([again])) == (tokens([first]), exit_layers([first]))


def test_replayed_output_is_not_taken_from_a_prefix_of_full_depth(folder):
    engine = Engine.from_pretrained(folder, dtype="float32", block_size=8)
    prompt, sampling = list(range(40)), SamplingParams(max_new_tokens=80, ignore_eos=True)
    (whole,) = engine.generate(prompt, sampling, MODES[0])
    engine.generate(prompt + whole.outputs[0].token_ids, SamplingParams(max_new_tokens=1))
    engine.add_request(prompt, sampling, MODES[0])
    (request,) = engine._core.requests.values()
    while request.sequences[0].num_output_tokens < 60:
        engine.step()
    engine._scheduler._preempt_youngest()
    outputs = []
    while engine.has_unfinished():
        outputs = engine.step() or outputs
    assert (tokens(outputs), exit_layers(outputs)) == (tokens([whole]), exit_layers([whole]))


def test_another_word_for_kv_is_refused():
    with pytest.raises(ValueError, match=r"EarlyExit\.kv='lazy': must be 'recompute' or 'copy'"):
        EarlyExit(0.5, kv="lazy")
