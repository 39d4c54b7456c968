from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multiexit_engine.train.causal import train_causal
from multiexit_engine.train.causal_config import TrainingProgress
from multiexit_engine.train.folder import read_network
from multiexit_engine.train.optimizers import rate_factor
from tests.train.tiny import LAYER_SPECIFIC, tiny_training, write_books


class Interruption(Exception):
    """Stands for whatever ends a run early."""


def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiexit_engine.train.loop.LOG_EVERY_STEPS", 3)
    books = write_books(tmp_path / "books")

    def interrupt(progress: TrainingProgress) -> None:
        raise Interruption

    train_causal(tiny_training(books, tmp_path / "whole"))
    with pytest.raises(Interruption):
        train_causal(tiny_training(books, tmp_path / "halves"), on_progress=interrupt)
    train_causal(tiny_training(books, tmp_path / "halves", resume=True))
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    halves = load_file(tmp_path / "halves" / "model.safetensors")
    torch.testing.assert_close(halves, whole, rtol=0, atol=0)


def test_training_beats_an_even_guess_over_the_words_of_the_text(tmp_path: Path) -> None:
    books = write_books(tmp_path / "books")
    config = tiny_training(books, tmp_path / "model", max_steps=60, checkpoint_every=100)
    report = train_causal(config)
    assert report.exits[-1].perplexity < 40


def test_a_written_folder_reads_back_as_the_network_that_was_measured(tmp_path: Path) -> None:
    books = write_books(tmp_path / "books")
    train_causal(tiny_training(books, tmp_path / "model"))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    state = read_network(tmp_path / "model").checkpoint_state(torch.bfloat16)
    torch.testing.assert_close(state, weights, rtol=0, atol=0)


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    shares = [(0, 0.0), (1, 0.1), (5, 0.5), (9, 0.8), (10, 1.0)]
    rates = [rate_factor(step, share, 2, 0.4) for step, share in shares]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"projection_mode": LAYER_SPECIFIC}, "projection_mode"),
        ({"exit_layers": (2, 3)}, "exit_layers"),
        ({"micro_batch_tokens": 96}, "batch_tokens"),
        ({"block_size": 128}, "block_size"),
    ],
)
def test_a_contradictory_config_names_the_field(
    tmp_path: Path, changes: dict[str, object], field: str
) -> None:
    with pytest.raises(ValueError, match=field):
        tiny_training(tmp_path, tmp_path, **changes)
