"""Solvers against closed-form flows, hand-made tables and Butcher's order conditions; the loop's manners."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.errors import UserError
from fewstep.flow import closed_form
from fewstep.flow.field import Guided
from fewstep.flow.paths import expand_time
from fewstep.solvers.runge_kutta import RungeKutta
from fewstep.solvers.solve import plan
from fewstep.solvers.tables import SOLVERS, table

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
STEPS = {1: (64, 128, 256, 512), 2: (32, 64, 128, 256), 4: (16, 32, 64, 128)}
UNEVEN = (0.0, 0.1, 0.35, 0.5, 0.9, 1.0)
GRIDS = [UNEVEN, UNEVEN[::-1], (0.2, 0.7), (0.9, 0.3, 0.25)]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gaussian() -> closed_form.Gaussian:
    return closed_form.gaussian(
        torch.tensor([0.7, -0.4], dtype=torch.float64), torch.tensor([0.6, 1.4], dtype=torch.float64)
    )


def mixture() -> closed_form.Mixture:
    return closed_form.mixture(torch.tensor([0.4, 0.6]), torch.tensor([[-1.2], [0.9]]), torch.tensor([0.5, 0.6]))


FLOWS = {"gaussian": (gaussian, 2), "mixture": (mixture, 1)}
# To a Gaussian the centred state obeys y' = a y, a = q'/(2q), and the midpoint rule's error of second order,
# h^2 y int (a''/24 + a a'/4 + a^3/6) dt, is zero over [0, 1]: its parts cancel by a' = (1 + s^2)/q - 2 a^2.
SUPERCONVERGENT = {("midpoint", "gaussian"): 3}


def nonlinear(x: Tensor, t: Tensor) -> Tensor:
    """No symmetry, no closed form, every entry coupled to every other."""
    return torch.sin(x.roll(1, -1) * (1 + expand_time(t, x))) - 0.3 * x + expand_time(t, x) ** 2


def exact(name: str) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    make, dimension = FLOWS[name]
    flow, x0 = make(), noise(64, dimension)
    zero = x0.new_zeros(len(x0))
    return flow.velocity, x0, flow.flow_map(x0, zero, zero + 1)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def slope(steps: tuple[int, ...], errors: list[float]) -> float:
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


def test_the_list_of_solvers_is_the_tested_one() -> None:
    """Multistep solvers have files of their own, test_tables_*.py."""
    one_step = {name: method for name, method in SOLVERS.items() if isinstance(method, RungeKutta)}
    assert {name: method.order for name, method in one_step.items()} == ORDERS


@pytest.mark.parametrize("grid", ["uniform", "shift:3"])
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("solver", ORDERS)
def test_error_falls_at_the_nominal_order(solver: str, flow: str, grid: str) -> None:
    v, x0, x1 = exact(flow)
    steps = STEPS[ORDERS[solver]]
    errors = [rms(fs.solve(v, x0, solver=solver, steps=n, grid=grid).x - x1) for n in steps]
    order = SUPERCONVERGENT.get((solver, flow), ORDERS[solver])
    assert slope(steps, errors) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("solver", ORDERS)
def test_inversion_converges_to_the_noise_at_the_nominal_order(solver: str, flow: str) -> None:
    v, x0, x1 = exact(flow)
    steps = STEPS[ORDERS[solver]]
    errors = [rms(fs.invert(v, x1, solver=solver, steps=n).x - x0) for n in steps]
    order = SUPERCONVERGENT.get((solver, flow), ORDERS[solver])
    assert slope(steps, errors) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("solver", ORDERS)
def test_there_and_back_gains_an_order_where_the_order_is_even(solver: str) -> None:
    """Local errors C h^(p+1) there and C (-h)^(p+1) back cancel for even p."""
    v, x0, _ = exact("mixture")
    order = ORDERS[solver]
    steps = STEPS[order]
    errors = []
    for n in steps:
        x1 = fs.solve(v, x0, solver=solver, steps=n).x
        errors.append(rms(fs.invert(v, x1, solver=solver, steps=n).x - x0))
    assert slope(steps, errors) == pytest.approx(order + (order % 2 == 0), abs=0.25)


def test_euler_on_the_gaussian_equals_its_closed_form_of_products() -> None:
    """One Euler step multiplies the centred state by 1 + h q'(t) / (2 q(t))."""
    std, grid = 0.5, UNEVEN
    v = closed_form.gaussian(torch.zeros(1), torch.tensor([std])).velocity
    factor = 1.0
    for t, s in itertools.pairwise(grid):
        factor *= 1 + (s - t) * (t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2)
    x0 = noise(8, 1)
    torch.testing.assert_close(fs.solve(v, x0, grid=grid).x, factor * x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("solver", ORDERS)
def test_a_constant_field_is_solved_exactly(solver: str, grid: tuple[float, ...]) -> None:
    c, x0 = noise(5, 3, seed=1), noise(5, 3)
    x = fs.solve(lambda x, t: c, x0, solver=solver, grid=grid).x
    torch.testing.assert_close(x, x0 + (grid[-1] - grid[0]) * c, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("solver", "power"), [("midpoint", 1), ("heun", 1), ("rk4", 3)])
def test_quadrature_is_exact_for_polynomials_in_time(solver: str, power: int) -> None:
    """On v(x, t) = t^q the rules are midpoint, trapezoidal and Simpson's."""
    x0 = torch.zeros(1, 1, dtype=torch.float64)
    x = fs.solve(lambda x, t: t[:, None] ** power, x0, solver=solver, grid=(0.1, 0.35, 1.0)).x
    assert x.item() == pytest.approx((1 - 0.1 ** (power + 1)) / (power + 1), abs=1e-14)


@pytest.mark.parametrize("solver", ORDERS)
def test_butcher_order_conditions_hold_up_to_the_order_and_no_further(solver: str) -> None:
    """(Hairer, Nørsett & Wanner, Solving ODEs I, table II.2.1.)"""
    method = SOLVERS[solver]
    assert isinstance(method, RungeKutta)
    b, c = np.array(method.b), np.array(method.c)
    a = np.array([[*row, *[0.0] * (len(b) - len(row))] for row in method.a])
    residuals = {
        1: [b.sum() - 1],
        2: [b @ c - 1 / 2],
        3: [b @ c**2 - 1 / 3, b @ a @ c - 1 / 6],
        4: [b @ c**3 - 1 / 4, b @ (c * (a @ c)) - 1 / 8, b @ a @ c**2 - 1 / 12, b @ a @ a @ c - 1 / 24],
        5: [b @ c**4 - 1 / 5],
    }
    for order in range(1, method.order + 1):
        np.testing.assert_allclose(residuals[order], 0, atol=1e-15)
    assert np.abs(residuals[method.order + 1]).max() > 1e-3


def test_dense_tables_equal_the_ones_made_by_hand() -> None:
    grid = (0.0, 0.2, 1.0)
    g, h = 0.2, 0.8
    by_hand = {
        "euler": [[0, 0], [g, 0], [g, h]],
        "heun": [
            [0, 0, 0, 0],
            [g, 0, 0, 0],
            [g / 2, g / 2, 0, 0],
            [g / 2, g / 2, h, 0],
            [g / 2, g / 2, h / 2, h / 2],
        ],
        "midpoint": [[0, 0, 0, 0], [g / 2, 0, 0, 0], [0, g, 0, 0], [0, g, h / 2, 0], [0, g, 0, h]],
    }
    for solver, expected in by_hand.items():
        a, b = table(solver, grid).dense
        np.testing.assert_allclose(b, expected, atol=1e-16)
        np.testing.assert_array_equal(a, np.ones(len(expected)))


def test_the_dense_table_of_rk4_equals_the_one_made_by_hand() -> None:
    g, h = -0.6, -0.4
    done = [g / 6, g / 3, g / 3, g / 6]
    expected = [
        [0] * 8,
        [g / 2, *[0] * 7],
        [0, g / 2, *[0] * 6],
        [0, 0, g, *[0] * 5],
        [*done, 0, 0, 0, 0],
        [*done, h / 2, 0, 0, 0],
        [*done, 0, h / 2, 0, 0],
        [*done, 0, 0, h, 0],
        [*done, h / 6, h / 3, h / 3, h / 6],
    ]
    rk4 = table("rk4", (1.0, 0.4, 0.0))
    np.testing.assert_allclose(rk4.dense[1], expected, atol=1e-16)
    np.testing.assert_allclose(rk4.times, [1, 0.7, 0.7, 0.4, 0.4, 0.2, 0.2, 0], atol=1e-15)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("solver", ORDERS)
def test_table_rows_sum_to_the_time_gone_by_and_use_only_earlier_rows(solver: str, grid: tuple[float, ...]) -> None:
    t = table(solver, grid)
    a, b = t.dense
    np.testing.assert_array_equal(a, 1.0)
    np.testing.assert_allclose(b.sum(1), np.array([*t.times, grid[-1]]) - grid[0], atol=1e-15)
    np.testing.assert_array_equal(np.triu(b[:-1]), 0.0)
    assert min(t.times) >= 0
    assert max(t.times) <= 1


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("solver", ORDERS)
def test_the_loop_computes_what_the_dense_table_says(solver: str, grid: tuple[float, ...]) -> None:
    x0 = noise(7, 3)
    t = table(solver, grid)
    a, b = t.dense
    velocities: list[Tensor] = []
    for j, time_ in enumerate(t.times):
        y = a[j] * x0 + sum((b[j, k] * velocity for k, velocity in enumerate(velocities)), torch.zeros_like(x0))
        velocities.append(nonlinear(y, x0.new_full((7,), time_)))
    end = x0 + sum(b[-1, k] * velocity for k, velocity in enumerate(velocities))
    torch.testing.assert_close(fs.solve(nonlinear, x0, solver=solver, grid=grid).x, end, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("solver", ORDERS)
def test_solvers_are_affinely_equivariant(solver: str) -> None:
    """y = A x + b turns v into A v(A^-1 (y - b)) and the solution into A X + b."""
    x0, matrix, shift = noise(6, 3), noise(3, 3, seed=1) + 2 * torch.eye(3), noise(3, seed=2)
    inverse = torch.linalg.inv(matrix)

    def moved(y: Tensor, t: Tensor) -> Tensor:
        return nonlinear((y - shift) @ inverse, t) @ matrix

    plain = fs.solve(nonlinear, x0, solver=solver, grid=UNEVEN).x
    other = fs.solve(moved, x0 @ matrix + shift, solver=solver, grid=UNEVEN).x
    torch.testing.assert_close(other, plain @ matrix + shift, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("solver", ORDERS)
def test_rows_do_not_see_each_other(solver: str) -> None:
    x0, order = noise(9, 4), torch.randperm(9, generator=torch.Generator().manual_seed(3))
    x = fs.solve(nonlinear, x0, solver=solver, steps=5).x
    torch.testing.assert_close(fs.solve(nonlinear, x0[order], solver=solver, steps=5).x, x[order])
    torch.testing.assert_close(fs.solve(nonlinear, x0[:2], solver=solver, steps=5).x, x[:2])


@pytest.mark.parametrize("solver", ORDERS)
def test_the_trajectory_holds_the_states_at_the_grid_times(solver: str) -> None:
    x0 = noise(4, 2, 3)
    solution = fs.solve(nonlinear, x0, solver=solver, grid=UNEVEN, trajectory=True)
    assert solution.trajectory is not None
    assert torch.equal(solution.trajectory[-1], solution.x)
    assert torch.equal(solution.trajectory[0], x0)
    assert solution.times == UNEVEN
    for k in range(1, len(UNEVEN) - 1):
        part = fs.solve(nonlinear, x0, solver=solver, grid=UNEVEN[: k + 1]).x
        torch.testing.assert_close(solution.trajectory[k], part, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("solver", ORDERS)
def test_inverting_is_solving_the_reversed_grid(solver: str) -> None:
    x1 = noise(4, 2)
    there = fs.invert(nonlinear, x1, solver=solver, grid=UNEVEN)
    assert there.times == UNEVEN[::-1]
    assert torch.equal(there.x, fs.solve(nonlinear, x1, solver=solver, grid=UNEVEN[::-1]).x)
    assert torch.equal(there.x, fs.invert(nonlinear, x1, solver=solver, grid=UNEVEN[::-1]).x)
    assert fs.invert(nonlinear, x1, solver=solver, steps=4, grid="shift:3").times[0] == 1.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.seen.append((t.clone(), label))
        return x if label is None else x + label[:, None]


@pytest.mark.parametrize(("scale", "factor"), [(None, 1), (2.5, 2), (-1.0, 2), (1.0, 1), (0.0, 1)])
@pytest.mark.parametrize(("solver", "stages"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_nfe_equals_what_a_forward_hook_counts(solver: str, stages: int, scale: float | None, factor: int) -> None:
    net, calls = Net(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    field = net if scale is None else Guided(net, scale)
    for _ in range(2):  # the second solve counts its own calls only
        calls.clear()
        nfe = fs.solve(field, noise(3, 2), solver=solver, steps=3, cond={"label": torch.arange(3)}).nfe
        assert nfe == len(calls) == 3 * stages * factor


@pytest.mark.parametrize("solver", ORDERS)
def test_the_network_gets_the_tables_times_and_the_condition_itself(solver: str) -> None:
    net, label = Net(), torch.arange(3)
    x0 = noise(3, 2, dtype=torch.float32)
    fs.solve(net, x0, solver=solver, grid=UNEVEN, cond={"label": label})
    times = torch.stack([t for t, _ in net.seen])
    expected = torch.tensor(table(solver, UNEVEN).times).to(torch.float32)[:, None].expand(-1, 3)
    assert torch.equal(times, expected)
    assert all(given is label for _, given in net.seen)


@pytest.mark.parametrize("solver", ORDERS)
def test_a_network_may_return_its_own_input_or_a_view_of_it(solver: str) -> None:
    """On v = x a step of order p multiplies by the exponential series cut after h^p, for all four solvers."""
    x0 = noise(4, 3)
    before, h = x0.clone(), 0.25
    factor = sum(h**k / np.prod(range(1, k + 1)) for k in range(ORDERS[solver] + 1))
    for v in (lambda x, t: x, lambda x, t: x[:], lambda x, t: x.detach().view(-1).view_as(x)):
        x = fs.solve(v, x0, solver=solver, steps=4).x
        torch.testing.assert_close(x, factor**4 * before, rtol=1e-13, atol=1e-13)
        assert torch.equal(x0, before)


def test_a_network_that_writes_into_its_time_harms_no_later_solve() -> None:
    def rude(x: Tensor, t: Tensor) -> Tensor:
        t.mul_(1000)
        return t[:, None].expand_as(x)

    x0 = torch.zeros(3, 2)
    first = fs.solve(rude, x0, grid=(0.0, 0.25, 1.0)).x
    torch.testing.assert_close(first, torch.full_like(x0, 0.75 * 250))
    assert torch.equal(fs.solve(rude, x0, grid=(0.0, 0.25, 1.0)).x, first)


@pytest.mark.parametrize("solver", ORDERS)
def test_no_velocity_is_held_longer_than_the_tableau_needs(solver: str) -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive = []

    def v(x: Tensor, t: Tensor) -> Tensor:
        alive.append(sum(reference() is not None for reference in seen))
        out = x * 2
        seen.append(weakref.ref(out))
        return out

    fs.solve(v, noise(2, 2), solver=solver, steps=4)
    assert max(alive) == {"euler": 0, "midpoint": 0, "heun": 1, "rk4": 3}[solver]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", ORDERS)
def test_the_starts_dtype_is_kept_for_states_times_and_result(solver: str, dtype: torch.dtype) -> None:
    seen = set()

    def v(x: Tensor, t: Tensor) -> Tensor:
        seen.update({x.dtype, t.dtype})
        return torch.cos(x.to(torch.float32)) * expand_time(t, x).to(torch.float32)  # always single precision

    x0 = noise(16, 2)
    solution = fs.solve(v, x0.to(dtype), solver=solver, steps=4, trajectory=True)
    assert solution.trajectory is not None
    assert seen == {dtype} == {solution.x.dtype, solution.trajectory.dtype}
    reference = fs.solve(lambda x, t: torch.cos(x) * t[:, None], x0, solver=solver, steps=4).x
    assert rms(solution.x.double() - reference) < 4 * max(torch.finfo(dtype).eps, 1e-7)


def test_gradients_pass_through_the_loop_only_when_asked() -> None:
    """Euler on v = a x: x_N = (1 + a/N)^N x0."""
    steps = 5
    a, x0 = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), noise(3, 2).requires_grad_()

    def v(x: Tensor, t: Tensor) -> Tensor:
        return a * x

    solution = fs.solve(v, x0, steps=steps, grad=True, trajectory=True)
    assert solution.trajectory is not None
    da, dx = torch.autograd.grad(solution.x.sum(), [a, x0], retain_graph=True)
    growth = (1 + a / steps).detach()
    torch.testing.assert_close(da, growth ** (steps - 1) * x0.sum().detach())
    torch.testing.assert_close(dx, (growth**steps).expand_as(x0))
    (dx_half,) = torch.autograd.grad(solution.trajectory[2].sum(), x0)
    torch.testing.assert_close(dx_half, (growth**2).expand_as(x0))
    assert not fs.solve(v, x0, steps=steps).x.requires_grad


@pytest.mark.parametrize("solver", ORDERS)
def test_gradients_of_every_solver_equal_finite_differences(solver: str) -> None:
    x0 = noise(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fs.solve(nonlinear, x, solver=solver, steps=2, grad=True).x, x0)


def test_a_solve_in_inference_mode_leaves_nothing_that_hinders_a_later_one_with_gradients() -> None:
    w = torch.ones((), requires_grad=True)

    def v(x: Tensor, t: Tensor) -> Tensor:
        return w * t[:, None] * x

    grid = (0.0, 0.125, 0.5, 1.0)  # nobody else's plan
    with torch.inference_mode():
        fs.solve(v, torch.ones(3, 2), grid=grid)
    fs.solve(v, torch.ones(3, 2), grid=grid, grad=True).x.sum().backward()
    # x_N = prod (1 + h_k t_k w): d log x / dw = sum h_k t_k / (1 + h_k t_k) at w = 1
    expected = 6 * (1 + 0.375 * 0.125) * (1.25) * (0.046875 / 1.046875 + 0.25 / 1.25)
    assert w.grad is not None
    assert w.grad.item() == pytest.approx(expected, rel=1e-5)


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fs.solve(nonlinear, noise(4, 2), solver="rk4", steps=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_an_error_in_the_network_passes_through_and_spoils_nothing() -> None:
    calls = []

    def broken(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        if len(calls) == 3:
            raise KeyError("out of coffee")
        return x

    x0 = noise(2, 2)
    with pytest.raises(KeyError, match="out of coffee"):
        fs.solve(broken, x0, solver="heun", steps=4)
    torch.testing.assert_close(fs.solve(broken, x0, steps=4).x, 1.25**4 * x0)


@pytest.mark.parametrize("solver", ["euler", "rk4", "unipc2", "deis3"])
def test_thousands_of_steps_are_planned_in_time_that_grows_hardly_faster_than_they(solver: str) -> None:
    """Four times the steps take 4 times as long when planning is linear, 16 times when it is quadratic."""

    def seconds(steps: int) -> float:
        times = []
        for k in range(3):  # grids that no other test has put in the cache
            began = time.perf_counter()
            made = plan(solver, f"quadratic:{1.125 + k / 64}", steps)
            times.append(time.perf_counter() - began)
            assert len(made.rows) == steps * SOLVERS[solver].calls
        return min(times)

    assert seconds(2000) < 12 * seconds(500)


def test_plans_are_cached_by_what_was_asked() -> None:
    assert plan("heun", "uniform", 7) is plan("heun", "uniform", 7)
    assert plan("heun", [0, 0.5, 1], None) is plan("heun", torch.tensor([0.0, 0.5, 1.0]), None)
    assert plan("heun", "uniform", 7) is not plan("heun", "uniform", 7, backward=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "eulr"}, "unknown solver 'eulr': did you mean 'euler'"),
        ({"solver": ["euler"]}, "unknown solver"),
        ({"grid": "unifrm"}, "unknown grid 'unifrm': did you mean 'uniform'"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"steps": True}, "steps must be a whole number"),
        ({"steps": 3, "grid": "0,0.5,1"}, "contradict each other"),
        ({"grid": (0, 0.5, 1.2)}, r"must lie in \[0, 1\]"),
        ({"grid": (0, 0.5, 0.5, 1)}, "turns round or repeats"),
        ({"path": "cosin"}, "unknown path 'cosin': did you mean 'cosine'"),
        ({"path": 3}, "path must be a path or its name .* got int"),
        ({"solver": "heun:2"}, "solver 'heun' takes no value, got 'heun:2': write 'heun'"),
        ({"solver": "ddim:half"}, "'half' is not a number. Write for example 'ddim:0.5'"),
        ({"solver": "ddim:1.5"}, "eta is the share of the posterior's noise, from 0"),
        ({"solver": "sde:-1"}, "must be a number from 0 up"),
        ({"solver": "sde:nan"}, "must be finite"),
        ({"solver": "rk45", "steps": 3}, "chooses its own steps: leave steps out"),
        ({"solver": "rk45", "grid": "shift:3"}, "grid 'shift:3' has no meaning for it"),
        ({"solver": "rk45:0"}, "tolerance must be a positive number"),
        ({"compile": True, "grad": True}, "no autograd graph: leave compile or grad out"),
        ({"compile": True, "solver": "rk45"}, "'rk45' has none: leave compile out"),
    ],
)
def test_wrong_solvers_and_grids_are_refused(arguments: dict[str, object], message: str) -> None:
    fs.solve(nonlinear, noise(2, 2), steps=1)  # True must not be served from the cache of 1
    for run in (fs.solve, fs.invert):
        with pytest.raises(UserError, match=message):
            run(nonlinear, noise(2, 2), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x0", "message"),
    [
        (torch.ones(3, 2, dtype=torch.long), "floating-point tensor of shape .* got torch.int64"),
        (np.ones((3, 2)), "got ndarray"),
        (torch.ones(3), r"shape \(B, ...\) with B >= 1 .* got \(3,\)"),
        (torch.ones(0, 2), r"got \(0, 2\)"),
        (
            torch.tensor([[1.0, float("nan")], [0.0, 0.0], [float("inf"), 0.0]]),
            "infinite values in 2 of 3 rows",
        ),
        (torch.tensor([[float("inf")], [float("-inf")]]), "in 2 of 2 rows"),
    ],
)
def test_a_start_that_cannot_be_solved_is_refused(x0: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fs.solve(lambda x, t: x, x0)


def test_a_finite_start_whose_sum_overflows_is_taken() -> None:
    x0 = torch.full((4, 2), 3e38)
    assert torch.equal(fs.solve(lambda x, t: torch.zeros_like(x), x0, steps=1).x, x0)


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (lambda x, t: x[:, :1], r"shape \(3, 1\) for an input of shape \(3, 2\)"),
        (lambda x, t: x.sum(), r"shape \(\) for an input"),
        (lambda x, t: (x,), "returned a tuple, .* must be a tensor"),
        (lambda x, t: None, "returned a NoneType"),
    ],
)
def test_what_is_no_velocity_is_refused(v: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fs.solve(v, noise(3, 2), steps=2)
