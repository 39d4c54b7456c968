"""The folder that ships as "demo-elmer", and what the engine makes of it."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from multiexit_engine import Engine, Parallel, SamplingParams
from multiexit_engine.train.elmer import read_elmer_network
from multiexit_engine.train.elmer_data import make_batch, read_tokenizer
from multiexit_engine.train.elmer_measure import Decode, confident, softly, without_exits

FOLDER = Path(str(files("multiexit_engine"))) / "assets" / "demo-elmer"
VERSES = [
    "And the Lord spake unto Moses, saying, Speak unto the children of Israel.",
    "And he saith unto them, Why are ye troubled?",
    "Blessed is the man that feareth the Lord, and his sons shall be mighty upon the earth.",
]
LENGTH = 20


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("demo-elmer", dtype="float32")


def answers(engine: Engine, mode: Parallel) -> list[tuple[list[int], list[int]]]:
    """Ids and exit layers of each verse, uncut."""
    outputs = engine.generate(VERSES, SamplingParams(ignore_eos=True, max_new_tokens=LENGTH), mode)
    return [
        (list(output.outputs[0].token_ids), list(output.outputs[0].exit_layers or ()))
        for output in outputs
    ]


def words(engine: Engine, verse: str) -> str:
    mode = Parallel("soft", length=1.1, collapse_repeats=True)
    return engine.generate(verse, decoding=mode)[0].outputs[0].text


def test_the_folder_is_at_most_25_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 25_000_000


def test_weights_are_bfloat16_and_hold_the_feedback() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        dtypes = {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
        assert "concat_head.weight" in weights.keys()  # noqa: SIM118
    assert dtypes == {torch.bfloat16}


def test_the_tokenizer_gives_back_any_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = "Ünïcödé — 海 🙂  two  spaces\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("mode", "decode"),
    [
        (Parallel("none", length=LENGTH), without_exits),
        (Parallel("soft", length=LENGTH), softly),
        (Parallel("confidence", threshold=0.5, length=LENGTH), confident(0.5)),
    ],
    ids=["none", "soft", "confidence"],
)
def test_the_engine_writes_what_the_training_measured(
    engine: Engine, mode: Parallel, decode: Decode
) -> None:
    tokenizer = read_tokenizer(FOLDER / "tokenizer.json")
    sources = [tokenizer.encode(verse).ids for verse in VERSES]
    batch = make_batch(sources, [[2]] * len(sources), [LENGTH] * len(sources))
    tokens = decode(read_elmer_network(FOLDER), batch)
    wanted = zip(tokens.ids.tolist(), tokens.exit_layers.tolist(), strict=True)
    assert answers(engine, mode) == list(wanted)


def test_tokens_of_one_verse_leave_at_different_layers(engine: Engine) -> None:
    for _, exit_layers in answers(engine, Parallel("confidence", threshold=0.5, length=LENGTH)):
        assert len(set(exit_layers)) >= 2


def test_old_words_become_new_ones(engine: Engine) -> None:
    text = words(engine, "And he saith unto them, Why are ye troubled?")
    assert text == "And he said to them, Why are you troubled?"


@pytest.mark.parametrize(("measure", "gain"), [("bleu", 3), ("rouge_l", 4)])
def test_answers_are_nearer_to_the_references_than_the_sources(measure: str, gain: int) -> None:
    figures = json.loads((FOLDER / "figures.json").read_text())
    rows = [row for row in figures["rows"] if row["length"] == "source"]
    assert min(row[measure] for row in rows) > figures["copy"][measure] + gain
