"""Gate probes learn from answers how sure a head is of a state."""

import random
import shutil

import pytest
import torch
from typer.testing import CliRunner

from multiexit_engine import Engine, Parallel
from multiexit_engine.checkpoint.probes import GATE_PROBES
from multiexit_engine.cli import app
from multiexit_engine.decoding.forecasts import foretold
from multiexit_engine.layers.gate_probes import probe_forecast
from multiexit_engine.train import train_gates
from multiexit_engine.train.gates import fit_gate
from tests.gate_probes import random_sources
from tests.golden.acd_checkpoints import byte_tokenizer
from tests.golden.test_elmer_golden import FOLDER
from tests.tiny import save_gpt2


def test_a_probe_finds_medians_and_scales():
    draw = torch.Generator().manual_seed(1)
    states = torch.randn(8000, 6, generator=draw) * 2 + 1
    scales = torch.stack([states[:, 1].abs() * 0.3 + 0.1, torch.full((8000,), 0.05)], 1)
    uniform = torch.rand(8000, 2, generator=draw).clamp(1e-4, 1 - 1e-4)
    wanted = torch.stack([3 * states[:, 0], states[:, 0] - 7], 1) + scales * uniform.logit()
    # of the order of the rows and the first weights
    torch.manual_seed(0)
    found = probe_forecast(fit_gate(states[:7000], wanted[:7000], 32, 20, 1e-2), states[7000:])
    held, scales = wanted[7000:], scales[7000:]
    for share in (0.1, 0.5, 0.9):
        reach = found.centres + found.log_scales.exp() * torch.tensor(share).logit()
        below = (held < reach).float().mean(0)
        assert torch.allclose(below, torch.tensor(share), atol=0.06)
    pair = torch.stack([found.log_scales[:, 0], scales[:, 0].log()])
    assert pair.corrcoef()[0, 1] > 0.4


def test_what_is_foretold_has_ends():
    found = foretold(torch.tensor([0.0, -0.6931472, -9.0]), torch.tensor([0.0, 1.0, 8.0]))
    assert found.isfinite().all()
    torch.testing.assert_close(found[1], torch.zeros(2), atol=1e-6, rtol=0)
    assert (found[:, 0].diff() < 0).all() and (found[:, 1].diff() > 0).all()


def test_training_twice_gives_the_same_probes(tmp_path):
    engine = Engine.from_pretrained(FOLDER / "t1", dtype="float32")
    files = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        reports = train_gates(engine, random_sources(12, 1), tmp_path / name, units=4, epochs=2)
        files.append((tmp_path / name / GATE_PROBES.file_name).read_bytes())
    assert files[0] == files[1]
    assert [report.layer for report in reports] == [1, 2, 3]
    assert all(report.num_rows > 0 for report in reports)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([[5, 6]], {}, "1 sources are short enough for the model: give more"),
        ([[5] * 65, [6] * 99], {}, "0 sources are short enough"),
        ([[5], [6]], {"units": 0}, "units=0: must be 1 or more"),
        ([[5], [6]], {"length_ratio": -1.0}, "Parallel.length"),
    ],
)
def test_what_cannot_be_learned_is_refused(given, options, message):
    engine = Engine.from_pretrained(FOLDER / "t1", dtype="float32")
    with pytest.raises(ValueError, match=message):
        train_gates(engine, given, **options)


def test_a_model_that_is_no_elmer_is_refused(tmp_path):
    engine = Engine.from_pretrained(save_gpt2(tmp_path), dtype="float32")
    with pytest.raises(ValueError, match="Parallel"):
        train_gates(engine, [[1, 2], [3, 4]])


def test_the_command_reads_lines_up_to_a_tab_and_writes_the_file(tmp_path):
    folder = shutil.copytree(FOLDER / "t1", tmp_path / "model")
    byte_tokenizer().save_pretrained(folder)
    draw = random.Random(3)
    lines = ["".join(draw.choices("abcdefgh ", k=20)) + "\ttarget" * (i % 2) for i in range(8)]
    (tmp_path / "pairs.tsv").write_text("\n".join([*lines, ""]))
    command = ["train", "gates", str(folder), "--sources", str(tmp_path / "pairs.tsv")]
    result = CliRunner().invoke(app, [*command, "--units", "4", "--epochs", "1"])
    assert result.exit_code == 0, result.output
    mode = Parallel("confidence", threshold=1.0, length=4, gate_chance=0.5)
    assert Engine.from_pretrained(folder).generate("abc", decoding=mode)
