"""The velocity field as the library calls it: a callable ``v(x, t, **cond)`` whose calls are counted.

Number of function evaluations (NFE) means network evaluations **per sample**. It is counted where the network
is called, never computed from the number of steps, so a guided step counts two.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, final

from torch import Tensor

from fewstep.errors import UserError

Velocity = Callable[..., Tensor]


class Field(ABC):
    """A velocity field ``v(x, t, **cond)``: ``x`` (B, ...), ``t`` (B,) in [0, 1], result like ``x``.

    Attributes:
        calls: network evaluations per sample so far.
    """

    calls: int

    @abstractmethod
    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The velocity, (B, ...) like ``x``, at times ``t`` (B,) in [0, 1]; it adds its evaluations to ``calls``."""


@final
class CountedField(Field):
    """Count the calls of any callable ``v(x, t, **cond)``.

    >>> field = CountedField(lambda x, t: -x)
    >>> field(3.0, 0.5), field.calls
    (-3.0, 1)
    """

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """``v(x, t, **cond)``, counted as one call."""
        self.calls += 1
        return self.velocity(x, t, **cond)


@final
class Guided(Field):
    """Classifier-free guidance ``v_w = v_0 + w (v_c - v_0)``.

    Every linear function of the velocity (data prediction, noise prediction, score) is guided by the same formula. Two
    network calls per evaluation; one when ``w`` is 0 or 1, where the other branch has no weight.
    Source: Ho & Salimans, arXiv:2207.12598, eq. 6, whose weight is our ``w - 1``.

    Args:
        velocity: ``v(x, t, **cond)``.
        scale: guidance weight ``w``; 1 is the conditional field.
        null: what replaces the condition in the unconditional call, ``{"label": None}`` by default: None, a number, or
            a tensor of one row's shape. Conditions it does not name are given to both calls.
        combine: ``combine(v_0, v_c, w)``, for networks whose guidance has another form; the formula above by default.

    Raises:
        UserError: ``scale`` is not finite.

    >>> import torch
    >>> v = Guided(lambda x, t, label: x if label is None else 2 * x, scale=3.0)
    >>> v(torch.ones(1), torch.zeros(1), label=torch.zeros(1)), v.calls  # 1 + 3 (2 - 1)
    (tensor([4.]), 2)
    """

    def __init__(
        self,
        velocity: Velocity,
        scale: float,
        null: Mapping[str, Any] | None = None,
        combine: Callable[[Tensor, Tensor, float], Tensor] | None = None,
    ) -> None:
        self.velocity = velocity
        self.combine = combine
        self.scale = float(scale)
        self.null = {"label": None} if null is None else dict(null)
        self.calls = 0
        if not math.isfinite(self.scale):
            raise UserError(f"the guidance scale must be a finite number, got {scale}.")

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """``v_w(x, t)``, (B, ...), counted as two calls, or one where ``w`` is 0 or 1.

        Raises:
            UserError: none of the conditions that ``null`` replaces was given.
        """
        if all(cond.get(name) is None for name in self.null):
            wanted, given = ", ".join(self.null) or "null has none", ", ".join(cond) or "no conditions"
            raise UserError(
                f"guidance {self.scale} needs a condition to leave out ({wanted}), and none was given (the "
                f"call has {given}): pass one, say in null what replaces another one, or leave guidance out."
            )
        if self.scale == 1.0:
            return self._call(x, t, cond)
        unconditional = self._call(x, t, {**cond, **null_rows(self.null, cond)})
        if self.scale == 0.0:
            return unconditional
        conditional = self._call(x, t, cond)
        if self.combine is not None:
            return self.combine(unconditional, conditional, self.scale)
        return unconditional.lerp(conditional, self.scale)

    def _call(self, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        self.calls += 1
        return self.velocity(x, t, **cond)


def null_rows(nulls: Mapping[str, Any], cond: Mapping[str, Any]) -> dict[str, Any]:
    """The nulls of the rows of a batch, by name; nulls of conditions that were not given are left out.

    Args:
        nulls: None, a number, or a tensor of one row's shape, by name.
        cond: the conditions whose rows they replace, each (B, ...).

    Returns:
        None, or a tensor like the condition.

    >>> import torch
    >>> null_rows({"label": 10}, {"label": torch.tensor([3, 4])})
    {'label': tensor([10, 10])}
    """
    found: dict[str, Any] = {}
    for name, null in nulls.items():
        rows = cond.get(name)
        if null is None or rows is None:
            found[name] = None
        elif isinstance(null, Tensor):
            found[name] = null.to(rows).expand_as(rows)
        else:
            found[name] = rows.new_full(rows.shape, null)
    return found


def calls_at(scale: float) -> int:
    """Network calls of one evaluation of :class:`Guided` with weight ``scale``."""
    return 1 if scale in (0.0, 1.0) else 2


def check_conditions(cond: Mapping[str, Any], batch: int) -> None:
    """Refuse a tensor condition that does not have one row per sample.

    Conditions are cut, repeated and put in another order together with their samples. A tensor that belongs to all
    samples could have as many rows as there are samples by chance, and would then be cut as if it had one row each.

    Args:
        cond: conditions by name; what is no tensor belongs to all samples.
        batch: number of samples.

    Raises:
        UserError: the first size of a tensor is not ``batch``; the condition is named.
    """
    for name, value in cond.items():
        if isinstance(value, Tensor) and value.shape[:1] != (batch,):
            raise UserError(
                f"condition {name!r} has shape {tuple(value.shape)} for {batch} samples: give one row per sample. "
                "A constant that belongs to all samples is no condition: keep it inside the network's adapter "
                "(fs.adapt), or repeat it for every sample."
            )


def as_field(velocity: Velocity) -> Field:
    """Return ``velocity`` itself if it counts its calls, else a counting wrapper."""
    return velocity if isinstance(velocity, Field) else CountedField(velocity)
