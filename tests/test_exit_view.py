"""Text coloured by exit layer, in the terminal and as a page."""

import re
from html.parser import HTMLParser

import pytest

from multiexit_engine.cli.exit_page import Section, exit_page
from multiexit_engine.cli.exit_view import (
    Piece,
    coloured_legend,
    coloured_text,
    layer_colours,
    layer_shares,
    mean_layer,
    text_pieces,
)
from tests.tiny import byte_tokenizer

PIECES = [Piece("a <b>", 2, 0.25), Piece("\n&", 8), Piece("", 8), Piece(" c", 4)]


def token_ids(text):
    return byte_tokenizer()(text)["input_ids"]


def pieces_of(text, *, seen=None, **options):
    ids = token_ids(text)
    layers = [1 + i % 3 for i in range(len(ids))]
    shown = text if seen is None else seen
    return text_pieces(byte_tokenizer(), token_ids("so "), ids, layers, **options, text=shown)


def test_pieces_are_the_tokens_with_their_layers():
    assert pieces_of("abcd") == [Piece("a", 1), Piece("b", 2), Piece("c", 3), Piece("d", 1)]


def test_a_character_of_several_tokens_stands_with_the_last_one():
    assert [piece.text for piece in pieces_of("né")] == ["n", "", "é"]


def test_an_unfinished_character_is_not_lost():
    ids = token_ids("né")[:-1]
    pieces = text_pieces(byte_tokenizer(), [], ids, [1, 2], text="n\ufffd")
    assert [piece.text for piece in pieces] == ["n", "\ufffd"]


def test_a_stop_string_is_left_out_but_its_tokens_count():
    pieces = pieces_of("ab END", seen="ab ")
    assert "".join(piece.text for piece in pieces) == "ab " and len(pieces) == 6


def test_an_ending_token_is_an_empty_piece():
    pieces = text_pieces(byte_tokenizer(), [], [*token_ids("a"), 256], [3, 5], text="a")
    assert pieces == [Piece("a", 3), Piece("", 5)]


def test_confidences_stand_with_their_tokens():
    pieces = pieces_of("ab", confidences=[0.5, None])
    assert [piece.confidence for piece in pieces] == [0.5, None]


def test_no_tokens_are_no_pieces():
    assert text_pieces(byte_tokenizer(), [1], [], [], text="") == []


@pytest.mark.parametrize("num_layers", [1, 2, 8, 80])
def test_colours_are_different_and_readable(num_layers):
    found = [layer_colours(layer, num_layers) for layer in range(1, num_layers + 1)]
    assert len(set(found)) == num_layers
    for pair in found:
        back, front = (_luminance(colour) for colour in pair)
        high, low = max(back, front), min(back, front)
        assert (high + 0.05) / (low + 0.05) >= 4.5


def _luminance(colour):
    """Relative luminance of the web's accessibility guidelines (WCAG 2.1)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_shares_and_mean_count_every_token():
    assert layer_shares(PIECES) == {2: 0.25, 4: 0.25, 8: 0.5}
    assert mean_layer(PIECES) == 5.5
    assert layer_shares([]) == {} and mean_layer([]) == 0.0


def test_the_terminal_shows_the_text_unchanged():
    shown = coloured_text(PIECES, 8)
    assert shown.plain == "a <b>\n& c"
    colours = [span.style.bgcolor.name for span in shown.spans]
    assert colours == [layer_colours(piece.layer, 8)[0] for piece in PIECES if piece.text]


def test_the_legend_names_every_layer():
    plain = " ".join(coloured_legend(PIECES, 8).plain.split())
    assert plain == "exit layer 2 25 % 4 25 % 8 50 % mean 5.5 of 8"


class _Reader(HTMLParser):
    """Text and titles of the paragraphs of class "text"; every address the page refers to."""

    def __init__(self):
        super().__init__()
        self.text, self.titles, self.addresses, self._is_inside = "", [], [], False

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "p":
            self._is_inside = attrs.get("class") == "text"
        self.titles += [attrs["title"]] if "title" in attrs else []
        self.addresses += [attrs[name] for name in ("src", "href") if name in attrs]

    def handle_endtag(self, tag):
        self._is_inside = self._is_inside and tag != "p"

    def handle_data(self, data):
        self.text += data if self._is_inside else ""


def read(page):
    reader = _Reader()
    reader.feed(page)
    return reader


def test_the_page_holds_prompt_and_text_unchanged():
    assert read(exit_page([Section("x < 1", PIECES)], 8, "t")).text == "x < 1a <b>\n& c"


def test_the_page_tells_layer_and_confidence_of_each_token():
    titles = read(exit_page([Section("", PIECES)], 8, "t")).titles
    assert titles == ["layer 2 of 8, confidence 0.250", "layer 8 of 8", "layer 4 of 8"]


def test_the_page_needs_nothing_beside_itself():
    page = exit_page([Section("a", PIECES)], 8, "t")
    assert read(page).addresses == [] and "url(" not in page and "@import" not in page


def test_the_page_escapes_its_title():
    assert "<h1>&lt;i&gt;</h1>" in exit_page([Section("", PIECES)], 8, "<i>")


def test_the_page_counts_the_tokens_of_all_texts():
    page = exit_page([Section("", PIECES), Section("", PIECES[:1])], 8, "t")
    assert "5 tokens" in page
    assert re.findall(r"<td>([\d.]+) %</td>", page) == ["40.0", "20.0", "40.0"]


def test_a_page_of_no_tokens_can_be_made():
    assert "0 tokens" in exit_page([Section("a", [])], 8, "t")
