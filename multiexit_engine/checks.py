"""Checks that the plain data share: is this a number, and what an error says."""

from __future__ import annotations

import sys


def reject(name: str, value: object, allowed: str) -> ValueError:
    """The error for a value that a field does not allow."""
    return ValueError(f"{name}={value!r}: must be {allowed}")


def is_int(value: object) -> bool:
    """Whether it is an integer, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether it is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # an integer of 400 digits is finite, but no float can hold it
    return abs(value) <= sys.float_info.max
