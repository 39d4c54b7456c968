import torch
from torch.nn import functional as F

from multiexit_engine.train.elmer_data import make_batch
from multiexit_engine.train.elmer_network import PAD
from multiexit_engine.train.elmer_objectives import (
    PairBatch,
    draw_exit_layers,
    exit_states,
    hard_loss,
    soft_losses,
)
from tests.train.tiny_elmer import tiny_elmer_network


def tiny_batch() -> PairBatch:
    """Two pairs; the second target is short and has positions to spare."""
    return make_batch([[0, 7, 8, 9, 2], [0, 5, 2]], [[11, 12, 13, 2], [14, 2]], [4, 3])


def states_of(exit_layers: torch.Tensor) -> torch.Tensor:
    network, batch = tiny_elmer_network(), tiny_batch()
    source = network.encode(batch.source_ids, batch.source_mask)
    return exit_states(network, source, batch.source_mask, batch.target_mask, exit_layers)


def test_a_batch_pads_sources_labels_and_positions() -> None:
    batch = tiny_batch()
    assert batch.source_ids.tolist() == [[0, 7, 8, 9, 2], [0, 5, 2, PAD, PAD]]
    assert batch.source_mask.tolist() == [[True] * 5, [True, True, True, False, False]]
    assert batch.labels.tolist() == [[11, 12, 13, 2], [14, 2, PAD, PAD]]
    assert batch.target_mask.tolist() == [[True] * 4, [True, True, True, False]]


def test_exit_layers_are_drawn_from_all_layers_evenly() -> None:
    layers = draw_exit_layers((300, 40), 4, 0.0, torch.Generator().manual_seed(1))
    shares = torch.bincount(layers.flatten(), minlength=5) / layers.numel()
    torch.testing.assert_close(
        shares, torch.tensor([0.0, 0.25, 0.25, 0.25, 0.25]), rtol=0, atol=0.02
    )


def test_full_rows_stay_to_the_last_layer() -> None:
    layers = draw_exit_layers((2000, 12), 4, 0.3, torch.Generator().manual_seed(1))
    assert abs(float((layers == 4).all(dim=1).double().mean()) - 0.3) < 0.03


def test_a_position_that_left_is_not_changed_by_the_layers_above() -> None:
    first = states_of(torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1]]))
    mixed = states_of(torch.tensor([[1, 3, 2, 3], [1, 2, 3, 3]]))
    torch.testing.assert_close(mixed[:, 0], first[:, 0])


def test_an_upper_position_sees_where_the_others_left() -> None:
    low = states_of(torch.tensor([[3, 1, 1, 1], [3, 1, 1, 1]]))
    high = states_of(torch.tensor([[3, 2, 1, 1], [3, 2, 1, 1]]))
    assert not torch.allclose(low[:, 0], high[:, 0], atol=1e-4)


def test_no_gradient_flows_through_a_copied_state() -> None:
    network, batch = tiny_elmer_network(), tiny_batch()
    with torch.no_grad():
        source = network.encode(batch.source_ids, batch.source_mask)
    exit_layers = torch.tensor([[1, 3, 1, 1], [1, 1, 1, 1]])
    states = exit_states(network, source, batch.source_mask, batch.target_mask, exit_layers)
    # position 1 left last: layer 1 reaches it through its own state, and through position 0's
    # only by what it saw before that one was copied
    states[0, 1].sum().backward()
    alone = network.model.decoder.layers[0].fc2.weight.grad.clone()
    network.zero_grad()
    first = network.first_states(2, 4)
    after = network.decoder_layer(0, first, batch.target_mask, source, batch.source_mask)
    frozen = after.detach().clone()
    for index in (1, 2):
        seen = torch.where((torch.arange(4) == 1)[None, :, None], after, frozen)
        after = network.decoder_layer(index, seen, batch.target_mask, source, batch.source_mask)
    after[0, 1].sum().backward()
    torch.testing.assert_close(alone, network.model.decoder.layers[0].fc2.weight.grad)


def test_what_a_padded_position_holds_changes_no_loss() -> None:
    network, batch = tiny_elmer_network(), tiny_batch()
    exit_layers = torch.tensor([[1, 3, 2, 3], [3, 2, 3, 1]])
    other = batch.source_ids.masked_fill(~batch.source_mask, 20)
    changed = PairBatch(other, batch.source_mask, batch.target_mask, batch.labels)
    torch.testing.assert_close(
        hard_loss(network, batch, exit_layers), hard_loss(network, changed, exit_layers)
    )


def test_the_hard_loss_is_the_mean_over_labels_alone() -> None:
    network, batch = tiny_elmer_network(), tiny_batch()
    exit_layers = torch.full((2, 4), 3)
    logits = network.logits(states_of(exit_layers))
    wanted = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=PAD)
    torch.testing.assert_close(hard_loss(network, batch, exit_layers), wanted)


def test_told_labels_change_the_layers_above_the_first() -> None:
    network, batch = tiny_elmer_network(), tiny_batch()
    # the first feedback weights are no feedback
    torch.nn.init.normal_(network.concat_head.weight, std=0.3)
    alone = soft_losses(network, batch, 0.0, torch.Generator().manual_seed(1))
    told = soft_losses(network, batch, 1.0, torch.Generator().manual_seed(1))
    assert alone[0] == told[0]
    assert not torch.isclose(alone[1], told[1])
