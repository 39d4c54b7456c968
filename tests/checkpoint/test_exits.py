"""Which exits and which projection come out of config, keys and arguments."""

import pytest
import torch

from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.config import VocabularyProjectionMode as Mode
from multiexit_engine.errors import CheckpointError
from tests.checkpoint.harness import HIDDEN, VOCAB, head_name, heads, matrices, matrix_name, write

LAYER, CAST, DIRECT = (
    Mode.LAYER_SPECIFIC_PROJECTION,
    Mode.SHARED_PROJECTION_CAST_OUTPUTS,
    Mode.SHARED_PROJECTION_DIRECT,
)


def exits_of(folder, **options):
    config = open_checkpoint(folder, **options).config
    return config.exit_layers, config.projection


def test_a_plain_checkpoint_has_no_exits(tmp_path):
    assert exits_of(write(tmp_path)) == ((), None)


def test_indices_of_the_config_are_sorted(tmp_path):
    folder = write(tmp_path, heads(4, 3, 1), lm_head_layer_indices=[4, 3, 1])
    assert exits_of(folder) == ((1, 3, 4), LAYER)


def test_conversion_matrices_mean_cast(tmp_path):
    folder = write(tmp_path, matrices(3, 1), lm_head_layer_indices=[4, 3, 1])
    assert exits_of(folder) == ((1, 3, 4), CAST)


def test_indices_without_keys_mean_direct(tmp_path):
    assert exits_of(write(tmp_path, lm_head_layer_indices=[2, 1])) == ((1, 2), DIRECT)


def test_keys_without_indices_are_found(tmp_path):
    assert exits_of(write(tmp_path, heads(2, 4))) == ((2, 4), LAYER)


def test_matrices_without_indices_add_the_last_layer(tmp_path):
    assert exits_of(write(tmp_path, matrices(2, 1))) == ((1, 2, 4), CAST)


def test_matrices_to_another_last_layer_are_not_ours(tmp_path):
    extra = {"name_to_conv_matrix.2_to_6.weight": torch.zeros(HIDDEN, HIDDEN)}
    assert exits_of(write(tmp_path, extra)) == ((), None)


@pytest.mark.parametrize("name", ["SHARED_PROJECTION_DIRECT", "shared_projection_direct"])
def test_the_mode_in_the_config_wins_over_the_keys(tmp_path, name):
    folder = write(tmp_path, heads(2, 4), lm_head_layer_indices=[2, 4], vocab_projection_mode=name)
    assert exits_of(folder) == ((2, 4), DIRECT)


def test_the_mode_given_wins_over_the_config(tmp_path):
    folder = write(
        tmp_path,
        heads(2, 4),
        lm_head_layer_indices=[2, 4],
        vocab_projection_mode="SHARED_PROJECTION_DIRECT",
    )
    assert exits_of(folder, vocab_projection_mode="layer_specific_projection") == ((2, 4), LAYER)


def test_direct_is_legal_beside_exit_heads(tmp_path):
    folder = write(tmp_path, heads(2, 4), lm_head_layer_indices=[2, 4])
    assert exits_of(folder, vocab_projection_mode=DIRECT) == ((2, 4), DIRECT)


def test_direct_without_indices_makes_every_layer_an_exit(tmp_path):
    assert exits_of(write(tmp_path), vocab_projection_mode=DIRECT) == ((1, 2, 3, 4), DIRECT)


@pytest.mark.parametrize("given", [(4, 1), [1, 4], "4;1", " 4 ; 1 ", "4, 1", (1, 4, 4)])
def test_indices_given_win_over_the_config(tmp_path, given):
    folder = write(tmp_path, heads(1, 3, 4), lm_head_layer_indices=[4, 3, 1])
    assert exits_of(folder, lm_head_layer_indices=given) == ((1, 4), LAYER)


def test_indices_given_to_a_plain_checkpoint_are_direct_exits(tmp_path):
    assert exits_of(write(tmp_path), lm_head_layer_indices=(3,)) == ((3,), DIRECT)


