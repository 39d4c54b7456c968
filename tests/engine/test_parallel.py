"""Non-autoregressive decoding on the checkpoints that ELMER's goldens were made with."""

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from multiexit_engine import Engine, Original, Parallel, SamplingParams
from multiexit_engine.layers.rough_heads import RoughHeads
from multiexit_engine.ops import PackedSources, PackedTexts, head_statistics
from tests.golden.acd_checkpoints import byte_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "elmer" / "t1"
UNCUT = SamplingParams(ignore_eos=True)
GENERATOR = torch.Generator().manual_seed(5)
SOURCES = [torch.randint(3, 399, (n,), generator=GENERATOR).tolist() for n in (9, 1, 17, 6, 30)]
MODES = [
    Parallel("soft", length=11),
    Parallel("confidence", "max_prob", 0.4, length=1.5),
    Parallel("prescribed", layers=[1, 3, 2, 1, 1]),
    Parallel("confidence", "entropy", 2.0, layers=(2,), length=(7, 12)),
    Parallel(length=3, refine=2),
]


@pytest.fixture(scope="module")
def elmer():
    return Engine.from_pretrained(GOLDEN, dtype="float32", max_batch_size=8)


def copy_of_checkpoint(folder, **changes):
    """The golden checkpoint with tensors replaced, or left out where None is given."""
    tensors = {**load_file(GOLDEN / "model.safetensors"), **changes}
    shutil.copy(GOLDEN / "config.json", folder)
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
    return folder


def results(engine, sources, modes, sampling=UNCUT):
    outputs = engine.generate(sources, sampling, modes)
    return [(o.outputs[0].token_ids, o.outputs[0].exit_layers) for o in outputs]


def rows_of(engine, sources, modes):
    """Rows that each layer computed, and those of which it made keys."""
    before = engine.stats()
    engine.generate(sources, UNCUT, modes)
    after = engine.stats()
    pairs = (
        (before.rows_per_layer, after.rows_per_layer),
        (before.keyed_rows_per_layer, after.keyed_rows_per_layer),
    )
    return [[b - a for a, b in zip(*pair, strict=True)] for pair in pairs]


@pytest.fixture
def rough_heads(monkeypatch):
    """Switches codes on for heads of any size, on any CPU and backend, or off."""

    def switch(is_on):
        monkeypatch.setattr("multiexit_engine.layers.rough_heads.are_codes_fast", lambda: is_on)
        monkeypatch.setattr("multiexit_engine.layers.rough_heads.LEAST_NUMBERS", 0)

    return switch


