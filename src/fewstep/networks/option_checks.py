"""Checks for the values of a network configuration.

Each checker takes the full name of a key and its value. It returns the plain (JSON) value, or raises a
:class:`~fewstep.errors.UserError` that names the key, the value and what is expected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fewstep.errors import UserError, unknown

Checker = Callable[[str, object], Any]


def _refuse(key: str, value: object, expected: str) -> UserError:
    return UserError(f"{key} is {value!r} ({type(value).__name__}), but it must be {expected}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def positive(key: str, value: object) -> int:
    """An integer of at least 1.

    >>> positive("network.width", 0)
    Traceback (most recent call last):
    fewstep.errors.UserError: network.width is 0 (int), but it must be a positive whole number.
    """
    if not isinstance(value, int) or not _is_int(value) or value < 1:
        raise _refuse(key, value, "a positive whole number")
    return value


def count(key: str, value: object) -> int:
    """An integer of at least 0."""
    if not isinstance(value, int) or not _is_int(value) or value < 0:
        raise _refuse(key, value, "a whole number, 0 or more")
    return value


def probability(key: str, value: object) -> float:
    """A number in [0, 1)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= float(value) < 1:  # type: ignore[arg-type]
        raise _refuse(key, value, "a number p with 0 <= p < 1")
    return float(value)  # type: ignore[arg-type]


def flag(key: str, value: object) -> bool:
    """``True`` or ``False``."""
    if not isinstance(value, bool):
        raise _refuse(key, value, "true or false")
    return value


def positives(key: str, value: object) -> list[int]:
    """A non-empty list of positive integers."""
    if not isinstance(value, (list, tuple)) or not value or not all(_is_int(v) and v > 0 for v in value):
        raise _refuse(key, value, "a list of positive whole numbers, such as [32, 64]")
    return list(value)


def data_shape(value: object) -> list[int]:
    """The shape of one sample: (D,), (C, H, W), ..."""
    return positives("network shape", value)


def checked(name: str, given: Mapping[str, object], checkers: Mapping[str, Checker]) -> dict[str, Any]:
    """Check the options of a network.

    Args:
        name: the network's name, for errors.
        given: the options that were given.
        checkers: the check of every option.

    Returns:
        The given options as plain values.

    Raises:
        UserError: a value is wrong, or a key has no checker.
    """
    for key in given:
        if key not in checkers:
            raise unknown(f"key for network {name!r}:", key, [*checkers, "name", "preset", "two_time"])
    return {key: checkers[key](f"network.{key}", value) for key, value in given.items()}


def features(shape: Sequence[int]) -> int:
    """Number of values D in one sample.

    >>> features((3, 8, 8))
    192
    """
    return math.prod(shape)