@pytest.mark.parametrize("given", [(0, 2), (5,), (-1,), "2;5", (True,), (2.0,), "a;2", "", ()])
def test_indices_out_of_range_name_the_range(tmp_path, given):
    with pytest.raises(ValueError, match=r"lm_head_layer_indices=.*allowed are layers from 1 to 4"):
        open_checkpoint(write(tmp_path), lm_head_layer_indices=given)


@pytest.mark.parametrize("given", ["original;2", ("original", 2)])
def test_original_among_the_indices_is_explained(tmp_path, given):
    with pytest.raises(ValueError, match="own head is always there"):
        open_checkpoint(write(tmp_path), lm_head_layer_indices=given)


@pytest.mark.parametrize("stated", [[5], [0], "x", 3, {"a": 1}])
def test_bad_indices_of_the_config_are_the_checkpoints_fault(tmp_path, stated):
    with pytest.raises(CheckpointError, match="config.json: lm_head_layer_indices"):
        open_checkpoint(write(tmp_path, lm_head_layer_indices=stated))


def test_a_bad_mode_of_the_config_is_the_checkpoints_fault(tmp_path):
    with pytest.raises(CheckpointError, match="config.json: vocab_projection_mode='maybe'"):
        open_checkpoint(write(tmp_path, vocab_projection_mode="maybe"))


def test_a_bad_mode_given_names_the_modes(tmp_path):
    with pytest.raises(ValueError, match="vocab_projection_mode='maybe': allowed are LAYER"):
        open_checkpoint(write(tmp_path), vocab_projection_mode="maybe")


def test_a_missing_exit_head_is_named_with_the_modes_that_would_work(tmp_path):
    folder = write(tmp_path, heads(2), lm_head_layer_indices=[2, 3])
    with pytest.raises(
        CheckpointError, match=rf"{head_name(3)}.*LAYER_SPECIFIC\w+ for layers \[2\].*DIRECT"
    ):
        open_checkpoint(folder)


def test_a_missing_matrix_is_named(tmp_path):
    folder = write(tmp_path, matrices(2), lm_head_layer_indices=[2, 3, 4])
    with pytest.raises(CheckpointError, match=matrix_name(3)):
        open_checkpoint(folder)


def test_the_wrong_mode_names_the_one_that_would_work(tmp_path):
    folder = write(tmp_path, heads(2, 3), lm_head_layer_indices=[2, 3])
    with pytest.raises(CheckpointError, match=r"LAYER_SPECIFIC_PROJECTION for layers \[2, 3\]"):
        open_checkpoint(folder, vocab_projection_mode=CAST)


@pytest.mark.parametrize("mode", [LAYER, CAST])
def test_a_mode_that_needs_weights_on_a_plain_checkpoint_is_refused(tmp_path, mode):
    with pytest.raises(CheckpointError, match="SHARED_PROJECTION_DIRECT for any layer"):
        open_checkpoint(write(tmp_path), vocab_projection_mode=mode)


@pytest.mark.parametrize(
    "extra",
    [
        {head_name(2): torch.zeros(VOCAB, HIDDEN + 1)},
        {head_name(2): torch.zeros(VOCAB + 1, HIDDEN)},
        {matrix_name(2): torch.zeros(HIDDEN, HIDDEN + 1)},
    ],
)
def test_an_exit_weight_that_does_not_fit_is_found_when_the_checkpoint_is_opened(tmp_path, extra):
    folder = write(tmp_path, extra, lm_head_layer_indices=[2])
    with pytest.raises(CheckpointError, match=f"{next(iter(extra))}.*has the shape"):
        open_checkpoint(folder)


def test_weights_of_exits_that_were_not_selected_may_be_missing(tmp_path):
    folder = write(tmp_path, heads(2), lm_head_layer_indices=[2, 3])
    assert exits_of(folder, lm_head_layer_indices=(2,)) == ((2,), LAYER)
