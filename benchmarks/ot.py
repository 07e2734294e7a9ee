"""Minibatch optimal transport: time and excess cost against scipy and POT, as a markdown table.

Run on one thread: ``OMP_NUM_THREADS=1 python benchmarks/ot.py``. Each time includes the cost matrix. The
solvers are timed in shuffled order; the table has the median over repetitions and batches. The excess cost is the
total squared distance relative to the optimum minus one, in the worst batch.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits, make_moons

from fewstep.errors import require_extra
from fewstep.flow.ot import assignment

# This file has the name of POT's module, and Python searches the folder of the script first: remove that folder.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

Solver = Callable[[torch.Tensor, torch.Tensor], np.ndarray]
REPETITIONS, SEEDS = 5, 4


def squared_distances(x0: torch.Tensor, x1: torch.Tensor) -> np.ndarray:
    """The cost matrix (n, n)."""
    a, b = x0.numpy(), x1.numpy()
    return (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T


def by_fewstep(x0: torch.Tensor, x1: torch.Tensor) -> np.ndarray:
    """The row of x0 for every row of x1, by fewstep."""
    return assignment(x0, x1).numpy()


def by_scipy(x0: torch.Tensor, x1: torch.Tensor) -> np.ndarray:
    """The same by scipy's exact assignment."""
    rows, columns = linear_sum_assignment(squared_distances(x0, x1))
    return rows[np.argsort(columns)]


def by_pot(x0: torch.Tensor, x1: torch.Tensor) -> np.ndarray:
    """The same by POT's network simplex."""
    weights = np.full(len(x0), 1 / len(x0))
    plan = require_extra("ot", "ot").emd(weights, weights, squared_distances(x0, x1).astype(np.float64))
    return plan.argmax(0)


SOLVERS: dict[str, Solver] = {"fewstep": by_fewstep, "scipy": by_scipy, "POT": by_pot}


def eight_gaussians(n: int, seed: int) -> torch.Tensor:
    """Eight Gaussians of std 0.1 on a circle of radius 2."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(n, 2, generator=generator)


def moons(n: int, seed: int) -> torch.Tensor:
    """scikit-learn's two moons."""
    return torch.from_numpy(make_moons(n, noise=0.05, random_state=seed)[0]).float()


def digits(n: int, seed: int) -> torch.Tensor:
    """Rows of the 8 x 8 digits in [-1, 1]."""
    rows = np.random.default_rng(seed).choice(1797, n, replace=False)
    return torch.from_numpy(load_digits().data[rows] / 8 - 1).float()


def low_rank(n: int, seed: int) -> torch.Tensor:
    """64 dimensions that depend on 8 latent ones, with noise."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(n, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    return torch.tanh(latent / 2) + 0.1 * torch.randn(n, 64, generator=generator)


def measure(make: Callable[[int, int], torch.Tensor], n: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds and largest excess cost of each solver."""
    times: dict[str, list[float]] = {name: [] for name in SOLVERS}
    excess = dict.fromkeys(SOLVERS, 0.0)
    for seed in range(SEEDS):
        x1 = make(n, seed)
        x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(1000 + seed))
        cost = {name: total(x0, x1, solve(x0, x1)) for name, solve in SOLVERS.items()}  # also the warm-up
        order = list(SOLVERS) * REPETITIONS
        random.Random(seed).shuffle(order)
        for name in order:
            start = time.perf_counter()
            SOLVERS[name](x0, x1)
            times[name].append(1e3 * (time.perf_counter() - start))
        for name in SOLVERS:
            excess[name] = max(excess[name], cost[name] / cost["scipy"] - 1)
    return {name: (statistics.median(times[name]), excess[name]) for name in SOLVERS}


def total(x0: torch.Tensor, x1: torch.Tensor, perm: np.ndarray) -> float:
    """Total squared distance of an assignment."""
    return float((x0[torch.from_numpy(perm)].double() - x1.double()).pow(2).sum())


def main() -> None:
    """Measure every data set and size, and print the table."""
    torch.set_num_threads(1)
    print("| data | D | n | fewstep ms | scipy ms | POT ms | faster than scipy / POT | excess cost |")
    print("|---|---|---|---|---|---|---|---|")
    for make in (eight_gaussians, moons, digits, low_rank):
        for n in (128, 256, 512):
            result = measure(make, n)
            (own, excess), (scipy, _), (pot, _) = (result[name] for name in SOLVERS)
            print(
                f"| {make.__name__} | {make(2, 0).shape[1]} | {n} | {own:.2f} | {scipy:.2f} | {pot:.2f} "
                f"| {scipy / own:.1f}x / {pot / own:.1f}x | {100 * excess:.2f} % |"
            )


if __name__ == "__main__":
    main()
