"""Tokens of a few rows straight from hidden states, by one launch that streams the head once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from multiexit_engine._cuda.library import HeadCall, HeadPlan, Library
from multiexit_engine.kernels.launch import kept_scratch

NUMBER_TYPES = {torch.bfloat16: 1, torch.float16: 2}
_Shape = tuple[int, int, int, int, bool, torch.device]


class Heads:
    """The head kernels of a build, with the signatures of the ops. One stream at a time."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._plans: dict[_Shape, HeadPlan] = {}

    def head_tokens(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: Tensor,
        seeds: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See ``multiexit_engine.ops.tokens``; 1 to 4 rows, bfloat16 or float16."""
        operands = _Operands(hidden, weight)
        operands.add(bias=None if bias is None else bias.to(hidden.dtype))
        return self._choose(operands, temperature, seeds, positions)

    def contrast_tokens(
        self,
        upper_hidden: Tensor,
        upper_weight: Tensor,
        lower_hidden: Tensor,
        lower_weight: Tensor,
        alpha: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        positions: Tensor,
        num_candidates: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See ``multiexit_engine.ops.tokens``; 1 to 4 rows, bfloat16 or float16.

        Scratch: 20 bytes for each row and vocabulary entry, touched where tokens may be plausible
        only.
        """
        operands = _Operands(upper_hidden, upper_weight)
        if _Operands(lower_hidden, lower_weight).shape != operands.shape:
            raise ValueError(
                f"lower head {tuple(lower_hidden.shape)} x {tuple(lower_weight.shape)}: it must be "
                f"of the upper one's shape and type, {tuple(upper_hidden.shape)} x "
                f"{tuple(upper_weight.shape)} {upper_weight.dtype}"
            )
        counts = None if num_candidates is None else num_candidates.contiguous()
        operands.add(
            lower_hidden=lower_hidden,
            lower_weight=lower_weight,
            alpha=alpha.float(),
            num_candidates=counts,
        )
        chosen = self._choose(operands, temperature, seeds, positions)
        if num_candidates is not None and counts is not None and counts is not num_candidates:
            num_candidates.copy_(counts)
        return chosen

    def _choose(
        self, operands: _Operands, temperature: Tensor, seeds: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        device, call = seeds.device, operands.call
        rows = int(call.rows)
        with current(device):
            plan = self._plan(operands, device)
            tokens = torch.empty(rows, dtype=torch.int64, device=device)
            log_probs = torch.empty(rows, dtype=torch.float32, device=device)
            operands.add(
                temperature=temperature.float(),
                seeds=seeds,
                positions=positions,
                tokens=tokens,
                log_probs=log_probs,
                kept=kept_scratch("head ring", [0.0], -(-self._library.kept_bytes // 4), device),
                scratch=torch.empty(plan.scratch_bytes, dtype=torch.uint8, device=device),
            )
            stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
            self._library.run(call, plan, stream)
        return tokens, log_probs

    def _plan(self, operands: _Operands, device: torch.device) -> HeadPlan:
        key = (*operands.shape, bool(operands.call.lower_hidden), device)
        if key not in self._plans:
            self._plans[key] = self._library.plan(operands.call)
        return self._plans[key]


class _Operands:
    """A call, and the tensors behind its addresses, which must outlive it."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        if hidden.dtype not in NUMBER_TYPES or weight.dtype != hidden.dtype:
            raise ValueError(
                f"hidden states {hidden.dtype}, weights {weight.dtype}: both must be bfloat16, or "
                "both float16"
            )
        if not weight.is_contiguous() or hidden.shape[1] != weight.shape[1]:
            raise ValueError(
                f"weights {tuple(weight.shape)}: they must be contiguous and as wide as the hidden "
                f"states, {tuple(hidden.shape)}"
            )
        rows, width = hidden.shape
        self.shape = rows, weight.shape[0], width, NUMBER_TYPES[hidden.dtype]
        self.call = HeadCall(
            **dict(zip(("rows", "vocab", "width", "number_type"), self.shape, strict=True))
        )
        self._kept: list[Tensor] = []
        self.add(hidden=hidden, weight=weight)

    def add(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                self._kept.append(tensor.contiguous())
                setattr(self.call, name, self._kept[-1].data_ptr())


def current(device: torch.device) -> AbstractContextManager[None]:
    """Makes a device the current one inside the block."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
