"""Text by exit layer: the pieces of an output, their colours, and how a terminal shows them.

Pure functions of texts and layers; knows nothing of engines or modes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from rich.style import Style
from rich.text import Text

from multiexit_engine.runtime.requests.detokenizer import Detokenizer, Tokenizer

# From shallow to deep: light to dark, so that the order shows without seeing the hues.
_RAMP = ((253, 231, 37), (94, 201, 98), (33, 145, 140), (59, 82, 139), (68, 1, 84))


class Piece(NamedTuple):
    """What one token added to a text.

    Attributes:
        text: empty where the token ends the text or only begins a character.
        layer: 1-based, whose head chose the token.
        confidence: of the exit in its choice, where the mode measures one.
    """

    text: str
    layer: int
    confidence: float | None = None


def text_pieces(
    tokenizer: Tokenizer,
    prompt_token_ids: Sequence[int],
    token_ids: Sequence[int],
    layers: Sequence[int],
    confidences: Sequence[float | None] | None = None,
    *,
    text: str,
) -> list[Piece]:
    """A piece for every token of an output; together they are its text.

    A character of several tokens stands in the piece of the last one.

    Args:
        tokenizer: of the model.
        prompt_token_ids: what came before.
        token_ids: of the output.
        layers: for each token the layer that chose it.
        confidences: for each token, where there are any.
        text: of the output; what the tokens hold beyond it, such as a stop string, is left out.
    """
    growing = Detokenizer(tokenizer, list(prompt_token_ids))
    texts: list[str] = []
    for token_id in token_ids:
        growing.append(token_id)
        texts.append(growing.take())
    growing.finish()
    if texts:
        texts[-1] += growing.take()
    pieces: list[Piece] = []
    num_left = len(text)
    for own, layer, confidence in zip(
        texts, layers, confidences or [None] * len(texts), strict=True
    ):
        pieces.append(Piece(own[:num_left], layer, confidence))
        num_left = max(0, num_left - len(own))
    return pieces


def layer_colours(layer: int, num_layers: int) -> tuple[str, str]:
    """Background of a layer and the foreground that is readable on it, as ``#rrggbb``.

    Source: the contrast ratio of the W3C's accessibility guidelines (WCAG 2.1), with 2.2 as gamma.
    """
    place = (layer - 1) / max(1, num_layers - 1) * (len(_RAMP) - 1)
    below = min(int(place), len(_RAMP) - 2)
    part = place - below
    red, green, blue = (
        round(low + part * (high - low))
        for low, high in zip(_RAMP[below], _RAMP[below + 1], strict=True)
    )
    weights = (0.2126, 0.7152, 0.0722)
    luminance = sum(
        weight * (part / 255) ** 2.2
        for weight, part in zip(weights, (red, green, blue), strict=True)
    )
    # where black and white contrast equally with the background
    is_light = luminance > 0.179
    return f"#{red:02x}{green:02x}{blue:02x}", "#000000" if is_light else "#ffffff"


def layer_shares(pieces: Sequence[Piece]) -> dict[int, float]:
    """For each layer, ascending, the share of tokens that it chose."""
    counts = Counter(piece.layer for piece in pieces)
    return {layer: counts[layer] / len(pieces) for layer in sorted(counts)}


def mean_layer(pieces: Sequence[Piece]) -> float:
    """The layer that chose a token, on average; 0 without tokens."""
    return sum(piece.layer for piece in pieces) / max(1, len(pieces))


def coloured_text(pieces: Sequence[Piece], num_layers: int) -> Text:
    """The text, every piece on the colour of its layer."""
    shown = Text()
    for piece in pieces:
        shown.append(piece.text, _style(piece.layer, num_layers))
    return shown


def coloured_legend(pieces: Sequence[Piece], num_layers: int) -> Text:
    """One line: each layer that occurs with its share of the tokens, and their mean."""
    shown = Text("exit layer ")
    for layer, share in layer_shares(pieces).items():
        shown.append(f" {layer} ", _style(layer, num_layers))
        shown.append(f" {100 * share:.0f} %  ")
    return shown.append(f"mean {mean_layer(pieces):.1f} of {num_layers}", "dim")


def _style(layer: int, num_layers: int) -> Style:
    background, foreground = layer_colours(layer, num_layers)
    return Style(color=foreground, bgcolor=background)
