"""The GPU report's lines about the ring, rehearsed: they must not fail where minutes are dear."""

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal for machines without a GPU")
def test_lines_are_rehearsed_and_invent_no_times(ring):
    pytest.importorskip("tests.kernels.interpreter")
    from benchmarks.gpu import ring_cases
    from benchmarks.gpu.cases import Card

    cases = list(ring_cases.cases(Card(float("nan"), float("nan")), ring.heads))
    assert [case.label["rows"] for case in cases] == [1, 3]
    lines = [case.measure() for case in cases]
    times = [v for line in lines for k, v in line.items() if k.endswith("us")]
    assert len(times) == 12 and all(time != time for time in times)
