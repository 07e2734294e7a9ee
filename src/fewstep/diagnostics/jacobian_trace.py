"""Quadratic forms ``w^T (dv/dx) w`` of a velocity field: their sum over unit vectors is the divergence.

Reverse differentiation gives ``w^T dv/dx`` in one backward pass, about two network calls; its product with ``w`` is the
form. Where a network cannot be differentiated in reverse, or only a part of it can,
:class:`~fewstep.flow.derivatives.Derivative` gives ``(dv/dx) w`` in another way.
"""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow.derivatives import TRIED_ROWS, Derivative, plain_attention, rows_of
from fewstep.flow.field import Field
from fewstep.flow.noise import BLOCK, block_rows, generator_for

ROWS = 4096  # most network rows at a time: samples times directions
VALUES = 1 << 19  # most values in those rows
AGREEMENT = 1e-2  # largest relative gap between the forms by reverse differentiation and by the derivative


def chunk(x: Tensor, directions: int) -> int:
    """How many samples of the size of ``x``'s rows go through the network at a time, in so many directions each."""
    return max(1, min(ROWS // directions, VALUES // (directions * x[0].numel())))


def rademacher(num: int, dimensions: int, probes: int, *, seed: int, row: int) -> Tensor:
    """Independent signs for samples ``row … row + num``, (num, probes, dimensions) int8.

    A probe of a sample depends on ``seed``, the probe's number and the sample's number alone.

    >>> rademacher(2, 3, 1, seed=0, row=0).shape
    torch.Size([2, 1, 3])
    """

    def draw(probe: int, block: int) -> Tensor:
        generator = generator_for(seed, "probe", probe, block)
        return torch.randint(0, 2, (BLOCK, dimensions), generator=generator, dtype=torch.int8) * 2 - 1

    empty = torch.empty(0, dimensions, dtype=torch.int8)
    return torch.stack([block_rows(num, row, partial(draw, m), empty) for m in range(probes)], 1)


@final
class QuadraticForms:
    """``(x, t, w) -> (v, w^T (dv/dx) w)`` for one velocity field.

    Args:
        field: the velocity field.
        grad: build the autograd graph.

    Attributes:
        spent: network evaluations so far, summed over samples and directions.
    """

    def __init__(self, field: Field, grad: bool) -> None:
        self.field, self.grad = field, grad
        self.derivative = Derivative(field)
        self.reverse = False
        self.spent = 0

    @property
    def used(self) -> str:
        """How the network is differentiated."""
        return "reverse" if self.reverse else str(self.derivative.used)

    def without_graph(self) -> QuadraticForms:
        """The same forms, with a count of their own."""
        forms = QuadraticForms(self.field, grad=False)
        forms.derivative, forms.reverse = self.derivative, self.reverse
        return forms

    def choose(self, x: Tensor, cond: dict[str, Any]) -> None:
        """Find how the network can be differentiated, on a few rows at t = 1.

        Reverse differentiation, which alone gives gradients, is taken where it agrees with the derivative ``J w``,
        itself compared with finite differences.

        Args:
            x: data, (B, ...); the first few rows are used.
            cond: conditions, one row per sample.

        Raises:
            UserError: gradients are asked for, and the network cuts them off; no way gives a finite derivative.
        """
        few, some = x[:TRIED_ROWS], rows_of(cond, len(x), slice(TRIED_ROWS))
        one = few.new_ones(len(few))
        w = rademacher(len(few), few[0].numel(), 1, seed=0, row=0).to(few).reshape(few.shape)
        _, along = self.derivative(few, one, w, **some)
        if self.derivative.used != "finite_difference":
            self.reverse = self._agrees((along * w).flatten(1), few, one, w, some)
        if self.grad and not self.reverse:
            raise UserError(
                "grad=True needs a network that lets gradients through, and this one computes under no_grad, detaches "
                "its input or does not depend on it: remove that, or leave grad out."
            )

    def _agrees(self, along: Tensor, x: Tensor, t: Tensor, w: Tensor, cond: dict[str, Any]) -> bool:
        try:
            _, vjp = self._reverse(x, t, w, **cond)
        except Exception:  # whatever a network raises that cannot be differentiated
            return False
        gap = (vjp.detach() * w).flatten(1).sum(1) - along.sum(1)
        return bool((gap.abs() <= AGREEMENT * along.abs().sum(1)).all())

    def __call__(self, x: Tensor, t: Tensor, w: Tensor, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Velocities and quadratic forms; every sample is repeated for each of its directions.

        Args:
            x: (B, ...).
            t: (B,).
            w: directions, (B, M, D).
            cond: conditions, one row per sample.

        Returns:
            ``v`` (B, ...) and ``w_m^T (dv/dx) w_m`` (B, M).
        """
        v, terms = None, []
        way = self._reverse if self.reverse else self.derivative
        for part in w.split(max(1, min(ROWS, VALUES // x[0].numel())), 1):
            count = part.shape[1]
            rows = torch.arange(len(x), device=x.device).repeat_interleave(count)
            before = self.field.calls
            value, along = way(x[rows], t[rows], part.reshape(len(rows), *x.shape[1:]), **rows_of(cond, len(x), rows))
            self.spent += (self.field.calls - before) * len(rows)
            terms.append((along.flatten(1) * part.flatten(0, 1)).sum(1).unflatten(0, (-1, count)))
            v = value[::count] if v is None else v
        assert v is not None, "there is a direction"
        return v, torch.cat(terms, 1)

    def _reverse(self, x: Tensor, t: Tensor, w: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        """``v`` and ``w^T dv/dx``, with their graph if it is wanted."""
        with torch.enable_grad(), plain_attention():
            x = x if x.requires_grad else x.detach().requires_grad_()
            v = self.field(x, t, **cond)
            (vjp,) = torch.autograd.grad(v, x, w.to(v.dtype), create_graph=self.grad)
        return (v, vjp) if self.grad else (v.detach(), vjp)
