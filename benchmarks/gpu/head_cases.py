"""Heads and contrast at the shapes of real models, against PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import Card, Case, Once
from benchmarks.gpu.timing import DEVICE, copies_of, graph_us, sized
from multiexit_engine.kernels import dola, heads
from multiexit_engine.ops import dola_tokens
from multiexit_engine.ops.best_tokens import no_best_tokens
from multiexit_engine.ops.edits import TokenEdits
from multiexit_engine.ops.narrowing import Narrowing
from multiexit_engine.ops.tokens import RowGroup

MODELS = sized(
    {"gpt2-medium": (50257, 1024), "gpt-neo-125m": (50257, 768), "llama-8b": (128256, 4096)},
    {"rehearsal": (300, 64)},
)
ROWS = sized((1, 4, 16, 64), (1, 4))
ALPHA = 0.1
# tokens of a row with a penalty
EDITS = sized(500, 20)
# premature layers of DoLa
CANDIDATES = 6
# Standard deviation of logits: leaves about ten plausible tokens, as trained models do.
SPREAD = 4.0


Pairs = list[tuple[Tensor, Tensor]]


def weights(vocab: int, width: int, copies: int) -> Pairs:
    """Pairs of an upper and a lower head whose logits mostly agree."""
    torch.manual_seed(0)
    pairs = []
    for _ in range(copies):
        upper = torch.randn(vocab, width, device=DEVICE) * SPREAD / width**0.5
        lower = 0.8 * upper + 0.6 * torch.randn_like(upper) * SPREAD / width**0.5
        pairs.append((upper.bfloat16(), lower.bfloat16()))
    return pairs


def hidden_states(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Upper and lower states that mostly agree."""
    upper = torch.randn(rows, width, device=DEVICE)
    lower = 0.7 * upper + 0.7 * torch.randn_like(upper)
    return upper.bfloat16(), lower.bfloat16()


def torch_contrast(upper: Tensor, weight: Tensor, lower: Tensor, lower_weight: Tensor) -> Tensor:
    """Greedy contrast as plain PyTorch: both heads in full, the fewest passes over the logits."""
    u, low = upper @ weight.T, lower @ lower_weight.T
    plausible = u >= u.amax(-1, keepdim=True) + math.log(ALPHA)
    return torch.where(plausible, u - low, -math.inf).argmax(-1)


def cases(card: Card) -> Iterator[Case]:
    """One line for each model and number of rows: what is plain, then what changes scores."""
    for model, (vocab, width) in MODELS.items():
        pairs = Once(partial(weights, vocab, width, copies_of(2 * vocab * width)))
        for rows in ROWS:
            label = {"model": model, "rows": rows}
            yield Case(label, partial(_plain, pairs, rows, card.read_tb_s))
            yield Case(label | {"draws": "changed"}, partial(_changed, pairs, rows))
            yield Case(label | {"draws": "dola"}, partial(_dola, vocab, rows, card.read_tb_s))
        pairs.forget()
        torch.cuda.empty_cache()


def fused_us(heads: Any, pairs: Pairs, states: tuple[Tensor, Tensor]) -> Any:
    """Of a backend of both ops: microseconds of a greedy contrast, a sampled one, a greedy head."""
    upper, lower = states
    rows = upper.shape[0]
    alpha = torch.full((rows,), ALPHA, device=DEVICE)
    ids = torch.arange(rows, device=DEVICE)
    cold, warm = ((torch.full((rows,), heat, device=DEVICE), ids, ids) for heat in (0.0, 0.8))
    return tuple(
        graph_us(calls)
        for calls in (
            [lambda w=w: heads.contrast_tokens(upper, w[0], lower, w[1], alpha, *cold)
             for w in pairs],
            [lambda w=w: heads.contrast_tokens(upper, w[0], lower, w[1], alpha, *warm)
             for w in pairs],
            [lambda w=w: heads.head_tokens(upper, w[0], None, *cold) for w in pairs],
        )
    )  # fmt: skip


