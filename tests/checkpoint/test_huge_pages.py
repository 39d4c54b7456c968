import gc

import pytest
import torch

from multiexit_engine.checkpoint.huge_pages import HUGE_PAGE, HugePages


def numbered(pages, rows, columns, dtype=torch.float32):
    tensor = pages.empty(torch.Size((rows, columns)), dtype)
    return tensor.copy_(torch.arange(rows * columns).view(rows, columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8])
def test_tensors_hold_what_is_written(dtype):
    tensor = HugePages().empty(torch.Size((3, 5)), dtype).copy_(torch.arange(15).view(3, 5))
    assert tensor.tolist() == torch.arange(15).view(3, 5).to(dtype).tolist()


def test_tensors_do_not_overlap():
    pages = HugePages()
    shapes = [(1, 1), (3, 7), (700, 1000), (1, 3), (2000, 3000), (3000, 2000), (5, 5)]
    tensors = [numbered(pages, *shape) for shape in shapes]
    for tensor, (rows, columns) in zip(tensors, shapes, strict=True):
        assert torch.equal(tensor, torch.arange(rows * columns).view(rows, columns).float())


def test_tensors_begin_at_lines_of_the_cache():
    pages = HugePages()
    assert all(numbered(pages, 3, columns).data_ptr() % 64 == 0 for columns in (1, 7, 16, 33))


def test_a_large_tensor_begins_at_a_huge_page():
    assert HugePages().empty(torch.Size((5000, 1000)), torch.float32).data_ptr() % HUGE_PAGE == 0


def test_a_tensor_outlives_the_pages_that_made_it():
    pages = HugePages()
    small, large = numbered(pages, 2, 3), numbered(pages, 5000, 1000)
    del pages
    gc.collect()
    assert small.sum() == 15 and large[-1, -1] == 4999999


def test_an_empty_tensor_is_possible():
    assert HugePages().empty(torch.Size((0, 4)), torch.float32).shape == (0, 4)
