"""Stochastic solvers: written-out formulas as matrices, exact laws on Gaussian data, samples of a mixture."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.errors import UserError
from fewstep.flow import closed_form
from fewstep.flow.noise import noise_rows
from fewstep.flow.paths import PATHS, AffinePath, make_path
from fewstep.solvers.solve import plan
from fewstep.solvers.tables import find_solver, table

MEAN, STD = 0.7, 0.4
INSIDE = (0.05, 0.2, 0.3, 0.55, 0.7, 0.85, 0.9)
WHOLE = (0.0, 0.1, 0.35, 0.5, 0.7, 0.9, 1.0)


def coefficients(path: AffinePath, grid: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    t = torch.tensor(grid, dtype=torch.float64)
    return path.alpha(t).numpy(), path.sigma(t).numpy()


def law(solver: str, grid: tuple[float, ...], path: AffinePath) -> tuple[float, float]:
    """Exact mean and variance of the end point for data N(MEAN, STD^2), from the exact law at ``grid[0]``.

    The velocity is linear there, so states and velocities are linear in (1, x_0, z_0, z_1, …).
    """
    made = table(solver, grid, path)
    a, b = made.dense
    t = torch.tensor(made.times, dtype=torch.float64)
    alpha, alpha_dot = path.alpha(t).numpy(), path.alpha_dot(t).numpy()
    q = path.sigma(t).numpy() ** 2 + (alpha * STD) ** 2
    slope = (path.sigma_sigma_dot(t).numpy() + alpha * alpha_dot * STD**2) / q
    start = np.zeros(2 + made.noise.shape[1])
    # at alpha(0) the start is drawn as a user draws it, N(0, 1), and not from a law that is almost that
    start[:2] = (alpha[0] * MEAN, math.sqrt(q[0])) if grid[0] > 0 else (0.0, 1.0)
    velocities = np.zeros((len(t), len(start)))
    for j in range(len(t) + 1):
        state = a[j] * start + b[j] @ velocities
        state[2:] += made.noise[j]
        if j < len(t):
            velocities[j] = slope[j] * state
            velocities[j, 0] += (alpha_dot[j] - slope[j] * alpha[j]) * MEAN
    return float(state[0]), float(state[1:] @ state[1:])


def even(steps: int, start: float = 0.0, end: float = 1.0) -> tuple[float, ...]:
    return tuple(np.linspace(start, end, steps + 1).tolist())


def written(kind: str, grid: tuple[float, ...], path: AffinePath) -> np.ndarray:
    """Rows over (x_0, v_0, v_1, …, z_0, z_1, …) of a solver written out in ``lambda``, on an inner grid."""
    n = len(grid) - 1
    basis = np.eye(1 + 2 * n)
    t = torch.tensor(grid, dtype=torch.float64)
    alpha, sigma = coefficients(path, grid)
    alpha_dot, sigma_dot = path.alpha_dot(t).numpy(), path.sigma_dot(t).numpy()
    lam = np.log(alpha / sigma)
    x, rows, old = basis[0], [], None
    for i in range(n):
        rows.append(x)
        v = basis[1 + i]
        d = alpha[i] * sigma_dot[i] - sigma[i] * alpha_dot[i]
        m, e = (sigma_dot[i] * x - sigma[i] * v) / d, (alpha[i] * v - alpha_dot[i] * x) / d
        h, z = lam[i + 1] - lam[i], basis[1 + n + i]
        if kind == "dpm++sde":
            slope = 0.0 if old is None else h / (2 * (lam[i] - lam[i - 1])) * (m - old)
            x = sigma[i + 1] / sigma[i] * math.exp(-h) * x - alpha[i + 1] * math.expm1(-2 * h) * (m + slope)
            x = x + sigma[i + 1] * math.sqrt(-math.expm1(-2 * h)) * z
        elif kind == "sde":
            step = grid[i + 1] - grid[i]
            x = x + step * (v - e) + math.sqrt(2 * sigma[i] * step) * z
        else:  # arXiv:2010.02502, eq. 12 and 16, whose alpha is our alpha^2, for alpha^2 + sigma^2 = 1
            now, new, eta = alpha[i] ** 2, alpha[i + 1] ** 2, float(kind.partition(":")[2])
            s = eta * math.sqrt((1 - new) / (1 - now)) * math.sqrt(1 - now / new)
            x = math.sqrt(new) * (x - math.sqrt(1 - now) * e) / math.sqrt(now) + math.sqrt(1 - new - s**2) * e + s * z
        old = m
    return np.array([*rows, x])


@pytest.mark.parametrize(
    ("solver", "path"),
    [
        *itertools.product(["dpm++sde", "sde"], PATHS),
        *itertools.product(["ddim:1", "ddim:0.3"], ["cosine", "vp", "interpolant"]),
    ],
)
def test_tables_are_the_papers_formulas(solver: str, path: str) -> None:
    made = table(solver, INSIDE, make_path(path))
    a, b = made.dense
    ours = np.hstack([a[:, None], b, made.noise])
    np.testing.assert_allclose(ours, written(solver, INSIDE, make_path(path)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("grid", [INSIDE, WHOLE, WHOLE[::-1]])
@pytest.mark.parametrize("path", PATHS)
def test_without_noise_they_are_ddim_and_euler(path: str, grid: tuple[float, ...]) -> None:
    for quiet, plain in (("ddim:0", "ddim"), ("sde:0", "euler")):
        ours, theirs = (table(solver, grid, make_path(path)) for solver in (quiet, plain))
        assert not ours.stochastic
        assert not find_solver(quiet).stochastic
        assert ours.noise.shape == (len(grid), 0)
        for one, other in zip(ours.dense, theirs.dense, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["ddim:1", "ddim:0.5", "sde", "sde:2", "dpm++sde"])
def test_stochastic_solvers_say_so(solver: str) -> None:
    assert find_solver(solver).stochastic
    assert table(solver, WHOLE).stochastic
    assert not find_solver("unipc2").stochastic
    assert not table("unipc2", WHOLE).stochastic


@pytest.mark.parametrize("path", ["linear", "cosine", "interpolant"])
def test_the_first_order_sde_solver_is_the_ancestral_one(path: str) -> None:
    """From alpha = 0 there is no earlier value to extrapolate from in the second step."""
    grid = (0.0, 0.4, 1.0)
    ours, theirs = (table(solver, grid, make_path(path)) for solver in ("dpm++sde", "ddim:1"))
    for one, other in zip([*ours.dense, ours.noise], [*theirs.dense, theirs.noise], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", ["ddim:1", "ddim:0.5", "sde", "dpm++sde"])
def test_nothing_is_infinite_at_the_ends_and_the_last_step_is_quiet(solver: str, path: str) -> None:
    for grid in (WHOLE, (0.0, 1.0), (0.0, 1e-12, 0.3, 1.0), (1e-310, 1e-8, 0.5, 1 - 1e-9, 1.0)):
        made = table(solver, grid, make_path(path))
        assert all(np.isfinite(part).all() for part in (*made.dense, made.noise))
        assert made.noise.shape == (len(grid), len(grid) - 2)
        assert abs(made.noise).max(initial=0.0) < 3


def test_at_alpha_zero_the_first_step_is_pure_renoising() -> None:
    """x_b = alpha_b m + sigma_b z with m = x + v on the linear path."""
    for solver in ("ddim:1", "dpm++sde"):
        made = table(solver, (0.0, 0.3, 1.0))
        a, b = made.dense
        np.testing.assert_allclose([a[1], b[1, 0], made.noise[1, 0]], [0.3, 0.3, 0.7], atol=1e-15)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("path", PATHS)
def test_ancestral_sampling_is_the_recursion_of_exact_posteriors(path: str, steps: int) -> None:
    """In y = x / alpha = x1 + rho x0 the next y is drawn from N(m + k (y - m), rho_b^2 (1 - k)), k = (rho_b / rho_a)^2.

    For Gaussian data m = mean + g (y - mean), g = std^2 / (std^2 + rho_a^2).
    """
    grid = even(steps)
    alpha, sigma = coefficients(make_path(path), grid)
    mean, variance = 0.0, 1.0
    for i in range(steps):
        ratio = 0.0 if alpha[i] == 0 else (sigma[i + 1] / alpha[i + 1] * alpha[i] / sigma[i]) ** 2
        # in x: m = MEAN + gain (x - alpha MEAN)
        gain = alpha[i] * STD**2 / ((alpha[i] * STD) ** 2 + sigma[i] ** 2)
        kept = 0.0 if alpha[i] == 0 else ratio / alpha[i]
        slope = alpha[i + 1] * ((1 - ratio) * gain + kept)
        mean = slope * mean + alpha[i + 1] * (1 - ratio) * (1 - gain * alpha[i]) * MEAN
        variance = slope**2 * variance + sigma[i + 1] ** 2 * (1 - ratio)
    assert law("ddim:1", grid, make_path(path)) == pytest.approx((mean, variance), abs=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", ["ddim:1", "ddim:0.5", "sde", "sde:0.3", "dpm++sde"])
def test_the_law_of_gaussian_data_is_reached_as_steps_grow(solver: str, path: str) -> None:
    """On VP the base N(0, 1) is not quite the law at t = 0: alpha(0) = .0066."""
    laws = [law(solver, even(steps), make_path(path)) for steps in (5, 20, 80, 320)]
    gaps = [abs(math.sqrt(variance) - STD) for _, variance in laws]
    assert gaps[-1] < gaps[1]
    assert gaps[-1] < 0.025
    assert laws[-1][0] == pytest.approx(MEAN, abs=2e-3)


def test_standard_deviations_on_the_line_are_the_known_ones() -> None:
    """.251, .341, .382 for N = 5, 20, 80 are the first-order solver's; the second order comes nearer to .4."""
    first, second = (
        [math.sqrt(law(solver, even(steps), make_path("linear"))[1]) for steps in (5, 20, 80)]
        for solver in ("ddim:1", "dpm++sde")
    )
    np.testing.assert_allclose(first, [0.251, 0.341, 0.382], atol=5e-4)
    np.testing.assert_allclose(second, [0.295, 0.421, 0.404], atol=5e-4)