def changed_us(pairs: Pairs, states: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Microseconds of a sampled contrast whose rows want more than a temperature.

    Draws narrowed by top_k and top_p; scores edited, of ``EDITS`` tokens in each row; five best
    tokens listed; all of these.
    """
    upper, lower = states
    rows, vocab = upper.shape[0], pairs[0][0].shape[0]
    ids = torch.arange(rows, device=DEVICE)
    heat, alpha = (torch.full((rows,), value, device=DEVICE) for value in (0.8, ALPHA))

    def call(weight: tuple[Tensor, Tensor], changes: dict[str, Any]) -> Any:
        groups = [RowGroup(rows, lower, weight[1])]
        draws = alpha, None, heat, ids, ids
        return heads.shared_head_tokens(upper, weight[0], None, groups, *draws, **changes)

    every = {
        "narrowing": Narrowing(
            torch.full((rows,), 50, dtype=torch.int32, device=DEVICE),
            torch.full((rows,), 0.1, device=DEVICE),
            torch.zeros(rows, device=DEVICE),
        ),
        "edits": penalties(rows, vocab),
        "best": no_best_tokens(torch.full((rows,), 5, dtype=torch.int32, device=DEVICE), 5),
    }
    kinds = {
        "narrowed_us": {"narrowing": every["narrowing"]},
        "edited_us": {"edits": every["edits"]},
        "listed_us": {"best": every["best"]},
        "all_us": every,
    }
    return {
        name: graph_us([lambda w=w, own=own: call(w, own) for w in pairs])
        for name, own in kinds.items()
    }


def penalties(rows: int, vocab: int) -> TokenEdits:
    """Repetition penalties of ``EDITS`` tokens in each row."""
    tokens = torch.randperm(vocab, device=DEVICE)[:EDITS].sort().values.repeat(rows)
    places = torch.arange(rows, device=DEVICE).repeat_interleave(EDITS)
    ones = torch.ones(rows * EDITS, device=DEVICE)
    edited = torch.ones(rows, dtype=torch.int32, device=DEVICE)
    return TokenEdits(places, tokens, 0 * ones, 1.2 * ones, 0 * ones, None, edited)


def torch_listed(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Best tokens as plain PyTorch lists them: logits, log-softmax, top-k."""
    return (hidden @ weight.T).float().log_softmax(-1).topk(5, -1)


def _plain(made: Once[Pairs], rows: int, read_tb_s: float) -> dict[str, Any]:
    pairs = made()
    states = upper, lower = hidden_states(rows, pairs[0][0].shape[1])
    logits = upper.float() @ pairs[0][0].float().T
    plausible = (logits >= logits.amax(-1, keepdim=True) + math.log(ALPHA)).any(0)
    candidates = int(plausible.sum())
    head_bytes = pairs[0][0].nbytes
    contrast_bytes = head_bytes + candidates * 2 * upper.shape[1]
    contrast, sampled, head = fused_us(heads, pairs, states)
    torch_both = graph_us([lambda w=w: torch_contrast(upper, w[0], lower, w[1]) for w in pairs])
    torch_head = graph_us([lambda w=w: (upper @ w[0].T).argmax(-1) for w in pairs])
    return {
        "plausible": candidates,
        "MB": contrast_bytes / 1e6,
        "contrast_us": contrast,
        "contrast_%": contrast_bytes / contrast / read_tb_s / 1e4,
        "sampled_us": sampled,
        "torch_two_heads_us": torch_both,
        "head_us": head,
        "head_%": head_bytes / head / read_tb_s / 1e4,
        "torch_head_us": torch_head,
    }


def _changed(made: Once[Pairs], rows: int) -> dict[str, Any]:
    pairs = made()
    states = upper, _ = hidden_states(rows, pairs[0][0].shape[1])
    listed = graph_us([lambda w=w: torch_listed(upper, w[0]) for w in pairs])
    return changed_us(pairs, states) | {"torch_listed_us": listed}


def _dola(vocab: int, rows: int, read_tb_s: float) -> dict[str, Any]:
    """DoLa's greedy choice from logits that are there: each must be read once at least."""
    mature = torch.randn(rows, vocab, device=DEVICE) * SPREAD
    premature = 0.7 * mature + 0.7 * torch.randn(CANDIDATES, rows, vocab, device=DEVICE) * SPREAD
    ids, places = (torch.zeros(rows, dtype=torch.int64, device=DEVICE) for _ in range(2))
    top, heat = torch.full((rows,), ALPHA, device=DEVICE), torch.zeros(rows, device=DEVICE)
    ours, theirs = (
        graph_us([lambda op=op: op(mature, premature, top, "exact", heat, ids, ids, places)])
        for op in (dola.dola_tokens, dola_tokens.reference)
    )
    least = (mature.nbytes + premature.nbytes) / read_tb_s / 1e6
    return {"dola_us": ours, "torch_dola_us": theirs, "dola_floor_us": least}
