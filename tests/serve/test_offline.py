"""A file of prompts becomes a file of answers, and nothing is lost when the run is killed."""

import json
import signal
import subprocess
import time

import pytest

from multiexit_engine import Contrast, Engine, Exit, SamplingParams
from multiexit_engine.serve.offline import generate_file
from tests.compat.pages import Page, run_command
from tests.serve.running import COMMAND


@pytest.fixture(scope="module")
def small():
    """An engine with few seats, so that lines wait for each other."""
    return Engine.from_pretrained("demo", dtype="float32", device="cpu", max_batch_size=3)


@pytest.fixture
def files(tmp_path):
    return tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"


def write(path, *lines):
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))


def answers(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({answer["line"] for answer in found}) == len(found), "a line is answered twice"
    return {answer["line"]: answer for answer in found}


def ids(answer):
    return [output["token_ids"] for output in answer["outputs"]]


def test_every_line_gets_what_generate_gives(small, files):
    prompts = ["The old house", "She", "A", "The sea was", "He went", "In the"] * 2
    modes = [None, Exit(6), Contrast(8, 4)] * 4
    forms = [None, {"mode": "exit", "layer": 6}, "contrast:8,4"] * 4
    lines = [
        {"prompt": p, "max_new_tokens": 5 + k} | ({"decoding": form} if form else {})
        for k, (p, form) in enumerate(zip(prompts, forms, strict=True))
    ]
    write(files[0], *lines)
    report = generate_file(small, *files)
    assert (report.num_done, report.num_failed, report.num_kept) == (12, 0, 0)
    sampling = [SamplingParams(max_new_tokens=5 + k) for k in range(12)]
    for k, wanted in enumerate(small.generate(prompts, sampling, modes), 1):
        found = answers(files[1])[k]
        assert found["outputs"][0]["token_ids"] == wanted.outputs[0].token_ids
        assert found["outputs"][0]["text"] == wanted.outputs[0].text
        assert found["outputs"][0]["exit_layers"] == wanted.outputs[0].exit_layers


def test_a_line_that_cannot_be_run_is_answered_and_harms_no_other(small, files):
    wrong = [
        "no json",
        '"a string"',
        {"text": "x"},
        {"prompt": 5},
        {"prompt": "a", "decoding": "exit:99"},
        {"prompt": "a", "decoding": 7},
        {"prompt": "a", "top_k": -1},
        {"prompt": "a", "mirostat": 2},
        {"prompt": "a", "logit_bias": {"x": 1}},
        {"prompt": []},
    ]
    write(files[0], {"prompt": "The"}, *wrong, "", {"prompt": "The", "id": "last"})
    report = generate_file(small, *files)
    found = answers(files[1])
    assert (report.num_done, report.num_failed) == (12, 10)
    assert [found[k]["error"] is None for k in sorted(found)] == [True] + [False] * 10 + [True]
    assert ids(found[1]) == ids(found[13])
    assert found[13]["id"] == "last"


def test_what_is_answered_is_not_computed_again(small, files):
    write(files[0], *({"prompt": "The", "max_new_tokens": 3} for _ in range(4)))
    generate_file(small, *files)
    before = files[1].read_text()
    lines = before.splitlines(keepends=True)
    files[1].write_text(lines[0] + lines[1][:50])
    report = generate_file(small, *files)
    assert (report.num_done, report.num_kept) == (3, 1)
    assert sorted(files[1].read_text().splitlines()) == sorted(before.splitlines())


def test_an_output_of_another_input_is_refused(small, files):
    write(files[0], {"prompt": "The"})
    generate_file(small, *files)
    write(files[0], {"prompt": "A"})
    with pytest.raises(ValueError, match="another line 1 than"):
        generate_file(small, *files)


def test_a_file_that_is_no_output_is_left_as_it_is(small, files):
    write(files[0], {"prompt": "The"})
    files[1].write_text("my diary\n")
    with pytest.raises(ValueError, match="no answer of an earlier run"):
        generate_file(small, *files)
    assert files[1].read_text() == "my diary\n"


def test_a_killed_run_that_is_taken_up_again_gives_what_one_run_gives(small, files, tmp_path):
    lines = [
        {"prompt": "The sea", "max_new_tokens": 24 + 7 * (k % 5), "temperature": float(k % 2)}
        for k in range(24)
    ]
    write(files[0], *lines)
    command = [
        *COMMAND, "generate", "--input", files[0], "--output", files[1],
        "--dtype", "float32", "--device", "cpu", "--max-batch-size", "3",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not (files[1].exists() and files[1].read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    num_kept = files[1].read_bytes().count(b"\n")
    assert 2 <= num_kept < 24
    report = generate_file(small, *files)
    assert (report.num_kept, report.num_done) == (num_kept, 24 - num_kept)
    generate_file(small, files[0], tmp_path / "whole.jsonl")
    found, wanted = answers(files[1]), answers(tmp_path / "whole.jsonl")
    assert {k: ids(found[k]) for k in found} == {k: ids(wanted[k]) for k in wanted}


def test_the_pages_command_answers_the_pages_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Page("offline.md")
    page.write_files(tmp_path)
    (command,) = page.commands
    run_command(command, status=2)
    found = {answer["id"]: answer for answer in answers(tmp_path / "answers.jsonl").values()}
    assert [len(t) for t in ids(found["letter"])] == [8]
    assert [len(t) for t in ids(found["sea"])] == [12, 12]
    assert "exit" in found["wrong"]["error"]
