"""Names of peers on the command line."""

import pytest
import typer
from roster import ROSTER, chosen_peers, peer_pythons


def test_all_peers_are_all():
    assert chosen_peers("all") == list(ROSTER)


def test_an_unknown_peer_is_named_with_the_known_ones():
    with pytest.raises(typer.BadParameter, match=r"'onnx'.*llama\.cpp"):
        chosen_peers("vllm,onnx")


def test_a_peers_python_is_given_by_name():
    assert peer_pythons(["vllm=/opt/bin/python"]) == {"vllm": "/opt/bin/python"}


def test_a_python_without_a_peers_name_is_refused():
    with pytest.raises(typer.BadParameter, match="NAME=PATH"):
        peer_pythons(["/opt/bin/python"])
