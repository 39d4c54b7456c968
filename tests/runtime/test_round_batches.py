import torch

from multiexit_engine.batch import ForwardBatch, ScheduledBatch, ScheduledSequence
from multiexit_engine.request import Sequence
from multiexit_engine.runtime.drafts.round_batches import RoundBatches
from tests.runtime.scheduler_harness import make_request

CPU = torch.device("cpu")


def drafting_items():
    """Items with 3, 2 and 1 drafts whose rows lie in blocks of four tokens."""
    request = make_request()
    lengths, tables, drafts = (6, 4, 9), ([3, 1, 0], [4, 5], [7, 6, 2]), (3, 2, 1)
    return [
        ScheduledSequence(
            Sequence(request, 0, [*range(length)], block_table=table), length - 1, 1, count
        )
        for length, table, count in zip(lengths, tables, drafts, strict=True)
    ]


def test_each_round_is_what_would_be_built_for_it_alone():
    rounds = RoundBatches(drafting_items(), 4, CPU)
    assert rounds.count == 3
    for number, count in enumerate((3, 2, 1)):
        tokens = torch.arange(count) + 50
        found = rounds.forward(number, tokens)
        alone = ForwardBatch.build(ScheduledBatch(tuple(rounds.rows(number))), 4, CPU)
        assert found.token_ids.tolist() == tokens.tolist()
        assert torch.equal(found.positions, alone.positions)
        assert torch.equal(found.slot_mapping, alone.slot_mapping)
        assert found.layout.query_lens == alone.layout.query_lens
        assert found.layout.context_lens == alone.layout.context_lens
        assert torch.equal(found.layout.cu_query_lens, alone.layout.cu_query_lens)
        assert torch.equal(found.layout.context_lens_device, alone.layout.context_lens_device)
        own = alone.layout.block_tables
        read = found.layout.block_tables[:, : own.shape[1]]
        assert torch.equal(read[own >= 0], own[own >= 0])


def test_the_first_round_reads_the_last_known_tokens():
    assert RoundBatches(drafting_items(), 4, CPU).first_tokens.tolist() == [5, 3, 8]


def test_the_last_drafts_are_what_would_be_built_for_them_alone():
    items = drafting_items()
    found = RoundBatches(items, 4, CPU).last(torch.arange(3) + 50)
    rows = [ScheduledSequence(i.sequence, i.stop - 1 + i.num_drafts, 1) for i in items]
    alone = ForwardBatch.build(ScheduledBatch(tuple(rows)), 4, CPU)
    assert found.token_ids.tolist() == [50, 51, 52]
    assert torch.equal(found.positions, alone.positions)
    assert torch.equal(found.slot_mapping, alone.slot_mapping)
    assert found.layout.context_lens == alone.layout.context_lens
    assert torch.equal(found.layout.context_lens_device, alone.layout.context_lens_device)
    assert torch.equal(found.layout.block_tables, alone.layout.block_tables)
