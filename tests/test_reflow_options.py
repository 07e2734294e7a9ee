"""The improved recipes of ReFlow: time laws, distances, weights, the denoiser as a velocity, anchored steps."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.diagnostics.pick import candidates
from fewstep.errors import UserError
from fewstep.flow.couplings import Facts, GaussianSource, Independent, Pair
from fewstep.flow.denoiser import DenoiserVelocity, denoise
from fewstep.flow.grids import make_grid
from fewstep.flow.noise import Draws, generator_for
from fewstep.flow.paths import Linear
from fewstep.flow.time_laws import make_time_law
from fewstep.generator import Config, load
from fewstep.methods.families.distances import (
    Distance,
    Loss,
    Normalised,
    Perceptual,
    Residual,
    endpoint_errors,
    find_distance,
    high_pass,
    identity,
    pseudo_huber_rows,
)
from fewstep.methods.families.straight_line import VelocityRegression
from fewstep.methods.reflow import MIN_NORMALISER, ReflowOptions, normaliser
from fewstep.metrics.feature_distance import find_features
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.solvers.solve import plan
from fewstep.training.world import LocalWorld
from objective_cases import loss_of

DOUBLE = torch.float64


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def squared_rows(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).flatten(1).square().mean(1)


# --- times -----------------------------------------------------------------------------------------------------------


def test_time_laws_have_the_papers_statistics() -> None:
    u = (torch.arange(200_000, dtype=DOUBLE) + 0.5) / 200_000
    both, tilted = make_time_law("ushape:4"), make_time_law("exponential")
    t = both.sample(u)
    assert float(t.mean()) == pytest.approx(0.5, abs=1e-6)
    assert float(t.var()) == pytest.approx(0.11567, abs=5e-6)
    assert float((t < 0.1).double().mean()) == pytest.approx(0.1725, abs=5e-5)
    end, middle = both.density(torch.tensor([0.0, 0.5], dtype=DOUBLE)).tolist()
    assert end / middle == pytest.approx(3.762, abs=5e-4)
    # ten to the power of 1 - t: ten times as dense at the noise as at the data
    start, last = tilted.density(torch.tensor([0.0, 1.0], dtype=DOUBLE)).tolist()
    assert start / last == pytest.approx(10.0)
    assert float(tilted.sample(u).mean()) == pytest.approx(0.3232, abs=5e-5)


def test_the_sigmoid_grid_is_its_formula_symmetric_and_uniform_in_the_limit() -> None:
    kappa, u = 5.0, np.arange(11) / 10
    g = 1 / (1 + np.exp(-kappa * (u - 0.5)))
    times = np.array(make_grid("sigmoid:5", 10))
    np.testing.assert_allclose(times, (g - g[0]) / (g[-1] - g[0]), atol=1e-15)
    np.testing.assert_allclose(times + times[::-1], 1.0, atol=1e-15)
    gaps = np.diff(times)
    assert np.all(np.diff(gaps[:5]) > 0), "denser towards the ends"
    np.testing.assert_allclose(make_grid("sigmoid:1e-4", 10), make_grid("uniform", 10), atol=1e-9)
    with pytest.raises(UserError, match="'sigmoid' needs a positive value"):
        make_grid("sigmoid:0", 4)
    with pytest.raises(UserError, match="squeezes times together"):
        make_grid("sigmoid:400", 50)


# --- a denoiser as a velocity ----------------------------------------------------------------------------------------


class Raw(nn.Module):
    """Some network F(x, c_noise)."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=DOUBLE))

    def forward(self, x: Tensor, c: Tensor, shift: float = 0.0) -> Tensor:
        return self.gain * torch.sin(2 * x + c[:, None] + shift) * x.roll(1, -1)


def edm(network: nn.Module, y: Tensor, sigma: Tensor, s: float) -> Tensor:
    """D(y, sigma), as in table 1 of arXiv:2206.00364."""
    sigma_ = sigma[:, None]
    total = sigma_**2 + s**2
    raw = network(y / total.sqrt(), sigma.log() / 4)
    return s**2 / total * y + sigma_ * s / total.sqrt() * raw


