r"""Semidiscrete optimal transport: from a continuous base to finitely many data rows (arXiv:2509.25519).

The optimal map of the squared cost from ``x ~ p0`` to the rows ``y_1 … y_N``, each with weight 1/N, sends x to

    j(x) = argmax_j  <x, y_j> - h_j,

and the potentials ``h`` (up to a constant) are those for which every row receives 1/N of the base. They minimise the
convex ``E_x max_j (<x, y_j> - h_j) + mean_j h_j``, whose stochastic gradient is ``1/N - freq_j``. In one dimension the
cells are intervals that meet at ``(h_{j+1} - h_j) / (y_{j+1} - y_j)``, the quantile of ``j / N`` whatever the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

BATCH = 1024  # fresh base rows per step
CHECK = 500  # steps between two looks at the imbalance
STEPS = 10_000  # steps at most
BALANCED = 0.02  # imbalance at which fitting ends: shares within 14 % of 1/N, root mean square
CELLS = 16  # rows that an imbalance is estimated from, per row of data
FALL = 0.45  # of the steps' size from one look to the next: potentials settle from the whole down to the cells
PIECE = 1 << 24  # largest table of scores, entries

Draw = Callable[[int, torch.Generator], Tensor]


def assign(x: Tensor, y: Tensor, h: Tensor) -> Tensor:
    """``argmax_j <x, y_j> - h_j``: (B,) row numbers of x (B, D) among y (N, D)."""
    most = max(1, PIECE // max(1, len(y)))
    return torch.cat([torch.addmm(-h, part, y.T).argmax(1) for part in x.split(most)])


def imbalance(rows: Tensor, size: int) -> float:
    """``chi^2 = N sum_j f_j^2 - 1 = mean_j (N f_j - 1)^2`` of the shares ``f``, without bias, from drawn row numbers.

    Two draws fall into one cell with probability ``sum f^2``, so pairs that do are counted.
    """
    counts = torch.bincount(rows, minlength=size).double()
    n = len(rows)
    return float(size * (counts * (counts - 1)).sum() / (n * (n - 1)) - 1)


@final
class Potentials:
    """Fits ``h`` by averaged stochastic gradient.

    Attributes:
        h: the potentials, (N,), the mean of recent iterates.
        chi2: their imbalance on fresh rows.

    Args:
        y: rows (N, D).
        draw: ``draw(n, generator)`` gives n rows of the base, (n, D).
        generator: of all draws.
    """

    def __init__(self, y: Tensor, draw: Draw, generator: torch.Generator) -> None:
        self.y, self._draw, self._generator = y, draw, generator
        self._h = 0.5 * y.square().sum(1)  # cells of nearest rows
        self.h = self._h.clone()
        # a typical score: what potentials are measured in
        self._scale = float(y.sub(y.mean(0)).square().sum(1).mean().sqrt())
        self._step = 0
        self.chi2 = float("inf")

    def fit(self, steps: int = STEPS, balanced: float = BALANCED) -> int:
        """Take steps until the imbalance is at most ``balanced``, at most so many; return how many."""
        while self._step < steps and self.chi2 > balanced:
            averaged = torch.zeros_like(self._h)
            for number in range(CHECK):
                self._take()
                averaged += (self._h - averaged) / (number + 1)
            self.h = averaged
            self.chi2 = self.measure()
        return self._step

    def measure(self) -> float:
        """Imbalance of the potentials on fresh rows."""
        total = max(4096, CELLS * len(self.y))
        parts = [self._draw(min(65536, total - k), self._generator) for k in range(0, total, 65536)]
        return imbalance(torch.cat([assign(x, self.y, self.h) for x in parts]), len(self.y))

    def _take(self) -> None:
        self._step += 1
        size = len(self.y)
        x = self._draw(BATCH, self._generator)
        share = torch.bincount(assign(x, self.y, self._h), minlength=size).to(self._h) / BATCH
        rate = self._scale * min(size, BATCH) / 2 * FALL ** ((self._step - 1) // CHECK)
        self._h += rate * (share - 1.0 / size)
