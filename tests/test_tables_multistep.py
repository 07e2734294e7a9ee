"""Multistep tables against independently written formulas, as matrices; exact cases; the loop's economy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

import fewstep as fs
from fewstep.flow.paths import VP, AffinePath, Cosine, Interpolant, Linear, expand_time
from fewstep.solvers.forms import exponential_moments
from fewstep.solvers.multistep import Multistep
from fewstep.solvers.tables import SOLVERS, table

MULTISTEP = {name: method for name, method in SOLVERS.items() if isinstance(method, Multistep)}
DATA = [name for name in MULTISTEP if name.startswith(("ddim", "dpm++", "unipc"))]
NOISE = [name for name in MULTISTEP if name.startswith("deis")]
PATHS = {"linear": Linear(), "cosine": Cosine(), "vp": VP(), "interpolant": Interpolant()}

INSIDE = (0.05, 0.2, 0.3, 0.55, 0.7, 0.85, 0.9)
WHOLE = (0.0, 0.1, 0.35, 0.5, 0.7, 0.9, 1.0)
BOTH_WAYS = [INSIDE, WHOLE, INSIDE[::-1], WHOLE[::-1]]

Network = Callable[[np.ndarray, float], np.ndarray]
Written = Callable[[Network, np.ndarray, tuple[float, ...]], np.ndarray]  # a solver written out: end point


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def nonlinear(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(x.roll(1, -1) * (1 + expand_time(t, x))) - 0.3 * x + expand_time(t, x) ** 2


def matrix_of(solver: Written, grid: tuple[float, ...]) -> np.ndarray:
    """Rows of a solver that is written out as code: x_0 is the first basis vector, velocity k the next ones."""
    rows: list[np.ndarray] = []

    def network(x: np.ndarray, t: float) -> np.ndarray:
        rows.append(x)
        return np.eye(len(grid))[len(rows)]

    end = solver(network, np.eye(len(grid))[0], grid)
    return np.array([*rows, end])


def matrix(name: str, grid: tuple[float, ...], path: AffinePath = PATHS["linear"]) -> np.ndarray:
    a, b = table(name, grid, path).dense
    return np.hstack([a[:, None], b])


def log_snr(t: float) -> float:
    return math.log(t / (1 - t)) if 0 < t < 1 else math.inf * (t - 0.5)


def dpm2m(v: Network, x: np.ndarray, grid: tuple[float, ...]) -> np.ndarray:
    """DPM-Solver++(2M) (arXiv:2211.01095, alg. 2), alpha = t, sigma = 1 - t; the last step of first order at t = 1."""
    old = None
    for i, (a, b) in enumerate(itertools.pairwise(grid)):
        velocity = v(x, a)
        d = m = x + (1 - a) * velocity
        if i > 0 and 0 < b < 1 and grid[i - 1] not in (0, 1):
            h, before = log_snr(b) - log_snr(a), log_snr(a) - log_snr(grid[i - 1])
            d = (1 + h / (2 * before)) * m - h / (2 * before) * old
        x = (1 - b) / (1 - a) * x + (b - (1 - b) * a / (1 - a)) * d if a < 1 else x + (b - a) * velocity
        old = m
    return x


def dpm3m(factor: float) -> Written:
    """DPM-Solver++(3M) with ``factor`` in its second difference, order 1, 2, 3, 3, … on an inner grid."""

    def solver(v: Network, x: np.ndarray, grid: tuple[float, ...]) -> np.ndarray:
        data: list[np.ndarray] = []
        lam = [log_snr(t) for t in grid]
        for i, (a, b) in enumerate(itertools.pairwise(grid)):
            data.append(x + (1 - a) * v(x, a))
            h = lam[i + 1] - lam[i]
            p1 = math.expm1(-h)
            x = (1 - b) / (1 - a) * x - b * p1 * data[-1]
            if i >= 1:
                r0 = (lam[i] - lam[i - 1]) / h
                d10 = (data[-1] - data[-2]) / r0
            if i == 1:
                x = x - b * p1 / 2 * d10
            if i >= 2:
                r1 = (lam[i - 1] - lam[i - 2]) / h
                d11 = (data[-2] - data[-3]) / r1
                d1 = d10 + r0 / (r0 + r1) * (d10 - d11)
                d2 = factor * (d10 - d11) / (r0 + r1)
                x = x + b * (p1 / h + 1) * d1 - b * ((p1 + h) / h**2 - 0.5) * d2
        return x

    return solver


def unipc(order: int, variant: str, corrected: bool = True) -> Written:
    """UniPC (arXiv:2302.04867, alg. 1 and 2, eq. 9) as printed: R, b, B and the two fixed rho = 1/2."""

    def update(
        x: np.ndarray, a: float, b: float, m: np.ndarray, others: list[tuple[float, np.ndarray]], new: bool
    ) -> np.ndarray:
        h = log_snr(b) - log_snr(a)
        hh = -h
        big = hh if variant == "bh1" and math.isfinite(h) else math.expm1(hh)
        x = (1 - b) / (1 - a) * x - b * math.expm1(hh) * m
        if not others:
            return x
        if len(others) == 1:
            rho = np.array([0.5])
            ratios = np.array([1.0 if new else (others[0][0] - log_snr(a)) / h])
        else:
            ratios = np.array([(lam - log_snr(a)) / h for lam, _ in others])
            g = math.expm1(hh) / hh - 1
            rhs = []
            for k in range(1, len(others) + 1):
                rhs.append(g * math.factorial(k) / big)
                g = g / hh - 1 / math.factorial(k + 1)
            rho = np.linalg.solve(np.array([ratios ** (k - 1) for k in range(1, len(others) + 1)]), rhs)
        return x - b * big * sum(w * (value - m) / r for w, r, (_, value) in zip(rho, ratios, others, strict=True))

    def solver(v: Network, x: np.ndarray, grid: tuple[float, ...]) -> np.ndarray:
        steps = len(grid) - 1
        past: list[tuple[float, np.ndarray]] = []
        predicted, before = x, None
        for i, (a, b) in enumerate(itertools.pairwise(grid)):
            m = predicted + (1 - a) * v(predicted, a)
            x = predicted
            if corrected and before is not None:
                state, s, old, used = before
                x = update(state, s, a, old, [*used, (log_snr(a), m)], True)
            wanted = min(order, steps - i) if grid[-1] == 1 else order
            others = past[: wanted - 1]
            before = (x, a, m, others)
            predicted = update(x, a, b, m, others, False) if b < 1 else m
            if a > 0:
                past.insert(0, (log_snr(a), m))
        return predicted

    return solver


def deis2(v: Network, x: np.ndarray, grid: tuple[float, ...]) -> np.ndarray:
    """tAB-DEIS with two values on the linear path, in closed form; Euler from t = 0 and into it."""
    old: tuple[float, np.ndarray] | None = None
    for a, b in itertools.pairwise(grid):
        velocity = v(x, a)
        e = x - a * velocity
        if old is None or a * b == 0:
            x = x + (b - a) * velocity
        else:
            before, other = old
            i0, i1 = 1 / b - 1 / a, -math.log(b / a)
            x = b / a * x + b * (e * (i1 - before * i0) / (a - before) + other * (i1 - a * i0) / (before - a))
        old = (a, e)
    return x


@pytest.mark.parametrize("grid", BOTH_WAYS)
def test_ddim_on_the_linear_path_is_euler(grid: tuple[float, ...]) -> None:
    np.testing.assert_allclose(matrix("ddim", grid), matrix("euler", grid), rtol=0, atol=1e-12)


def test_ddim_on_the_cosine_path_turns_by_the_angle_of_the_step() -> None:
    """x_b = cos(pi h / 2) x_a + (2 / pi) sin(pi h / 2) v_a."""

    def rotate(v: Network, x: np.ndarray, grid: tuple[float, ...]) -> np.ndarray:
        for a, b in itertools.pairwise(grid):
            angle = math.pi / 2 * (b - a)
            x = math.cos(angle) * x + 2 / math.pi * math.sin(angle) * v(x, a)
        return x

    for grid in BOTH_WAYS:
        np.testing.assert_allclose(matrix("ddim", grid, Cosine()), matrix_of(rotate, grid), atol=1e-12)


@pytest.mark.parametrize("grid", BOTH_WAYS)
def test_dpm2m_and_unip2_are_one_matrix(grid: tuple[float, ...]) -> None:
    """(arXiv:2302.04867, sec. 3.3.)"""
    expected = matrix_of(dpm2m, grid)
    np.testing.assert_allclose(matrix("dpm++2m", grid), expected, rtol=0, atol=1e-12)
    if grid in (INSIDE, WHOLE, INSIDE[::-1]):
        np.testing.assert_allclose(matrix_of(unipc(2, "bh2", corrected=False), grid), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "factor"), [("dpm++3m", 2.0), ("dpm++3m-reference", 1.0)])
def test_dpm3m_is_the_exact_or_the_public_formula(name: str, factor: float) -> None:
    for grid in (INSIDE, INSIDE[::-1]):
        np.testing.assert_allclose(matrix(name, grid), matrix_of(dpm3m(factor), grid), rtol=0, atol=1e-11)


def test_dpm3m_is_unip3() -> None:
    """Both integrate the parabola through three values of m exactly."""
    np.testing.assert_allclose(
        matrix("dpm++3m", INSIDE), matrix_of(unipc(3, "bh2", corrected=False), INSIDE), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("grid", [INSIDE, WHOLE, (0.0, 0.3, 1.0), (0.0, 1.0), (1e-6, 0.25, 0.5, 0.75, 1.0)])
@pytest.mark.parametrize("variant", ["bh2", "bh1"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_its_papers_algorithm(order: int, variant: str, grid: tuple[float, ...]) -> None:
    name = f"unipc{order}" + ("" if variant == "bh2" else "-bh1")
    expected = matrix_of(unipc(order, variant), grid)
    np.testing.assert_allclose(matrix(name, grid), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("grid", BOTH_WAYS)
def test_deis2_is_its_closed_form(grid: tuple[float, ...]) -> None:
    np.testing.assert_allclose(matrix("deis2", grid), matrix_of(deis2, grid), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("solver", "weights"),
    [("ab2", [3 / 2, -1 / 2]), ("ab3", [23 / 12, -16 / 12, 5 / 12]), ("ab4", [55 / 24, -59 / 24, 37 / 24, -9 / 24])],
)
def test_adams_bashforth_has_its_classical_weights_on_even_steps(solver: str, weights: list[float]) -> None:
    """(Hairer, Nørsett & Wanner, Solving ODEs I, eq. III.1.5.)"""
    n, p = 8, len(weights)
    rows = matrix(solver, tuple((np.arange(n + 1) / n).tolist()))
    for i in range(p - 1, n):
        expected = np.zeros(n + 1)
        expected[i + 2 - p : i + 2] = np.array(weights[::-1]) / n
        np.testing.assert_allclose(rows[i + 1] - rows[i], expected, atol=1e-14)


def test_the_corrector_of_abm2_is_moultons_on_even_steps() -> None:
    """y_(i+1) = x_i + h (3 v_i - v_(i-1)) / 2, then x_(i+1) = x_i + h (5 v_(i+1) + 8 v_i - v_(i-1)) / 12."""
    n, h = 6, 1 / 6
    v, x = np.eye(n + 1)[1:], np.eye(n + 1)[0]
    rows = [x, x + h * v[0]]
    x = x + h / 2 * (v[0] + v[1])
    for i in range(1, n):
        rows.append(x + h / 2 * (3 * v[i] - v[i - 1]))
        if i + 1 < n:
            x = x + h / 12 * (5 * v[i + 1] + 8 * v[i] - v[i - 1])
    np.testing.assert_allclose(matrix("abm2", tuple((np.arange(n + 1) / n).tolist())), rows, atol=1e-14)


def worst_step(name: str, path: AffinePath, grid: tuple[float, ...], degree: int) -> float:
    """Largest relative error of steps with full history where the solver's quantity is that power of its variable."""
    data, in_time = name.startswith("dpm"), name in ("deis2", "deis3", "deis4")

    def at(t: float) -> tuple[float, float, float, float]:
        s = torch.tensor([t], dtype=torch.float64)
        alpha, sigma, alpha_dot, sigma_dot = (
            float(f(s)) for f in (path.alpha, path.sigma, path.alpha_dot, path.sigma_dot)
        )
        return alpha, sigma, alpha_dot, sigma_dot

    def quantity(t: float) -> float:
        alpha, sigma, _, _ = at(t)
        return (t if in_time else math.log(alpha / sigma) if data else sigma / alpha) ** degree

    def density(t: float) -> float:
        """(alpha / sigma)' or (sigma / alpha)'."""
        alpha, sigma, alpha_dot, sigma_dot = at(t)
        d = alpha_dot * sigma - alpha * sigma_dot
        return d / sigma**2 if data else -d / alpha**2

    def v(x: Tensor, t: Tensor) -> Tensor:
        q = torch.full_like(x, quantity(float(t[0])))
        return path.data_to_velocity(q, x, t) if data else path.noise_to_velocity(q, x, t)

    start = torch.ones(1, 1, dtype=torch.float64)
    states = fs.solve(v, start, solver=name, grid=grid, path=path, trajectory=True).trajectory
    assert states is not None
    x, worst = states.flatten().tolist(), 0.0
    for i in range(MULTISTEP[name].values - 1, len(grid) - 1):
        a, b = grid[i : i + 2]
        integral = quad(lambda t: quantity(t) * density(t), a, b, epsabs=1e-12)[0]
        weight_a, weight_b = at(a)[data], at(b)[data]  # sigma in the data form, alpha in the noise form
        exact = weight_b / weight_a * x[i] + weight_b * integral
        worst = max(worst, abs(exact - x[i + 1]) / max(1.0, abs(exact)))
    return worst


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["deis2", "deis3", "deis4", "deis2-rho", "deis3-rho", "deis4-rho", "dpm++3m"])
def test_steps_integrate_polynomials_in_their_variable_exactly_and_no_higher_ones(name: str, path: str) -> None:
    degree = MULTISTEP[name].values - 1
    for grid in (INSIDE, INSIDE[::-1]):
        assert worst_step(name, PATHS[path], grid, degree) < 1e-10
    # the fourth powers that four values miss are small where rho is
    assert worst_step(name, PATHS[path], INSIDE, degree + 1) > (1e-4 if degree < 3 else 1e-6)