@pytest.mark.parametrize("s", [0.5, 1.3])
def test_the_velocity_of_a_denoiser_is_the_one_its_definition_gives(s: float) -> None:
    x, t, network = noise(200, 3), torch.linspace(0.01, 0.99, 200, dtype=DOUBLE), Raw()
    # x_t = t y with noise level (1 - t) / t, and v = (D - x_t) / (1 - t)
    defined = (edm(network, x / t[:, None], (1 - t) / t, s) - x) / (1 - t[:, None])
    torch.testing.assert_close(DenoiserVelocity(network, s)(x, t), defined, rtol=1e-12, atol=1e-12)


def test_the_velocity_of_a_denoiser_is_regular_at_both_ends() -> None:
    x, network, s = noise(5, 3), Raw(), 0.5
    v = DenoiserVelocity(network, s)
    largest = x.new_full((5,), math.log((1 - 1e-5) / 1e-5) / 4)
    torch.testing.assert_close(v(x, x.new_zeros(5)), -x + s * network(x, largest))
    torch.testing.assert_close(v(x, x.new_ones(5)), x + network(x / s, -largest))
    assert v(x.float(), torch.zeros(5)).dtype == torch.float32
    torch.testing.assert_close(v(x, x.new_ones(5), shift=0.3), x + network(x / s, -largest, shift=0.3))


def test_a_denoiser_without_a_network_is_the_gaussian_flow() -> None:
    x, t = noise(50, 2), torch.linspace(0, 1, 50, dtype=DOUBLE)
    exact = fs.closed_form.gaussian(torch.zeros(2, dtype=DOUBLE), torch.full((2,), 0.7, dtype=DOUBLE))
    torch.testing.assert_close(DenoiserVelocity(Raw(0.0), 0.7)(x, t), exact.velocity(x, t), rtol=1e-12, atol=1e-12)


def test_denoiser_to_velocity_and_back() -> None:
    y, sigma, network = noise(60, 3), torch.logspace(-3, 1.9, 60, dtype=DOUBLE), Raw()
    back = denoise(DenoiserVelocity(network, 0.5), y, sigma)
    torch.testing.assert_close(back, edm(network, y, sigma, 0.5), rtol=1e-11, atol=1e-12)
    # the posterior mean of a Gaussian
    exact = fs.closed_form.gaussian(torch.zeros(3, dtype=DOUBLE), torch.full((3,), 0.7, dtype=DOUBLE))
    mean = y * 0.49 / (0.49 + sigma[:, None] ** 2)
    torch.testing.assert_close(denoise(exact.velocity, y, sigma), mean, rtol=1e-10, atol=1e-12)


def test_a_generator_samples_saves_and_loads_a_denoiser(tmp_path: Path) -> None:
    model = fs.Generator(DenoiserVelocity(Raw(0.0), 0.7), shape=(2,))
    x = model.sample(4000, solver="heun", steps=20, seed=1)
    assert x.std().item() == pytest.approx(0.7, rel=0.02)
    model.save(tmp_path / "m")
    again = fs.load(tmp_path / "m", module=DenoiserVelocity(Raw(5.0), 0.7))
    torch.testing.assert_close(again.sample(10, steps=3), model.sample(10, steps=3))
    for wrong in ({"sigma_data": 0.0}, {"sigma_data": 1.0, "clip": 0.5}):
        with pytest.raises(UserError, match=r"must be"):
            DenoiserVelocity(Raw(), **wrong)


# --- anchored steps --------------------------------------------------------------------------------------------------


class Field(nn.Module):
    def __init__(self, velocity: Any) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.velocity(x, t)


def test_anchored_steps_are_eulers_where_the_flow_is_straight() -> None:
    v, x0 = fs.closed_form.coupled_gaussian(1.5, 0.4, 1.0).velocity, noise(64, 1)
    for grid in ("uniform", "sigmoid:6"):
        for steps in (1, 2, 3, 7):
            anchored = fs.solve(v, x0, solver="anchored", steps=steps, grid=grid)
            assert anchored.nfe == steps
            torch.testing.assert_close(anchored.x, fs.solve(v, x0, steps=steps, grid=grid).x, rtol=0, atol=1e-6)


