"""Modes of decoding: their checks, their JSON and their command-line forms."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiexit_engine.params import (
    Contrast,
    DoLa,
    EarlyExit,
    Exit,
    Original,
    Parallel,
    SelfSpeculative,
    decoding_from_json,
    decoding_to_json,
    parse_decoding,
)

LAYERS = st.integers(1, 200)
TARGETS = st.one_of(
    st.just(Original()),
    st.builds(Exit, LAYERS),
    st.builds(
        Contrast,
        st.one_of(LAYERS, st.just("original")),
        LAYERS,
        st.floats(allow_nan=False, allow_infinity=False),
        st.integers(0, 1000),
    ),
    st.builds(
        DoLa,
        st.one_of(
            st.sampled_from(["low", "high"]),
            st.lists(st.integers(0, 200), min_size=1, max_size=9, unique=True),
        ),
        st.floats(0, 1),
        st.sampled_from(["exact", "reference"]),
        st.one_of(LAYERS, st.just("original")),
        st.sampled_from(["raw", "exits"]),
    ),
)
LENGTHS = st.one_of(st.integers(1, 99), st.floats(0.1, 9))
PARALLEL = st.one_of(
    st.builds(
        Parallel,
        st.just("confidence"),
        st.sampled_from(["entropy", "max_prob"]),
        st.floats(0, 9),
        st.none() | st.lists(LAYERS, min_size=1, max_size=4, unique=True),
        st.none() | LENGTHS | st.lists(LENGTHS, min_size=1, max_size=4),
        st.booleans(),
        st.integers(0, 4),
    ),
    st.builds(Parallel, st.just("prescribed"), layers=st.lists(LAYERS, min_size=1, max_size=9)),
    st.builds(Parallel, st.sampled_from(["none", "soft"]), length=st.none() | LENGTHS),
)
MODES = st.one_of(
    TARGETS,
    PARALLEL,
    st.builds(
        SelfSpeculative,
        LAYERS,
        st.one_of(st.integers(1, 16), st.just("auto")),
        TARGETS,
        st.one_of(st.integers(1, 99), st.just("auto")),
        st.booleans() | st.integers(1, 8),
    ),
    st.builds(
        EarlyExit,
        st.floats(2, 100),
        st.sampled_from(["max_prob", "margin", "entropy"]),
        st.one_of(st.none(), st.lists(LAYERS, min_size=1, unique=True).map(sorted)),
        LAYERS,
        shortlist=st.one_of(st.none(), st.integers(2, 50000)),
    ),
    st.builds(EarlyExit, st.floats(2, 100), st.sampled_from(["similarity", "patience"])),
)


def command_line_value(value):
    if isinstance(value, dict):
        name, *values = value.values()
        return f"{name}({','.join(map(command_line_value, values))})"
    if isinstance(value, list):
        return ";".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


@given(MODES)
def test_every_mode_survives_its_json_form(mode):
    assert decoding_from_json(json.loads(json.dumps(decoding_to_json(mode)))) == mode


@given(MODES)
def test_every_mode_survives_its_command_line_form(mode):
    name, *values = decoding_to_json(mode).items()
    assert (
        parse_decoding(f"{name[1]}:" + ",".join(command_line_value(v) for _, v in values)) == mode
    )
    assert (
        parse_decoding(
            f"{name[1]}:" + ", ".join(f"{k} = {command_line_value(v)}" for k, v in values)
        )
        == mode
    )


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("original", Original()),
        ("original:", Original()),
        ("exit:6", Exit(6)),
        (" exit:layer=6 ", Exit(6)),
        ("contrast:24,12,alpha=0.1", Contrast(24, 12, 0.1)),
        ("contrast:original,12", Contrast("original", 12)),
        ("contrast:lower=12,upper=24,min_candidates=0", Contrast(24, 12, min_candidates=0)),
        ("dola:high", DoLa("high")),
        ("dola:4", DoLa((4,))),
        ("dola:0;2; 4,0.2,jsd=reference", DoLa((0, 2, 4), 0.2, "reference")),
        ("dola:candidates=2;4,mature=6,heads=exits", DoLa((2, 4), mature=6, heads="exits")),
        ("parallel", Parallel()),
        ("parallel:soft,length=1.5", Parallel("soft", length=1.5)),
        ("parallel:confidence,max_prob,0.9", Parallel("confidence", "max_prob", 0.9)),
        (
            "parallel:confidence,threshold=1,layers=2;4,length=8;12,collapse_repeats=true",
            Parallel(
                "confidence", threshold=1, layers=(2, 4), length=(8, 12), collapse_repeats=True
            ),
        ),
        (
            "parallel:confidence,threshold=1,gate_chance=0.25,gate_gain=0",
            Parallel("confidence", threshold=1, gate_chance=0.25, gate_gain=0),
        ),
        ("parallel:prescribed,layers=3", Parallel("prescribed", layers=(3,))),
        ("self_speculative:6", SelfSpeculative(6)),
        ("self_speculative:6,draft_vocab=4096", SelfSpeculative(6, draft_vocab=4096)),
        ("self_speculative:6,3,target=exit:9", SelfSpeculative(6, 3, Exit(9))),
        ("self_speculative:6,tree=true", SelfSpeculative(6, tree=2)),
        ("self_speculative:6,3,tree=2;1;4", SelfSpeculative(6, 3, tree=(2, 1, 4))),
        (
            "early_exit:0.9,margin,layers=4; 8,shortlist=2048",
            EarlyExit(0.9, "margin", (4, 8), shortlist=2048),
        ),
        ("early_exit:calibrated=0.95", EarlyExit(calibrated=0.95)),
        ("early_exit:2,patience,null,3", EarlyExit(2, "patience", min_layer=3)),
        (
            "self_speculative:6,target=contrast( 24, 12, alpha=0.2 )",
            SelfSpeculative(6, target=Contrast(24, 12, 0.2)),
        ),
    ],
)
def test_command_line_forms(text, mode):
    assert parse_decoding(text) == mode


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "decoding=''.*original"),
        ("sample", "decoding='sample'.*contrast"),
        ("exit", "'layer'"),
        ("exit:", "'layer'"),
        ("exit:6,7", "mode 'exit': its fields are layer"),
        ("exit:six", "Exit.layer='six'"),
        ("exit:0", "Exit.layer=0"),
        ("exit:true", "Exit.layer=True"),
        ("exit:6.0", "Exit.layer=6.0"),
        ("exit:mode=original", "'mode' is given twice"),
        ("original:6", "no fields"),
        ("contrast:24", "'lower'"),
        ("contrast:24,12,beta=1", "no field 'beta'"),
        ("contrast:24,12,upper=6", "'upper' is given twice"),
        ("contrast:24,12,alpha=nan", "Contrast.alpha"),
        ("contrast:24,12,alpha=NaN", "Contrast.alpha"),
        ("contrast:24,12,alpha=1e999", "Contrast.alpha"),
        ("contrast:24,12,function=print", "no field 'function'"),
        ("contrast:24,original", "Contrast.lower='original'"),
        ("dola", "'candidates'"),
        ("dola:middle", "DoLa.candidates='middle'"),
        ("dola:2;2", r"DoLa.candidates=\(2, 2\): must be different layers"),
        ("dola:-1", r"DoLa.candidates=\(-1,\)"),
        ("dola:2;", r"DoLa.candidates=\(2, ''\)"),
        ("dola:2,1.5", "DoLa.relative_top=1.5"),
        ("dola:2,jsd=true", "DoLa.jsd=True"),
        ("dola:2,mature=0", "DoLa.mature=0"),
        ("dola:2,heads=own", "DoLa.heads='own'"),
        ("parallel:hard", "Parallel.exit='hard'.*'none', 'soft', 'confidence', 'prescribed'"),
        ("parallel:confidence", "Parallel.threshold=None: must be a number"),
        ("parallel:none,threshold=1", "Parallel.threshold=1: must be None"),
        ("parallel:none,measure=margin", "Parallel.measure='margin'"),
        ("parallel:prescribed", "Parallel.layers=None"),
        ("parallel:soft,layers=2", r"Parallel.layers=\(2,\): must be None with exit='soft'"),
        ("parallel:prescribed,layers=2;0", r"Parallel.layers=\(2, 0\)"),
        ("parallel:prescribed,layers=2;1,length=3", "Parallel.length=3: must be None or 2"),
        ("parallel:confidence,threshold=1,layers=2;2", "must be different layers"),
        ("parallel:none,length=0", "Parallel.length=0"),
        ("parallel:none,length=4;-1.5", "Parallel.length=-1.5"),
        ("parallel:soft,refine=1", "Parallel.refine=1: must be 0 with 'soft'"),
        ("parallel:none,refine=-1", "Parallel.refine=-1"),
        ("parallel:none,gate_bias=false", "Parallel.gate_bias=False"),
        ("parallel:none,gate_chance=0.5", "Parallel.gate_chance=0.5: must be None"),
        ("parallel:none,collapse_repeats=1", "Parallel.collapse_repeats=1"),
        ("self_speculative:6,draft_vocab=0", "SelfSpeculative.draft_vocab=0"),
        ("self_speculative:6,draft_vocab=all", "SelfSpeculative.draft_vocab='all'"),
        ("early_exit", "threshold=None, calibrated=None: give one"),
        ("early_exit:0.9,calibrated=0.9", "threshold=0.9, calibrated=0.9: give one"),
        ("early_exit:calibrated=1", "EarlyExit.calibrated=1: must be a share"),
        ("early_exit:nan", "EarlyExit.threshold"),
        ("early_exit:1,patience", "EarlyExit.threshold=1: must be 2 or more with 'patience'"),
        ("early_exit:0.9,surprise", "EarlyExit.measure='surprise': must be one of max_prob"),
        ("early_exit:0.9,layers=4;2", r"EarlyExit.layers=\[4, 2\]: must be .*ascending"),
        ("early_exit:0.9,layers=0", "EarlyExit.layers=0"),
        ("early_exit:0.9,min_layer=0", "EarlyExit.min_layer=0"),
        ("early_exit:0.9,shortlist=1", "EarlyExit.shortlist=1"),
        ("early_exit:0.9,similarity,shortlist=9", "must be None with measure='similarity'"),
        ("self_speculative:6,target=early_exit(0.9)", "target=Early.*must be Original"),
        ("self_speculative:6,1,tree=2;2", r"tree=\[2, 2\]: must be choices at 1 places"),
        ("self_speculative:0", "SelfSpeculative.draft_exit=0"),
        ("self_speculative:6,draft_len=17", "draft_len=17: must be 'auto' or .* 1..16"),
        ("self_speculative:6,draft_len=some", "draft_len='some'"),
        ("self_speculative:6,target=contrast(24,12", "a parenthesis has no partner"),
        ("self_speculative:6,target=24)", "a parenthesis has no partner"),
        ("self_speculative:6,target=greedy", "decoding='self_speculative.*original:..."),
        (
            "self_speculative:6,target=self_speculative(2)",
            "target=Self.*must be Original",
        ),
    ],
)
def test_a_wrong_command_line_form_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse_decoding(text)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("exit", "decoding='exit'"),
        (None, "decoding=None"),
        ({}, "decoding.mode=None"),
        ({"mode": ["exit"]}, "decoding.mode"),
        ({"mode": "exit"}, "needs the field 'layer'"),
        ({"mode": "exit", "layer": 6, "depth": 1}, "no field 'depth'"),
        ({"mode": "contrast", "upper": "all", "lower": 2}, "Contrast.upper='all'"),
        ({"mode": "contrast", "upper": 4, "lower": 2, "min_candidates": -1}, "min_candidates=-1"),
        ({"mode": "dola", "candidates": []}, r"DoLa.candidates=\(\)"),
        ({"mode": "dola", "candidates": [2, 4.0]}, r"DoLa.candidates=\(2, 4.0\)"),
        ({"mode": "dola", "candidates": None}, r"DoLa.candidates=\(None,\)"),
        ({"mode": "self_speculative", "draft_exit": 2, "target": "exit"}, "target='exit'"),
        ({"mode": "self_speculative", "draft_exit": 2, "target": {"mode": "exit"}}, "'layer'"),
    ],
)
def test_a_wrong_json_form_says_what_is_wrong(value, message):
    with pytest.raises(ValueError, match=message):
        decoding_from_json(value)


def test_a_contrast_function_has_no_json_form():
    with pytest.raises(ValueError, match="Contrast.function"):
        decoding_to_json(Contrast(4, 2, function=lambda upper, lower: upper - lower))


def test_a_contrast_function_must_be_callable():
    with pytest.raises(ValueError, match="Contrast.function='minus'"):
        Contrast(4, 2, function="minus")