@pytest.mark.parametrize("path", ["cosine", "vp", "interpolant"])
@pytest.mark.parametrize("solver", ["ddim:1", "ddim:0.5", "sde", "sde:0.3", "dpm++sde"])
def test_inside_the_interval_laws_converge_at_the_stated_order(solver: str, path: str) -> None:
    target = make_path(path)
    t = torch.tensor([0.9], dtype=torch.float64)
    variance = float(target.sigma(t) ** 2 + (target.alpha(t) * STD) ** 2)
    few, many = (abs(law(solver, even(n, 0.1, 0.9), target)[1] - variance) for n in (256, 512))
    assert math.log2(few / many) == pytest.approx(find_solver(solver).order, abs=0.1)


def mixture(path: str) -> closed_form.Mixture:
    return closed_form.mixture(
        torch.tensor([0.3, 0.7]), torch.tensor([[-1.2], [0.9]]), torch.tensor([0.3, 0.5]), path=make_path(path)
    )


def distance_to_mixture(x: Tensor) -> float:
    """Largest distance between the samples' distribution function and the mixture's (Kolmogorov)."""
    x = x.flatten().double().sort().values
    normal = torch.special.ndtr
    exact = 0.3 * normal((x + 1.2) / 0.3) + 0.7 * normal((x - 0.9) / 0.5)
    ranks = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    return float(torch.maximum((exact - ranks[:-1]).abs(), (exact - ranks[1:]).abs()).max())


