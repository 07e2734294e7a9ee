"""Conditions: named arrays with one row per row of the data, and the mask among them that marks padding.

A condition is handed to the network as the keyword argument of its name, so the names are those of the network's own
arguments. Whole numbers reach it as int64, flags as bool and all other numbers as float32.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.data.arrays import read_npy, refuse_dtype
from fewstep.data.axes import Arranged
from fewstep.data.lazy import LazyRows, RowSource, row_chunks
from fewstep.data.rules import refuse_non_finite
from fewstep.errors import UserError, unknown

__all__ = ["as_rows", "check_conditions", "check_mask", "condition_names", "numpy_of", "read_conditions"]

_TAKEN = {"x": "the rows", "t": "the time", "r": "the end time"}


def numpy_of(value: Any) -> NDArray[Any]:
    """A tensor, array or nested list as an array; bfloat16, which numpy lacks, becomes float32.

    >>> numpy_of([[1, 2]]).shape
    (1, 2)
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return np.asarray((value.float() if value.dtype == torch.bfloat16 else value).numpy())
    return np.asarray(value)


def as_rows(value: Any) -> RowSource:
    """Arrays and tensors as arrays; other row sources stay on their medium and are read where they are asked for."""
    if isinstance(value, (np.ndarray, LazyRows)):
        return value
    if isinstance(value, RowSource) and not isinstance(value, Tensor):
        return LazyRows(value)
    try:
        return numpy_of(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"a {type(value).__name__} cannot be read as one array of numbers: {error}. Give an array or a tensor "
            "whose rows have one shape; pad them and mark the padding with a mask."
        ) from error


def condition_names(given: Any) -> tuple[str, ...]:
    """Check the names of conditions.

    Args:
        given: one name, a list of names, or a mapping whose keys are names; None: none.

    Raises:
        UserError: a name cannot be the keyword of a network's argument, is taken, or occurs twice.

    >>> condition_names(["obs", "mask"])
    ('obs', 'mask')
    """
    names = [given] if isinstance(given, str) else list(given or ())
    for name in names:
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(
                f"condition {name!r} cannot be the name of a network's argument, as which it is passed. Give a name "
                "of letters, digits and '_', e.g. 'obs'."
            )
        if name == "label":
            raise UserError("condition 'label' is the class label: give it as 'labels' (one whole number per row).")
        if name in _TAKEN:
            raise UserError(f"condition {name!r} has the name of {_TAKEN[name]} in v(x, t, r, ...). Give it another.")
        if names.count(name) > 1:
            raise UserError(f"condition {name!r} is named twice. Name it once.")
    return tuple(names)


def read_conditions(given: Any, inside: Mapping[str, NDArray[Any]], what: str) -> dict[str, RowSource]:
    """The values of the conditions that the data key ``conditions`` names.

    Args:
        given: a name, a list of names of ``inside``, or a mapping from names to paths of ``.npy`` files or to arrays.
        inside: the arrays that the data's own file holds.
        what: how errors name the data.

    Raises:
        UserError: a name or path does not exist, or a file cannot be read.
    """
    names = condition_names(given)
    if isinstance(given, Mapping):
        return {name: _read_one(name, given[name]) for name in names}
    for name in names:
        if name not in inside:
            raise UserError(
                f"data key 'conditions': {name!r} would be an array of {what}, which holds none beside the rows. Give "
                f"its file: 'conditions: {{{name}: {name}.npy}}'."
            )
    return {name: inside[name] for name in names}


def _read_one(name: str, source: Any) -> RowSource:
    if not isinstance(source, (str, os.PathLike)):
        return as_rows(source)
    path = Path(os.path.expanduser(source))
    if not path.is_file():
        raise UserError(f"data key 'conditions': there is no file {str(source)!r} for {name!r}.")
    return read_npy(path)