def test_anchored_steps_of_a_curved_flow_have_the_stated_spread_and_do_not_converge() -> None:
    v, one = fs.closed_form.coupled_gaussian(0.0, 0.7, 0.0).velocity, torch.ones(1, 1, dtype=DOUBLE)
    found = [abs(float(fs.solve(v, one, solver="anchored", steps=k).x)) for k in (1, 2, 3, 4, 8)]
    np.testing.assert_allclose(found, [0.0, 0.329, 0.476, 0.581, 0.858], atol=5e-4)
    euler = [abs(float(fs.solve(v, one, steps=k).x)) for k in (1, 2, 3, 4, 8)]
    np.testing.assert_allclose(euler, [0.0, 0.329, 0.439, 0.497, 0.592], atol=5e-4)
    assert float(fs.solve(v, one, solver="anchored", steps=64).x) > 2


def test_the_anchored_loop_is_its_formula() -> None:
    def v(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x + t[:, None]) - x

    x0, grid = noise(6, 2), (0.0, 0.2, 0.5, 0.9)
    x = x0
    for t, s in itertools.pairwise(grid):
        x = (1 - s) * x0 + s * (x + (1 - t) * v(x, x0.new_full((6,), t)))
    found = fs.solve(v, x0, solver="anchored", grid=grid, trajectory=True)
    torch.testing.assert_close(found.x, x, rtol=1e-13, atol=1e-13)
    a, b = plan("anchored", grid, None).table.dense
    np.testing.assert_allclose(a, 1.0, atol=1e-15)
    np.testing.assert_allclose(b.sum(1), grid, atol=1e-15)  # a constant field is solved exactly


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"grid": "0.2,1"}, "its grid must start at 0, not at 0.2"),
        ({"steps": 3, "path": "cosine"}, "for the linear path only.*this flow is on Cosine"),
        ({"solver": "anchored:1", "steps": 2}, "takes no value"),
    ],
)
def test_anchored_steps_are_refused_where_they_mean_nothing(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fs.solve(lambda x, t: x, noise(3, 1), **{"solver": "anchored", **how})
    with pytest.raises(UserError, match="not at 1"):
        fs.invert(lambda x, t: x, noise(3, 1), solver="anchored", steps=3)


def test_a_generator_takes_anchored_steps_for_deterministic_pairs_only() -> None:
    curved = Facts(independent=True, deterministic=False)
    transport = Facts(independent=False, deterministic=False)
    straight = Facts(independent=False, deterministic=True)
    for coupling in (curved, transport):
        module = Field(fs.closed_form.coupled_gaussian(0.0, 0.7, 0.0).velocity)
        model = fs.Generator(module, config=Config(shape=(1,), coupling=coupling))
        with pytest.raises(UserError, match=r"for straight trajectories.*\.329.*Take 'euler'"):
            model.sample(8, solver="anchored", steps=3)
    reflowed = fs.Generator(
        Field(fs.closed_form.coupled_gaussian(0.0, 0.7, 1.0).velocity), config=Config(shape=(1,), coupling=straight)
    )
    x = reflowed.sample(8, solver="anchored", steps=3)
    torch.testing.assert_close(x, reflowed.sample(8, steps=1))


def test_nobody_picks_anchored_steps_or_fresh_noise_by_himself() -> None:
    names = {name for name, _, _ in candidates(4)}
    assert {"euler", "heun", "unipc2"} <= names
    assert not names & {"anchored", "dpm++sde", "sde"}
    with pytest.raises(ValueError, match="follows straight flows only"):
        ReflowOptions(method="reflow", teacher="t", solver="anchored")


# --- distances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.03, 0.5])
def test_the_gradient_of_the_pseudo_huber_distance_is_bounded(share: float) -> None:
    x, y = (noise(20, 2, 3) * torch.logspace(-4, 3, 20, dtype=DOUBLE)[:, None, None]).requires_grad_(), noise(20, 2, 3)
    (gradient,) = torch.autograd.grad(pseudo_huber_rows(x, y, share).sum(), x)
    e = (x - y).detach()
    length = (e.square().sum((1, 2), keepdim=True) + share**2 * 6).sqrt()
    torch.testing.assert_close(gradient, e / (6 * length), rtol=1e-12, atol=1e-15)
    assert float(gradient.flatten(1).norm(dim=1).max()) < 1 / 6
    torch.testing.assert_close(find_distance(f"huber:{share}")(x, y), pseudo_huber_rows(x, y, share).mean())


def matrix(height: int, width: int, strength: float) -> Tensor:
    """The high-pass filter of one channel as a matrix."""
    unit = torch.eye(height * width, dtype=DOUBLE).reshape(-1, 1, height, width)
    return high_pass(unit, strength).reshape(len(unit), -1)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (8, 8), (7, 4)])
