"""What probes tell of a row is told of that row alone."""

import torch

from multiexit_engine.layers.probes import chances_of


def test_the_bits_of_a_chance_do_not_depend_on_its_place():
    odds = torch.randn(41, generator=torch.Generator().manual_seed(0)).repeat(50)
    odds = odds * torch.linspace(0.1, 5, len(odds))
    alone = torch.cat([chances_of(one) for one in odds.split(1)])
    for count in (1, 2, 7, 19, 41, len(odds)):
        assert torch.equal(chances_of(odds[:count]), alone[:count])
