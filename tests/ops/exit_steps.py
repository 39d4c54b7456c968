"""Rows of a step that choose their exit, drawn at random, and what a loop says of them."""

from __future__ import annotations

import math

import torch

from multiexit_engine.ops import ExitProgress, ExitRules, HeadStatistics, RowPaths
from multiexit_engine.ops.exit_rows import MEASURES

NUM_ROWS = 300


def draw(low, high, dtype, generator):
    return torch.randint(low, high, (NUM_ROWS,), generator=generator).to(dtype)


def steps(seed=0, device="cpu"):
    """Rules, progress, paths and statistics of rows."""
    generator = torch.Generator().manual_seed(seed)
    measures = draw(-1, len(MEASURES), torch.int32, generator)
    shortlists = draw(0, 2, torch.int32, generator) * 50
    shortlists[measures > 2] = 0
    rules = ExitRules(measures, torch.rand(NUM_ROWS, generator=generator), shortlists)
    progress = ExitProgress(
        draw(0, 2, torch.int32, generator) * 2,
        torch.rand(NUM_ROWS, generator=generator),
        draw(0, 3, torch.int64, generator),
        draw(0, 3, torch.int32, generator),
        torch.zeros(NUM_ROWS, dtype=torch.int32),
        draw(0, 5, torch.int32, generator),
    )
    paths = RowPaths(
        draw(0, NUM_ROWS, torch.int64, generator),
        draw(0, 5, torch.int32, generator),
        draw(0, 7, torch.int32, generator),
        draw(0, 16, torch.int32, generator),
    )
    numbers = torch.rand(4, NUM_ROWS, generator=generator)
    log_probs, below = -numbers[0], -numbers[1] - 0.1
    log_probs[::7] = math.nan
    tokens = draw(0, 3, torch.int64, generator)
    found = HeadStatistics(tokens, log_probs, log_probs + below, numbers[2], 2 * numbers[3])
    return tuple(moved(each, device) for each in (rules, progress, paths, found))


def moved(each, device):
    fields = each if isinstance(each, tuple) else vars(each).values()
    return type(each)(*(column.to(device, copy=True) for column in fields))


def columns(progress):
    """[(name, numbers)], NaN as None."""
    return {
        name: [None if value != value else value for value in column.tolist()]
        for name, column in vars(progress).items()
    }
