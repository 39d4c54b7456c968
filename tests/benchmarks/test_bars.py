"""Which bars a run meets, misses, or could not have met."""

from bars import Bar, latency_bars, throughput_bars

RATES = {
    ("engine Original", "float32"): 90.0,
    ("engine Contrast", "float32"): 88.0,
    ("engine Original", "bfloat16"): 150.0,
    ("transformers", "float32"): 28.0,
    ("transformers", "bfloat16"): 25.0,
    ("IBM's way", "float32"): 10.0,
    ("vLLM", "float32"): 80.0,
}
FLOORS = {
    ("engine Original", "float32"): 100.0,
    ("engine Contrast", "float32"): 100.0,
    ("engine Original", "bfloat16"): 200.0,
}


def bars_of(rates):
    return {bar.what: bar for bar in latency_bars(rates, FLOORS, {"float32": 0.9})}


def test_a_ratio_is_engine_over_peer():
    bar = bars_of(RATES)["Original float32 / transformers float32"]
    assert (bar.reached, bar.wanted, bar.met) == (90 / 28, 3, True)


def test_bfloat16_stands_beside_the_better_dtype_of_transformers():
    assert bars_of(RATES)["Original bfloat16 / transformers float32"].reached == 150 / 28


def test_peers_that_did_not_run_have_no_bar():
    assert not any("llama" in what for what in bars_of(RATES))


def test_a_bar_above_what_the_bytes_allow_is_out_of_reach():
    bar = bars_of(RATES | {("vLLM", "float32"): 90.0})["Original float32 / vLLM float32"]
    assert bar.cells()[-1] == "out of reach"


def test_a_bar_that_the_bytes_allow_is_not_met():
    assert bars_of(RATES)["Original float32 / vLLM float32"].cells()[-1] == "not met"


def test_time_of_contrast_is_a_bar_from_above():
    bar = bars_of(RATES)["time of Contrast / Original, float32"]
    assert bar.reached == 90 / 88
    assert bar.met


def test_an_upper_bar_that_is_passed_is_not_met():
    assert not Bar("time", 1.05, 1.06, at_most=True).met


def test_throughput_is_compared_with_vllm_and_with_one_request():
    rates = {
        ("engine Original, 16 together", "float32"): 300.0,
        ("engine Original, 8 together", "float32"): 240.0,
        ("engine Original, one", "float32"): 60.0,
        ("vLLM", "float32"): 400.0,
    }
    reached = {bar.what: (bar.reached, bar.met) for bar in throughput_bars(rates, 16)}
    assert reached == {
        "16 requests float32 / vLLM": (0.75, False),
        "8 together / one, float32": (4.0, False),
    }
