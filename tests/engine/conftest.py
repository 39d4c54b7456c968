import pytest

from multiexit_engine import Engine
from tests.tiny import save_gpt2


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="package")
def engine(folder):
    return Engine.from_pretrained(folder, dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def nothing_stays_behind(request):
    """After every test the shared engine holds no request and no block."""
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        stats = engine.stats()
        assert not engine.has_unfinished()
        assert stats.num_free_kv_blocks == stats.num_kv_blocks
        assert not engine._core.requests and not engine._core._texts
        engine._scheduler.check_integrity()
