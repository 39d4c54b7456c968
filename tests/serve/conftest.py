import httpx
import pytest
from openai import OpenAI

from multiexit_engine import Engine
from tests.serve.running import CHAT_TEMPLATE, serving


@pytest.fixture(scope="package")
def engine():
    """For what a request gives alone; the server has an engine of its own."""
    return Engine.from_pretrained("demo", dtype="float32", device="cpu")


@pytest.fixture(scope="package")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "template.jinja"
    path.write_text(CHAT_TEMPLATE)
    return path


@pytest.fixture(scope="package")
def server(template):
    loaded = Engine.from_pretrained("demo", dtype="float32", device="cpu", kv_cache_memory=2**25)
    with serving(loaded, chat_template=template) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_stays_behind(request):
    """After every test the shared server holds no request and no block."""
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").wait_until_empty()


@pytest.fixture(scope="package")
def client(server):
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as openai:
        yield openai


@pytest.fixture(scope="package")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http