@pytest.mark.parametrize("h", [1e-9, -1e-4, 0.03, 0.999, 1.001, -2.5, 13.8, 200.0])
def test_exponential_moments_are_the_integrals(h: float) -> None:
    for k, value in enumerate(exponential_moments(h, 3)):
        expected = quad(lambda s, k=k: math.exp(-h * (1 - s)) * s**k, 0, 1, epsabs=0, epsrel=1e-13, points=[0.97])[0]
        assert value == pytest.approx(expected, rel=2e-12)


@pytest.mark.parametrize("grid", BOTH_WAYS)
@pytest.mark.parametrize("solver", MULTISTEP)
def test_constant_fields_and_straight_flows_are_solved_exactly(solver: str, grid: tuple[float, ...]) -> None:
    """v(x, t) = A (I + t A)^-1 x moves along the lines x0 + t A x0: all three quantities are constant on each."""
    x0, c, a = noise(5, 3), noise(5, 3, seed=1), 0.4 * noise(3, 3, seed=2)
    eye = torch.eye(3, dtype=torch.float64)
    start, end = grid[0], grid[-1]
    constant = fs.solve(lambda x, t: c, x0, solver=solver, grid=grid).x
    torch.testing.assert_close(constant, x0 + (end - start) * c, rtol=1e-11, atol=1e-11)

    def straight(x: Tensor, t: Tensor) -> Tensor:
        return x @ torch.linalg.inv(eye + t[0] * a) @ a

    for times in (grid, (start, end)):  # many steps, and one
        x = fs.solve(straight, x0 @ (eye + start * a), solver=solver, grid=times).x
        torch.testing.assert_close(x, x0 @ (eye + end * a), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("grid", [(0.0, 1e-12, 0.3, 1.0), (1e-310, 1e-8, 0.5, 1 - 1e-9, 1.0)])
@pytest.mark.parametrize("solver", MULTISTEP)
def test_times_next_to_the_ends_give_finite_tables(solver: str, grid: tuple[float, ...]) -> None:
    """A constant field is still exact, to the digits that are left: from 1 - 1e-9, sigma grows by 5e8 in a step."""
    c = noise(2, 2)
    for times in (grid, grid[::-1]):
        end = (times[-1] - times[0]) * c
        torch.testing.assert_close(fs.solve(lambda x, t: c, 0 * c, solver=solver, grid=times).x, end, atol=1e-6, rtol=0)


@pytest.mark.parametrize("path", ["cosine", "vp", "interpolant"])
@pytest.mark.parametrize("solver", [*DATA, *NOISE])
def test_pairs_joined_by_the_path_itself_are_solved_exactly_on_it(solver: str, path: str) -> None:
    """With x1 = B x0 every trajectory is alpha B x0 + sigma x0: data and noise predictions stay what they are."""
    p, x0, matrix_ = PATHS[path], noise(5, 3), 0.4 * noise(3, 3, seed=2) + torch.eye(3, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)

    def state(t: Tensor) -> Tensor:
        return p.alpha(t) * matrix_ + p.sigma(t) * eye

    def v(x: Tensor, t: Tensor) -> Tensor:
        start = x @ torch.linalg.inv(state(t[0]))
        return p.target(start, start @ matrix_, t)

    for grid in (INSIDE, WHOLE, (0.0, 1.0), INSIDE[::-1]):
        first, last = (state(torch.tensor(t, dtype=torch.float64)) for t in (grid[0], grid[-1]))
        x = fs.solve(v, x0 @ first, solver=solver, grid=grid, path=p).x
        torch.testing.assert_close(x, x0 @ last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", DATA)
def test_data_form_solvers_reach_a_point_mass_exactly_on_any_grid(solver: str, path: str) -> None:
    p, c = PATHS[path], noise(1, 3, seed=4).expand(6, 3)
    for grid in ((0.0, 1.0), WHOLE, (0.2, 1.0)):
        x = fs.solve(lambda x, t: p.data_to_velocity(c, x, t), noise(6, 3), solver=solver, grid=grid, path=p).x
        torch.testing.assert_close(x, c, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("grid", BOTH_WAYS)
@pytest.mark.parametrize("solver", MULTISTEP)
def test_solvers_are_affinely_equivariant(solver: str, grid: tuple[float, ...]) -> None:
    """y = A x + b turns v into A v(A^-1 (y - b)) and the solution into A X + b: x_0 has weight one in every row."""
    x0, a, shift = noise(6, 3), noise(3, 3, seed=1) + 2 * torch.eye(3), noise(3, seed=2)
    inverse = torch.linalg.inv(a)
    plain = fs.solve(nonlinear, x0, solver=solver, grid=grid).x
    other = fs.solve(lambda y, t: nonlinear((y - shift) @ inverse, t) @ a, x0 @ a + shift, solver=solver, grid=grid).x
    torch.testing.assert_close(other, plain @ a + shift, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", MULTISTEP)
def test_n_steps_are_n_calls_and_the_loop_does_what_the_dense_table_says(solver: str, path: str) -> None:
    x0 = noise(7, 3)
    for grid in (WHOLE, WHOLE[::-1]):
        t = table(solver, grid, PATHS[path])
        assert t.times == grid[:-1]
        a, b = t.dense
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(np.triu(b[:-1]), 0.0)
        velocities: list[Tensor] = []
        for j, time in enumerate([*t.times, 0.0]):
            y = a[j] * x0 + sum((b[j, k] * velocity for k, velocity in enumerate(velocities)), torch.zeros_like(x0))
            velocities.append(nonlinear(y, x0.new_full((7,), time)))
        solution = fs.solve(nonlinear, x0, solver=solver, grid=grid, path=path)
        assert solution.nfe == len(grid) - 1
        torch.testing.assert_close(solution.x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", MULTISTEP)
def test_a_step_adds_up_few_tensors_whatever_the_number_of_steps(solver: str) -> None:
    """One state and a velocity per value; data and noise are a state and a velocity each. DDIM stays x + h v."""
    method = MULTISTEP[solver]
    t = table(solver, tuple((np.arange(41) / 40).tolist()))
    values = method.values + method.corrector
    most = 1 + values if solver.startswith("ab") else 2 * values
    assert max(len(c.terms) for c in [*t.points, *t.nodes]) == most
    if solver == "ddim":
        assert all(point.terms["y", j] == 1.0 for j, point in enumerate(t.nodes))


@pytest.mark.parametrize("solver", MULTISTEP)
def test_gradients_of_multistep_solvers_equal_finite_differences(solver: str) -> None:
    x0 = noise(2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fs.solve(nonlinear, x, solver=solver, steps=3, grad=True).x, x0)