@pytest.mark.parametrize("strength", [0.5, 10.0])
def test_the_high_pass_filter_is_linear_and_invertible(height: int, width: int, strength: float) -> None:
    phi = matrix(height, width, strength)
    torch.testing.assert_close(phi, phi.T)
    # the blur along a side of n has the eigenvalues cos(pi k / 2n)^2
    down, across = (torch.cos(math.pi * torch.arange(n, dtype=DOUBLE) / (2 * n)) ** 2 for n in (height, width))
    expected = 1 + strength * (1 - (down[:, None] * across[None]).flatten())
    torch.testing.assert_close(torch.linalg.eigvalsh(phi), expected.sort().values, rtol=1e-12, atol=1e-12)
    assert float(expected.min()) >= 1 - 1e-12
    assert float(expected.max()) < 1 + strength
    x, y = noise(2, 3, height, width), noise(2, 3, height, width, seed=1)
    torch.testing.assert_close(
        high_pass(2 * x - y, strength), 2 * high_pass(x, strength) - high_pass(y, strength), rtol=1e-12, atol=1e-12
    )
    each = torch.stack([phi @ x[0, channel].flatten() for channel in range(3)]).reshape(3, height, width)
    torch.testing.assert_close(high_pass(x, strength)[0], each, rtol=1e-12, atol=1e-12)


def test_inside_the_image_the_blur_is_the_gaussian_kernel_and_flat_images_stay() -> None:
    unit = torch.zeros(1, 1, 7, 7, dtype=DOUBLE)
    unit[0, 0, 3, 3] = 1.0
    blur = unit - (high_pass(unit, 1.0) - unit)
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=DOUBLE) / 16
    torch.testing.assert_close(blur[0, 0, 2:5, 2:5], kernel)
    flat = torch.full((1, 2, 5, 6), 0.3, dtype=DOUBLE)
    torch.testing.assert_close(high_pass(flat), flat)


