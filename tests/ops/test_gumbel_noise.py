import math

import numpy as np
import pytest
import torch

from multiexit_engine.ops import gumbel_noise
from multiexit_engine.ops.sampling import philox
from tests.ops.backends import all_backends, device_for, implementation_or_skip

KNOWN_ANSWERS = [  # of Random123: counter, key, first word of the result
    ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        0xD16CFE09,
    ),
]


def philox_in_plain_integers(counter, key):
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0


def noise_in_plain_integers(seed, position, token):
    seed %= 2**64
    bits = philox_in_plain_integers((token, position, 0, 0), (seed % 2**32, seed >> 32))
    v = np.float32(np.float32(bits) + np.float32(0.5)) * np.float32(2.0**-32)
    v = min(float(v), 1 - 2.0**-24)
    return -math.log(-math.log1p(-v))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, expected):
    words = [torch.tensor([word]) for word in (*counter, *key)]
    assert philox(tuple(words[:4]), tuple(words[4:])).tolist() == [expected]
    assert philox_in_plain_integers(counter, key) == expected


SEEDS = torch.tensor([0, 1, 2**31 + 5, 2**63 - 1, -1])
POSITIONS = torch.tensor([0, 7, 1000, 2**31 - 1, 3])


def test_equals_plain_integers():
    actual = gumbel_noise.reference(SEEDS, POSITIONS, 63)
    expected = [
        [noise_in_plain_integers(seed, position, token) for token in range(63)]
        for seed, position in zip(SEEDS.tolist(), POSITIONS.tolist(), strict=True)
    ]
    assert actual.dtype == torch.float32
    torch.testing.assert_close(
        actual.double(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-6
    )


def test_depends_on_seed_position_and_token_only():
    whole = gumbel_noise.reference(SEEDS, POSITIONS, 1031)
    some = torch.tensor([1030, 0, 5])
    assert torch.equal(gumbel_noise.reference(SEEDS[2:3], POSITIONS[2:3], some), whole[2:3, some])
    own = torch.tensor([[1], [20], [300], [4], [5]])
    assert torch.equal(gumbel_noise.reference(SEEDS, POSITIONS, own), whole.gather(1, own))


def test_extreme_words_give_finite_noise(monkeypatch):
    for word, expected in ((0, 33 * math.log(2)), (2**32 - 1, -math.log(24 * math.log(2)))):
        monkeypatch.setattr(
            "multiexit_engine.ops.sampling.philox", lambda *_, word=word: torch.tensor([[word]])
        )
        noise = gumbel_noise.reference(torch.tensor([0]), torch.tensor([0]), 1)
        assert noise.tolist() == [[pytest.approx(expected, rel=1e-6)]]


def test_has_the_moments_of_gumbel():
    noise = gumbel_noise.reference(torch.arange(20), torch.arange(20), 10_000).double()
    assert noise.mean().item() == pytest.approx(0.5772157, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


@all_backends(gumbel_noise)
def test_backend_matches_reference(backend):
    implementation = implementation_or_skip(gumbel_noise, backend)
    device = device_for(gumbel_noise, backend)
    actual = implementation(SEEDS.to(device), POSITIONS.to(device), 1031)
    expected = gumbel_noise.reference(SEEDS, POSITIONS, 1031)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_triton_replays_the_bits():
    """The layout that the docstring promises: Triton's own generator, in its interpreter."""
    triton = pytest.importorskip("triton")
    tl = triton.language
    if torch.cuda.is_available():
        pytest.skip("runs in the interpreter only")

    @triton.jit
    def kernel(out_ptr, seed, position, SIZE: tl.constexpr):
        tokens = tl.arange(0, SIZE).to(tl.int64)
        tl.store(out_ptr + tokens, tl.randint(seed, (position.to(tl.int64) << 32) + tokens))

    out = torch.empty(64, dtype=torch.int32)
    kernel[(1,)](out, 2**40 + 3, 17, SIZE=64)
    expected = [philox_in_plain_integers((t, 17, 0, 0), (3, 2**8)) for t in range(64)]
    assert [word % 2**32 for word in out.tolist()] == expected
