import pytest
import torch

from multiexit_engine.ops.sampling import gumbel_noise

triton = pytest.importorskip("triton")
tl = triton.language
gumbel = pytest.importorskip("multiexit_engine.kernels.noise").gumbel


@triton.jit
def _noise_kernel(
    noise_ptr, seed_ptr, position_ptr, first, ROWS: tl.constexpr, TOKENS: tl.constexpr
):
    rows, tokens = tl.arange(0, ROWS), tl.arange(0, TOKENS)
    seed, position = tl.load(seed_ptr + rows), tl.load(position_ptr + rows)
    noise = gumbel(seed[:, None], position[:, None], (first + tokens)[None, :])
    tl.store(noise_ptr + rows[:, None] * TOKENS + tokens[None, :], noise)


def test_kernels_draw_the_noise_of_the_reference(device):
    seeds = torch.tensor([0, -5, 2**40 + 7, 2**62])
    positions = torch.tensor([0, 5, 2**31 - 1, 100])
    noise = torch.full((4, 4096), float("nan"), device=device)
    args = (noise, seeds.to(device), positions.to(device), 200_000)
    _noise_kernel[(1,)](*args, ROWS=4, TOKENS=4096)
    expected = gumbel_noise.reference(seeds, positions, torch.arange(200_000, 204_096))
    torch.testing.assert_close(noise.cpu(), expected, atol=1e-5, rtol=1e-5)