def dense_logits(engine, source, layers):
    """Every layer on every row; a row that left is put back, as ELMER's pre-training does."""
    model, length = engine._model, len(layers)
    exits = torch.tensor(layers)[:, None]
    with torch.inference_mode():
        cross = model.cross_keys_values(model.encode(torch.tensor(source), [len(source)]))
        hidden = model.start(length).embedded
        for layer, block in enumerate(model.blocks):
            read = PackedSources(cross[:, layer : layer + 1], [len(source)], [length])
            after = block.packed(hidden, PackedTexts.whole([length]), read)
            hidden = torch.where(exits > layer, after, hidden)
        operands = model.predict(hidden)
        return operands.hidden @ operands.weight.T + operands.bias


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"quantization": "int8"},
        {"quantization": "int4", "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_weights_of_fewer_bits_give_about_the_same_logits(options):
    options = {"dtype": "float32", **options}
    native, reference = (
        Engine.from_pretrained(GOLDEN, backend=backend, **options)
        for backend in ("native", "reference")
    )
    tolerance = 2e-4 if options["dtype"] == "float32" else 0.05
    for mode in (Parallel(length=9), Parallel("prescribed", layers=[1, 3, 2, 4, 1])):
        for source in SOURCES:
            found, wanted = (e.logits(source, mode) for e in (native, reference))
            assert (found - wanted).abs().mean() <= tolerance


@pytest.mark.parametrize("seed", range(3))
def test_ragged_equals_dense(elmer, seed):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(3, 399, (7 + seed,), generator=generator).tolist()
    layers = torch.randint(1, 5 - seed, (13,), generator=generator).tolist()
    found = elmer.logits(source, Parallel("prescribed", layers=layers))
    torch.testing.assert_close(found, dense_logits(elmer, source, layers), atol=1e-4, rtol=0)


def test_a_layer_computes_only_the_rows_that_still_go_on(elmer):
    modes = [Parallel("prescribed", layers=[1, 3, 2, 1, 1]), Parallel("prescribed", layers=[2, 2])]
    computed, keyed = rows_of(elmer, SOURCES[:2], modes)
    assert computed == [7, 4, 1, 0]
    # the first layer's are kept for each length; the second answer is done after two layers
    assert keyed == [0, 7, 5, 0]


def test_without_exits_all_rows_run_all_layers(elmer):
    assert rows_of(elmer, SOURCES[:2], Parallel(length=6)) == [[12] * 4, [0, 12, 12, 12]]


def test_sure_rows_are_not_computed_further(elmer):
    mode = Parallel("confidence", "max_prob", 0.0, layers=(2,), length=6)
    assert rows_of(elmer, SOURCES[:1], mode) == [[6, 6, 0, 0], [0, 6, 0, 0]]


@pytest.mark.parametrize("is_rough", [False, True])
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(
    "mode",
    [
        Parallel("soft", length=9),
        Parallel("confidence", "max_prob", 0.5, length=9),
        Parallel("confidence", "entropy", 2.5, length=9),
        Parallel("confidence", "entropy", 2.5, layers=(2, 3), length=9, gate_bias=False),
        Parallel("prescribed", layers=[1, 3, 2, 4, 1, 1, 2, 2, 3]),
    ],
    ids=str,
)
def test_each_layer_runs_for_the_rows_that_left_later_on_every_route(
    mode, backend, is_rough, rough_heads
):
    rough_heads(is_rough)
    own = Engine.from_pretrained(GOLDEN, dtype="float32", backend=backend)
    exits = [layer for _, layers in results(own, SOURCES, mode) for layer in layers]
    computed, keyed = rows_of(own, SOURCES, mode)
    assert computed == [sum(exit > layer for exit in exits) for layer in range(4)]
    assert mode.exit == "soft" or computed[0] > computed[3]
    assert all(k >= c for k, c in zip(keyed[1:], computed[1:], strict=True))


@pytest.mark.parametrize("measure", ["entropy", "max_prob"])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_rough_gates_change_neither_tokens_nor_layers(backend, measure, rough_heads):
    own = Engine.from_pretrained(GOLDEN, dtype="float32", backend=backend)
    top = 1.0 if measure == "max_prob" else 6.0
    layers = set()
    for step in range(13):
        threshold, biased = top * step / 12, step % 2 > 0
        tested = (1 + step % 3,) if step % 4 == 0 else None
        mode = Parallel("confidence", measure, threshold, tested, length=11, gate_bias=biased)
        rough_heads(True)
        found = results(own, SOURCES, mode)
        rough_heads(False)
        assert found == results(own, SOURCES, mode)
        layers.update(layer for _, exits in found for layer in exits)
    assert layers == {1, 2, 3, 4}


@pytest.mark.parametrize("mode", [Parallel(length=9), *MODES], ids=str)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_tokens_by_codes_are_those_of_exact_logits(backend, mode, rough_heads):
    own = Engine.from_pretrained(GOLDEN, dtype="float32", backend=backend)
    rough_heads(True)
    found = results(own, SOURCES, mode)
    rough_heads(False)
    assert found == results(own, SOURCES, mode)


def test_exact_tests_read_only_rows_that_rough_ones_leave_open(monkeypatch, rough_heads):
    rough_heads(True)
    elmer = Engine.from_pretrained(GOLDEN, dtype="float32")
    path, exact_rows = "multiexit_engine.runtime.parallel.parallel_pass.head_statistics", []

    def counted(hidden, *rest):
        exact_rows.append(hidden.shape[0])
        return head_statistics(hidden, *rest)

    monkeypatch.setattr(path, counted)
    rows_of(elmer, SOURCES, Parallel("confidence", "max_prob", 0.9, length=11))
    assert not exact_rows
    mode = Parallel("confidence", "max_prob", 0.9, length=11)
    boundary = float(elmer.exit_readings(SOURCES[0], mode).values[4, 0])
    found = results(elmer, SOURCES, replace(mode, threshold=boundary))
    assert found[0][1][4] == 1 and exact_rows == [1]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_log_probabilities_do_not_depend_on_whether_codes_decide(backend, rough_heads):
    own = Engine.from_pretrained(GOLDEN, dtype="float32", backend=backend)
    mode, asked = Parallel("confidence", "max_prob", 0.5, length=11), SamplingParams(logprobs=0)
    found = []
    for is_rough in (True, False):
        rough_heads(is_rough)
        outputs = own.generate(SOURCES, asked, mode)
        found.append([each.logprob for o in outputs for entry in o.outputs[0].logprobs
                      for each in entry.values()])  # fmt: skip
    assert found[0] == found[1]


def test_the_test_that_lets_a_row_go_tells_its_token(monkeypatch, rough_heads):
    rough_heads(True)
    elmer = Engine.from_pretrained(GOLDEN, dtype="float32")
    read, best_tokens = [], RoughHeads.best_tokens

    def counted(self, hidden, *rest):
        read.append(hidden.shape[0])
        return best_tokens(self, hidden, *rest)

    monkeypatch.setattr(RoughHeads, "best_tokens", counted)
    mode = Parallel("confidence", "max_prob", 0.6, length=11)
    computed, _ = rows_of(elmer, SOURCES, mode)
    num_left = computed[0] - computed[-1]
    assert num_left > 0
    assert sum(read) == computed[-1]


def test_a_further_pass_computes_the_least_likely_tokens_again(elmer):
    # two thirds of nine positions, then one third
    computed, keyed = rows_of(elmer, SOURCES[:1], Parallel(length=9, refine=2))
    assert computed == [9 + 6 + 3] * 4
    assert keyed == [18, 27, 27, 27]


def test_a_further_pass_keeps_the_most_likely_tokens(elmer):
    once, again = (
        elmer.generate(SOURCES[2], SamplingParams(ignore_eos=True, logprobs=0), mode)[0].outputs[0]
        for mode in (Parallel(length=8), Parallel(length=8, refine=1))
    )
    values = [next(iter(entry.values())).logprob for entry in once.logprobs]
    kept = sorted(range(8), key=values.__getitem__)[4:]
    assert [again.token_ids[place] for place in kept] == [once.token_ids[place] for place in kept]


def test_of_several_lengths_the_likeliest_answer_is_kept(elmer):
    params = SamplingParams(logprobs=0)
    alone = [
        elmer.generate(SOURCES[0], params, Parallel(length=length))[0].outputs[0]
        for length in (4, 9, 13)
    ]
    best = max(alone, key=lambda c: c.cumulative_logprob / len(c.token_ids))
    (together,) = elmer.generate(SOURCES[0], params, Parallel(length=(13, 4, 9)))
    assert together.outputs[0].token_ids == best.token_ids


def test_without_a_length_max_new_tokens_is_the_cap(elmer):
    (output,) = elmer.generate(SOURCES[0], SamplingParams(max_new_tokens=5, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 5


def test_an_answer_ends_with_the_first_ending_token(elmer):
    mode = Parallel(length=20)
    whole = elmer.generate(SOURCES, UNCUT, mode)
    end = whole[0].outputs[0].token_ids[3]
    cut = elmer.generate(SOURCES[0], SamplingParams(stop_token_ids=(end,)), mode)[0].outputs[0]
    place = whole[0].outputs[0].token_ids.index(end)
    assert cut.token_ids == whole[0].outputs[0].token_ids[: place + 1]
    assert len(cut.exit_layers) == place + 1
    assert (cut.finish_reason, cut.stop_reason) == ("stop", end)
    assert {o.outputs[0].finish_reason for o in whole} == {"length"}


def test_equal_words_beside_each_other_become_one_in_the_text(tmp_path):
    folder = copy_of_checkpoint(tmp_path)
    byte_tokenizer().save_pretrained(folder)
    space, letter = byte_tokenizer()(" a")["input_ids"]
    bias = torch.zeros(1, 400)
    bias[0, [space, letter]] = 100.0
    folder = copy_of_checkpoint(folder, final_logits_bias=bias)
    with_text = Engine.from_pretrained(folder, dtype="float32")
    plain, collapsed = (
        with_text.generate("b", UNCUT, Parallel(length=30, collapse_repeats=flag))[0].outputs[0]
        for flag in (False, True)
    )
    assert plain.token_ids == collapsed.token_ids
    words = plain.text.split()
    kept = words[:1] + [b for a, b in pairwise(words) if a != b]
    assert collapsed.text == " ".join(kept)
    pieces = list(with_text.stream("b", UNCUT, Parallel(length=30, collapse_repeats=True)))
    assert "".join(piece.text for piece in pieces) == collapsed.text


def test_logprobs_are_those_of_the_logits(elmer):
    mode = Parallel("prescribed", layers=[1, 4, 2])
    params = SamplingParams(ignore_eos=True, logprobs=1)
    found = elmer.generate(SOURCES[0], params, mode)[0].outputs[0]
    expected = elmer.logits(SOURCES[0], mode).log_softmax(-1)
    for place, (token, entry) in enumerate(zip(found.token_ids, found.logprobs, strict=True)):
        assert entry[token].logprob == pytest.approx(expected[place, token].item(), abs=1e-4)


def test_a_waiting_request_can_be_aborted(elmer):
    first = elmer.add_request(SOURCES[0], UNCUT, Parallel(length=4))
    second = elmer.add_request(SOURCES[1], UNCUT, Parallel(length=4))
    assert elmer.abort(first).outputs[0].finish_reason == "abort"
    (output,) = elmer.step()
    assert output.request_id == second and output.finished
    assert not elmer.has_unfinished() and not elmer._core.requests


@pytest.mark.parametrize(
    ("sampling", "mode", "message"),
    [
        ({}, Original(), "decoding=Original.*must be Parallel.*architecture='bart'"),
        ({}, Parallel("prescribed", layers=[5]), r"Parallel.layers=\(5,\): .* layers 1..4"),
        ({}, Parallel(length=65), "Parallel.length: 65 positions are asked for, the model has 64"),
        ({}, Parallel(length=40.0), "Parallel.length: 360 positions"),
        ({"max_new_tokens": 99}, Parallel(), "max_new_tokens: 99 positions"),
        ({}, Parallel(collapse_repeats=True), "has no tokenizer"),
        ({}, Parallel(length=tuple(range(1, 10))), "names 9 lengths.*max_batch_size=8"),
        ({"temperature": 1.0}, Parallel(), "temperature=1.0.*leave temperature at 0.0"),
        ({"num_beams": 4}, Parallel(), "num_beams=4"),
        ({"repetition_penalty": 1.2}, Parallel(), "repetition_penalty=1.2"),
        ({"logprobs": 5}, Parallel(), "logprobs=5.*give 0, 1 or None"),
    ],
)
def test_bad_input_is_refused_before_any_work(elmer, sampling, mode, message):
    steps = elmer.stats().num_steps
    with pytest.raises(ValueError, match=message):
        elmer.generate([SOURCES[1], SOURCES[0]], SamplingParams(**sampling), mode)
    assert elmer.stats().num_steps == steps and not elmer.has_unfinished()


def test_scores_of_given_texts_are_refused(elmer):
    with pytest.raises(ValueError, match="architecture='bart' to score"):
        elmer.score([SOURCES[0]])
    assert not elmer.has_unfinished()


def test_numbers_that_are_nan_fail_their_own_request_only(tmp_path):
    table = load_file(GOLDEN / "model.safetensors")["model.shared.weight"]
    table[7] = torch.nan
    head = load_file(GOLDEN / "model.safetensors")["model.shared.weight"]
    changes = {"model.encoder.embed_tokens.weight": table, "model.shared.weight": head}
    broken = Engine.from_pretrained(copy_of_checkpoint(tmp_path, **changes), dtype="float32")
    bad, good = broken.generate([[5, 7], [5, 6]], UNCUT, Parallel(length=4))
    assert bad.error and bad.outputs[0].finish_reason == "error"
    assert good.error is None and len(good.outputs[0].token_ids) == 4


def test_feedback_is_the_default_where_the_checkpoint_has_it(elmer):
    assert results(elmer, SOURCES, None) == results(elmer, SOURCES, Parallel("soft"))


def test_without_concat_head_elmer_must_be_named_and_has_no_feedback(tmp_path):
    folder = copy_of_checkpoint(tmp_path, **{"concat_head.weight": None})
    named = Engine.from_pretrained(folder, architecture="elmer", dtype="float32")
    assert results(named, SOURCES, None) == results(named, SOURCES, Parallel("none"))
    with pytest.raises(ValueError, match="no concat_head.weight"):
        named.generate(SOURCES[0], UNCUT, Parallel("soft"))


def test_elmers_weights_read_as_bart_give_a_warning(caplog):
    from multiexit_engine.checkpoint import open_checkpoint

    with caplog.at_level("WARNING"):
        opened = open_checkpoint(GOLDEN, architecture="bart")
    assert opened.config.model_type == "bart"
    assert "concat_head.weight" in caplog.text


def test_a_model_that_writes_token_by_token_refuses_the_mode():
    demo = Engine.from_pretrained("demo")
    with pytest.raises(ValueError, match="architecture='elmer'"):
        demo.generate("a", UNCUT, Parallel(length=4))