def trained(distance: Distance) -> tuple[Tensor, Tensor]:
    """A linear model v = A x_t + b of 4x4 images at one time, trained on fixed pairs."""
    x0, other = noise(1000, 1, 4, 4), noise(1000, 1, 4, 4, seed=1)
    x1 = 0.5 + 0.4 * (0.6 * x0 + 0.8 * other.roll(1, -1))  # half-dependent pairs: many targets for every state
    x_t = 0.4 * x1 + 0.6 * x0
    a, b = torch.zeros(16, 16, dtype=DOUBLE, requires_grad=True), torch.zeros(16, dtype=DOUBLE, requires_grad=True)
    optimiser = torch.optim.LBFGS([a, b], max_iter=60, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = distance((x_t.flatten(1) @ a.T + b).reshape(x_t.shape), x1 - x0)
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    return a.detach(), b.detach()


def test_a_linear_filter_leaves_the_trained_optimum_where_it_was() -> None:
    plain, filtered = trained(find_distance("l2")), trained(find_distance("highpass:10"))
    for one, other in zip(plain, filtered, strict=True):
        assert float((one - other).norm() / one.norm()) < 0.01
    bent = trained(lambda x, y: find_distance("highpass:10")(x.tanh(), y.tanh()))
    assert float((plain[0] - bent[0]).norm() / plain[0].norm()) > 0.03, "one that is not linear moves it"


class Perturbed(nn.Module):
    """``v + epsilon psi``, ``epsilon`` the only parameter."""

    def __init__(self, velocity: Any) -> None:
        super().__init__()
        self.velocity = velocity
        self.epsilon = nn.Parameter(torch.zeros((), dtype=DOUBLE))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.velocity(x, t) + self.epsilon * torch.sin(2 * x + t[:, None, None, None])


def score(loss: str | Loss) -> float:
    """z-score of the loss's derivative at the exact velocity of independent pairs of images."""
    std = torch.linspace(0.3, 2.0, 16, dtype=DOUBLE).reshape(1, 4, 4)
    target = fs.closed_form.gaussian(torch.full((1, 4, 4), 0.5, dtype=DOUBLE), std)
    student = Perturbed(target.velocity)
    objective = VelocityRegression(student, Linear(), make_time_law("exponential"), loss)
    gradients = []
    for block in range(30):
        generator = generator_for("stationary image", block)
        x1 = target.sample(500, generator, dtype=DOUBLE)
        batch = Independent(GaussianSource((1, 4, 4))).pair(x1, {}, generator)
        value = loss_of(objective, "student", batch, Draws(generator, 500))["loss"]
        gradients.append(torch.autograd.grad(value, student.epsilon)[0].item())
    return float(np.mean(gradients) / (np.std(gradients, ddof=1) / math.sqrt(len(gradients))))


def test_the_exact_velocity_is_a_stationary_point_of_the_high_passed_loss() -> None:
    assert abs(score("highpass")) < 4
    assert abs(score("highpass:2")) < 4


# --- weights ---------------------------------------------------------------------------------------------------------


def residual(v: Tensor, target: Tensor, x_t: Tensor, t: Tensor) -> Residual:
    return Residual(v, target, x_t, x_t + (1 - t).reshape(-1, *[1] * (v.ndim - 1)) * target, t)


def test_endpoint_errors_are_those_of_the_predicted_data() -> None:
    v, target, x_t, t = (
        noise(9, 1, 3, 4),
        noise(9, 1, 3, 4, seed=1),
        noise(9, 1, 3, 4, seed=2),
        torch.linspace(0, 1, 9, dtype=DOUBLE),
    )
    at = residual(v, target, x_t, t)
    guess = Linear().velocity_to_data(v, x_t, t)
    torch.testing.assert_close(endpoint_errors(at, identity), squared_rows(guess, at.x1))
    torch.testing.assert_close(endpoint_errors(at, high_pass), squared_rows(high_pass(guess), high_pass(at.x1)))


@pytest.mark.parametrize("operator", [identity, high_pass])
def test_the_gradient_of_the_normalised_loss_is_that_of_the_logarithm(operator: Any) -> None:
    target, x_t, t = noise(6, 1, 3, 3, seed=1), noise(6, 1, 3, 3, seed=2), torch.linspace(0, 0.95, 6, dtype=DOUBLE)
    v = noise(6, 1, 3, 3).requires_grad_()
    loss = Normalised(0.01, operator)(residual(v, target, x_t, t))["loss"]
    (gradient,) = torch.autograd.grad(loss, v)
    logarithm = lambda w: float((endpoint_errors(residual(w, target, x_t, t), operator) + 0.01).log().mean())  # noqa: E731
    for seed in range(5):
        step = 1e-5 * noise(6, 1, 3, 3, seed=10 + seed)
        difference = (logarithm(v.detach() + step) - logarithm(v.detach() - step)) / 2
        assert float((gradient * step).sum()) == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize(("c", "minimum"), [(1e-3, 0.00), (0.1, 0.02), (10.0, 0.19)])
def test_with_two_targets_the_normalised_loss_is_least_beside_their_mean(c: float, minimum: float) -> None:
    """Why it is refused for independent pairs: the mean of 0 (probability .8) and 1 is .2."""
    target = torch.tensor([0.0] * 8 + [1.0] * 2, dtype=DOUBLE)[:, None]
    guesses = torch.linspace(0, 0.4, 400_001, dtype=DOUBLE)
    least = float(guesses[((guesses - target) ** 2 + c).log().mean(0).argmin()])
    assert least == pytest.approx(minimum, abs=0.005)
    m = torch.tensor(least, dtype=DOUBLE, requires_grad=True)
    t = torch.zeros(10, dtype=DOUBLE)
    loss = Normalised(c)(residual(m.expand(10, 1), target, torch.zeros(10, 1, dtype=DOUBLE), t))["loss"]
    assert abs(torch.autograd.grad(loss, m)[0].item()) < 1e-3


def test_the_constant_is_a_thousandth_of_the_median_error() -> None:
    pair = Pair(noise(20_000, 2), noise(20_000, 2, seed=1))
    t = torch.rand(20_000, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    v = lambda x, t: pair.x1 - pair.x0 + 0.3  # noqa: E731
    # the error is (1 - t)^2 .09, and the median of (1 - t)^2 is a quarter
    assert normaliser(v, pair, t, identity) == pytest.approx(1e-3 * 0.09 / 4, rel=0.03)
    assert normaliser(lambda x, t: pair.x1 - pair.x0, pair, t, identity) == MIN_NORMALISER


def test_the_perceptual_loss_weighs_its_terms_by_time() -> None:
    t = torch.tensor([0.0, 0.25, 1.0], dtype=DOUBLE)
    v, target, x_t = noise(3, 4), noise(3, 4, seed=1), noise(3, 4, seed=2)
    near, far = pseudo_huber_rows(v, target), (1 - t) ** 2 * squared_rows(v, target)

    def value(row: int, **options: Any) -> float:
        at = residual(v, target, x_t, t)
        one = Residual(*(part[row : row + 1] for part in at))
        return float(Perceptual(squared_rows, **options)(one)["loss"])

    for row in range(3):
        assert value(row) == pytest.approx(float(t[row] * near[row] + far[row]))
        assert value(row, floor=0.4) == pytest.approx(float(t[row].clamp_min(0.4) * near[row] + far[row]))
        divided = far[row] / (1 - t[row]).clamp_min(1e-5)
        assert value(row, divided=True) == pytest.approx(float(t[row] * near[row] + divided))
    assert value(0) == pytest.approx(float(squared_rows(x_t + v, x_t + target)[0]))  # the weights at t = 0: 0 and 1
    assert value(2) == pytest.approx(float(near[2]))  # at t = 1 the endpoint is the state


def test_gradients_go_through_the_features() -> None:
    v, t = noise(4, 3).requires_grad_(), torch.full((4,), 0.5, dtype=DOUBLE)
    at = residual(v, noise(4, 3, seed=1), noise(4, 3, seed=2), t)
    loss = Perceptual(lambda x, y: squared_rows(torch.sin(x), torch.sin(y)))(at)
    (gradient,) = torch.autograd.grad(loss["loss"], v)
    assert float(gradient.abs().min()) > 0
    assert loss["loss"].item() == pytest.approx(loss["features"].item() + loss["huber"].item())


LOSSES: dict[str, str | Loss] = {
    "l2": "l2",
    "huber": "huber:0.1",
    "highpass": "highpass:3",
    "normalised": Normalised(1e-3),
    "normalised highpass": Normalised(1e-3, high_pass),
    "perceptual": Perceptual(squared_rows, floor=0.1, divided=True),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("time", ["ushape:4", "exponential"])
def test_exact_deterministic_pairs_are_the_minimum_of_every_loss(loss: str, time: str) -> None:
    pairs = fs.closed_form.coupled_gaussian(0.5, 0.4, 1.0, shape=(1, 4, 4))
    x0, x1 = pairs.sample_pairs(256, generator_for("pairs"), dtype=DOUBLE)
    student = Perturbed(pairs.velocity)
    objective = VelocityRegression(student, Linear(), make_time_law(time), LOSSES[loss])
    terms = loss_of(objective, "student", Pair(x0, x1), Draws(generator_for("t"), 256))
    assert terms["loss"].item() < 1e-12
    assert abs(torch.autograd.grad(terms["loss"], student.epsilon)[0].item()) < 1e-9
    with torch.no_grad():
        student.epsilon.fill_(0.1)
    assert loss_of(objective, "student", Pair(x0, x1), Draws(generator_for("t"), 256))["loss"].item() > 1e-4


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "l3"}, "unknown distance 'l3': did you mean"),
        ({"loss": "huber:-1"}, "not a positive number"),
        ({"loss": "l1:3"}, "takes no value"),
        ({"loss": "perceptual"}, "none are named: add 'features"),
        ({"features": "laplacian"}, "belong to 'loss: perceptual'"),
        ({"weight": "divided"}, "'weight: divided' is of the features' distance"),
        ({"weight": "normalised", "loss": "huber"}, "of a squared error: set 'loss: l2' or 'highpass', not 'huber'"),
        ({"weight": "normalised", "real": "independent"}, "noise does not determine its endpoint"),
        ({"weight": "normalised", "real": "anneal"}, "noise does not determine its endpoint"),
        ({"weight": "normalised", "real": "anneal", "rounds": 2, "mix": [0.5, 1.0]}, "does not determine"),
        ({"loss": "perceptual", "features": "f", "real": "independent"}, "'loss: perceptual' has its minimum"),
        ({"weight": "normalised", "mix": [2.0], "real": "independent"}, "mix must hold probabilities"),
        ({"dropout": 1.0}, "dropout"),
        ({"solver": "anchored"}, "follows straight flows only"),
    ],
)
def test_options_that_contradict_each_other_or_the_pairs_are_refused(options: dict[str, Any], message: str) -> None:
    stages = {"t": "flow_matching", "straight": {"method": "reflow", "teacher": "t", **options}}
    with pytest.raises(UserError, match=message):
        make_recipe({"data": "moons", "stages": stages}, "test")


