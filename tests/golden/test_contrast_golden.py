"""IBM's contrast function, reproduced: the distribution, the greedy token, the candidates.

Truth is the float64 reference stored in contrast/cases.npz (contrast/manifest.json says how); IBM's
own code gives NaN or loses tokens in some of these cases.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from multiexit_engine.ops import contrast_heads, contrast_logits
from tests.golden.contrast_recipe import make_inputs

FOLDER = Path(__file__).with_name("contrast")
CASES = json.loads((FOLDER / "manifest.json").read_text())["cases"]
ALL_CASES = pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def arrays():
    with np.load(FOLDER / "cases.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def inputs(case):
    """Upper and lower logits in the case's dtype, alpha and least number of candidates."""
    keys = ("kind", "batch", "vocab", "seed", "dtype")
    upper, lower = make_inputs(*(case[key] for key in keys))
    digest = hashlib.sha256(upper.tobytes() + lower.tobytes()).hexdigest()
    assert digest == case["sha256_inputs"]
    dtype = getattr(torch, case["dtype"])
    alpha = torch.full((case["batch"],), case["alpha"])
    least = torch.full((case["batch"],), case["minimum_candidates"])
    return torch.from_numpy(upper).to(dtype), torch.from_numpy(lower).to(dtype), alpha, least


def assert_expected(case, arrays, actual, tolerance=TOLERANCE):
    assert not actual.isnan().any()
    expected = arrays[f"{case['name']}/expected"]
    if case["storage"] == "sampled":
        squares = actual.double().square().where(actual.isfinite(), 0.0).sum(-1)
        torch.testing.assert_close(
            squares, arrays[f"{case['name']}/row_sumsq"].double(), rtol=1e-5, atol=1e-6
        )
        rows, cols = arrays[f"{case['name']}/rows"].long(), arrays[f"{case['name']}/cols"].long()
        actual = actual[rows, cols]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=tolerance)


@ALL_CASES
def test_distribution(case, arrays):
    actual = contrast_logits(*inputs(case))
    assert actual.dtype == torch.float32
    assert_expected(case, arrays, actual)


@ALL_CASES
def test_greedy_token(case):
    tokens = contrast_logits(*inputs(case)).argmax(-1)
    for token, allowed in zip(tokens.tolist(), case["argmax_ties"], strict=True):
        assert token in allowed


@pytest.mark.parametrize(
    "case", [c for c in CASES if c["minimum_candidates"] == 1], ids=lambda case: case["name"]
)
def test_one_candidate_needs_no_count(case):
    upper, lower, alpha, least = inputs(case)
    with_count = contrast_logits(upper, lower, alpha, least)
    assert torch.equal(contrast_logits(upper, lower, alpha, None), with_count)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if "masked" not in c["kind"] and c["vocab"] < 2000],
    ids=lambda case: case["name"],
)
def test_from_hidden_states(case, arrays):
    """Heads whose logits are the case's: the hidden state of row i is the i-th unit vector."""
    upper, lower, alpha, least = inputs(case)
    hidden = torch.eye(case["batch"], dtype=upper.dtype)
    actual = contrast_heads(hidden, upper.T, hidden, lower.T, alpha, least)
    assert_expected(case, arrays, actual)