def check_conditions(conditions: Mapping[str, RowSource], num: int, what: str) -> dict[str, RowSource]:
    """Refuse conditions that a network cannot be given; return them as arrays or lazy rows.

    Values that are NaN or infinite are refused. They are not looked for in lazy rows, which would be read for it.

    Args:
        conditions: ``(N, ...)`` by name.
        num: number of rows of the data.
        what: how errors name the data.

    Raises:
        UserError: another number of rows, a dtype that is not real, or values that are not finite.
    """
    found: dict[str, RowSource] = {}
    for name, values in conditions.items():
        named = f"condition {name!r} of {what}"
        refuse_dtype(np.dtype(values.dtype), named)
        if not values.shape or len(values) != num:
            raise UserError(
                f"{named} has shape {tuple(values.shape)}, and {what} has {num} rows. Give one row of the condition "
                "per row, in the same order."
            )
        if isinstance(values, np.ndarray):
            refuse_non_finite(values, named)
        found[name] = values
    return found


def check_mask(
    name: str | None, conditions: Mapping[str, RowSource], rows: Arranged, what: str
) -> dict[str, RowSource]:
    """Check the condition that marks valid entries; return the conditions with it in the network's arrangement.

    Args:
        name: which condition it is; None: there is no mask, and the conditions are returned unchanged.
        conditions: all conditions by name.
        rows: the arranged rows ``(N, *shape)``.
        what: how errors name the data.

    Raises:
        UserError: there is no such condition, its shape is not that of the first axes of the rows, a value is neither
            0 nor 1, or a row has no valid entry.
    """
    if name is None:
        return dict(conditions)
    if not isinstance(name, str):
        raise UserError(
            f"data key 'mask' must be the name of a condition, got a {type(name).__name__}. Give the values as a "
            "condition and its name here: conditions={'mask': values}, mask='mask'."
        )
    if name not in conditions:
        raise UserError(
            f"data key 'mask': {unknown('condition', name, conditions)} The mask is one of the conditions: name it in "
            f"'conditions' too, e.g. 'conditions: [{name}]'."
        )
    mask, shape = conditions[name], tuple(rows.rows.shape[1:])
    if rows.layout == "HW" and tuple(mask.shape[1:]) == shape[1:]:
        mask = mask[:, None] if isinstance(mask, np.ndarray) else LazyRows(mask, _channel, (1, *mask.shape[1:]))
    elif rows.layout == "HWC" and tuple(mask.shape[1:]) == (*shape[1:], shape[0]):
        mask = np.moveaxis(np.asarray(mask[:]), -1, 1)
    own = tuple(mask.shape[1:])
    if len(own) > len(shape) or any(n not in (1, m) for n, m in zip(own, shape, strict=False)):
        raise UserError(
            f"the mask {name!r} of {what} has shape {tuple(mask.shape)}, and the rows have {tuple(rows.rows.shape)}. "
            "Its axes must be the first axes of the rows: (N,), (N, T) for rows (N, T, D), or the shape of the rows."
        )
    _check_flags(mask, f"the mask {name!r} of {what}")
    return {**conditions, name: mask}


def _channel(block: NDArray[Any]) -> NDArray[Any]:
    return block[:, None]


def _check_flags(mask: RowSource, named: str) -> None:
    """Refuse values other than 0 and 1, and rows of zeros."""
    chunks = row_chunks(mask)
    for start in chunks:
        part = np.asarray(mask[start : start + chunks.step]).reshape(-1, max(1, int(np.prod(mask.shape[1:]))))
        wrong = (part != 0) & (part != 1)
        if wrong.any():
            row, place = np.unravel_index(int(wrong.argmax()), wrong.shape)
            raise UserError(
                f"{named} holds {part[row, place]} in row {start + int(row)}. Values must be 1 for valid entries and 0 "
                "for padding."
            )
        empty = np.flatnonzero(~(part != 0).any(axis=1))
        if empty.size:
            raise UserError(
                f"{named} is 0 everywhere in row {start + int(empty[0])}: no entry of that row is valid. Drop such "
                "rows."
            )