def test_options_that_fit_are_taken() -> None:
    common = {"method": "reflow", "teacher": "t"}
    ReflowOptions(**common, weight="normalised", real="independent", mix=1.0)
    ReflowOptions(**common, weight="normalised", loss="highpass:5", time="exponential", dropout=0.03)
    ReflowOptions(**common, loss="perceptual:0.05", features="f", weight="divided", time="ushape:4")


def test_high_pass_is_refused_for_vectors_before_anything_is_trained(tmp_path: Path) -> None:
    stages = {"t": "flow_matching", "straight": {"method": "reflow", "teacher": "t", "loss": "highpass"}}
    recipe = make_recipe({"data": "moons", "stages": stages}, "test")
    with pytest.raises(UserError, match=r"stage 'straight'.*highpass' filters images .*shape \(2,\)"):
        run_recipe(recipe, tmp_path / "run", LocalWorld(quiet=True))
    assert not (tmp_path / "run").exists()


def test_a_run_with_the_options_starts_from_the_teacher_with_its_own_dropout(tmp_path: Path) -> None:
    common = {
        "method": "reflow", "teacher": "teacher", "mix": 1, "pairs": 300, "nfe": 16, "tolerance": 0.5,
        "samples": 512, "weight": "normalised",
    }  # fmt: skip
    stages = {
        "teacher": {"method": "flow_matching", "samples": 1024},
        "still": {**common, "lr": 1e-9, "dropout": 0.1, "time": "exponential"},
        "moving": {**common, "loss": "highpass:5", "time": "ushape:4", "rounds": 2},
    }
    recipe = make_recipe({"data": "digits", "network": {"name": "mlp", "preset": "tiny"}, "stages": stages}, "test")
    run_recipe(recipe, tmp_path / "run", LocalWorld(quiet=True))
    teacher, still, moving = (load(tmp_path / "run" / name) for name in stages)
    assert (teacher.config.network or {})["dropout"] == 0.0
    assert (still.config.network or {})["dropout"] == 0.1
    assert (moving.config.network or {})["dropout"] == 0.0
    before, after = teacher.module.state_dict(), still.module.state_dict()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert not torch.allclose(before["output.weight"], moving.module.state_dict()["output.weight"], atol=1e-4)
    lines = (tmp_path / "run" / "stats.jsonl").read_text().splitlines()
    assert any('"endpoint"' in line for line in lines)
    still.sample(4, solver="anchored", steps=2)
    with pytest.raises(UserError, match="for straight trajectories"):
        teacher.sample(4, solver="anchored", steps=2)


