"""Puts rows, labels and conditions together to a data set, after checking that they fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from numpy.typing import ArrayLike

from fewstep.data.axes import Arranged
from fewstep.data.condition_arrays import check_conditions, check_mask
from fewstep.data.dataset import DataSet
from fewstep.data.labels import check_labels
from fewstep.data.lazy import RowSource
from fewstep.data.rules import choose_scaling

__all__ = ["Parts", "assemble"]


@final
@dataclass(frozen=True)
class Parts:
    """What a data set is made of, unchecked.

    Attributes:
        name: the name that the data gets.
        rows: the rows in the network's shape.
        what: how errors name the data.
        labels: whole numbers ``(N,)``, or None.
        label_names: names of the labels ``0 .. K - 1``, or None.
        labels_what: how errors name the labels.
        conditions: by name, ``(N, ...)``.
        mask: name of the condition that marks valid entries, or None.
        scale: ``standardise``, ``range``, ``none``, or None for the automatic rule.
    """

    name: str
    rows: Arranged
    what: str
    labels: ArrayLike | None = None
    label_names: tuple[str, ...] | None = None
    labels_what: str = "the labels"
    conditions: Mapping[str, RowSource] = field(default_factory=dict)
    mask: str | None = None
    scale: str | None = None


def assemble(parts: Parts) -> DataSet:
    """Check the parts, choose the scaling, and build the data set.

    Raises:
        UserError: rows, labels, conditions or the mask do not fit, or hold values that cannot be used.
    """
    rows, num = parts.rows.rows, len(parts.rows.rows)
    conditions = check_conditions(parts.conditions, num, parts.what)
    conditions = check_mask(parts.mask, conditions, parts.rows, parts.what)
    valid = None if parts.mask is None else conditions[parts.mask]
    scaling, quantum = choose_scaling(rows, parts.rows.kind, parts.rows.layout, parts.scale, parts.what, valid)
    if parts.labels is None:
        return DataSet(parts.name, rows, scaling, quantum=quantum, conditions=conditions, mask=parts.mask)
    numbers, values = check_labels(parts.labels, num, parts.labels_what, parts.what)
    names = parts.label_names or values
    classes = int(numbers.max()) + 1
    return DataSet(parts.name, rows, scaling, numbers, classes, names, quantum, conditions, parts.mask)
