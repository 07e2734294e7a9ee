"""Named columns: which of the things that a data set or a loader gives per row are the rows, labels and conditions.

Items come as dictionaries (keys are names), as tuples (keys are positions, 0 first) or as one tensor. The rules:

- rows: ``x=``; without it position 0, the only column, or the one called ``x``, ``data``, ``images``, ``image``,
  ``img``, ``pixel_values`` or ``latents``;
- labels: ``label=``; without it the one called ``y``, ``label`` or ``labels``, or position 1 of a pair whose second
  part is whole numbers;
- conditions: ``conditions=``, a list of names, or a mapping from the network's names to the item's keys. For tuples a
  list names the parts after the rows, in order; the name ``label`` among them means the labels.

Where ``conditions`` is not given at all and further columns exist, they are refused with their names, so that nothing
is dropped unsaid; ``conditions=[]`` says that they are not wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from fewstep.data.condition_arrays import condition_names, numpy_of
from fewstep.errors import UserError, unknown

__all__ = ["Columns", "Wanted", "choose_columns", "columns_of", "numeric"]

Key = str | int
X_KEYS = ("x", "data", "images", "image", "img", "pixel_values", "latents")
LABEL_KEYS = ("y", "label", "labels")


@final
@dataclass(frozen=True)
class Wanted:
    """What the caller said about the columns; None: nothing was said.

    Attributes:
        x: key of the rows.
        label: key of the labels.
        conditions: names, or a mapping from names to keys.
    """

    x: Key | None = None
    label: Key | None = None
    conditions: Any = None


@final
@dataclass(frozen=True)
class Columns:
    """Which key of an item holds what.

    Attributes:
        x: of the rows.
        label: of the labels; None for none.
        conditions: by the network's name.
    """

    x: Key
    label: Key | None = None
    conditions: Mapping[str, Key] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[Key, ...]:
        """All keys, each once."""
        return tuple(dict.fromkeys((self.x, *([] if self.label is None else [self.label]), *self.conditions.values())))


def columns_of(item: Any, what: str) -> dict[Key, Any]:
    """The parts of an item by key.

    Args:
        item: a mapping, a tuple or list, a named tuple, or one tensor, array or number.
        what: how errors name the source.

    Raises:
        UserError: the item is empty or of another kind.

    >>> columns_of((5, 6), "the loader")
    {0: 5, 1: 6}
    """
    if isinstance(item, Mapping):
        found: dict[Key, Any] = dict(item)
    elif isinstance(item, (tuple, list)):
        found = dict(enumerate(item))
    else:
        found = {0: item}
    if not found or item is None or isinstance(item, (str, bytes)):
        raise UserError(f"{what} gives {item!r}. Give items that are dictionaries, tuples or tensors.")
    return found


def numeric(value: Any) -> bool:
    """Whether a part of an item is numbers, which could be a condition; texts and objects are not."""
    if isinstance(value, (str, bytes)) or value is None:
        return False
    try:
        return numpy_of(value).dtype.kind in "fiubc"
    except (TypeError, ValueError, RuntimeError):  # ragged lists; images and other objects of foreign kinds
        return False


def choose_columns(wanted: Wanted, item: Mapping[Key, Any], what: str) -> Columns:
    """Find rows, labels and conditions among the parts of an item.

    Args:
        wanted: what the caller said.
        item: the parts of one item (or of a block of them) by key, see :func:`columns_of`.
        what: how errors name the source.

    Raises:
        UserError: a key does not exist, the rows cannot be told, or further numeric parts are not named.
    """
    keys = list(item)
    keys = list(item)
    x, given, label = _x_key(wanted.x, keys, what), wanted.conditions, wanted.label
    if isinstance(given, Mapping):
        conditions = {name: _known(key, keys, what) for name, key in given.items()}
    elif isinstance(keys[0], int):
        conditions = _by_position(given, [key for key in keys if key not in (x, label)], what)
    else:
        names = [given] if isinstance(given, str) else list(given or ())
        conditions = {name: _known(name, keys, what) for name in names}
    condition_names([name for name in conditions if name != "label"])
    named = conditions.pop("label", None)
    label = _label_key(named if label is None else label, item, {x, *conditions.values()}, what)
    if given is None:
        _refuse_further([key for key in keys if key not in (x, label) and numeric(item[key])], what)
    return Columns(x, label, conditions)


def _known(key: Any, keys: Sequence[Key], what: str) -> Key:
    if key not in keys:
        if isinstance(keys[0], int):
            raise UserError(f"{what} gives tuples of {len(keys)} parts, and {key!r} is none of 0 to {len(keys) - 1}.")
        raise unknown(f"column of {what}:", key, map(str, keys))
    found: Key = key
    return found


def _x_key(x: Key | None, keys: Sequence[Key], what: str) -> Key:
    """The key of the rows."""
    if x is not None:
        return _known(x, keys, what)
    if len(keys) == 1 or isinstance(keys[0], int):
        return keys[0]
    found = [key for key in X_KEYS if key in keys]
    if len(found) != 1:
        raise UserError(
            f"{what} gives the columns {', '.join(map(repr, keys))}, and it is not clear which of them is the data. "
            "Name it: x='…'."
        )
    return found[0]


def _by_position(given: Iterable[str] | str | None, rest: Sequence[Key], what: str) -> dict[str, Key]:
    """Names for the parts of a tuple after the rows."""
    names = [given] if isinstance(given, str) else list(given or ())
    if len(names) > len(rest):
        raise UserError(
            f"{what} gives tuples with {len(rest)} part(s) beside the rows, and conditions names {len(names)}: "
            f"{', '.join(map(repr, names))}."
        )
    return dict(zip(names, rest, strict=False))


def _label_key(label: Key | None, item: Mapping[Key, Any], used: set[Key], what: str) -> Key | None:
    """The key of the labels: as given, or found by its name or by its whole numbers among the keys not used."""
    keys = list(item)
    if label is not None:
        return _known(label, keys, what)
    free = [key for key in keys if key not in used]
    if isinstance(keys[0], str):
        found = [key for key in LABEL_KEYS if key in free]
        return found[0] if len(found) == 1 else None
    if len(keys) != 2 or not free or not numeric(item[free[0]]):
        return None
    values = numpy_of(item[free[0]])
    return free[0] if values.ndim <= 1 and values.dtype.kind in "iu" else None


def _refuse_further(keys: Sequence[Key], what: str) -> None:
    if not keys:
        return
    if isinstance(keys[0], int):
        names = ", ".join(f"'c{key}'" for key in keys)
        raise UserError(
            f"{what} gives tuples whose parts {', '.join(map(str, keys))} are not named, and training would not see "
            f"them. Name the parts after the rows as the network does: conditions=[{names}]; conditions=[] leaves them "
            "out."
        )
    raise UserError(
        f"{what} also gives {', '.join(map(repr, keys))}, and training would not see it. Name what the network takes, "
        f"in fs.as_data or fs.stream: conditions={list(keys)!r} (and mask='…' if one marks padding); conditions=[] "
        "leaves it out."
    )
