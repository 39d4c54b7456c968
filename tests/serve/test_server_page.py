"""The commands of docs/server.md, run as they stand."""

import json
import re
import shlex
import signal
import subprocess
import sys

import pytest

from tests.compat.pages import Page
from tests.serve.running import Process, events_of

PAGE = Page("../server.md")
CURLS = re.findall(r"^\$ (curl .*(?:\n    .*)*)", PAGE.text, re.M)
SERVES = [line for line in PAGE.commands if line.startswith("multiexit serve")]


@pytest.mark.parametrize("command", CURLS, ids=range(len(CURLS)))
def test_every_call_is_answered(server, command):
    line = command.replace("http://127.0.0.1:8000", server.url)
    answer = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    if "/metrics" in command:
        assert "vllm:time_to_first_token_seconds_bucket" in answer
    elif '"stream": true' in command:
        assert all("exit_layers" in c for e in events_of(answer) for c in e["choices"])
    else:
        assert "error" not in json.loads(answer)


def test_the_forms_are_kept(server):
    answers = []
    for command in CURLS:
        if "choice" in command or "regex" in command:
            line = command.replace("http://127.0.0.1:8000", server.url)
            answer = subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout
            answers.append(json.loads(answer)["choices"][0]["text"])
    choice, year = answers
    assert choice in ("cat", "dog")
    assert re.fullmatch("1[0-9]{3}", year)


@pytest.mark.parametrize("command", SERVES)
def test_every_server_starts(command):
    arguments = shlex.split(command.replace("--port 8000", ""))[3:]
    with Process(*arguments) as process:
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


def test_missing_packages_are_named():
    """Without fastapi the command says what to install, and starts nothing."""
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from multiexit_engine.cli import app; app(['serve', 'demo'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "serve needs the package 'fastapi'" in done.stderr
    assert "pip install 'multiexit-engine[serve]'" in done.stderr
    assert "Traceback" not in done.stderr
