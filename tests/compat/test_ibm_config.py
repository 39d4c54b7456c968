"""MultiExitConfiguration means what it means in IBM's library."""

from functools import partial

import pytest
import torch

from multiexit_engine.compat.ibm_config import (
    MultiExitConfiguration,
    VocabularyProjectionMode,
    calculate_contrasted_logits,
)
from multiexit_engine.params import Contrast, Exit, Original


def test_the_default_is_the_original_head():
    config = MultiExitConfiguration()
    assert config.decoding == Original()
    assert config.vocab_projection_mode is VocabularyProjectionMode.LAYER_SPECIFIC_PROJECTION
    assert config.get_description() == "original_head"


def test_fields_come_in_ibms_order():
    config = MultiExitConfiguration(
        "shared_projection_direct", "24;12", False, False, None, (24, 12)
    )
    assert config.vocab_projection_mode is VocabularyProjectionMode.SHARED_PROJECTION_DIRECT
    assert config.lm_head_layer_indices == (24, 12)
    assert config.decoding == Contrast(24, 12, alpha=0.1, min_candidates=1)


@pytest.mark.parametrize(
    ("fields", "decoding", "description"),
    [
        ({"output_layer_index": 12}, Exit(12), "layer_12"),
        ({"output_layer_index": "12"}, Exit(12), "layer_12"),
        ({"contrast_layer_indices": (24, 12)}, Contrast(24, 12), "24_vs_12"),
        ({"contrast_layer_indices": [24, 12]}, Contrast(24, 12), "24_vs_12"),
        ({"contrast_layer_indices": "24;12"}, Contrast(24, 12), "24_vs_12"),
        ({"contrast_layer_indices": "original;12"}, Contrast("original", 12), "original_vs_12"),
        ({"contrast_layer_indices": (8, 8)}, Contrast(8, 8), "8_vs_8"),
        (
            {"contrast_layer_indices": (24, 12), "output_layer_index": 6},
            Contrast(24, 12),
            "24_vs_12",
        ),
    ],
)
def test_exits_choose_the_mode(fields, decoding, description):
    for use_original_head in (False, "False"):
        config = MultiExitConfiguration(use_original_head=use_original_head, **fields)
        assert config.decoding == decoding
        assert config.get_description() == description


def test_the_original_head_goes_before_an_output_layer():
    assert MultiExitConfiguration(output_layer_index=6).decoding == Original()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"contrast_layer_indices": (24, 12)}, "contradicts use_original_head=True"),
        ({"vocab_projection_mode": "direct"}, "SHARED_PROJECTION_DIRECT"),
        ({"use_original_head": "false"}, "use_original_head='false'"),
        ({"freeze_parameters": 1}, "freeze_parameters=1"),
        ({"lm_head_layer_indices": "24,12"}, "lm_head_layer_indices='24,12'"),
        ({"lm_head_layer_indices": ("original", 12)}, "the original head is always there"),
        ({"output_layer_index": "twelve"}, "output_layer_index='twelve'"),
        (
            {"use_original_head": False, "contrast_layer_indices": "12;original"},
            "the lower a layer number",
        ),
        ({"use_original_head": False, "contrast_layer_indices": (1, 2, 3)}, "must be"),
        ({"contrast_function": 3}, "contrast_function=3"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        MultiExitConfiguration(**fields)


def test_an_exit_must_be_chosen_when_the_original_head_is_off():
    with pytest.raises(ValueError, match="output_layer_index or contrast_layer_indices"):
        _ = MultiExitConfiguration(use_original_head=False).decoding


def test_parameters_of_the_standard_function_become_numbers_of_the_mode():
    function = partial(calculate_contrasted_logits, minimum_candidates=5, alpha=0.3)
    config = MultiExitConfiguration(
        use_original_head=False, contrast_layer_indices=(24, 12), contrast_function=function
    )
    assert config.decoding == Contrast(24, 12, alpha=0.3, min_candidates=5)


def test_another_function_is_kept():
    def function(upper, lower):
        return upper - lower

    config = MultiExitConfiguration(
        use_original_head=False, contrast_layer_indices=(24, 12), contrast_function=function
    )
    assert config.decoding == Contrast(24, 12, function=function)


def test_contrasted_logits_share_the_mass_of_the_candidates():
    upper = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().view(1, 1, 4)
    lower = torch.tensor([0.6, 0.1, 0.1, 0.2]).log().view(1, 1, 4)
    found = calculate_contrasted_logits(upper, lower, alpha=0.2).exp().flatten()
    ratios = torch.tensor([0.5 / 0.6, 0.3 / 0.1, 0.15 / 0.1])
    wanted = torch.cat([0.95 * ratios / ratios.sum(), torch.tensor([0.05])])
    torch.testing.assert_close(found, wanted)


def test_contrasted_logits_of_half_precision_hold_no_nan():
    upper, lower = torch.randn(2, 3, 1, 500, generator=torch.manual_seed(0)) * 20
    found = calculate_contrasted_logits(upper.half(), lower.half())
    assert not found.isnan().any()
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(3, 1))


def test_contrasted_logits_take_one_row_of_any_shape():
    upper, lower = torch.randn(2, 7, generator=torch.manual_seed(1))
    flat = calculate_contrasted_logits(upper, lower)
    assert flat.shape == (7,)
    torch.testing.assert_close(
        calculate_contrasted_logits(upper.view(1, 1, 7), lower.view(1, 1, 7)).flatten(), flat
    )


def test_more_candidates_than_tokens_are_refused():
    with pytest.raises(ValueError, match=r"minimum_candidates=8: must be in 0\.\.7"):
        calculate_contrasted_logits(torch.zeros(7), torch.zeros(7), minimum_candidates=8)


def test_alpha_of_one_keeps_the_distribution():
    upper, lower = torch.randn(2, 9, generator=torch.manual_seed(2))
    found = calculate_contrasted_logits(upper, lower, alpha=1.0)
    torch.testing.assert_close(found, upper.log_softmax(-1))
