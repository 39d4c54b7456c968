"""A GPT-Neo and its GPT-2 twin are one function."""

import torch
from checkpoints import make_checkpoint
from gpt2_twin import make_gpt2_twin
from transformers import GPT2LMHeadModel

from tests.benchmarks.test_bytes_read import TINY_NEO


def test_the_twin_of_a_gpt_neo_gives_its_logits(tmp_path):
    checkpoint = make_checkpoint(TINY_NEO, tmp_path, torch.float32)
    original = TINY_NEO.model_class.from_pretrained(checkpoint)
    twin = GPT2LMHeadModel.from_pretrained(make_gpt2_twin(TINY_NEO, checkpoint))
    ids = torch.randint(0, 131, (1, 50))
    with torch.inference_mode():
        torch.testing.assert_close(twin(ids).logits, original(ids).logits)
