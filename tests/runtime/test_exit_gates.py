"""Exits are asked by codes of their heads; only rows that these leave open read the heads."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from multiexit_engine import EarlyExit, Engine, SamplingParams
from multiexit_engine.layers import rough_heads
from multiexit_engine.runtime.early_exit import exit_gates
from multiexit_engine.runtime.early_exit.deciding_rows import DecidingRow
from multiexit_engine.runtime.early_exit.exit_gates import HeadGate
from tests.engine.families import EARLY_EXITS, with_copies
from tests.tiny import save_gpt2, save_probes

PROMPTS = [[3, 1, 4], list(range(40)), [200, 7], [9] * 12]
GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True, confidences=False)
SAMPLED = replace(GREEDY, temperature=1.0, top_k=0, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_probes(save_gpt2(tmp_path_factory.mktemp("gpt2")), (2, 4))


@pytest.fixture
def switch(monkeypatch):
    """Codes on for heads of any size, on any CPU, or off."""

    def to(is_on):
        monkeypatch.setattr(rough_heads, "are_codes_fast", lambda: is_on)
        monkeypatch.setattr(rough_heads, "LEAST_NUMBERS", 0)

    return to


@pytest.fixture
def read(monkeypatch):
    """Rows that read a head, and those that read a part of it, as they come."""
    counts = {"whole": 0, "listed": 0}

    def counted(name, find):
        def count(measures, *rest):
            counts[name] += len(measures)
            return find(measures, *rest)

        return count

    monkeypatch.setattr(exit_gates, "read_head", counted("whole", exit_gates.read_head))
    monkeypatch.setattr(exit_gates, "bounds", counted("listed", exit_gates.bounds))
    return counts


def results(engine, sampling, mode):
    completions = [o.outputs[0] for o in engine.generate(PROMPTS, sampling, mode)]
    return [(c.token_ids, c.exit_layers, c.confidences) for c in completions]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", with_copies(EARLY_EXITS), ids=str)
def test_codes_change_neither_tokens_nor_exits(folder, switch, mode, sampling, backend):
    engine = Engine.from_pretrained(folder, dtype="float32", backend=backend)
    switch(False)
    expected = results(engine, sampling, mode)
    switch(True)
    assert results(engine, sampling, mode) == expected


FAR = [
    EarlyExit(0.9),
    EarlyExit(0.9, "margin"),
    EarlyExit(0.2, "entropy"),
    EarlyExit(0.9, shortlist=99),
]


@pytest.mark.parametrize("mode", FAR, ids=str)
def test_most_rows_read_no_head(folder, switch, read, mode):
    engine = Engine.from_pretrained(folder, dtype="float32")
    switch(False)
    results(engine, GREEDY, mode)
    without = dict(read)
    switch(True)
    results(engine, GREEDY, mode)
    found = {name: count - without[name] for name, count in read.items()}
    assert sum(found.values()) < 0.5 * sum(without.values())


@pytest.mark.parametrize("mode", EARLY_EXITS[:3], ids=str)
def test_confidences_that_are_asked_for_are_those_of_the_heads(folder, switch, read, mode):
    engine = Engine.from_pretrained(folder, dtype="float32")
    asked = replace(GREEDY, confidences=True)
    switch(False)
    expected = results(engine, asked, mode)
    switch(True)
    assert results(engine, asked, mode) == expected
    assert all(len(confidences) == 24 for _, _, confidences in expected)


def test_a_row_of_nan_stays(folder, switch):
    engine = Engine.from_pretrained(folder, dtype="float32")
    heads = engine._core.runner.model.heads
    switch(True)
    states = torch.full((1, 64), torch.nan)
    row = DecidingRow(SimpleNamespace(target=0), EarlyExit(0.0), frozenset({2}))
    HeadGate(heads, 2, lambda rows: states).ask([row])
    assert not row.is_sure
