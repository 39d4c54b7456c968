"""What encoder-decoders write under forced tokens and drafts: transformers', or their target's."""

import pytest
import torch
import transformers

from multiexit_engine import Contrast, Exit, Original, SamplingParams, SelfSpeculative
from tests.engine.families import FAMILIES, SOURCED

PEERS = {
    "bart": transformers.BartForConditionalGeneration,
    "t5": transformers.T5ForConditionalGeneration,
}


def tokens(output):
    return [completion.token_ids for completion in output.outputs]


@pytest.mark.parametrize("family", SOURCED)
@pytest.mark.parametrize("target", [Original(), Exit(3), Contrast(4, 2)], ids=str)
def test_self_speculation_gives_the_tokens_of_its_target(family, target):
    engine = FAMILIES[family].open(SOURCED[family])
    params = SamplingParams(max_new_tokens=30)
    plain = engine.generate([[9, 8, 7, 6]], params, target)[0]
    drafted = engine.generate([[9, 8, 7, 6]], params, SelfSpeculative(1, target=target))[0]
    assert tokens(drafted) == tokens(plain)


@pytest.mark.parametrize("family", SOURCED)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_forced_tokens_begin_and_end_outputs_as_in_transformers(family, num_beams):
    theirs = PEERS[family].from_pretrained(SOURCED[family], dtype=torch.float32).eval()
    source = [7, 50, 120, 9]
    forced = {"max_new_tokens": 8, "num_beams": num_beams}
    forced |= {"forced_bos_token_id": 33, "forced_eos_token_id": 44}
    # transformers 5.23 sizes T5's cache by the encoder's layers, here fewer than the decoder's
    plain = {"do_sample": False, "use_cache": False}
    _, *wanted = theirs.generate(torch.tensor([source]), **plain, **forced)[0].tolist()
    engine = FAMILIES[family].open(SOURCED[family])
    (found,) = tokens(engine.generate([source], SamplingParams(**forced))[0])
    assert list(found) == wanted
    assert (found[0], found[-1], len(found)) == (33, 44, 8)
