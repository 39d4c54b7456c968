"""Exit heads as a network to train: logits and losses of every exit of a decoder.

It knows transformers' causal decoders, the three projection modes and cross entropy. It does not
know where tokens come from, nor how or whether anything is optimised.
Source of the parameter names: IBM/auto-contrastive-generation, `multi_exit_modeling.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from multiexit_engine.config import VocabularyProjectionMode


class ExitHeads(nn.Module):
    """The weights that exits add to a decoder, under the names that checkpoints give them.

    `layers` are 1-based; the last layer of the decoder may be listed. New heads start as copies of
    the decoder's own: a layer-specific head as its output matrix, a cast as the identity.
    """

    def __init__(
        self,
        mode: VocabularyProjectionMode,
        layers: Sequence[int],
        num_layers: int,
        output_weight: Tensor,
    ) -> None:
        super().__init__()
        outside = [layer for layer in layers if not 1 <= layer <= num_layers]
        if outside or not layers or len(set(layers)) != len(layers):
            raise ValueError(
                f"exit layers {list(layers)}: give different layers from 1 to {num_layers}"
            )
        self.mode = mode
        self.layers = tuple(sorted(layers))
        self.num_layers = num_layers
        vocab_size, hidden_size = output_weight.shape
        self.name_to_lm_exit_head = nn.ModuleDict()
        self.name_to_conv_matrix = nn.ModuleDict()
        for layer in self.layers:
            if mode is VocabularyProjectionMode.LAYER_SPECIFIC_PROJECTION:
                head = nn.Linear(hidden_size, vocab_size, bias=False)
                head.weight.data.copy_(output_weight)
                self.name_to_lm_exit_head[f"lm_head_{layer}"] = head
            elif self._casts(layer):
                cast_matrix = nn.Linear(hidden_size, hidden_size, bias=False)
                nn.init.eye_(cast_matrix.weight)
                self.name_to_conv_matrix[f"{layer}_to_{num_layers}"] = cast_matrix

    def logits(self, normed: Tensor, layer: int, output_weight: Tensor) -> Tensor:
        """Logits [..., vocab] of exit `layer` from its hidden states after the final norm."""
        if self.mode is VocabularyProjectionMode.LAYER_SPECIFIC_PROJECTION:
            return cast(Tensor, self.name_to_lm_exit_head[f"lm_head_{layer}"](normed))
        if self._casts(layer):
            normed = self.name_to_conv_matrix[f"{layer}_to_{self.num_layers}"](normed)
        return F.linear(normed, output_weight)

    def _casts(self, layer: int) -> bool:
        cast_mode = VocabularyProjectionMode.SHARED_PROJECTION_CAST_OUTPUTS
        return self.mode is cast_mode and layer < self.num_layers


class MultiExitNetwork(nn.Module):
    """A decoder of transformers together with its exit heads."""

    def __init__(
        self, decoder: PreTrainedModel, mode: VocabularyProjectionMode, layers: Sequence[int]
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.final_norm_path = _final_norm_path(decoder)
        num_layers = int(decoder.config.num_hidden_layers)
        self.heads = ExitHeads(mode, layers, num_layers, self.output_weight.detach())

    @property
    def layers(self) -> tuple[int, ...]:
        """The exit layers, shallowest first."""
        return self.heads.layers

    @property
    def output_weight(self) -> Tensor:
        """The decoder's own output matrix [vocab, hidden]."""
        return cast(Tensor, self.decoder.get_submodule("lm_head").weight)

    def normed_states(
        self, ids: Tensor, cache: DynamicCache | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(layer, hidden states after the final norm [batch, tokens, hidden]) of every exit.

        With a cache, `ids` follow the tokens that it holds, and are added to it.
        """
        states = self.decoder.base_model(
            ids, past_key_values=cache, output_hidden_states=True, use_cache=cache is not None
        ).hidden_states
        norm = self.decoder.get_submodule(self.final_norm_path)
        for layer in self.layers:
            # transformers applies the final norm to the last hidden state, and to no other.
            yield layer, states[layer] if layer == self.heads.num_layers else norm(states[layer])

    def exit_logits(self, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(layer, logits [batch, tokens, vocab]) of every exit, shallowest first."""
        for layer, state in self.normed_states(ids):
            yield layer, self.heads.logits(state, layer, self.output_weight)

    def next_logits(self, ids: Tensor, cache: DynamicCache) -> dict[int, Tensor]:
        """By layer, the logits [batch, vocab] of the token after `ids`, which join the cache."""
        return {
            layer: self.heads.logits(state[:, -1], layer, self.output_weight)
            for layer, state in self.normed_states(ids, cache)
        }

    def forward(self, ids: Tensor, share_rows: bool = False) -> Tensor:
        """The loss of every exit [exits], shallowest first.

        With `share_rows` the exits before the deepest divide the rows among them, so that a step
        pays for two heads however many exits there are.
        """
        num_shares = max(len(self.layers) - 1, 1)
        losses = []
        for place, (layer, state) in enumerate(self.normed_states(ids)):
            rows = slice(None)
            if share_rows and layer != self.layers[-1]:
                rows = slice(place * len(ids) // num_shares, (place + 1) * len(ids) // num_shares)
            logits = self.heads.logits(state[rows], layer, self.output_weight)
            losses.append(shifted_cross_entropy(logits, ids[rows]))
        return torch.stack(losses)

    def checkpoint_state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Weights under the names of a released checkpoint; a tied output matrix is left out."""
        tied = self.decoder.config.tie_word_embeddings
        state = {
            name: tensor
            for name, tensor in self.decoder.state_dict().items()
            if not (tied and name == "lm_head.weight")
        }
        state.update(self.heads.state_dict())
        return {
            name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()
        }


def shifted_cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean over rows and positions of -log p(ids[t+1] | ids[..t]), in fp32."""
    targets = ids[:, 1:].reshape(-1)
    return F.cross_entropy(logits[:, :-1].reshape(len(targets), -1).float(), targets)


def exit_loss_weights(layers: Sequence[int], num_layers: int, early_exit_weight: float) -> Tensor:
    """The weight of each exit's loss: 1 for the last layer, rising with depth before it."""
    return torch.tensor(
        [1.0 if layer == num_layers else early_exit_weight * layer / num_layers for layer in layers]
    )


def _final_norm_path(decoder: PreTrainedModel) -> str:
    for path in ("transformer.ln_f", "model.norm"):
        try:
            decoder.get_submodule(path)
        except AttributeError:
            continue
        return path
    raise ValueError(
        f"model type {decoder.config.model_type!r}: exits need a causal decoder with a final norm "
        "(gpt2, gpt_neo, llama and others built like them)"
    )
