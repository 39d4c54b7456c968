"""The kernels of heads as the engine launches them, for the compile test."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch

from multiexit_engine.kernels import head_edits, head_finish, head_statistics, head_tiles
from multiexit_engine.kernels import heads as configs
from multiexit_engine.kernels.launch import options
from multiexit_engine.kernels.matrices import Stored
from tests.kernels.shipped import DTYPES, Shipped


class Kept(NamedTuple):
    """How heads are stored: the type of codes, their bits, and the columns that share a scale."""

    codes: str
    bits: int
    group: int

    @property
    def matrix(self) -> Stored:
        return Stored(torch.empty(0), None, self.bits, self.group)

    @property
    def constants(self) -> dict[str, Any]:
        return {**self.matrix.constants, **({} if self.bits else {"scale_ptr": None})}

    @property
    def types(self) -> dict[str, str]:
        if not self.bits:
            return {}
        weights = "upper_weight_ptr", "lower_weight_ptr", "head_weight_ptr"
        scales = "scale_ptr", "lower_scale_ptr"
        return dict.fromkeys(weights, self.codes) | dict.fromkeys(scales, "*bf16")

    def __str__(self) -> str:
        return f"bits={self.bits} group={self.group}"


# Plain, int8, int4, fp8.
PLAIN = Kept("", 0, 0)
CODED = (Kept("*i8", 8, 32), Kept("*u8", 4, 32), Kept("*u8", 8, 0))


# What a head whose rows have no lower heads of their own does without.
MIXED = ("lower_table_ptr", "group_ptr")
# What the last kernel does without where no score is edited.
EDITS = (
    "edited_ptr", "entry_ptr", "allowed_ptr", "is_edited_ptr", "add_ptr", "penalty_ptr", "loss_ptr",
)  # fmt: skip
# What a row's draw is narrowed by.
NARROWING = ("top_k_ptr", "unlikely_ptr", "min_p_ptr")
# Where it tells its best tokens.
BEST = ("asked_ptr", "best_id_ptr", "best_logprob_ptr", "rank_ptr")


class HeadKind(NamedTuple):
    """Lower heads of rows; whether scores are edited, draws narrowed, best tokens told."""

    lowers: str
    edited: bool = False
    narrowed: bool = False
    told: bool = False

    @property
    def flags(self) -> dict[str, bool]:
        return {"EDITED": self.edited, "NARROWED": self.narrowed, "TOLD": self.told}

    @property
    def has_all(self) -> bool:
        return self.lowers == "own" and self.edited and (self.narrowed or self.told)

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self._asdict().items())


BOTH = (False, True)
HEADS = (
    HeadKind("no"),
    HeadKind("one"),
    *(HeadKind(*kind) for kind in product(("no", "own"), BOTH, BOTH, BOTH) if any(kind[1:])),
    HeadKind("own"),
)


def heads(overlap: bool) -> Iterator[Shipped]:
    """Tiles of heads and of their statistics, and the kernels that finish both."""
    for dtype in DTYPES:
        for rows in (1, 16, 32, 64):
            for kind in HEADS:
                yield _head(rows, dtype, kind, overlap)
            yield from (_statistics(rows, dtype, is_listed) for is_listed in (True, False))
        for rows, kept in product((1, 32, 64), CODED):
            for kind in (HEADS[0], HEADS[1], HeadKind("own", *BOTH[1:] * 3)):
                yield _head(rows, dtype, kind, overlap, kept)
            yield _statistics(rows, dtype, is_listed=True, kept=kept)
    yield from _finishes(overlap)
    yield from (_laid_out(are_masked) for are_masked in BOTH)
    yield Shipped(
        "latest tokens",
        head_edits.latest_kernel,
        DTYPES[0],
        {"BLOCK": head_edits._BLOCK},
        options(4),
        dict.fromkeys(("latest_ptr", "chosen_by_ptr"), "*i64"),
    )


def _head(
    rows: int, dtype: torch.dtype, kind: HeadKind, overlap: bool, kept: Kept = PLAIN
) -> Shipped:
    """The tiles of a head, its rows contrasted with no lower head, with one, or each with its own.

    Where each row has its own the heads have a bias, which takes more registers than none.
    """
    lowers, edited, narrowed, told = kind
    config = configs.head_config(rows, dtype)
    if lowers == "own" or any(kind.flags.values()) or kept.bits:
        config = configs.mixed_config(rows, dtype, kind.has_all)
    unused: dict[str, Any] = {
        "no": dict.fromkeys(("bias_ptr", "lower_ptr", "lower_weight_ptr", *MIXED)),
        "one": dict.fromkeys(("bias_ptr", *MIXED)),
        "own": {},
    }[lowers]
    return Shipped(
        f"head rows={rows} {kind} {kept}",
        head_tiles.head_kernel,
        dtype,
        {
            **kept.constants,
            **unused,
            **({} if kept.bits and lowers == "one" else {"lower_scale_ptr": None}),
            **({} if edited else {"edited_ptr": None, "allowed_ptr": None}),
            **({} if narrowed else dict.fromkeys(NARROWING)),
            **({} if told else {"asked_ptr": None}),
            "EVEN": 1024 % config.block_k == 0,
            "HAS_BIAS": lowers == "own",
            "CONTRAST": lowers != "no",
            "MIXED": lowers == "own",
            **kind.flags,
            "BLOCK_V": config.block_v,
            "BLOCK_R": config.block_r,
            "BLOCK_K": config.block_k,
            "STAGES": configs.stages_for(kept.matrix, config, dtype),
            "OVERLAP": overlap,
        },
        options(config.num_warps, config.max_registers),
        kept.types,
    )


def _statistics(rows: int, dtype: torch.dtype, is_listed: bool, kept: Kept = PLAIN) -> Shipped:
    config = configs.head_config(rows, dtype)
    return Shipped(
        f"statistics rows={rows} listed={is_listed} {kept}",
        head_statistics.statistics_kernel,
        dtype,
        {
            **kept.constants,
            "bias_ptr": None,
            **({} if is_listed else {"row_ptr": None, "count_ptr": None}),
            "LISTED": is_listed,
            "EVEN": 1024 % config.block_k == 0,
            "HAS_BIAS": False,
            "BLOCK_V": config.block_v,
            "BLOCK_R": config.block_r,
            "BLOCK_K": config.block_k,
            "STAGES": kept.matrix.stages(config.num_stages),
        },
        options(config.num_warps, config.max_registers),
        kept.types,
    )


def _laid_out(are_masked: bool) -> Shipped:
    """What is done to scores of rows of a memory, by token."""
    integers = "is_listed", "start", "count", "list", "words", "edited", "entry", "allowed"
    types = dict.fromkeys([f"{name}_ptr" for name in (*integers, "is_edited")], "*i32")
    types |= dict.fromkeys(("row_ptr", "mask_ptr", "latest_ptr"), "*i64")
    numbers = "row_penalty", "row_loss", "number", "add", "penalty", "loss"
    types |= dict.fromkeys([f"{name}_ptr" for name in numbers], "*fp32")
    return Shipped(
        f"edits masked={are_masked}",
        head_edits.edits_kernel,
        DTYPES[0],
        {"BLOCK": head_edits._BLOCK, **({} if are_masked else {"words_ptr": None})},
        options(4, 128),
        types,
    )


def _finishes(overlap: bool) -> Iterator[Shipped]:
    tail = {"TILES": 4096, "OVERLAP": overlap}
    yield Shipped("head finish", head_finish.head_finish_kernel, DTYPES[0], tail, options(4))
    for is_listed in (True, False):
        unlisted: dict[str, Any] = {} if is_listed else {"row_ptr": None, "count_ptr": None}
        yield Shipped(
            f"statistics finish listed={is_listed}",
            head_statistics.statistics_finish_kernel,
            DTYPES[0],
            {"TILES": 4096, "LISTED": is_listed, **unlisted},
            options(4),
        )
    for kind in HEADS[1:]:
        lowers, edited, narrowed, told = kind
        unused = () if edited else EDITS
        unused += () if narrowed else NARROWING
        unused += () if told else BEST
        last_options = configs.finish_config(*kind.flags.values())
        listed = last_options.pop("LISTED")
        unused += () if lowers == "own" else ("group_ptr", "least_ptr")
        yield Shipped(
            f"contrast finish {kind}",
            head_finish.contrast_finish_kernel,
            DTYPES[0],
            {
                **tail,
                **dict.fromkeys(unused),
                "BLOCK_V": 32,
                "LISTED": listed,
                "CONTRAST": lowers != "no",
                "MIXED": lowers == "own",
                "LEAST": lowers == "own",
                **kind.flags,
            },
            last_options,
        )
