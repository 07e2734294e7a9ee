"""The conditions of a model's samples: the user's, or drawn by the law of the data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.data.dataset import LABEL, DataSet
from fewstep.errors import UserError
from fewstep.flow.noise import integer_rows
from fewstep.generator.config import Config
from fewstep.generator.label_draws import Label, draw_labels
from fewstep.networks.foreign import spread

ROW_DRAW = 2  # which table of draws the numbers of condition rows come from; 0 is the base noise, 1 the labels
KEPT_ROWS = 1024  # rows of conditions kept with a model to draw from; chosen, not tuned
KEPT_BYTES = 1 << 26  # bytes of these rows, 64 MiB; chosen, not tuned

Rows = Mapping[str, Tensor]  # conditions by name, each (N, ...)


def kept_conditions(data: DataSet, names: Sequence[str]) -> dict[str, Tensor]:
    """Conditions of training rows, evenly spaced, to draw from when a model is sampled; none for labels alone.

    Args:
        data: the training data.
        names: of the conditions.
    """
    if all(name == LABEL for name in names):
        return {}
    sizes = [
        data.conditions[name].dtype.itemsize * math.prod(data.conditions[name].shape[1:]) for name in data.conditions
    ]
    count = max(1, min(KEPT_ROWS, len(data.train), KEPT_BYTES // max(1, sum(sizes))))
    chosen = data.train[torch.linspace(0, len(data.train) - 1, count).round().long().numpy()]
    return data.cond_rows(chosen, names)


def draw_conditions(
    config: Config, name: str, kept: Rows, num: int, cond: Mapping[str, Any] | None, label: Label | None, seed: int
) -> dict[str, Tensor]:
    """The conditions of samples ``0 … num - 1``.

    Args:
        config: of the model.
        name: the model's name, for messages.
        kept: rows of conditions to draw from; empty for a model that has none.
        num: number of samples.
        cond: the user's conditions by name, each ``(num, ...)``; one row, with or without its first dimension 1, is
            used for all samples.
        label: the user's labels.
        seed: the samples' seed: row ``i`` is a function of (seed, i).

    Raises:
        UserError: conditions that are missing, unknown, or of another number or shape.
    """
    given = dict(cond or {})
    if label is not None and LABEL in given:
        raise UserError("labels are given by 'label' and by cond['label']: give one of them.")
    if label is None:
        label = given.pop(LABEL, None) if config.class_weights else None
    if not config.conditions:
        labels = draw_labels(config, name, num, label, seed)
        return {**_loose(name, given, num), **({} if labels is None else {LABEL: labels})}
    if label is not None and not config.class_weights:
        draw_labels(config, name, num, label, seed)  # refuses it
    names = [*([LABEL] if config.class_weights else []), *config.conditions]
    if not given and label is None:
        return _drawn(kept, name, names, num, seed)
    missing = [other for other in config.conditions if other not in given]
    if missing or (label is None and LABEL in names):
        wanted = (missing or [LABEL])[0]
        raise UserError(
            f"{name!r} takes the conditions {', '.join(names)}, and {wanted!r} is missing: give all of them, "
            "cond={…}, or none to draw them from rows of the training data."
        )
    _refuse_others(name, given, config.conditions)
    found = {other: _fit(name, other, given[other], num, tuple(shape)) for other, shape in config.conditions.items()}
    labels = draw_labels(config, name, num, label, seed) if LABEL in names else None
    return found if labels is None else {LABEL: labels, **found}


def mask_starts(mask: str | None, x0: Tensor, cond: Rows) -> Tensor:
    """Base samples x0 (num, ...) with zeros at the padding that the condition ``mask`` marks."""
    return x0 if mask is None or mask not in cond else x0 * spread(cond[mask], x0)


def _drawn(kept: Rows, name: str, names: Sequence[str], num: int, seed: int) -> dict[str, Tensor]:
    """Rows of the kept conditions, drawn together, so that conditions of one row stay together."""
    if any(other not in kept for other in names):
        raise UserError(
            f"{name!r} takes the conditions {', '.join(names)}, and no rows of them are kept with the model: pass "
            f"them, cond={{{names[0]!r}: …}}; in a shell, --cond FILE.npz."
        )
    rows = integer_rows(num, len(kept[names[0]]), seed=seed, draw=ROW_DRAW)
    return {other: kept[other][rows] for other in names}


def _refuse_others(name: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    strange = sorted(set(given) - set(known))
    if strange:
        raise UserError(f"{name!r} takes no condition {strange[0]!r}: it takes {', '.join(known)}.")


def _fit(name: str, what: str, value: Any, num: int, shape: tuple[int, ...]) -> Tensor:
    """The rows of one condition, (num, *shape); one row serves all samples."""
    rows = torch.as_tensor(value)
    if tuple(rows.shape) == shape:
        rows = rows[None]
    if tuple(rows.shape[1:]) != shape or len(rows) not in (1, num):
        raise UserError(
            f"the condition {what!r} has shape {tuple(rows.shape)}, and {num} samples of {name!r} need {(num, *shape)}."
        )
    return rows.expand(num, *shape)


def _loose(name: str, given: Mapping[str, Any], num: int) -> dict[str, Tensor]:
    """Conditions of a model whose conditions are not recorded: their number of rows is checked."""
    found = {what: torch.as_tensor(value) for what, value in given.items()}
    for what, rows in found.items():
        if rows.ndim == 0 or len(rows) not in (1, num):
            raise UserError(
                f"the condition {what!r} has shape {tuple(rows.shape)}, and {num} samples of {name!r} need one row "
                "each, or one for all, (1, ...)."
            )
    return {what: rows.expand(num, *rows.shape[1:]) for what, rows in found.items()}
