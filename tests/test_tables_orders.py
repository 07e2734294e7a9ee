"""Multistep solvers converge at their order: inside, and as far as the ends allow on all of [0, 1]."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.flow import closed_form
from fewstep.flow.paths import make_path
from fewstep.solvers.multistep import Multistep
from fewstep.solvers.tables import SOLVERS

MULTISTEP = [name for name, method in SOLVERS.items() if isinstance(method, Multistep)]
ORDERS = {
    "ab2": 2, "ab3": 3, "ab4": 4, "abm2": 3, "ddim": 1,
    "deis2": 2, "deis3": 3, "deis4": 4, "deis2-rho": 2, "deis3-rho": 3, "deis4-rho": 4,
    "dpm++2m": 2, "dpm++3m": 3, "dpm++3m-reference": 2,
    "unipc1": 2, "unipc2": 3, "unipc3": 4,
    "unipc1-bh1": 2, "unipc2-bh1": 3, "unipc3-bh1": 4,
    "unipc1-t": 2, "unipc2-t": 3, "unipc3-t": 4,
}  # fmt: skip


def flow(path: str) -> closed_form.Mixture:
    return closed_form.mixture(
        torch.tensor([0.4, 0.6]), torch.tensor([[-1.2], [0.9]]), torch.tensor([0.5, 0.6]), path=make_path(path)
    )


@cache
def truth(path: str, *times: float) -> tuple[Tensor, ...]:
    """States of the exact flow at the given times, 32 trajectories."""
    x0 = torch.randn(32, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    zero = x0.new_zeros(len(x0))
    return tuple(x0 if t == 0 else flow(path).flow_map(x0, zero, zero + t) for t in times)


def graded(start: float, end: float, steps: int, order: int) -> tuple[float, ...]:
    """Even steps after a run-up that doubles a first step so short that its low order does not matter."""
    h = (end - start) / steps
    times, step = [0.0], abs(h) ** max(2.0, 0.5 + order / 2)
    while step < abs(h):
        times.append(times[-1] + step)
        step *= 2
    rest = np.linspace(times[-1], abs(end - start), round((abs(end - start) - times[-1]) / abs(h)) + 1)[1:]
    return tuple((start + np.sign(h) * np.array([*times, *rest])).tolist())


def error(solver: str, path: str, grid: tuple[float, ...], start: Tensor, end: Tensor) -> float:
    x = fs.solve(flow(path).velocity, start, solver=solver, grid=grid, path=make_path(path)).x
    return float((x - end).square().mean().sqrt())


def observed(solver: str, path: str, start: float, end: float, steps: tuple[int, int], graded_start: bool) -> float:
    """log2 of the error's ratio from N to 2 N steps."""
    a, b = truth(path, start, end)
    grids = [
        graded(start, end, n, ORDERS[solver]) if graded_start else tuple(np.linspace(start, end, n + 1).tolist())
        for n in steps
    ]
    few, many = (error(solver, path, grid, a, b) for grid in grids)
    return float(np.log2(few / many))


def test_every_multistep_solver_states_the_order_that_is_measured_here() -> None:
    assert {name: SOLVERS[name].order for name in MULTISTEP} == ORDERS


@pytest.mark.parametrize(("start", "end"), [(0.1, 0.9), (0.9, 0.1)])
@pytest.mark.parametrize("solver", ORDERS)
def test_inside_the_interval_the_error_falls_at_the_nominal_order(solver: str, start: float, end: float) -> None:
    order = observed(solver, "linear", start, end, (128, 256), True)
    assert order == pytest.approx(ORDERS[solver], abs=0.25)


@pytest.mark.parametrize("path", ["cosine", "vp", "interpolant"])
@pytest.mark.parametrize("solver", ORDERS)
def test_the_order_is_the_same_on_every_affine_path(solver: str, path: str) -> None:
    steps = (256, 512) if solver == "deis4-rho" else (128, 256)  # rho spans two decades: the asymptote comes later
    assert observed(solver, path, 0.1, 0.9, steps, True) == pytest.approx(ORDERS[solver], abs=0.25)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("solver", ORDERS)
def test_from_end_to_end_start_up_and_singular_ends_leave_order_two(solver: str, start: float, end: float) -> None:
    """Euler's first step has a local error of order h^2, and forms singular at an end take such a step there too.

    ``abm2`` corrects its first step by the trapezoidal rule and its form has no singularity: it keeps order three.
    """
    order = observed(solver, "linear", start, end, (128, 256), False)
    if solver in ("ddim", "abm2"):
        assert order == pytest.approx(ORDERS[solver], abs=0.1)
    else:
        assert 1.4 < order < 2.7


@pytest.mark.parametrize(("solver", "order"), [("deis2-rho", 2), ("deis3-rho", 3), ("abm2", 3), ("unipc3", 1)])
def test_on_vp_the_noise_form_in_rho_has_no_singular_end(solver: str, order: int) -> None:
    """alpha(0) > 0, and as sigma ~ (1 - t)^(1/2) near data the noise prediction -sigma score is smooth in rho alone.

    The data form's last step takes ``m`` for ``x_1``, which is wrong by sigma^2 score / 2 = O(h) there.
    """
    measured = observed(solver, "vp", 0.0, 1.0, (256, 512) if order == 1 else (128, 256), False)
    assert measured == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("solver", ORDERS)
def test_there_and_back_returns_to_the_noise(solver: str) -> None:
    (x0,) = truth("linear", 0.0)
    v = flow("linear").velocity
    gaps = []
    for steps in (32, 64):
        x1 = fs.solve(v, x0, solver=solver, steps=steps).x
        gaps.append(float((fs.invert(v, x1, solver=solver, steps=steps).x - x0).square().mean().sqrt()))
    assert gaps[1] < gaps[0] / (1.8 if ORDERS[solver] == 1 else 2.3)
    assert gaps[1] < (0.05 if ORDERS[solver] == 1 else 5e-3)
