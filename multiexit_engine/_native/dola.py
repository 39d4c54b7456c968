"""DoLa's ops on logits."""

from __future__ import annotations

import torch
from torch import Tensor

from multiexit_engine import _C
from multiexit_engine._native.heads import ChosenRows


def js_divergences(mature: Tensor, premature: Tensor, form: str) -> Tensor:
    """See ``multiexit_engine.ops.js_divergences``; sums in pieces of float32."""
    mature, premature = mature.float().contiguous(), premature.float().contiguous()
    out = torch.empty(premature.shape[:2])
    logits = _layer_logits(mature, premature)
    _C.js_divergences(torch.get_num_threads(), logits, _is_published(form), out.data_ptr())
    return out


def dola_tokens(
    mature: Tensor,
    premature: Tensor,
    relative_top: Tensor,
    form: str,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    places: Tensor,
) -> tuple[Tensor, Tensor]:
    """See ``multiexit_engine.ops.dola_tokens``; sums in pieces of float32."""
    mature, premature = mature.float().contiguous(), premature.float().contiguous()
    relative_top = relative_top.float().contiguous()
    rows = ChosenRows(temperature, seeds, positions)
    _C.dola_tokens(
        torch.get_num_threads(),
        _layer_logits(mature, premature),
        relative_top.data_ptr(),
        _is_published(form),
        rows.choice,
        places.data_ptr(),
    )
    return rows.tokens, rows.log_probs


def _layer_logits(mature: Tensor, premature: Tensor) -> _C.LayerLogits:
    """A view of both, which must outlive it."""
    return _C.LayerLogits(mature.data_ptr(), premature.data_ptr(), *premature.shape)


def _is_published(form: str) -> bool:
    return form == "reference"