def test_a_perceptual_run_looks_through_the_features_of_a_stage(tmp_path: Path) -> None:
    stages = {
        "teacher": {"method": "flow_matching", "samples": 1024},
        "seen": {"method": "features", "samples": 512},
        "straight": {
            "method": "reflow", "teacher": "teacher", "mix": 1, "pairs": 300, "nfe": 16, "tolerance": 0.5,
            "samples": 512, "loss": "perceptual:0.1", "features": "seen", "time": "ushape:4",
        },
    }  # fmt: skip
    recipe = make_recipe({"data": "digits", "network": {"name": "mlp", "preset": "tiny"}, "stages": stages}, "test")
    run_recipe(recipe, tmp_path / "run", LocalWorld(quiet=True))
    features = find_features(tmp_path / "run" / "seen", (1, 8, 8))
    assert load(tmp_path / "run" / "straight").config.features == features.digest
    lines = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    terms = next(line["terms"] for line in lines if line["stage"] == "straight")
    assert terms["loss"] == pytest.approx(terms["huber"] + terms["features"], rel=1e-5)
    assert min(terms.values()) > 0
    x, y = noise(5, 1, 8, 8).float().requires_grad_(), noise(5, 1, 8, 8, seed=1).float()
    t = torch.zeros(5)
    loss = Perceptual(features)(Residual(x, y, torch.zeros_like(x), y, t))["loss"]  # at t = 0 the features alone
    torch.testing.assert_close(loss, features(x, y).mean())
    assert float(torch.autograd.grad(loss, x)[0].abs().sum()) > 0