@pytest.mark.parametrize("path", ["linear", "cosine", "vp"])
@pytest.mark.parametrize("solver", ["ddim:1", "ddim:0.5", "sde", "dpm++sde"])
def test_samples_of_a_mixture_have_its_quantiles(solver: str, path: str) -> None:
    """4000 exact samples are nearer than .031 with probability .999."""
    x0 = noise_rows(4000, (1,), seed=5)
    few, many = (
        fs.solve(mixture(path).velocity, x0, solver=solver, steps=steps, path=path, seed=5).x for steps in (3, 100)
    )
    assert distance_to_mixture(many) < 0.031
    assert distance_to_mixture(few) > 0.04
    mean, variance = 0.27, 0.3 * (0.09 + 1.44) + 0.7 * (0.25 + 0.81) - 0.27**2
    assert float(many.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / 4000))
    assert float(many.var()) == pytest.approx(variance, rel=0.08)


def decay(x: Tensor, t: Tensor) -> Tensor:
    return -x


@pytest.mark.parametrize("solver", ["ddim:0.7", "sde", "dpm++sde"])
def test_noise_is_the_table_of_seed_and_step_whatever_the_batch(solver: str) -> None:
    x0 = noise_rows(300, (2, 3), seed=1)
    together = fs.solve(decay, x0, solver=solver, steps=4, seed=1).x
    parts = [
        fs.solve(decay, x0[a:b], solver=solver, steps=4, seed=1, row=a).x for a, b in ((0, 100), (100, 257), (257, 300))
    ]
    torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=1e-6)
    assert not torch.allclose(fs.solve(decay, x0, solver=solver, steps=4, seed=2).x, together)
    assert torch.equal(fs.solve(decay, x0, solver=solver, steps=4, seed=1).x, together)


