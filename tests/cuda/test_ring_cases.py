"""The GPU report's lines about the ring, rehearsed: they must not fail where minutes are dear."""

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal for machines without a GPU")
def test_lines_are_rehearsed_and_invent_no_times(ring):
    pytest.importorskip("tests.kernels.interpreter")
    from benchmarks.gpu import ring_cases

    lines = ring_cases.measure(float("nan"), ring.heads)
    assert [line["rows"] for line in lines] == [1, 3]
    times = [v for line in lines for k, v in line.items() if k.endswith("us")]
    assert len(times) == 12 and all(time != time for time in times)
