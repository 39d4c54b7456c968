import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from multiexit_engine.train.corpus import DEMO_TITLES, fixed_blocks, read_titles
from multiexit_engine.train.exits import MultiExitNetwork
from multiexit_engine.train.folder import read_network
from multiexit_engine.train.measure import ExitFigures, measure_exits
from multiexit_engine.train.samples import contrast_scores, exit_scores, greedy_continuations

DEMO = Path(str(files("multiexit_engine"))) / "assets" / "demo"

TEXT = """\
The rain had stopped before they came to the bridge, but the river was still high, and the old man
would not let the children cross it by themselves. He took the little girl by the hand and told the
boy to walk behind him and to hold on to his coat. "If you look at the water," he said, "you will
think that the bridge is moving. Look at the church on the other side, and you will not be afraid."
The boy said that he was not afraid of anything; but he held the coat very hard, and he did not once
look down.

When they were safe on the other bank the old man sat upon a stone to rest. It was almost dark now,
and there was a light in the window of the inn. "Your mother will be waiting for us," said he, "and
I do not know what I shall say to her." "You must say that it was my fault," the boy answered. "It
was I who wanted to see the ships." The old man laughed and shook his head. "I was a boy myself," he
said, "and I wanted to see them too. I have seen a great many since then, and I have been glad of
every one. Come, my dear, give me your hand again. There is nothing to be sorry for, except that the
supper will be cold."

They went up the road together without another word. At the door of the house the woman was standing
with a lamp in her hand, and when she saw them she put it down and ran out to meet them.
"""


@pytest.fixture(scope="module")
def network() -> MultiExitNetwork:
    return read_network(DEMO)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.tensor(AutoTokenizer.from_pretrained(DEMO)(TEXT)["input_ids"])


@pytest.fixture(scope="module")
def figures(network: MultiExitNetwork, ids: torch.Tensor) -> list[ExitFigures]:
    return measure_exits(network, fixed_blocks(ids, 300), len(TEXT) / len(ids))


def read_config() -> dict[str, object]:
    content: dict[str, object] = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    return content


def test_the_folder_is_at_most_30_megabytes() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 30_000_000


def test_the_config_says_where_the_exits_are_and_how_they_project() -> None:
    config = read_config()
    assert config["model_type"] == "gpt2"
    assert config["lm_head_layer_indices"] == [8, 6, 4, 2]
    assert config["vocab_projection_mode"] == "SHARED_PROJECTION_CAST_OUTPUTS"


def test_weights_are_bfloat16_and_hold_a_matrix_for_every_early_exit() -> None:
    with safe_open(DEMO / "model.safetensors", framework="pt") as weights:
        names = [name for name in weights.keys() if "name_to" in name]  # noqa: SIM118
        dtypes = {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
    assert sorted(names) == [f"name_to_conv_matrix.{layer}_to_8.weight" for layer in (2, 4, 6)]
    assert dtypes == {torch.bfloat16}


def test_the_end_token_begins_ends_and_pads() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (end,) * 3


@pytest.mark.parametrize(
    "text", [TEXT, "Ünïcödé — 海 🙂", "  two  spaces\n\n\ttab ", "", "\x00\x7f"]
)
def test_the_tokenizer_gives_back_any_text(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_perplexity_falls_from_exit_to_exit(figures: list[ExitFigures]) -> None:
    perplexities = [exit.perplexity for exit in figures]
    assert perplexities == sorted(perplexities, reverse=True)
    assert perplexities[0] > 1.1 * perplexities[-1]


def test_the_last_exit_predicts_plain_prose(figures: list[ExitFigures]) -> None:
    assert figures[-1].perplexity < 60


def test_deeper_exits_agree_more_with_the_last(figures: list[ExitFigures]) -> None:
    agreements = [exit.agreement for exit in figures]
    assert agreements == sorted(agreements)


def test_modes_can_be_told_apart(network: MultiExitNetwork, ids: torch.Tensor) -> None:
    modes = [exit_scores(2), exit_scores(8), contrast_scores(8, 2), contrast_scores(8, 4)]
    texts = {
        tuple(greedy_continuations(network, ids[None, :50], mode, 30)[0].tolist()) for mode in modes
    }
    assert len(texts) == len(modes)


def test_the_card_names_every_held_out_book() -> None:
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    titles = [title for title in read_titles(DEMO_TITLES) if title.held_out]
    assert [title.title for title in titles if title.title not in card] == []
