"""Probes learn from text where an exit's token is that of the last layer."""

import random
import shutil

import pytest
import torch
from typer.testing import CliRunner

from multiexit_engine import EarlyExit, Engine, SamplingParams
from multiexit_engine.checkpoint.probes import FILE_NAME
from multiexit_engine.cli import app
from multiexit_engine.evaluate.calibration import calibrate
from multiexit_engine.layers.exit_probes import probe_chances
from multiexit_engine.train import train_probes
from multiexit_engine.train.probes import WINDOW, fit_probe
from tests.tiny import save_gpt2

OPTIONS = {
    "dtype": "float32",
    "vocab_projection_mode": "SHARED_PROJECTION_DIRECT",
    "lm_head_layer_indices": [2, 4, 6],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("learned"))


def texts(count, seed=1):
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(WINDOW)] for _ in range(count)]


def test_a_probe_finds_a_rule_of_the_states():
    draw = torch.Generator().manual_seed(1)
    states = torch.randn(6000, 8, generator=draw) * 3 + 1
    is_right = (states[:, 0] - 1).abs() < 2
    # of the order of the rows and the first weights
    torch.manual_seed(0)
    probe = fit_probe(states[:5000], is_right[:5000], 16, 20, 1e-2)
    found = probe_chances(probe, states[5000:]) > 0.5
    assert float((found == is_right[5000:]).float().mean()) > 0.93


def test_a_trained_probe_is_read_calibrated_and_followed(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    engine = Engine.from_pretrained(tmp_path / "model", **OPTIONS)
    reports = train_probes(engine, texts(60), units=8, layers=(2, 4))
    assert [report.layer for report in reports] == [2, 4]
    assert [report.num_tokens for report in reports] == [54 * WINDOW] * 2
    assert all(0 < report.agreement < 1 and report.ranking > 0.55 for report in reports)
    found = calibrate(engine, texts(40, seed=2), measure="probe", agreement=0.3)
    assert found.probes is not None and found.mean_layer < 6
    mode = EarlyExit(found.threshold, "probe")
    (output,) = engine.generate([1, 2, 3], SamplingParams(max_new_tokens=20), mode)
    assert len(output.outputs[0].confidences) == len(output.outputs[0].token_ids)


def test_training_twice_gives_the_same_probes(folder, tmp_path):
    engine = Engine.from_pretrained(folder, **OPTIONS)
    files = []
    for name in ("one", "other"):
        # a folder that is not there yet
        train_probes(engine, texts(6), tmp_path / name, units=4, epochs=1)
        files.append((tmp_path / name / FILE_NAME).read_bytes())
    assert files[0] == files[1]


def test_a_threshold_does_not_outlive_its_probes(folder, tmp_path):
    from multiexit_engine.checkpoint.calibration import write_calibration

    shutil.copytree(folder, tmp_path / "model")
    engine = Engine.from_pretrained(tmp_path / "model", **OPTIONS)
    train_probes(engine, texts(6), units=4, epochs=1)
    found = calibrate(engine, texts(20, seed=2), measure="probe", agreement=0.1)
    write_calibration(tmp_path / "model", found)
    mode = EarlyExit(measure="probe", calibrated=0.1)
    assert engine.generate([1, 2], decoding=mode)
    train_probes(engine, texts(6), units=4, epochs=2)
    with pytest.raises(ValueError, match="there are: 0.1 for probe .* of other probes"):
        Engine.from_pretrained(tmp_path / "model", **OPTIONS).generate([1, 2], decoding=mode)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([[1, 2, 3]], {}, "the texts hold 0 windows of 128 tokens: give more"),
        (texts(3), {"units": 0}, "units=0: must be 1 or more"),
        (texts(3), {"layers": (3,), "units": 4}, "EarlyExit.layers=3"),
    ],
)
def test_what_cannot_be_learned_is_refused(folder, given, options, message):
    with pytest.raises(ValueError, match=message):
        train_probes(Engine.from_pretrained(folder, dtype="float32"), given, **options)


def test_the_command_writes_the_file(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(3).choices("abcdefgh ", k=2000)))
    command = ["train", "probes", str(tmp_path / "model"), "--texts", str(text), "--units", "4"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    mode = EarlyExit(0.5, "probe")
    assert Engine.from_pretrained(tmp_path / "model").generate([1, 2], decoding=mode)
