"""Class labels: whole numbers, one per row, mapped to ``0 .. K - 1``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.errors import UserError

__all__ = ["check_labels"]


def check_labels(
    labels: ArrayLike, num: int, what: str, rows_what: str
) -> tuple[NDArray[np.int64], tuple[int, ...] | None]:
    """Map the labels of ``num`` rows to int64 ``0 .. K - 1``, in the order of their values.

    Booleans and floats that are whole numbers are accepted as integers.

    Args:
        labels: whole numbers ``(num,)``.
        num: number of rows.
        what, rows_what: how errors name the labels and the data.

    Returns:
        The mapped labels ``(num,)``, and the K original values; None in place of the values when they are
        ``0 .. K - 1`` already.

    Raises:
        UserError: the labels are not one whole number, at least 0, per row.

    >>> check_labels([7, 3, 7], 3, "the labels", "the data")
    (array([1, 0, 1]), (3, 7))
    """
    array: NDArray[Any] = np.asarray(labels)
    if array.ndim != 1:
        hint = ""
        if array.ndim == 2 and len(array) == num:
            hint = " Use y.reshape(-1)." if array.shape[1] == 1 else " For one-hot rows use y.argmax(axis=1)."
        raise UserError(f"{what}: labels must be one number per row, got shape {array.shape}.{hint}")
    if array.dtype.kind not in "iubf":
        raise UserError(
            f"{what}: labels must be whole numbers, got dtype {array.dtype}. "
            "Number the classes: numpy.unique(y, return_inverse=True)[1]."
        )
    if len(array) != num:
        raise UserError(
            f"{what} has {len(array)} labels and {rows_what} has {num} rows. Give one label per row, in the same order."
        )
    wrong = np.flatnonzero(array != np.rint(array)) if array.dtype.kind == "f" else np.empty(0, np.intp)
    if not wrong.size and array.dtype.kind == "f":
        wrong = np.flatnonzero(np.abs(array) > 2**53)
    if wrong.size:
        raise UserError(
            f"{what}: labels must be whole numbers, and {wrong.size} are not; the first is "
            f"{array[wrong[0]]} at index {wrong[0]}."
        )
    negative = np.flatnonzero(array < 0)
    if negative.size:
        raise UserError(
            f"{what}: labels must be 0 or more, and {negative.size} are not; the first is "
            f"{array[negative[0]]} at index {negative[0]}. Drop the rows without a label, or number them."
        )
    values, inverse = np.unique(array, return_inverse=True)
    names = tuple(int(value) for value in values)
    return inverse.astype(np.int64), None if names == tuple(range(len(names))) else names
