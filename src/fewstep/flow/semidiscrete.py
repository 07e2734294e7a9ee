r"""Semidiscrete optimal transport: from a continuous base to finitely many data rows (arXiv:2509.25519).

The optimal map of the squared cost from ``x ~ p0`` to the rows ``y_1 … y_N``, each with weight 1/N, sends x to

    j(x) = argmax_j  <x, y_j> - h_j,

and the potentials ``h`` (up to a constant) are those for which every row receives 1/N of the base. They minimise the
convex ``E_x max_j (<x, y_j> - h_j) + mean_j h_j``, whose stochastic gradient is ``1/N - freq_j``. In one dimension the
cells are intervals that meet at ``(h_{j+1} - h_j) / (y_{j+1} - y_j)``, the quantile of ``j / N`` whatever the rows.

That gradient alone converges slowly in few dimensions: a step moves the boundary between two neighbouring cells, while
mass must move over many cells. So fitting has two parts.

1. Soft cells, ``w_j = softmax_j((<x, y_j> - h_j) / eps)``, with eps falling from the spread of the scores to the gap
   between the best two: ``h_j += a eps (N mean(w_j) - 1)``. A large eps moves mass between regions, a small one between
   neighbours.
2. Hard cells: the stochastic gradient, in units of every cell's mean gap between the best and the second score, with a
   falling step. The result is a weighted mean of the iterates in which early ones have a small weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

BATCH = (256, 1024)  # limits of the base rows drawn per step, which are a sixteenth of the data rows
SOFT_STEPS = 300  # steps of part 1
SOFT_STEP = 0.2  # step size of part 1, times a batch's draws per soft cell, at most 1
VISITS = 100  # part 2 draws at most so many base rows per data row
FEWEST_STEPS = 2000  # part 2 may take so many steps even where that is more draws per row
SETTLED = 2.0  # draws per row after which the steps of part 2 begin to fall
FALL = 0.5  # they fall as this power of the number of steps
FORGET = 3.0  # iterate n has a weight proportional to this power of n in the mean
NEW = 0.2  # weight of one draw in a cell's mean gap
FIRST_CHECK = 1 / 8  # the imbalance is first measured after this share of part 2, then whenever the steps have doubled
BALANCED = 0.02  # imbalance at which fitting ends: shares within 14 % of 1/N, root mean square
CERTAIN = 5.0  # a measured imbalance has a standard error of about the limit over this
SOME = 32  # draws that gaps and spreads are estimated from
PIECE = 1 << 22  # largest table of scores, entries

Draw = Callable[[int, torch.Generator], Tensor]


def assign(x: Tensor, y: Tensor, h: Tensor) -> Tensor:
    """The optimal map ``j(x) = argmax_j <x, y_j> - h_j``.

    Args:
        x: points of the base, (B, D).
        y: data rows, (N, D).
        h: potentials, (N,).

    Returns:
        Row numbers, (B,) int64. Source: arXiv:2509.25519.

    >>> assign(torch.tensor([[-1.0], [2.0]]), torch.tensor([[-1.0], [1.0]]), torch.zeros(2))
    tensor([0, 1])
    """
    most = max(1, PIECE // max(1, len(y)))
    table = with_potentials(y, h)
    out = torch.empty(min(most, len(x)), len(y), dtype=y.dtype, device=y.device)
    return torch.cat([best(score(part, table, out)) for part in x.split(most)])


def with_potentials(y: Tensor, h: Tensor) -> Tensor:
    """``[y, -h]``, (N, D + 1): what ``[x, 1]`` is multiplied with."""
    return torch.cat([y, -h.to(y)[:, None]], 1)


def score(x: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """``<x, y_j> - h_j``, (B, N), written into the first rows of ``out``."""
    return torch.mm(torch.cat([x, torch.ones_like(x[:, :1])], 1), table.T, out=out[: len(x)])


def best(scores: Tensor) -> Tensor:
    """Index of the largest entry of every row (B, N), the first where several are equal: (B,).

    On a CPU by numpy, which takes a tenth of torch's time.
    """
    return torch.from_numpy(scores.numpy().argmax(1)) if scores.device.type == "cpu" else scores.argmax(1)


def imbalance(rows: Tensor, size: int, weight: Tensor | None = None) -> float:
    """``chi^2 = sum_j f_j^2 / w_j - 1`` of the shares ``f``, without bias, from drawn row numbers.

    Two draws fall into cell j with probability ``f_j^2``, so pairs that do are counted. With equal weights ``w = 1/N``
    it is ``N sum_j f_j^2 - 1 = mean_j (N f_j - 1)^2``.
    """
    counts = torch.bincount(rows, minlength=size).double()
    wanted = torch.full_like(counts, 1.0 / size) if weight is None else weight
    n = len(rows)
    return float((counts * (counts - 1) / wanted).sum() / (n * (n - 1)) - 1)


@final
class Potentials:
    """Fits the potentials ``h`` (module's docstring). Equal rows are fitted as one row of their joint weight.

    Attributes:
        chi2: the potentials' imbalance on fresh base rows, as last measured.

    Args:
        y: rows (N, D).
        draw: ``draw(n, generator)`` gives n rows of the base, (n, D).
        generator: of all draws.
    """

    def __init__(self, y: Tensor, draw: Draw, generator: torch.Generator) -> None:
        self.y, self._draw, self._generator = y, draw, generator
        # a shift of all rows adds the same to all scores; it would put the nearest rows' cells in the wrong place
        self._rows, self._which, counts = torch.unique(y - y.mean(0), dim=0, return_inverse=True, return_counts=True)
        self._weight = counts.double() / len(y)
        self._batch = max(BATCH[0], min(BATCH[1], len(counts) // 16))
        self._scores = torch.empty(self._batch, len(counts), dtype=y.dtype)
        # in double precision: what one step adds to a large potential is below the resolution of single
        self._h = 0.5 * self._rows.double().square().sum(1)  # cells of nearest rows
        self._mean = self._h.clone()
        self._gaps = torch.zeros_like(self._h)
        self.chi2 = float("inf")

    @property
    def h(self) -> Tensor:
        """The potentials, (N,): the weighted mean of the iterates."""
        return self._mean[self._which].to(self.y)

    def fit(self, visits: float = VISITS, balanced: float = BALANCED) -> int:
        """Take steps until the imbalance is at most ``balanced``, or ``visits`` base rows per data row were drawn.

        Args:
            visits: draws per row in part 2, at most.
            balanced: imbalance (chi^2) at which fitting ends.

        Returns:
            The number of steps taken.
        """
        size = len(self._h)
        if size == 1:
            self.chi2 = 0.0
            return 0
        self._soften()
        most, done = max(FEWEST_STEPS, math.ceil(visits * size / self._batch)), 0
        until = math.ceil(FIRST_CHECK * most)
        while self.chi2 > balanced and done < most:
            while done < until:
                done += 1
                self._take(done)
            self.chi2, until = self.measure(balanced), min(2 * until, most)
        return SOFT_STEPS + done

    def measure(self, balanced: float = BALANCED) -> float:
        """Imbalance of the potentials on fresh base rows, enough of them to tell it from ``balanced``."""
        size = len(self._h)
        total = max(4096, math.ceil(CERTAIN * math.sqrt(2 * size) / balanced))
        parts = [self._draw(min(65536, total - k), self._generator) for k in range(0, total, 65536)]
        return imbalance(torch.cat([assign(x, self._rows, self._mean) for x in parts]), size, self._weight)

    def _score(self) -> Tensor:
        """Scores of a fresh batch, (B, N)."""
        return score(self._draw(self._batch, self._generator), with_potentials(self._rows, self._h), self._scores)

    def _soften(self) -> None:
        """Part 1."""
        scores = self._score()
        widest, gap = float(scores[:SOME].std(1).mean()), _gap(scores)
        least = 1e-6 * widest  # a base of few rows may lie on boundaries
        for step in range(SOFT_STEPS):
            scores = self._score()
            gap += 0.05 * (_gap(scores) - gap)
            eps = widest * min(1.0, max(gap, least) / widest) ** (step / (SOFT_STEPS - 1))
            soft = torch.softmax(scores / eps, 1)
            cells = float(1 / soft[:SOME].square().sum(1).mean())  # that share one draw
            size = min(1.0, SOFT_STEP * self._batch * cells / len(self._h))
            self._h += size * eps * (soft.mean(0).double() / self._weight - 1).clamp(-1, 3)
        self._mean = self._h.clone()
        self._gaps.fill_(gap)

    def _take(self, number: int) -> None:
        """One step of part 2."""
        size, scores = len(self._h), self._score()
        first = best(scores)
        highest = scores.gather(1, first[:, None])
        second = scores.scatter_(1, first[:, None], -math.inf).amax(1, keepdim=True)
        counts = torch.bincount(first, minlength=size).double()
        gap = torch.zeros_like(self._h).index_add_(0, first, (highest - second)[:, 0].double()) / counts.clamp_min(1)
        self._gaps += (1 - (1 - NEW) ** counts) * (gap - self._gaps)
        pace = min(1.0, self._batch / size)  # a batch's draws per row, and never more than one step's worth
        rate = pace * (1 + number * pace / SETTLED) ** -FALL
        self._h += rate * size * self._gaps * (counts / self._batch - self._weight)
        self._mean += (FORGET + 1) / (number + FORGET) * (self._h - self._mean)


def _gap(scores: Tensor) -> float:
    """Mean difference between the best and the second best score, from a few draws."""
    top = scores[:SOME].topk(2, 1).values
    return float((top[:, 0] - top[:, 1]).mean())
