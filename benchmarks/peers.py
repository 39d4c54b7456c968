"""What the engine is measured against: transformers itself, and published ways of using it.

IBM's way, written plainly: every loaded exit head and the model's own head are computed at every
step, whatever the mode needs, and the contrast sorts the whole vocabulary in probability space.
DoLa's: the model's head on the hidden states of all candidates, one layer for the whole batch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from checkpoints import EXIT_HEAD, Shape
from safetensors import safe_open
from torch import Tensor


def load_transformers(shape: Shape, folder: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """Transformers' own model on the checkpoint's weights, with its original head."""
    model = shape.model_class.from_pretrained(folder, dtype=dtype)
    return model.eval().to(device)


def load_ibm_way(
    shape: Shape, folder: Path, dtype: torch.dtype, heads: tuple[int, ...], device: str = "cpu"
) -> Any:
    """Transformers' model whose ``generate`` contrasts two exits as IBM's library does.

    ``heads`` are the exits whose heads are loaded, and so computed: all of the checkpoint's, or
    the two contrasted ones, which is the best that its user can do.
    """

    class AllHeads(shape.model_class):  # type: ignore[name-defined,misc]
        exit_heads: dict[int, Tensor]

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            kwargs["output_hidden_states"] = True
            out = super().forward(*args, **kwargs)
            logits = {}
            for layer, weight in self.exit_heads.items():
                hidden = out.hidden_states[layer][:, -1:, :]
                if layer < len(out.hidden_states) - 1:
                    hidden = self.transformer.ln_f(hidden)
                logits[layer] = hidden @ weight.T
            out.logits = contrast(logits[shape.upper], logits[shape.lower])
            return out

    model = AllHeads.from_pretrained(folder, dtype=dtype).eval().to(device)
    model.exit_heads = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for layer in heads:
            head = file.get_tensor(f"{EXIT_HEAD.format(layer)}.weight")
            model.exit_heads[layer] = head.to(model.device, dtype)
    return model


def contrast(upper: Tensor, lower: Tensor, alpha: float = 0.1, min_candidates: int = 1) -> Tensor:
    """IBM's formula in probability space: full sort, masks, renormalisation. [B, 1, V] -> same."""
    p, q = upper.softmax(-1), lower.softmax(-1)
    ranked = p.sort(-1, descending=True).values
    threshold = torch.minimum(alpha * ranked[..., :1], ranked[..., min_candidates - 1, None])
    plausible = p >= threshold
    mass = torch.where(plausible, p, 0.0).sum(-1, keepdim=True)
    ratio = torch.where(plausible, p.log() - q.log(), -torch.inf)
    return torch.where(plausible, (mass * ratio.softmax(-1)).log(), p.log())


def load_dola_way(
    shape: Shape, folder: Path, dtype: torch.dtype, candidates: tuple[int, ...]
) -> Any:
    """Transformers' model whose ``generate`` contrasts layers as transformers 4.55 did."""

    class AllCandidates(shape.model_class):  # type: ignore[name-defined,misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            kwargs["output_hidden_states"] = True
            out = super().forward(*args, **kwargs)
            states = torch.stack([out.hidden_states[layer][:, -1] for layer in candidates])
            out.logits = dola(out.logits[:, -1], self.lm_head(states))[:, None]
            return out

    return AllCandidates.from_pretrained(folder, dtype=dtype).eval()


def dola(mature: Tensor, premature: Tensor, relative_top: float = 0.1) -> Tensor:
    """The published formula. [B, V] and [candidates, B, V] logits -> [B, V]."""
    log_p, log_q = mature.float().log_softmax(-1), premature.float().log_softmax(-1)
    mean = 0.5 * (log_p.exp() + log_q.exp())
    divergence = torch.nn.functional.kl_div
    first = divergence(log_p.expand_as(mean), mean, reduction="none").mean(-1)
    second = divergence(log_q, mean, reduction="none").mean(-1)
    base = log_q[(0.5 * (first + second)).mean(-1).argmax()]
    threshold = log_p.amax(-1, keepdim=True) + math.log(relative_top)
    return torch.where(log_p >= threshold, log_p - base, -torch.inf)


@torch.inference_mode()
def generate(
    model: Any, prompts: list[list[int]], num_new_tokens: int, **options: object
) -> list[list[int]]:
    """Greedy ``generate`` of transformers on prompts of one length; the new tokens of each."""
    ids = torch.tensor(prompts, device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_new_tokens,
        min_new_tokens=num_new_tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=False,
        output_hidden_states=False,
        **options,
    )
    return [row[len(prompts[0]) :] for row in out.tolist()]
