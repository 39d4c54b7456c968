import random
from pathlib import Path

import pytest

from multiexit_engine.train.elmer_data import (
    TokenBudgetSampler,
    damage,
    encode_source,
    encode_target,
    hold_out,
    read_pairs,
    read_tokenizer,
    train_pair_tokenizer,
)

VERSE = "And the LORD spake unto Moses, saying, Speak unto the children. They went out."


def test_pairs_are_lines_of_two_columns(tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text("old one\tnew one\nold two\tnew two\n")
    assert read_pairs([file, file]) == [("old one", "new one"), ("old two", "new two")] * 2


@pytest.mark.parametrize("line", ["alone", "a\tb\tc", "a\t", "\tb"])
def test_another_line_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text(f"old\tnew\n{line}\n")
    with pytest.raises(ValueError, match=r"pairs\.tsv, line 2"):
        read_pairs([file])


def test_every_fiftieth_pair_is_held_out() -> None:
    pairs = [(str(number), "") for number in range(120)]
    training, held_out = hold_out(pairs)
    assert held_out == [("49", ""), ("99", "")]
    assert len(training) == 118


def test_special_ids_are_barts(tmp_path: Path) -> None:
    tokenizer = train_pair_tokenizer([VERSE] * 3, 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    same = read_tokenizer(tmp_path / "tokenizer.json")
    assert same.encode("<mask>").ids == [0, same.get_vocab_size() - 1, 2]


def test_a_tokenizer_with_other_special_ids_is_refused(tmp_path: Path) -> None:
    tokenizer = train_pair_tokenizer([VERSE], 300)
    tokenizer.add_tokens(["after the mask"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="<mask> have the ids"):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_a_source_begins_and_ends_and_a_target_only_ends() -> None:
    tokenizer = train_pair_tokenizer([VERSE] * 3, 300)
    (source,), (target,) = encode_source(tokenizer, [VERSE], 99), encode_target(tokenizer, [VERSE])
    assert source == [0, *target]
    assert target[-1] == 2
    assert tokenizer.decode(target) == VERSE


def test_a_source_that_is_too_long_still_ends() -> None:
    tokenizer = train_pair_tokenizer([VERSE], 300)
    (whole,), (short,) = (encode_source(tokenizer, [VERSE], limit) for limit in (999, 7))
    assert short == [*whole[:6], 2]


def test_damage_hides_the_share_that_was_asked_for() -> None:
    words = " ".join(f"w{number}" for number in range(100))
    kept = [word for word in damage(words, 0.3, random.Random(1)).split() if word != "<mask>"]
    # a span may fall on a mask, and hides less then
    assert 70 <= len(kept) <= 78


def test_damage_of_nothing_only_moves_sentences() -> None:
    moved = {damage("One. Two! Three?", 0.0, random.Random(seed)) for seed in range(40)}
    assert len(moved) == 6
    assert all(sorted(text.split()) == ["One.", "Three?", "Two!"] for text in moved)


def test_an_epoch_visits_every_row_once() -> None:
    lengths = [random.Random(1).randint(3, 40) for _ in range(200)]
    sampler = TokenBudgetSampler(lengths, 120, seed=0)
    seen: list[int] = []
    step = 0
    while len(seen) < len(lengths):
        seen += sampler.rows(step)
        step += 1
    assert sorted(seen) == list(range(200))


def test_no_batch_exceeds_its_budget_of_padded_tokens() -> None:
    chooser = random.Random(1)
    lengths = [chooser.randint(3, 40) for _ in range(200)]
    sampler = TokenBudgetSampler(lengths, 120, seed=0)
    batches = [sampler.rows(step) for step in range(60)]
    assert max(len(rows) * max(lengths[row] for row in rows) for rows in batches) <= 120


def test_a_step_gives_the_same_rows_whatever_came_before() -> None:
    lengths = [5 + number % 7 for number in range(50)]
    forward = TokenBudgetSampler(lengths, 60, seed=4)
    rows = [forward.rows(step) for step in range(40)]
    assert TokenBudgetSampler(lengths, 60, seed=4).rows(35) == rows[35]
    assert forward.rows(2) == rows[2]
