"""Scores by a request's own contrast function, whose failures are that request's alone.

Knows nothing of plans or of how logits came to be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multiexit_engine.decoding.plan import ContrastFunction


def custom_scores(
    function: ContrastFunction, upper: Tensor, lower: Tensor
) -> tuple[Tensor, dict[int, str]]:
    """What a function gives for each row, one after the other.

    Args:
        function: takes two [1, 1, vocab] logits.
        upper: [rows, vocab] logits of the later exit.
        lower: [rows, vocab] of the earlier one.

    Returns:
        [rows, vocab] scores, zeros in rows for which the function failed; and why, by their places.
    """
    failures: dict[int, str] = {}
    scores = torch.zeros_like(upper)
    for place in range(len(upper)):
        result = _call(function, upper[None, place : place + 1], lower[None, place : place + 1])
        if isinstance(result, str):
            failures[place] = result
        else:
            scores[place] = result[0, 0]
    return scores, failures


def _call(function: ContrastFunction, upper: Tensor, lower: Tensor) -> Tensor | str:
    """The function's scores, or why there are none. It gets copies: it may write into them."""
    shape = list(upper.shape)
    try:
        result = function(upper.clone(), lower.clone())
    except Exception as error:  # a request's own code: any failure is that request's alone
        return f"the contrast function raised {type(error).__name__}: {error}"
    if not isinstance(result, Tensor):
        return f"the contrast function returned {type(result).__name__}, not a tensor {shape}"
    if list(result.shape) != shape:
        return f"the contrast function returned shape {list(result.shape)}, not {shape}"
    if result.is_complex():
        return f"the contrast function returned {result.dtype}, not real numbers"
    return result
