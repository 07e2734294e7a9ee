"""Closed-form flows: each is checked against its definition, not against another of our formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from fewstep.errors import UserError
from fewstep.flow.closed_form import CoupledGaussian, Gaussian, Mixture, coupled_gaussian, gaussian, mixture
from fewstep.flow.coupled_gaussian import joint_gaussian_velocity
from fewstep.flow.derivatives import WAYS, Derivative, pullback
from fewstep.flow.paths import VP, AffinePath, Cosine, Interpolant, Linear

D = torch.float64
Flow = Gaussian | Mixture | CoupledGaussian
PATHS = [Linear(), Cosine(), VP(), Interpolant()]


def bimodal(path: AffinePath | None = None) -> Mixture:
    """The one-dimensional test mixture."""
    return mixture(torch.tensor([0.4, 0.6]), torch.tensor([[-1.2], [0.9]]), torch.tensor([0.25, 0.35]), path)


def triangle(path: AffinePath | None = None) -> Mixture:
    means = torch.tensor([[1.0, 0.0], [-0.8, 0.7], [-0.5, -1.0]])
    return mixture(torch.tensor([1.0, 2.0, 1.0]), means, torch.tensor([0.3, 0.4, 0.25]), path)


def flows() -> list[Flow]:
    mean, std = torch.tensor([1.0, -0.5, 0.3]), torch.tensor([0.3, 1.0, 2.0])
    made: list[Flow] = [gaussian(mean, std, path) for path in PATHS]
    made += [bimodal(path) for path in PATHS]
    made += [triangle(), coupled_gaussian(mean, std, 0.6), coupled_gaussian(mean, std, -0.4)]
    return made


def name(flow: Flow) -> str:
    path = "" if isinstance(flow, CoupledGaussian) else type(flow.path).__name__
    return f"{type(flow).__name__}-{points(flow, 1).shape[1]}d-{path}"


def points(flow: Flow, n: int, seed: int = 0) -> Tensor:
    dim = flow.means.shape[1] if isinstance(flow, Mixture) else len(flow.mean)
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=D)


def full(n: int, t: float) -> Tensor:
    return torch.full((n,), t, dtype=D)


ALL = pytest.mark.parametrize("flow", flows(), ids=name)
WITH_DENSITY = pytest.mark.parametrize("flow", [f for f in flows() if not isinstance(f, CoupledGaussian)], ids=name)


@ALL
def test_velocity_is_the_best_predictor_of_the_target(flow: Flow) -> None:
    """E[(v - target) phi(x_t)] = 0 for phi = 1, x, x^2: z-scores on 200 000 pairs, and a wrong v fails."""
    n = 200_000
    generator = torch.Generator().manual_seed(1)
    path: AffinePath = Linear()
    if isinstance(flow, CoupledGaussian):
        x0, x1 = flow.sample_pairs(n, generator, D)
    else:
        path, x1 = flow.path, flow.sample(n, generator, D)
        x0 = torch.randn(x1.shape, generator=generator, dtype=D)
    t = 0.98 * torch.rand(n, generator=generator, dtype=D)  # the VP target has no variance bound at t = 1
    x, target = path.interpolate(x0, x1, t), path.target(x0, x1, t)
    v = flow.velocity(x, t)
    for power in range(3):
        assert float(z_scores((v - target) * x**power).abs().max()) < 4
    assert float(z_scores((-v - target) * x).abs().max()) > 20


def z_scores(sample: Tensor) -> Tensor:
    return sample.mean(0) / sample.std(0) * math.sqrt(len(sample))


@ALL
def test_flow_map_moves_with_the_velocity(flow: Flow) -> None:
    """d/dr X(x, t, r) = v(X, r), by forward differentiation."""
    x = points(flow, 7)
    t, r = torch.linspace(0, 0.9, 7, dtype=D), torch.linspace(0.8, 0.1, 7, dtype=D)
    end, speed = jvp(lambda s: flow.flow_map(x, t, s), (r,), (torch.ones_like(r),))
    torch.testing.assert_close(speed, flow.velocity(end, r), rtol=1e-6, atol=1e-6)


@ALL
@pytest.mark.parametrize("time", [0.0, 1.0])
def test_derivatives_at_the_ends_are_the_limits_from_inside(flow: Flow, time: float) -> None:
    """dv/dt, (∂v/∂x) w and the derivatives of score and density, against one-sided third-order differences."""
    x, w, t = points(flow, 5), points(flow, 5, seed=1), full(5, time)
    h = 1e-4 if time == 0 else -1e-4

    def inside(values: Callable[[Tensor], Tensor]) -> Tensor:
        zero, one, two, three = (values(t + k * h) for k in range(4))
        return (-11 * zero + 18 * one - 9 * two + 2 * three) / (6 * h)

    slope = inside(lambda s: flow.velocity(x, s))
    for mode in ("auto", *WAYS):
        derivative = Derivative(flow.velocity, mode)
        _, found = derivative(x, t, 0 * x, torch.ones_like(t))
        torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-5)
        assert derivative.used == ("forward" if mode == "auto" else mode)
    _, along = Derivative(flow.velocity)(x, t, w)
    torch.testing.assert_close(along, (flow.velocity(x + 1e-5 * w, t) - flow.velocity(x - 1e-5 * w, t)) / 2e-5)
    assert bool(torch.isfinite(pullback(flow.velocity, x, t, w)[1]).all())
    if isinstance(flow, CoupledGaussian):
        return
    for values in (flow.score, flow.log_density):
        _, found = jvp(lambda s, f=values: f(x, s), (t,), (torch.ones_like(t),))
        torch.testing.assert_close(found, inside(lambda s, f=values: f(x, s)), rtol=1e-5, atol=1e-5)


@ALL
def test_flow_maps_compose_and_invert(flow: Flow) -> None:
    x = points(flow, 6)
    t, q, r = full(6, 0.0), torch.linspace(0.1, 0.9, 6, dtype=D), full(6, 1.0)
    direct = flow.flow_map(x, t, r)
    torch.testing.assert_close(flow.flow_map(flow.flow_map(x, t, q), q, r), direct, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flow.flow_map(direct, r, t), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flow.flow_map(x, q, q), x, rtol=1e-9, atol=1e-9)


@ALL
def test_average_velocity_identity(flow: Flow) -> None:
    """u = v + (r - t) du/dt along the flow (MeanFlow 2505.13447, in our time), and u = v at r = t."""
    x = points(flow, 6)
    t, r = torch.linspace(0.05, 0.6, 6, dtype=D), torch.linspace(0.9, 0.7, 6, dtype=D)
    v = flow.velocity(x, t)
    tangents = (v, torch.ones_like(t), torch.zeros_like(r))
    u, rate = jvp(flow.average_velocity, (x, t, r), tangents)
    torch.testing.assert_close(u, v + (r - t)[:, None] * rate, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x + (r - t)[:, None] * u, flow.flow_map(x, t, r), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flow.average_velocity(x, t, t), v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("flow", [gaussian(0.5, 0.3), coupled_gaussian(0.5, 0.3, 0.6)], ids=name)
def test_linear_average_velocity_is_smooth_at_the_diagonal(flow: Gaussian | CoupledGaussian) -> None:
    x, t = points(flow, 5), full(5, 0.4)
    near = flow.average_velocity(x, t, t + 1e-9)
    torch.testing.assert_close(near, flow.velocity(x, t), rtol=1e-8, atol=1e-8)
    _, slope = jvp(lambda r: flow.average_velocity(x, t, r), (t,), (torch.ones_like(t),))
    _, rate = jvp(flow.velocity, (x, t), (flow.velocity(x, t), torch.ones_like(t)))
    torch.testing.assert_close(slope, rate / 2, rtol=1e-9, atol=1e-9)  # u = v + (r - t)/2 dv/dt + ...


@WITH_DENSITY
@pytest.mark.parametrize("time", [0.0, 0.5, 0.9, 1.0])
def test_score_is_the_gradient_of_the_log_density(flow: Gaussian | Mixture, time: float) -> None:
    x = points(flow, 20).requires_grad_()
    t = full(20, time)
    (gradient,) = torch.autograd.grad(flow.log_density(x, t).sum(), x)
    torch.testing.assert_close(flow.score(x, t), gradient, rtol=1e-9, atol=1e-9)


@WITH_DENSITY
@pytest.mark.parametrize("time", [0.05, 0.5, 0.95])
def test_score_follows_from_the_velocity(flow: Gaussian | Mixture, time: float) -> None:
    x, t = points(flow, 20), full(20, time)
    score = flow.path.velocity_to_score(flow.velocity(x, t), x, t)
    torch.testing.assert_close(score, flow.score(x, t), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("time", [0.0, 0.5, 1.0])
def test_densities_integrate_to_one(path: AffinePath, time: float) -> None:
    line = torch.linspace(-8, 8, 4001, dtype=D)
    for flow in (bimodal(path), gaussian(0.5, 0.2, path)):
        density = flow.log_density(line[:, None], full(len(line), time)).exp()
        assert float(torch.trapezoid(density, line)) == pytest.approx(1, abs=1e-6)
    line = torch.linspace(-6, 6, 241, dtype=D)
    plane = torch.cartesian_prod(line, line)
    density = triangle(path).log_density(plane, full(len(plane), time)).exp()
    assert float(density.sum()) * 0.05**2 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_flow_carries_densities_into_each_other(path: AffinePath) -> None:
    """log p_t(x) = log p_r(X) + log |dX/dx| in one dimension."""
    for flow in (bimodal(path), gaussian(torch.tensor([0.5]), torch.tensor([0.3]), path)):
        x = torch.linspace(-2.5, 2.5, 11, dtype=D)[:, None]
        t, r = full(11, 0.1), full(11, 1.0)
        end, stretch = jvp(lambda y, f=flow, a=t, b=r: f.flow_map(y, a, b), (x,), (torch.ones_like(x),))
        moved = flow.log_density(end, r) + stretch[:, 0].log()
        torch.testing.assert_close(moved, flow.log_density(x, t), rtol=1e-8, atol=1e-8)


def test_one_dimensional_map_is_accurate_in_tails_and_gaps() -> None:
    flow = mixture(torch.tensor([0.5, 0.5]), torch.tensor([[-3.0], [3.0]]), torch.tensor([0.1, 0.1]))
    x = torch.tensor([[-12.0], [-1.0], [1.0], [12.0]], dtype=D)
    end = flow.flow_map(x, full(4, 0.0), full(4, 1.0))
    torch.testing.assert_close(end, -end.flip(0), rtol=1e-12, atol=1e-12)  # symmetric data
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=D), torch.tensor(1.0, dtype=D))
    inner = -3 + 0.1 * normal.icdf(2 * normal.cdf(x[1]))  # the left mode holds the left half
    torch.testing.assert_close(end[1], inner, rtol=1e-9, atol=1e-9)
    assert float(end[0]) == pytest.approx(-3 - 0.1 * 11.94, abs=0.02)  # F(x) = Phi(-12): 2 Phi(-12) = Phi(-11.94)
    gap = flow.flow_map(torch.tensor([[1e-12]], dtype=D), full(1, 0.0), full(1, 1.0))
    assert abs(float(gap)) < 3


def test_fine_solver_agrees_with_the_product_of_one_dimensional_flows() -> None:
    """Means that differ along one axis only: the plane's flow factorises into mixture and Gaussian."""
    weights, stds = torch.tensor([0.3, 0.7]), torch.full((2,), 0.2)
    for path in (Linear(), Cosine(), VP()):
        flat = mixture(weights, torch.tensor([[-1.0, 0.4], [1.5, 0.4]]), stds, path)
        first = mixture(weights, torch.tensor([[-1.0], [1.5]]), stds, path)
        second = gaussian(torch.tensor([0.4]), 0.2, path)
        x = torch.randn(40, 2, generator=torch.Generator().manual_seed(2), dtype=D)
        t, r = full(40, 0.0), full(40, 1.0)
        expected = torch.cat([first.flow_map(x[:, :1], t, r), second.flow_map(x[:, 1:], t, r)], 1)
        torch.testing.assert_close(flat.flow_map(x, t, r), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("make", [lambda: triangle(), lambda: gaussian(torch.tensor([1.0, -2.0]), 0.5)])
def test_samples_have_the_density(make: Callable[[], Gaussian | Mixture]) -> None:
    """Cross entropy of the samples = entropy by quadrature, and first two moments by quadrature."""
    flow = make()
    x = flow.sample(200_000, torch.Generator().manual_seed(3))
    assert x.dtype == torch.float32
    line = torch.linspace(-6, 6, 481, dtype=D)
    plane = torch.cartesian_prod(line, line)
    log_p = flow.log_density(plane)
    mass = log_p.exp() * 0.025**2
    log_q = flow.log_density(x.double())
    error = float(log_q.std()) / math.sqrt(len(x))
    assert abs(float(log_q.mean()) - float((mass * log_p).sum())) < 4 * error
    for power in (1, 2):
        torch.testing.assert_close((x.double() ** power).mean(0), mass @ plane**power, rtol=0, atol=0.02)


RHOS = [-0.5, 0.0, 0.3, 0.8, 0.99]


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_loss_floor_straightness_and_their_split(rho: float, std: float) -> None:
    """V by regression of pairs, S by quadrature over the exact flow, and E|X1-X0|^2 = E|Z1-Z0|^2 + S + V."""
    flow = coupled_gaussian(0.7, std, rho)
    nodes = (torch.arange(400, dtype=D) + 0.5) / 400
    z0, ones = torch.ones(400, 1, dtype=D), torch.ones(400, dtype=D)
    zt = flow.flow_map(z0, 0 * ones, nodes)
    # Everything is affine in z0 ~ N(0, 1): E f(z0)^2 = (f(1)^2 + f(-1)^2) / 2.
    gap = [
        flow.flow_map(s * z0, 0 * ones, ones) - s * z0 - flow.velocity(flow.flow_map(s * z0, 0 * ones, nodes), nodes)
        for s in (1, -1)
    ]
    straightness = float((gap[0] ** 2 + gap[1] ** 2).mean() / 2)
    assert flow.straightness() == pytest.approx(straightness, rel=2e-3, abs=1e-5)
    q = (zt[:, 0] - nodes * 0.7) ** 2
    variance = float((std**2 * (1 - rho**2) / q).mean())
    assert flow.loss_floor() == pytest.approx(variance, rel=2e-3)
    transport = 0.7**2 + 1 + std**2 - 2 * rho * std
    moved = 0.7**2 + (std - 1) ** 2
    assert transport == pytest.approx(moved + flow.straightness() + flow.loss_floor(), rel=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_loss_floor_is_the_loss_of_the_exact_velocity(rho: float) -> None:
    flow = coupled_gaussian(torch.tensor([0.5, -1.0]), torch.tensor([0.4, 1.2]), rho)
    generator = torch.Generator().manual_seed(5)
    x0, x1 = flow.sample_pairs(200_000, generator, D)
    t = torch.rand(len(x0), generator=generator, dtype=D)
    loss = (flow.velocity(Linear().interpolate(x0, x1, t), t) - (x1 - x0)).pow(2).sum(1).mean()
    assert float(loss) == pytest.approx(flow.loss_floor(), rel=0.01)


def test_independent_gaussian_figures() -> None:
    """V = pi s / 2, S = (2 - pi / 2) s, one Euler step collapses to the mean."""
    flow = gaussian(torch.tensor([0.7, 0.1]), torch.tensor([0.5, 2.0]))
    assert flow.loss_floor() == pytest.approx(math.pi / 2 * 2.5)
    assert flow.straightness() == pytest.approx((2 - math.pi / 2) * 2.5)
    x0 = points(flow, 5)
    end = x0 + flow.velocity(x0, full(5, 0.0))
    torch.testing.assert_close(end, flow.mean.expand(5, 2))
    with pytest.raises(UserError, match="linear path only"):
        gaussian(0.0, 1.0, Cosine()).straightness()


def test_uncorrelated_pairs_are_the_independent_gaussian() -> None:
    mean, std = torch.tensor([1.0, -0.5]), torch.tensor([0.3, 2.0])
    a, b = gaussian(mean, std), coupled_gaussian(mean, std, 0.0)
    x, t, r = points(a, 9), torch.linspace(0, 1, 9, dtype=D), full(9, 0.8)
    torch.testing.assert_close(a.velocity(x, t), b.velocity(x, t))
    torch.testing.assert_close(a.flow_map(x, t, r), b.flow_map(x, t, r))
    torch.testing.assert_close(a.average_velocity(x, t, r), b.average_velocity(x, t, r))


def euler_std(flow: CoupledGaussian, grid: tuple[float, ...]) -> float:
    """Half the distance of the images of +1 and -1 under Euler steps: the map is affine."""
    x = torch.tensor([[1.0], [-1.0]], dtype=D)
    for a, b in itertools.pairwise(grid):
        x = x + (b - a) * flow.velocity(x, full(2, a))
    return abs(float(x[0] - x[1])) / 2


@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.6, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_euler_on_the_angle_grid_obeys_the_cosine_law(rho: float, steps: int) -> None:
    flow = coupled_gaussian(0.4, 1.7, rho)
    grid = flow.angle_grid(steps)
    assert grid[0] == 0
    assert grid[-1] == 1
    expected = 1.7 * math.cos(math.acos(rho) / steps) ** steps
    assert euler_std(flow, grid) == pytest.approx(abs(expected), abs=1e-12)
    if steps == 1:
        assert euler_std(flow, (0.0, 1.0)) == pytest.approx(float(flow.one_step_std()), abs=1e-12)
    elif 0 <= rho < 1:
        uniform = tuple(k / steps for k in range(steps + 1))
        assert euler_std(flow, grid) > euler_std(flow, uniform)


def test_cosine_law_figures() -> None:
    stds = [euler_std(coupled_gaussian(0.0, 1.0, 0.0), coupled_gaussian(0, 1, 0).angle_grid(k)) for k in (1, 2, 4, 8)]
    assert stds == pytest.approx([0, 0.5, 0.7286, 0.8562], abs=5e-5)


def test_acceleration_is_the_second_derivative_along_the_flow() -> None:
    flow = coupled_gaussian(torch.tensor([0.4, 1.0]), torch.tensor([0.3, 1.7]), 0.6)
    x, t = points(flow, 7), torch.linspace(0, 1, 7, dtype=D)
    _, second = jvp(flow.velocity, (x, t), (flow.velocity(x, t), torch.ones_like(t)))
    torch.testing.assert_close(flow.acceleration(x, t), second, rtol=1e-10, atol=1e-10)


def test_perfect_reflow_is_straight() -> None:
    flow = coupled_gaussian(0.4, 1.7, 1.0)
    assert flow.straightness() == 0
    assert flow.loss_floor() == 0
    x, t = points(flow, 6), torch.linspace(0, 1, 6, dtype=D)
    torch.testing.assert_close(flow.average_velocity(x, t, 0 * t + 1), flow.velocity(x, t))


def test_joint_gaussian_velocity_is_the_regression_of_pairs() -> None:
    """Monte Carlo regression for a dense joint covariance, and the correlated family as a special case."""
    generator = torch.Generator().manual_seed(6)
    root = torch.randn(6, 6, generator=generator, dtype=D) / 2
    joint = root @ root.T + 0.3 * torch.eye(6, dtype=D)
    mean0, mean1 = torch.tensor([0.5, 0.0, -1.0], dtype=D), torch.tensor([1.0, 2.0, 0.0], dtype=D)
    draws = torch.randn(300_000, 6, generator=generator, dtype=D) @ torch.linalg.cholesky(joint).T
    x0, x1 = mean0 + draws[:, :3], mean1 + draws[:, 3:]
    x = 0.7 * x0 + 0.3 * x1
    design = torch.cat([torch.ones(len(x), 1, dtype=D), x], 1)
    fit = torch.linalg.lstsq(design, x1 - x0).solution
    probe = torch.randn(5, 3, generator=generator, dtype=D)
    exact = joint_gaussian_velocity(probe, full(5, 0.3), mean0, mean1, joint[:3, :3], joint[3:, 3:], joint[3:, :3])
    torch.testing.assert_close(fit[0] + probe @ fit[1:], exact, rtol=0, atol=0.03)
    std = torch.tensor([0.5, 1.0, 2.0], dtype=D)
    family = coupled_gaussian(mean1, std, 0.4)
    eye = torch.eye(3, dtype=D)
    matrix = joint_gaussian_velocity(
        probe, full(5, 0.3), 0 * mean1, mean1, eye, torch.diag(std**2), 0.4 * torch.diag(std)
    )
    torch.testing.assert_close(matrix, family.velocity(probe, full(5, 0.3)))


def test_images_are_treated_like_their_flat_vectors_also_when_batch_equals_size() -> None:
    mean, std = torch.randn((2, 1, 2, 2), generator=torch.Generator().manual_seed(7))
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(8), dtype=D)
    t, r = torch.linspace(0.1, 0.7, 4, dtype=D), full(4, 0.9)
    pairs = [
        (gaussian(mean, std.abs()), gaussian(mean.flatten(), std.abs().flatten())),
        (
            mixture(torch.ones(2), torch.stack([mean, std]), torch.tensor([0.5, 0.7])),
            mixture(torch.ones(2), torch.stack([mean, std]).flatten(1), torch.tensor([0.5, 0.7])),
        ),
        (coupled_gaussian(mean, std.abs(), 0.5), coupled_gaussian(mean.flatten(), std.abs().flatten(), 0.5)),
    ]
    for image, flat in pairs:
        torch.testing.assert_close(image.velocity(x, t).flatten(1), flat.velocity(x.flatten(1), t))
        torch.testing.assert_close(image.flow_map(x, t, r).flatten(1), flat.flow_map(x.flatten(1), t, r))


def test_results_keep_the_dtype_of_x() -> None:
    for flow in flows():
        x, t = points(flow, 3).float(), torch.tensor([0.0, 0.3, 0.6])
        assert flow.velocity(x, t).dtype == torch.float32
        assert flow.flow_map(x, t, 0 * t + 1).dtype == torch.float32
        assert flow.average_velocity(x, t, 0 * t + 1).dtype == torch.float32


def test_point_data_are_exact_before_the_end_and_refused_at_it() -> None:
    flow = mixture(torch.ones(1), torch.tensor([[2.0]]), torch.zeros(1))
    x = torch.tensor([[0.5]], dtype=D)
    torch.testing.assert_close(flow.velocity(x, full(1, 0.75)), (2 - x) / 0.25)  # v = (x1 - x)/(1 - t)
    with pytest.raises(UserError, match="use t < 1"):
        flow.velocity(x, full(1, 1.0))


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(UserError, match="negative"):
        gaussian(0.0, -1.0)
    with pytest.raises(UserError, match="do not broadcast"):
        gaussian(torch.zeros(2), torch.ones(3))
    with pytest.raises(UserError, match="NaN"):
        gaussian(math.nan, 1.0)
    with pytest.raises(UserError, match="per data point"):
        gaussian(torch.zeros(2), 1.0).velocity(torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(UserError, match=r"t must be \(B,\)"):
        gaussian(torch.zeros(2), 1.0).velocity(torch.zeros(4, 2), torch.tensor(0.0))
    with pytest.raises(UserError, match="K components"):
        mixture(torch.ones(2), torch.zeros(2), torch.ones(2))
    with pytest.raises(UserError, match="positive"):
        mixture(torch.tensor([0.0, 1.0]), torch.zeros(2, 1), torch.ones(2))
    with pytest.raises(UserError, match="lives on"):
        bimodal().velocity(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(UserError, match=r"\(-1, 1\]"):
        coupled_gaussian(0.0, 1.0, -1.0)
    with pytest.raises(UserError, match="one std"):
        coupled_gaussian(0.0, torch.tensor([1.0, 2.0]), 0.5).angle_grid(4)
