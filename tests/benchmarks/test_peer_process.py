"""A peer is asked over pipes, and takes no CPU while it is not asked."""

import sys
import time

import pytest
from peer_process import PeerProcess

from tests.benchmarks.conftest import BENCHMARKS

SPINNING_PEER = """
import threading
from protocol import serve

def spin():
    while True:
        pass

def load(arguments):
    print("loading", arguments.weights)
    threading.Thread(target=spin, daemon=True).start()
    return lambda prompts, new_tokens: [prompt[:1] * new_tokens for prompt in prompts]

serve(load, lambda: "1.0")
"""
DYING_PEER = "import sys; sys.exit('no such model')"


def start(tmp_path, code):
    script = tmp_path / "server.py"
    script.write_text(code)
    path = {"PYTHONPATH": str(BENCHMARKS / "peer_servers")}
    command = [sys.executable, str(script), "--weights=float32"]
    return PeerProcess(command, path, tmp_path / "log")


def test_a_peer_answers_every_prompt(tmp_path):
    with start(tmp_path, SPINNING_PEER) as peer:
        assert peer.version == "1.0"
        answer = peer.generate([[7, 8], [9]], 3)
    assert answer.tokens == [[7, 7, 7], [9, 9, 9]]
    assert 0 < answer.seconds < 5


def test_what_a_peer_prints_goes_to_its_log(tmp_path):
    with start(tmp_path, SPINNING_PEER) as peer:
        peer.generate([[1]], 1)
    assert "loading float32" in (tmp_path / "log").read_text()


def test_a_peer_that_would_spin_is_stopped_between_its_turns(tmp_path):
    with start(tmp_path, SPINNING_PEER) as peer:
        peer.generate([[1]], 1)
        time.sleep(0.1)  # until the signal has come to every thread
        before = peer.cpu_seconds()
        time.sleep(0.3)
        assert peer.cpu_seconds() == before


def test_a_peer_that_dies_shows_the_end_of_its_log(tmp_path):
    with pytest.raises(RuntimeError, match="no such model"):
        start(tmp_path, DYING_PEER)
