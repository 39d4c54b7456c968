import pytest

from multiexit_engine.config import ModelConfig, VocabularyProjectionMode
from multiexit_engine.decoding.plan import (
    ExitPlanner,
    Segment,
    plan_exits,
    plan_segments,
    resolve_mode,
)
from multiexit_engine.layers.exit_heads import Head
from multiexit_engine.params import Contrast, Exit, Original


def config(exits=(2, 4, 6, 8)):
    return ModelConfig(
        model_type="gpt2",
        vocab_size=11,
        hidden_size=4,
        num_layers=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
        max_position_embeddings=16,
        attention_windows=(None,) * 8,
        tie_word_embeddings=True,
        exit_layers=exits,
        projection=VocabularyProjectionMode.LAYER_SPECIFIC_PROJECTION if exits else None,
    )


ORIGINAL = Head(8, True)


@pytest.mark.parametrize(
    ("mode", "upper", "lower", "depth"),
    [
        (Original(), ORIGINAL, None, 8),
        (Exit(4), Head(4, False), None, 4),
        (Exit(8), Head(8, False), None, 8),
        (Contrast(6, 2), Head(6, False), Head(2, False), 6),
        (Contrast("original", 4), ORIGINAL, Head(4, False), 8),
        (Contrast(4, 4), Head(4, False), Head(4, False), 4),
        (Contrast(2, 6), Head(2, False), Head(6, False), 6),
    ],
)
def test_heads_and_depth_of_a_mode(mode, upper, lower, depth):
    resolved = resolve_mode(mode, config())
    assert (resolved.upper, resolved.lower, resolved.depth) == (upper, lower, depth)


@pytest.mark.parametrize(
    ("mode", "field"),
    [
        (Exit(3), "Exit.layer=3"),
        (Exit(9), "Exit.layer=9"),
        (Contrast(5, 2), "Contrast.upper=5"),
        (Contrast("original", 7), "Contrast.lower=7"),
    ],
)
def test_a_missing_exit_is_named_with_those_there_are(mode, field):
    with pytest.raises(ValueError, match=f"{field}: this model has exits at layers 2, 4, 6, 8"):
        resolve_mode(mode, config())


def test_the_original_head_cannot_be_the_lower_one():
    with pytest.raises(ValueError, match=r"Contrast\.lower='original'"):
        Contrast(4, "original")


@pytest.mark.parametrize("mode", [Exit(4), Contrast("original", 4)])
def test_a_model_without_exits_says_how_to_get_them(mode):
    with pytest.raises(ValueError, match=r"no exits.*lm_head_layer_indices.*SHARED_PROJECTION_D"):
        resolve_mode(mode, config(exits=()))


def test_a_model_without_exits_has_its_own_head():
    assert resolve_mode(Original(), config(exits=())).upper == ORIGINAL


def test_rows_with_equal_heads_share_a_group():
    modes = [Original(), Contrast(6, 2), Exit(6), Contrast(6, 2, alpha=0.5, min_candidates=3)]
    plan = plan_exits([*modes, Original()], config())
    rows = {(group.upper, group.lower): group.rows for group in plan.groups}
    assert rows == {
        (ORIGINAL, None): (0, 4),
        (Head(6, False), Head(2, False)): (1, 3),
        (Head(6, False), None): (2,),
    }
    contrast = plan.groups[1]
    assert contrast.alphas == (0.1, 0.5) and contrast.min_candidates == (1, 3)
    assert plan.num_rows == 5


def test_hidden_states_are_kept_where_rows_read_them():
    modes = [Original(), Contrast(6, 2), Exit(6), Contrast(4, 4)]
    assert plan_exits(modes, config()).rows_at == {2: (1,), 4: (3,), 6: (1, 2), 8: (0,)}


def test_custom_functions_stand_apart():
    class Unhashable:
        __hash__ = None

        def __call__(self, upper, lower):
            return upper - lower

    function = Unhashable()
    modes = [Contrast(6, 2), Contrast(6, 2, function=function), Contrast(6, 2, function=function)]
    plan = plan_exits(modes, config())
    assert [group.rows for group in plan.groups] == [(0,), (1, 2)]
    assert plan.groups[1].function is function and plan.groups[1].alphas == ()


def test_planning_refuses_what_the_model_lacks():
    with pytest.raises(ValueError, match=r"Exit\.layer=5"):
        plan_exits([Original(), Exit(5)], config())


def test_no_rows_need_no_heads():
    plan = plan_exits([], config())
    assert plan.groups == () and plan.rows_at == {} and plan.num_rows == 0


@pytest.mark.parametrize(
    ("depths", "taps", "expected"),
    [
        ([8, 8], [8], [(0, 8, 2)]),
        ([8, 8], [2, 8], [(0, 2, 2), (2, 8, 2)]),
        ([8, 6, 6, 2], [2, 6, 8], [(0, 2, 4), (2, 6, 3), (6, 8, 1)]),
        ([6, 4], [], [(0, 4, 2), (4, 6, 1)]),
        ([], [], []),
    ],
)
def test_segments_end_at_taps_and_depths(depths, taps, expected):
    assert plan_segments(depths, taps) == tuple(Segment(*segment) for segment in expected)


def test_planner_plans_as_plan_exits_and_reuses_the_plan_of_the_same_modes():
    planner = ExitPlanner(config())
    batches = [[Original(), Contrast(6, 2)], [Exit(4)], [Contrast(6, 2, alpha=0.5)]] * 5
    for modes in batches:
        plan = planner.plan(modes)
        assert plan == plan_exits(modes, config())
        assert planner.plan(list(modes)) is plan
