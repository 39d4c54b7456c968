"""What benchmarks write about themselves."""

import os

from report import command_line


def test_a_command_names_files_of_this_folder_by_their_way_from_here() -> None:
    script = os.path.abspath("benchmarks/latency.py")
    assert command_line([script, "--json", "out.json"]) == (
        "python benchmarks/latency.py --json out.json"
    )


def test_a_command_tells_no_folder_of_the_machine() -> None:
    words = ["nar.py", "--peer-python", "vllm=/home/me/vllm/bin/python", "--json", "/tmp/a.json"]
    assert command_line(words) == "python nar.py --peer-python vllm=python --json a.json"
