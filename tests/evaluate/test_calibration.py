"""A calibrated threshold keeps what it says, and requests find it beside the model."""

import random
import shutil
from dataclasses import replace

import pytest
import torch
from scipy.stats import binom

from multiexit_engine import EarlyExit, Engine, Exit, SamplingParams
from multiexit_engine.checkpoint.calibration import (
    FILE_NAME,
    read_calibrations,
    write_calibration,
)
from multiexit_engine.cli import app
from multiexit_engine.evaluate.calibration import (
    CONTEXT,
    WINDOW,
    agreements,
    calibrate,
    p_value,
    taken_exits,
    thresholds,
)
from tests.tiny import save_gpt2


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Layers above the fourth add little, so that its exit mostly agrees with the last one."""
    folder = save_gpt2(tmp_path_factory.mktemp("calibrated"))
    engine = Engine.from_pretrained(
        folder,
        dtype="float32",
        vocab_projection_mode="SHARED_PROJECTION_DIRECT",
        lm_head_layer_indices=[2, 4, 6],
    )
    for block in engine._model.blocks[4:]:
        for linear in (block.attention.output, block.mlp.down):
            linear.weight.data.mul_(0.02)
    return engine


def texts(count, seed=1):
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(WINDOW)] for _ in range(count)]


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy", "similarity", "patience"])
def test_readings_are_what_requests_measure(engine, measure):
    start = {"entropy": 0.0, "patience": 4.0}.get(measure, 1.1)
    mode = EarlyExit(start, measure)
    prompt = texts(1)[0][:20]
    sampling = SamplingParams(max_new_tokens=30, ignore_eos=True)
    (output,) = engine.generate(prompt, sampling, mode)
    text = prompt + output.outputs[0].token_ids
    readings = engine.exit_readings(text, mode)
    assert readings.layers == (2, 4)
    confidences = torch.tensor(output.outputs[0].confidences)
    torch.testing.assert_close(readings.values[19:-1, -1], confidences, atol=1e-5, rtol=1e-4)
    for place, layer in enumerate((2, 4)):
        best = engine.logits(text, Exit(layer)).argmax(-1)
        assert readings.tokens[:, place].tolist() == best.tolist()
    assert readings.tokens[:, 2].tolist() == engine.logits(text).argmax(-1).tolist()


@pytest.mark.parametrize("shortlist", [None, 100])
def test_a_threshold_keeps_its_share_of_new_texts(engine, shortlist):
    found = calibrate(engine, texts(150), agreement=0.8, confidence=0.9, shortlist=shortlist)
    assert found.found_agreement > 0.8
    assert found.mean_layer < 6
    mode = EarlyExit(found.threshold, shortlist=shortlist)
    fresh = [engine.exit_readings(text, mode) for text in texts(40, seed=2)]
    kept = [agreements(r, "max_prob", found.threshold)[CONTEXT:].float() for r in fresh]
    assert float(torch.cat(kept).mean()) > 0.8
    assert all(int(taken_exits(r, "max_prob", 1.1).min()) == 2 for r in fresh)


def test_too_little_text_is_refused(engine):
    with pytest.raises(ValueError, match=r"2 windows of text show it for no threshold"):
        calibrate(engine, texts(2), agreement=0.99, confidence=0.99)
    with pytest.raises(ValueError, match="no window of 128 tokens"):
        calibrate(engine, [[1, 2, 3]])


def test_a_request_uses_the_threshold_beside_its_model(engine, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(engine.checkpoint.folder, folder)
    found = calibrate(engine, texts(100), agreement=0.7)
    write_calibration(folder, found)
    assert write_calibration(folder, found) == folder / FILE_NAME
    assert read_calibrations(folder) == [found]
    other = Engine.from_pretrained(
        folder,
        dtype="float32",
        vocab_projection_mode="SHARED_PROJECTION_DIRECT",
        lm_head_layer_indices=[2, 4, 6],
    )
    sampling = SamplingParams(max_new_tokens=20)
    asked, given = (
        other.generate([1, 2, 3], sampling, mode)[0].outputs[0]
        for mode in (EarlyExit(calibrated=0.7), EarlyExit(found.threshold))
    )
    assert asked.exit_layers == given.exit_layers
    message = "no threshold was found for margin.*there are: 0.7 for max_prob at layers \\[2, 4\\]"
    with pytest.raises(ValueError, match=message):
        other.generate([1], decoding=EarlyExit(measure="margin", calibrated=0.7))


def test_what_a_followed_text_meets_is_what_its_own_writing_meets(engine):
    """A mode that follows its own text chooses that text, by way of the same exits."""
    prompts = [text[:20] for text in texts(5)]
    sampling = SamplingParams(max_new_tokens=30, ignore_eos=True)
    for mode in (EarlyExit(0.3, kv="copy"), EarlyExit(0.3), Exit(4)):
        written = [output.outputs[0] for output in engine.generate(prompts, sampling, mode)]
        whole = [p + each.token_ids for p, each in zip(prompts, written, strict=True)]
        followed = engine.follow(whole, 20, mode)
        assert [each.token_ids for each in followed] == [each.token_ids for each in written]
        assert [each.exit_layers for each in followed] == [each.exit_layers for each in written]


def test_a_followed_text_goes_on_as_it_is_given(engine):
    text = texts(1)[0]
    (found,) = engine.follow([text], 30, Exit(4))
    assert found.token_ids == engine.logits(text, Exit(4)).argmax(-1).tolist()[29:-1]


def test_a_threshold_for_copied_keys_and_values_is_found_with_them(engine, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(engine.checkpoint.folder, folder)
    found = calibrate(engine, texts(40), measure="patience", agreement=0.5, kv="copy")
    mode = EarlyExit(found.threshold, "patience", kv="copy")
    followed = engine.follow(texts(40), CONTEXT, mode)
    full = [engine.logits(text).argmax(-1).tolist()[CONTEXT - 1 : -1] for text in texts(40)]
    equal = [
        one == other
        for each, row in zip(followed, full, strict=True)
        for one, other in zip(each.token_ids, row, strict=True)
    ]
    layers = [layer for each in followed for layer in each.exit_layers]
    assert found.found_agreement == pytest.approx(sum(equal) / len(equal))
    assert found.mean_layer == pytest.approx(sum(layers) / len(layers))
    assert found.mean_layer < 6
    write_calibration(folder, found)
    other = Engine.from_pretrained(
        folder,
        dtype="float32",
        vocab_projection_mode="SHARED_PROJECTION_DIRECT",
        lm_head_layer_indices=[2, 4, 6],
    )
    assert other.generate([1, 2], decoding=replace(mode, threshold=None, calibrated=0.5))
    with pytest.raises(ValueError, match=r"kv='recompute'.*layers \[2, 4\] with kv='copy'"):
        other.generate([1, 2], decoding=EarlyExit(measure="patience", calibrated=0.5))


def test_without_a_file_the_request_is_refused(engine):
    with pytest.raises(ValueError, match="run `multiexit calibrate`.*there are: none"):
        engine.generate([1], decoding=EarlyExit(calibrated=0.95))


def test_the_command_writes_the_file(engine, tmp_path):
    from typer.testing import CliRunner

    folder = tmp_path / "model"
    shutil.copytree(engine.checkpoint.folder, folder)
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(3).choices("abcdefgh ", k=6000)))
    options = ["--texts", str(text), "--agreement", "0.05", "--layers", "2,4"]
    result = CliRunner().invoke(app, ["calibrate", str(folder), *options])
    assert result.exit_code == 0, result.output
    (found,) = read_calibrations(folder)
    assert found.layers == (2, 4)
    assert found.agreement == 0.05


@pytest.mark.parametrize(("mean", "count", "limit"), [(0.01, 300, 0.05), (0.0, 20, 0.1)])
def test_p_values_are_those_of_hoeffding_and_bentkus(mean, count, limit):
    kl = 0.0 if not mean else mean * torch.tensor(mean / limit).log().item()
    kl += (1 - mean) * torch.tensor((1 - mean) / (1 - limit)).log().item()
    hoeffding = torch.tensor(-count * kl).exp().item()
    bentkus = 2.718281828 * binom.cdf(-(-count * mean // 1), count, limit)
    assert p_value(mean, count, limit) == pytest.approx(min(hoeffding, bentkus), rel=1e-4)


def test_a_mean_at_the_limit_proves_nothing():
    assert p_value(0.05, 10**6, 0.05) == 1


@pytest.mark.parametrize("measure", ["max_prob", "margin", "similarity", "entropy", "patience"])
def test_thresholds_go_from_strict_to_lax(measure):
    found = thresholds(measure, 3, 50257)
    assert found == sorted(found, reverse=measure != "entropy")
