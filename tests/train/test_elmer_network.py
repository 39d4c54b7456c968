import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from multiexit_engine.train.elmer_network import ElmerNetwork, ElmerShape
from multiexit_engine.train.elmer_objectives import (
    PairBatch,
    decode_by_confidence,
    decode_softly,
    exit_states,
    soft_losses,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "elmer"
SETS = [path.name for path in sorted(GOLDEN.iterdir()) if path.is_dir()]
PATTERNS = ["rand", "early", "layer0", "last", "rowwise"]
CONFIDENCE = ["maxprob_0", "maxprob_3", "entropy_5", "entropy_7"]


def read_network(name: str) -> ElmerNetwork:
    """The golden's weights in float64, in which its logits were computed."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    weights = load_file(GOLDEN / name / "model.safetensors")
    network = ElmerNetwork(ElmerShape.from_config(config)).double()
    network.load_state_dict({key: tensor.double() for key, tensor in weights.items()})
    return network.eval()


def read_golden(name: str, file: str) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """All tensors of a file, and what a decoding takes: source, its mask, the target's mask."""
    golden = load_file(GOLDEN / name / f"{file}.safetensors")
    masks = golden["attention_mask"].bool(), golden["decoder_attention_mask"].bool()
    return golden, (golden["input_ids"].long(), *masks)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_prescribed_exits_give_elmers_logits(name: str, pattern: str) -> None:
    network = read_network(name)
    golden, (source_ids, source_mask, target_mask) = read_golden(name, "hard_prescribed")
    # the goldens count layers from 0
    exit_layers = golden[f"{pattern}.exit_layers"].long() + 1
    with torch.no_grad():
        source = network.encode(source_ids, source_mask)
        states = exit_states(network, source, source_mask, target_mask, exit_layers)
        logits = network.logits(states)
    wanted = golden[f"{pattern}.logits"].double()
    torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", SETS)
def test_feedback_gives_elmers_tokens(name: str) -> None:
    golden, inputs = read_golden(name, "soft")
    tokens = decode_softly(read_network(name), *inputs)
    assert torch.equal(tokens.ids, golden["ids"].long())


@pytest.mark.parametrize("name", SETS)
def test_the_losses_of_feedback_are_elmers(name: str) -> None:
    golden, inputs = read_golden(name, "soft")
    batch = PairBatch(*inputs, labels=golden["labels"].long())
    losses = soft_losses(read_network(name), batch, 0.0, torch.Generator())
    torch.testing.assert_close(losses.detach().double(), golden["eval_losses"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("case", CONFIDENCE)
def test_confidence_exits_are_those_of_the_golden(name: str, case: str) -> None:
    cases = json.loads((GOLDEN / name / "hard_conf.json").read_text())["cases"]
    threshold = next(each["threshold"] for each in cases if each["name"] == case)
    golden, inputs = read_golden(name, "hard_conf")
    measure = "max_prob" if case.startswith("maxprob") else "entropy"
    tokens = decode_by_confidence(read_network(name), *inputs, threshold, measure)
    assert torch.equal(tokens.ids, golden[f"{case}.ids"].long())
    assert torch.equal(tokens.exit_layers, golden[f"{case}.exit_layers"].long() + 1)
