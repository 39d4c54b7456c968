"""What stands on a page of docs/doors: files, commands and programs, to be run as they stand."""

import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from multiexit_engine.cli import app

DOORS = Path(__file__).resolve().parents[2] / "docs" / "doors"


class Page:
    """One page; its blocks in order of their appearance."""

    def __init__(self, name: str) -> None:
        self.text = (DOORS / name).read_text()
        blocks = re.findall(r"^```console\n(.*?)^```", self.text, re.M | re.S)
        self.commands = [
            line.removeprefix("$ ")
            for block in blocks
            for line in block.replace("\\\n", "").splitlines()
            if line.startswith("$ ")
        ]
        self.programs = re.findall(r"^```python\n(.*?)^```", self.text, re.M | re.S)

    def write_files(self, folder: Path) -> None:
        """The files that the page names before their blocks."""
        named = re.findall(r"^`([\w./-]+)`:\n\n```\w+\n(.*?)^```", self.text, re.M | re.S)
        assert named
        for name, text in named:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    def run_program(self, number: int = 0) -> None:
        exec(compile(self.programs[number], "page", "exec"), {"__name__": "page"})


def run_command(line: str, status: int = 0) -> str:
    """The output of a `multiexit` command, run in this process."""
    program, *arguments = shlex.split(line)
    assert program == "multiexit"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == status, f"{line}: {result.output}"
    return result.stdout
