"""The programs of docs/doors/clients.md run against a real server, by the real clients."""

import os

import pytest

from multiexit_engine import Contrast, Exit, SamplingParams
from tests.compat.pages import Page

# LiteLLM would look for a price list on the internet
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
pytestmark = [
    # what the clients do on their way is not ours to mend
    pytest.mark.filterwarnings("ignore:::(litellm|langchain|pydantic|openai|importlib).*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PAGE = Page("clients.md")
CONTRAST = Contrast(8, 4)
CHAT = "user: Tell me of the sea.\nassistant:"


@pytest.fixture
def run(server, capsys):
    """Runs a program of the page against the server of the tests; gives what it printed."""

    def run_program(number):
        program = PAGE.programs[number].replace("http://127.0.0.1:8000", server.url)
        exec(compile(program, "clients.md", "exec"), {})
        return capsys.readouterr().out

    return run_program


@pytest.fixture
def text(engine):
    """The text that the engine itself gives."""

    def generate(prompt, mode):
        return engine.generate(prompt, SamplingParams(max_new_tokens=16), mode)[0].outputs[0].text

    return generate


def test_openais_client_gets_the_engines_text_whole_and_in_pieces(run, text):
    wanted = text("The old house", CONTRAST)
    assert run(0) == wanted + "\n" + wanted


def test_openais_async_client_gets_two_modes_at_once(run, text):
    wanted = [text("The old house", mode) for mode in (Exit(6), CONTRAST)]
    assert run(1) == "".join(part + "\n" for part in wanted)


def test_litellm_gets_the_engines_text_and_chat(run, text):
    assert run(2) == text("The old house", CONTRAST) + "\n" + text(CHAT, CONTRAST)


def test_langchain_gets_the_engines_text_and_chat(run, text):
    assert run(3) == text("The old house", CONTRAST) + "\n" + text(CHAT, CONTRAST)
