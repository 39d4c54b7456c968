"""Text by exit layer as one HTML page that needs nothing beside itself.

Pure functions of texts and layers; the colours are those of the terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from multiexit_engine.cli.exit_view import Piece, layer_colours, layer_shares, mean_layer

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { opacity: .65; }
.token { border-radius: 2px; }
.legend { border-collapse: collapse; font-size: 14px; }
.legend td { padding: 1px 8px; text-align: right; }
.legend .bar { width: 20em; text-align: left; }
.bar i { display: inline-block; height: .8em; }
"""


class Section(NamedTuple):
    """One continuation of one prompt."""

    prompt: str
    pieces: Sequence[Piece]


def exit_page(sections: Sequence[Section], num_layers: int, title: str) -> str:
    """The page: a table of how many tokens each layer chose, then the texts.

    Each token stands on the colour of its layer; pointing at it shows layer and confidence.
    """
    pieces = [piece for section in sections for piece in section.pieces]
    texts = "\n".join(_section(section, num_layers) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>{_STYLE}{_colours(pieces, num_layers)}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{_legend(pieces, num_layers)}
{texts}
</body>
</html>
"""


def _colours(pieces: Sequence[Piece], num_layers: int) -> str:
    rules = []
    for layer in layer_shares(pieces):
        background, foreground = layer_colours(layer, num_layers)
        rules.append(f".l{layer} {{ background: {background}; color: {foreground}; }}\n")
    return "".join(rules)


def _legend(pieces: Sequence[Piece], num_layers: int) -> str:
    rows = "\n".join(
        f'<tr><td><span class="token l{layer}">&nbsp;{layer}&nbsp;</span></td>'
        f"<td>{100 * share:.1f} %</td>"
        f'<td class="bar"><i class="l{layer}" style="width: {100 * share:.1f}%"></i></td></tr>'
        for layer, share in layer_shares(pieces).items()
    )
    return (
        f"<p>{len(pieces)} tokens, chosen at layer {mean_layer(pieces):.1f} of {num_layers} on "
        f'average</p>\n<table class="legend">\n<tr><td>layer</td><td>tokens</td><td></td></tr>\n'
        f"{rows}\n</table>"
    )


def _section(section: Section, num_layers: int) -> str:
    tokens = "".join(_token(piece, num_layers) for piece in section.pieces if piece.text)
    prompt = escape(section.prompt)
    return f'<p class="text"><span class="prompt">{prompt}</span>{tokens}</p>'


def _token(piece: Piece, num_layers: int) -> str:
    told = f"layer {piece.layer} of {num_layers}"
    if piece.confidence is not None:
        told += f", confidence {piece.confidence:.3f}"
    return f'<span class="token l{piece.layer}" title="{told}">{escape(piece.text)}</span>'
