import torch

from multiexit_engine.ops import write_kv
from tests.ops.backends import all_backends, device_for, implementation_or_skip

SLOTS = torch.tensor([13, 2, 7, 0, 19])


def written_by(function, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 5, 3, 7, generator=generator).to(dtype).to(device)
    caches = torch.full((2, 5, 4, 3, 7), float("nan"), dtype=dtype, device=device)
    function(key, value, caches[0], caches[1], SLOTS.to(device))
    return key, value, caches


def assert_stored(key, value, caches):
    flat = caches.view(2, 20, 3, 7)
    assert torch.equal(flat[0, SLOTS], key)
    assert torch.equal(flat[1, SLOTS], value)
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[SLOTS] = False
    assert flat[:, untouched].isnan().all()


def test_reference_writes_the_named_slots_and_no_others():
    assert_stored(*written_by(write_kv.reference))


def test_strided_keys_are_stored():
    fused = torch.arange(5 * 2 * 21.0).view(5, 42)
    key, value = (part.unflatten(1, (3, 7)) for part in fused.split(21, dim=1))
    caches = torch.full((2, 5, 4, 3, 7), float("nan"))
    write_kv(key, value, caches[0], caches[1], SLOTS)
    assert_stored(key, value, caches)


@all_backends(write_kv)
def test_backend_writes_the_named_slots_and_no_others(backend):
    function = implementation_or_skip(write_kv, backend)
    assert_stored(*written_by(function, device_for(write_kv, backend)))
