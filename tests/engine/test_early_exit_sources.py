"""Early exits of encoder-decoders, against modules in float64 that take one token at a time."""

import pytest
import torch

from multiexit_engine import EarlyExit, SamplingParams
from multiexit_engine.batch import ForwardBatch, ScheduledBatch, ScheduledSequence
from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.models import build_model
from multiexit_engine.ops import use_backend
from multiexit_engine.params import Original
from multiexit_engine.request import Request, Sequence
from tests.engine.families import FAMILIES, SOURCED

CPU, BLOCK_SIZE, LENGTH = torch.device("cpu"), 64, 24
SOURCES = [[5] * 7, [9, 8, 7, 300], [44, 4, 4]]
EXITS = (1, 2, 3)
# rows leave at each of the exits, and some at none
THRESHOLDS = {"bart": 0.8, "t5": 0.4}


class OneByOne:
    """A model in float64, a source in block 0 of its cache and its answer in block 1."""

    def __init__(self, family, source):
        checkpoint = open_checkpoint(SOURCED[family], architecture=family)
        self.model = build_model(checkpoint, CPU, torch.float32).double()
        config = self.model.config
        self.depth = config.num_layers
        shape = config.num_layers, 2, BLOCK_SIZE, config.num_kv_heads, config.head_dim
        self.cache = PagedKVCache(*shape, torch.float64, CPU)
        cross = self.model.cross_keys_values(self.model.encode(torch.tensor(source), [len(source)]))
        self.model.store_cross(cross, self.cache, torch.arange(len(source)))
        self.source, self.token_ids = tuple(source), [config.encoder.decoder_start_token_id]

    def next_token(self, threshold, kv):
        """The token that the last one gives, and the layer at which it left."""
        batch, hidden, found = self._batch(), None, None
        hidden = self.model.embed(batch.token_ids, batch.positions).double()
        for layer in range(self.depth):
            hidden = self.model.run_layers(hidden, layer, layer + 1, self.cache, batch)
            probs = self._logits(hidden).softmax(-1)
            if layer + 1 == self.depth or (layer + 1 in EXITS and probs.max() >= threshold):
                found = found or (int(probs.argmax()), layer + 1)
                if kv == "copy":
                    places = batch.positions, batch.slot_mapping
                    for block in list(self.model.blocks)[layer + 1 :]:
                        block.write_kv(hidden, self.cache, *places)
                    break
        self.token_ids.append(found[0])
        return found

    def _logits(self, hidden):
        operands = self.model.heads.operands(self.model.heads.original, hidden)
        logits = operands.hidden @ operands.weight.T
        return logits if operands.bias is None else logits + operands.bias

    def _batch(self):
        request = Request(
            "r", self.token_ids, SamplingParams(), Original(), self.depth, 0,
            source_token_ids=self.source,
        )  # fmt: skip
        sequence = Sequence(request, 0, self.token_ids, block_table=[1], source_table=[0])
        item = ScheduledSequence(sequence, len(self.token_ids) - 1, 1)
        return ForwardBatch.build(ScheduledBatch((item,)), BLOCK_SIZE, CPU)


@pytest.mark.parametrize("family", SOURCED)
@pytest.mark.parametrize("kv", ["recompute", "copy"])
def test_tokens_and_exits_are_those_of_one_token_at_a_time(family, kv):
    threshold = THRESHOLDS[family]
    params = SamplingParams(max_new_tokens=LENGTH, ignore_eos=True)
    mode = EarlyExit(threshold, "max_prob", layers=EXITS, kv=kv)
    outputs = FAMILIES[family].open(SOURCED[family]).generate(SOURCES, params, mode)
    with torch.inference_mode(), use_backend("reference"):
        for source, output in zip(SOURCES, outputs, strict=True):
            truth = OneByOne(family, source)
            wanted = [truth.next_token(threshold, kv) for _ in range(LENGTH)]
            completion = output.outputs[0]
            assert list(zip(completion.token_ids, completion.exit_layers, strict=True)) == wanted
    left = {layer for output in outputs for layer in output.outputs[0].exit_layers}
    assert len(left) >= 3
