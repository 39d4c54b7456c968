"""What the documents say is what the code does."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_page_of_the_command_line_is_current(tmp_path):
    page = tmp_path / "cli.md"
    command = [sys.executable, "-m", "typer", "multiexit_engine.cli", "utils", "docs"]
    subprocess.run([*command, "--name", "multiexit", "--output", page], cwd=ROOT, check=True)
    assert page.read_text() == (ROOT / "docs" / "cli.md").read_text(), "run `make docs`"


def test_the_readmes_program_runs(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(program, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.strip()) > 20


def test_the_readmes_make_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    wanted = re.findall(r"^make (\w+)", README, re.M)
    assert wanted == ["demo", "test"]
    assert all(re.search(rf"^{name}:", makefile, re.M) for name in wanted)


def test_links_of_the_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_that_the_documents_name_exist():
    folders = [ROOT, ROOT / "multiexit_engine", ROOT / "docs", ROOT / "csrc", ROOT / "tests"]
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|cpp|h|inl|cu))`", page.read_text()):
            assert any((folder / name).exists() for folder in folders), f"{page.name}: {name}"
