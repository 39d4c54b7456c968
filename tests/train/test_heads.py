from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multiexit_engine.checkpoint.calibration import FILE_NAME as CALIBRATIONS
from multiexit_engine.config import VocabularyProjectionMode
from multiexit_engine.train.causal import train_causal
from multiexit_engine.train.folder import read_network
from multiexit_engine.train.heads import HeadTrainingConfig, train_exit_heads
from tests.train.tiny import CAST, DIRECT, LAYER_SPECIFIC, tiny_training, write_books


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    books = write_books(tmp_path / "books")
    train_causal(tiny_training(books, tmp_path / "checkpoint", projection_mode=DIRECT))
    return tmp_path / "checkpoint"


def head_training(checkpoint: Path, mode: VocabularyProjectionMode) -> HeadTrainingConfig:
    return HeadTrainingConfig(
        checkpoint=checkpoint,
        corpus=checkpoint.parent / "books",
        output=checkpoint.parent / "with_heads",
        exit_layers=(1, 3),
        projection_mode=mode,
        block_size=32,
        batch_size=8,
        max_steps=30,
        learning_rate=1e-2,
        warmup_steps=2,
    )


@pytest.mark.parametrize("mode", [LAYER_SPECIFIC, CAST])
def test_the_loss_of_every_exit_falls(checkpoint: Path, mode: VocabularyProjectionMode) -> None:
    history = train_exit_heads(head_training(checkpoint, mode))
    assert history[-1][1] < history[0][1] - 0.3
    assert history[-1][3] < history[0][3] - 0.3


@pytest.mark.parametrize("mode", [LAYER_SPECIFIC, CAST])
def test_the_decoder_stays_as_it_was(checkpoint: Path, mode: VocabularyProjectionMode) -> None:
    train_exit_heads(head_training(checkpoint, mode))
    before = load_file(checkpoint / "model.safetensors")
    after = load_file(checkpoint.parent / "with_heads" / "model.safetensors")
    torch.testing.assert_close({name: after[name] for name in before}, before, rtol=0, atol=0)


def test_the_written_heads_carry_the_names_of_released_checkpoints(checkpoint: Path) -> None:
    train_exit_heads(head_training(checkpoint, LAYER_SPECIFIC))
    names = set(load_file(checkpoint.parent / "with_heads" / "model.safetensors"))
    names -= set(load_file(checkpoint / "model.safetensors"))
    assert names == {
        "name_to_lm_exit_head.lm_head_1.weight",
        "name_to_lm_exit_head.lm_head_3.weight",
    }


def test_the_written_folder_says_which_exits_it_has(checkpoint: Path) -> None:
    train_exit_heads(head_training(checkpoint, CAST))
    network = read_network(checkpoint.parent / "with_heads")
    assert (network.layers, network.heads.mode) == ((1, 3), CAST)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": 0}, "max_steps=0: must be 1 or more"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: must be a number above 0"),
        ({"block_size": 4096}, "block_size=4096: must be at most the model's 64 positions"),
        ({"checkpoint": Path("no-such-folder")}, "must be a folder with config.json"),
        ({"device": "cuda:9"}, "device='cuda:9': this machine has"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_work(
    checkpoint: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_exit_heads(replace(head_training(checkpoint, CAST), **change))


def test_thresholds_of_other_exits_do_not_come_along(checkpoint: Path) -> None:
    (checkpoint / CALIBRATIONS).write_text("[]\n")
    train_exit_heads(replace(head_training(checkpoint, CAST), max_steps=1))
    assert not (checkpoint.parent / "with_heads" / CALIBRATIONS).exists()


def test_heads_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SHARED_PROJECTION_DIRECT"):
        head_training(tmp_path / "checkpoint", DIRECT)
