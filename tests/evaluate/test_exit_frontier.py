"""A sweep of thresholds: quality, depth and speed of each."""

import json
import random

import pytest
from typer.testing import CliRunner

from multiexit_engine import Engine, Exit
from multiexit_engine.cli import app
from multiexit_engine.evaluate.exit_frontier import measure_frontier
from tests.tiny import save_gpt2

TEXT = "".join(random.Random(3).choices("abcdefgh ", k=600))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("frontier"))


def test_a_sweep_goes_from_full_depth_to_the_first_exit(folder):
    engine = Engine.from_pretrained(folder, dtype="float32")
    points = measure_frontier(
        engine, TEXT, thresholds=(1.1, 0.3, 0.0), num_prompts=3, max_new_tokens=8, num_runs=1
    )
    full, middle, first = points
    assert (full.agreement, full.mean_layer, full.shares) == (1.0, 6.0, {6: 1.0})
    assert (first.mean_layer, first.shares) == (2.0, {2: 1.0})
    assert set(middle.shares) <= {2, 4, 6}
    assert 2 < middle.mean_layer < 6
    ids = engine.tokenizer(TEXT)["input_ids"]
    windows = [ids[i : i + 128] for i in range(0, 512, 128)]
    assert full.perplexity == pytest.approx(_perplexity(engine, windows, None), rel=1e-3)
    assert first.perplexity == pytest.approx(_perplexity(engine, windows, Exit(2)), rel=1e-3)


def _perplexity(engine, windows, mode):
    total = sum(score.total for score in engine.score(windows, mode))
    return 2.718281828 ** (-total / (127 * len(windows)))


def test_the_command_prints_and_draws(folder, tmp_path):
    text, plot = tmp_path / "text.txt", tmp_path / "exits.png"
    text.write_text(TEXT)
    options = ["--num-prompts", "1", "--max-new-tokens", "4", "--num-runs", "1", "--json"]
    command = ["bench", "exits", "--model", str(folder), "--text", str(text), "--plot", str(plot)]
    result = CliRunner().invoke(app, [*command, "--thresholds", "1.1,0.0", *options])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert [row["threshold"] for row in rows] == [1.1, 0.0]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_text_without_a_window_is_refused(folder):
    engine = Engine.from_pretrained(folder, dtype="float32")
    with pytest.raises(ValueError, match="no window of 128 tokens"):
        measure_frontier(engine, "short")
