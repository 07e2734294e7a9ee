"""Padding in measures: entries of a sample that do not belong to it, marked by a mask among the conditions.

Rows of unequal length are padded to one shape. Padded entries are set to zero, and so is the velocity there: they stay
zero along the whole trajectory, the Jacobian has neither rows nor columns of them, and no measure depends on what stood
there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from fewstep.errors import UserError, unknown
from fewstep.flow.field import CountedField, Field, Guided, Velocity, as_field
from fewstep.networks.foreign import Foreign, spread


def mask_name(v: Velocity) -> str | None:
    """The name of the condition with the valid entries that a network from outside declares; None for no mask.

    Guidance and the counting of calls are looked through.

    >>> mask_name(lambda x, t: x) is None
    True
    """
    inner: Any = v
    while isinstance(inner, (Guided, CountedField)):
        inner = inner.velocity
    return inner.mask if isinstance(inner, Foreign) else None


def valid_entries(x: Tensor, cond: Mapping[str, Any], name: str) -> Tensor:
    """Which entries of x (B, ...) are valid, bool of its shape.

    Args:
        x: samples.
        cond: their conditions; the one called ``name`` is 1 at valid entries and 0 elsewhere, (B,), (B, T) or of the
            shape of x.
        name: of the mask.

    Raises:
        UserError: there is no such condition, or it is no tensor; it does not fit x, holds other values than 0 and 1,
            or leaves a sample without entries.

    >>> valid_entries(torch.zeros(1, 2, 1), {"valid": torch.tensor([[1, 0]])}, "valid").flatten().tolist()
    [True, False]
    """
    if name not in cond:
        raise UserError(f"{unknown('condition', name, cond)} It is the mask: pass it in cond, with the samples.")
    mask = cond[name]
    if not isinstance(mask, Tensor):
        raise UserError(f"the mask {name!r} must be a tensor with one row per sample, got {type(mask).__name__}.")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise UserError(f"the mask {name!r} holds other values than 0 (padding) and 1 (valid): give one of those.")
    valid = (spread(mask, x) != 0).expand_as(x)
    if not bool(valid.flatten(1).any(1).all()):
        raise UserError(f"the mask {name!r} leaves a sample without any valid entry: leave such samples out.")
    return valid


def without_padding(x: Tensor, cond: Mapping[str, Any], name: str | None) -> Tensor:
    """The samples x (B, ...) with zeros at their padded entries; x itself without a mask.

    >>> without_padding(torch.ones(1, 2), {"valid": torch.tensor([[1, 0]])}, "valid")
    tensor([[1., 0.]])
    """
    if name is None or not isinstance(x, Tensor):  # what is no tensor is refused by the caller's own check
        return x
    return torch.where(valid_entries(x, cond, name), x, torch.zeros((), dtype=x.dtype, device=x.device))


@final
class Masked(Field):
    """A velocity field whose padded entries neither move nor move others.

    Args:
        velocity: ``v(x, t, **cond)``.
        name: of the condition with the valid entries.
    """

    def __init__(self, velocity: Velocity, name: str) -> None:
        self.field, self.name = as_field(velocity), name

    @property
    def calls(self) -> int:  # type: ignore[override]
        """Network calls of the field so far."""
        return self.field.calls

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The velocity, with zeros at the padded entries."""
        valid, zero = spread(cond[self.name], x) != 0, torch.zeros((), dtype=x.dtype, device=x.device)
        v = self.field(torch.where(valid, x, zero), t, **cond)
        return torch.where(valid, v, zero.to(v.dtype))


def masked_field(v: Velocity, name: str | None) -> Field:
    """``v`` as a field, with its padding masked where there is a mask."""
    return as_field(v) if name is None else Masked(v, name)
