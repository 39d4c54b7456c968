"""What every part of the report is made of: cases, which are measured one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Card(NamedTuple):
    """What the card can do at most, as measured: TB/s of reads, bf16 TFLOP/s."""

    read_tb_s: float
    gemm_tflop_s: float


class Case(NamedTuple):
    """One measurement, whose failure costs no other.

    Attributes:
        label: what is measured; stands in front of its figures.
        measure: figures, of one line or of several.
    """

    label: dict[str, Any]
    measure: Callable[[], dict[str, Any] | list[dict[str, Any]]]


class Once(Generic[T]):
    """What several cases share: made when the first asks for it; a failure meets all of them."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: list[T] = []
        self._failure: Exception | None = None

    def __call__(self) -> T:
        """The one."""
        if self._failure is not None:
            raise self._failure
        if not self._made:
            try:
                self._made.append(self._make())
            except Exception as error:
                self._failure = error
                raise
        return self._made[0]

    def forget(self) -> None:
        """Free it."""
        self._made.clear()
