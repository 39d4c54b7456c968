import pytest
import torch
from torch import Tensor

from multiexit_engine.train.exits import MultiExitNetwork, exit_loss_weights
from tests.train.tiny import CAST, DIRECT, LAYER_SPECIFIC, tiny_decoder, tiny_network

LAYERS = (1, 3, 4)


def random_ids(rows: int, tokens: int) -> Tensor:
    return torch.randint(1, 67, (rows, tokens), generator=torch.Generator().manual_seed(3))


def plain_states(network: MultiExitNetwork, ids: Tensor) -> dict[int, Tensor]:
    """Hidden states after the final norm in float64: hs[N] of transformers already has it."""
    decoder = network.decoder.double()
    states = decoder.transformer(ids, output_hidden_states=True).hidden_states
    return {1: decoder.transformer.ln_f(states[1]), 3: decoder.transformer.ln_f(states[3])} | {
        4: states[4]
    }


def plain_loss(logits: Tensor, ids: Tensor) -> float:
    total, count = 0.0, 0
    for row in range(ids.shape[0]):
        for position in range(ids.shape[1] - 1):
            scores = logits[row, position]
            total -= float(scores[ids[row, position + 1]] - torch.logsumexp(scores, dim=0))
            count += 1
    return total / count


@torch.no_grad()
def test_losses_of_direct_exits_equal_the_plain_formula() -> None:
    network, ids = tiny_network(DIRECT, LAYERS), random_ids(2, 7)
    losses = network(ids)
    states = plain_states(network, ids)
    head = network.decoder.lm_head.weight
    expected = [plain_loss(states[layer] @ head.T, ids) for layer in LAYERS]
    torch.testing.assert_close(losses, torch.tensor(expected))


@torch.no_grad()
def test_losses_of_cast_exits_equal_the_plain_formula() -> None:
    network, ids = tiny_network(CAST, LAYERS), random_ids(2, 7)
    losses = network(ids)
    weights = {name: weight.double() for name, weight in network.heads.state_dict().items()}
    states = plain_states(network, ids)
    head = network.decoder.lm_head.weight
    expected = [
        plain_loss(states[1] @ weights["name_to_conv_matrix.1_to_4.weight"].T @ head.T, ids),
        plain_loss(states[3] @ weights["name_to_conv_matrix.3_to_4.weight"].T @ head.T, ids),
        plain_loss(states[4] @ head.T, ids),
    ]
    torch.testing.assert_close(losses, torch.tensor(expected))


@torch.no_grad()
def test_losses_of_layer_specific_exits_equal_the_plain_formula() -> None:
    network, ids = tiny_network(LAYER_SPECIFIC, LAYERS), random_ids(2, 7)
    losses = network(ids)
    weights = {name: weight.double() for name, weight in network.heads.state_dict().items()}
    states = plain_states(network, ids)
    expected = [
        plain_loss(states[k] @ weights[f"name_to_lm_exit_head.lm_head_{k}.weight"].T, ids)
        for k in LAYERS
    ]
    torch.testing.assert_close(losses, torch.tensor(expected))


@torch.no_grad()
def test_shared_rows_give_each_early_exit_its_own_rows_and_the_last_exit_all() -> None:
    network, ids = tiny_network(CAST, LAYERS), random_ids(5, 7)
    shared = network(ids, share_rows=True)
    expected = torch.stack([network(ids[:2])[0], network(ids[2:])[1], network(ids)[2]])
    torch.testing.assert_close(shared, expected)


def test_new_cast_exits_begin_as_direct_exits() -> None:
    ids = random_ids(2, 7)
    cast = MultiExitNetwork(tiny_decoder(), CAST, LAYERS)
    direct = MultiExitNetwork(tiny_decoder(), DIRECT, LAYERS)
    torch.testing.assert_close(cast(ids), direct(ids))


def test_a_tied_output_matrix_is_not_stored_twice() -> None:
    state = tiny_network(CAST, LAYERS).checkpoint_state(torch.bfloat16)
    assert "lm_head.weight" not in state
    assert "transformer.wte.weight" in state


def test_loss_weights_rise_with_depth_and_the_last_is_one() -> None:
    weights = exit_loss_weights((2, 4, 8), num_layers=8, early_exit_weight=0.2)
    torch.testing.assert_close(weights, torch.tensor([0.05, 0.1, 1.0]))


@pytest.mark.parametrize("layers", [(0, 4), (5,), (2, 2), ()])
def test_impossible_exit_layers_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="exit layers"):
        MultiExitNetwork(tiny_decoder(), DIRECT, layers)