def test_the_end_is_what_the_table_says_of_start_velocities_and_noise() -> None:
    made = table("dpm++sde", WHOLE)
    a, b = made.dense
    x0 = noise_rows(5, (2,), seed=3, dtype=torch.float64)
    seen: list[Tensor] = []

    def v(x: Tensor, t: Tensor) -> Tensor:
        seen.append(torch.sin(x) * (1 + t[:, None]))
        return seen[-1]

    solution = fs.solve(v, x0, solver=made, seed=3, row=7, trajectory=True)
    noises = [noise_rows(5, (2,), seed=3, start=7, draw=2 + k, dtype=torch.float64) for k in range(5)]
    end = a[-1] * x0 + sum(b[-1, k] * velocity for k, velocity in enumerate(seen))
    end = end + sum(made.noise[-1, k] * z for k, z in enumerate(noises))
    torch.testing.assert_close(solution.x, end, rtol=1e-12, atol=1e-12)
    assert solution.trajectory is not None
    assert torch.equal(solution.trajectory[-1], solution.x)
    assert solution.nfe == len(seen) == 6


def test_solvers_without_noise_do_not_look_at_the_seed() -> None:
    x0 = noise_rows(4, (2,), seed=0)
    for solver in ("euler", "unipc2", "ddim:0"):
        plain = fs.solve(decay, x0, solver=solver, steps=3).x
        assert torch.equal(fs.solve(decay, x0, solver=solver, steps=3, seed=9, row=5).x, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_starts_dtype_is_kept_and_global_random_state_left_alone(dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    x0 = noise_rows(16, (2,), seed=0)
    x = fs.solve(decay, x0.to(dtype), solver="sde", steps=4).x
    assert x.dtype == dtype
    torch.testing.assert_close(x.float(), fs.solve(decay, x0, solver="sde", steps=4).x, rtol=1e-2, atol=1e-2)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_flow_through_a_stochastic_solve() -> None:
    x0 = noise_rows(2, (2,), seed=0, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fs.solve(lambda x, t: x.sin(), x, solver="sde", steps=3, grad=True).x, x0)


@pytest.mark.parametrize("solver", ["ddim:0.5", "sde", "dpm++sde"])
def test_from_data_to_noise_a_stochastic_solver_is_refused(solver: str) -> None:
    x = noise_rows(3, (2,), seed=0)
    for run in (
        lambda: fs.invert(decay, x, solver=solver, steps=3),
        lambda: fs.solve(decay, x, solver=solver, grid=WHOLE[::-1]),
        lambda: plan(solver, "uniform", 4, backward=True),
    ):
        with pytest.raises(UserError, match="from noise to data only, because its steps add fresh noise"):
            run()
