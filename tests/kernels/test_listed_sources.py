"""Decoder blocks with sources for rows that the device lists: those of these rows alone."""

from dataclasses import replace

import pytest
import torch

from multiexit_engine.batch import ForwardBatch, ScheduledBatch, ScheduledSequence
from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.models import build_model
from multiexit_engine.ops import (
    ListedRows,
    assume_device,
    compact_rows,
    decoder_blocks,
    listed_decoder_blocks,
    use_backend,
)
from multiexit_engine.quantization import Quantization
from tests.models.harness import CPU, ENCODER_DECODERS, save
from tests.models.test_encoder_decoders import BLOCK_SIZE, new_sequences, transformers_model

pytest.importorskip("multiexit_engine.kernels.listed_blocks")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tensors are the CPU's")

# target, position: two rows of the first target, which the second of them sees
ROWS = [(0, 9), (0, 10), (1, 4), (3, 7), (3, 6), (2, 0)]
RUNNING, COPIED = [0, 1, 3], [4]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folders = {}

    def model(family, name):
        if family not in folders:
            theirs = transformers_model(*ENCODER_DECODERS[family])
            folders[family] = save(theirs, tmp_path_factory.mktemp("checkpoint"))
        kind = None if name is None else Quantization.parse(name)
        return build_model(open_checkpoint(folders[family]), CPU, torch.float32, kind)

    return model


def forward(items):
    batch = ScheduledBatch(tuple(ScheduledSequence(*item) for item in items))
    return ForwardBatch.build(batch, BLOCK_SIZE, CPU)


def filled(model):
    """Sequences, and a cache with keys and values of everything before the rows, else NaN."""
    sequences, kv_cache = new_sequences(model)
    with use_backend("reference"):
        batch = forward([(sequences[0], 0, 9), (sequences[1], 0, 4), (sequences[3], 0, 6)])
        hidden = model.embed(batch.token_ids, batch.positions)
        decoder_blocks.reference(hidden, list(model.blocks), kv_cache, batch)
    return sequences, kv_cache


def alone(model, hidden):
    sequences, kv_cache = filled(model)
    running, copied = (
        forward([(sequences[ROWS[row][0]], ROWS[row][1], 1) for row in rows])
        for rows in (RUNNING, COPIED)
    )
    with use_backend("reference"):
        for block in model.blocks:
            block.write_kv(hidden[COPIED], kv_cache, copied.positions, copied.slot_mapping)
        return decoder_blocks.reference(hidden[RUNNING], list(model.blocks), kv_cache, running)


def listed(model, hidden):
    sequences, kv_cache = filled(model)
    whole = forward([(sequences[target], at, 1) for target, at in ROWS])
    owners = forward([(s, len(s.token_ids) - 1, 1) for s in sequences])
    batch = replace(
        whole,
        layout=replace(whole.layout, block_tables=owners.layout.block_tables),
        sources=replace(whole.sources, block_tables=owners.sources.block_tables),
    )
    marks = [torch.tensor([row in rows for row in range(len(ROWS))]) for rows in (RUNNING, COPIED)]
    spare_slot = sequences[2].block_table[0] * BLOCK_SIZE + 1
    rows = ListedRows(
        *map(compact_rows.reference, marks), torch.tensor([i for i, _ in ROWS]), spare_slot
    )
    function = listed_decoder_blocks.implementation("triton")
    with assume_device("cuda"):
        return function(hidden, list(model.blocks), kv_cache, batch, rows)


@pytest.mark.parametrize(
    "name", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8", "fp8"))]
)
@pytest.mark.parametrize("family", ["bart", "t5 gated and untied"])
@torch.inference_mode()
def test_listed_rows_are_those_of_the_rows_alone(opened, family, name):
    model = opened(family, name)
    hidden = torch.randn(len(ROWS), 48, generator=torch.Generator().manual_seed(1))
    for row in set(range(len(ROWS))) - {*RUNNING, *COPIED}:
        hidden[row] = torch.nan
    found, wanted = listed(model, hidden), alone(model, hidden)
    torch.testing.assert_close(
        found[RUNNING], wanted, atol=3e-5 * float(wanted.abs().max()), rtol=0
    )
    stays = [row for row in range(len(ROWS)) if row not in RUNNING]
    assert torch.equal(found[stays].nan_to_num(), hidden[stays].nan_to_num())
