"""Euler's endpoint error and its origin along t, against closed forms and actual Euler runs."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.diagnostics.diagnose import Diagnosis
from fewstep.diagnostics.sensitivity import interpolated, jump_squares, root_mean_square, with_jumps
from fewstep.errors import UserError
from fewstep.flow import closed_form


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def standardised(num: int, *shape: int) -> Tensor:
    z = noise(num, *shape)
    z = z - z.mean(0)
    return z / z.square().mean(0).sqrt()


def gaussian(*stds: float) -> closed_form.Gaussian:
    return closed_form.gaussian(torch.full((len(stds),), 0.4), torch.tensor(stds, dtype=torch.float64))


def ring(std: float) -> closed_form.Mixture:
    angles = torch.arange(8) * math.pi / 4
    means = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    return closed_form.mixture(torch.ones(8), means, torch.full((8,), std))


def euler_error(v: nn.Module, x0: Tensor, steps: int, *, trimmed: bool = True) -> float:
    """Of an actual run, against a fine one."""
    exact = fs.solve(v, x0, solver="rk4", steps=128).x
    norms = (fs.solve(v, x0, steps=steps).x - exact).flatten(1).double().norm(dim=1).numpy()
    return root_mean_square(norms, trimmed=trimmed)


def unit_of_gaussian(s: float) -> float:
    """e(1) = Φ(1, t) x''/2 integrated: s^3/2 ∫ q^-2 dt, per dimension and unit of noise."""
    t = np.linspace(0, 1, 400_001)
    return float(s**3 / 2 * np.trapezoid(1 / ((1 - t) ** 2 + (s * t) ** 2) ** 2, t))


@pytest.mark.parametrize("s", [2.0, 0.5, 0.1, 0.02])
def test_the_unit_error_of_a_gaussian_flow_is_its_integral(s: float) -> None:
    d = fs.diagnose(gaussian(s, s).velocity, standardised(64, 2), stiffness=False)
    assert d.unit_error == pytest.approx(math.sqrt(2) * unit_of_gaussian(s), rel=3e-3)


def test_the_unit_error_is_the_limit_of_n_times_the_error() -> None:
    flow, x0 = gaussian(0.3, 1.2), noise(64, 2)
    d = fs.diagnose(flow.velocity, x0, nodes=32, stiffness=False)
    exact = flow.flow_map(x0, torch.zeros(64), torch.ones(64))
    gaps = []
    for steps in (64, 128, 256):
        error = float((fs.solve(flow.velocity, x0, steps=steps).x - exact).square().sum(1).mean().sqrt())
        gaps.append(abs(steps * error / d.unit_error - 1))
    assert gaps[-1] < 5e-3
    assert [a / b for a, b in pairwise(gaps)] == pytest.approx([2, 2], abs=0.3)


@pytest.mark.parametrize("flow", [ring(0.3), ring(0.05), gaussian(0.03, 0.03)], ids=["wide", "narrow", "one"])
def test_the_predicted_error_is_that_of_runs_from_other_noises(
    flow: closed_form.Mixture | closed_form.Gaussian,
) -> None:
    d = fs.diagnose(flow.velocity, noise(300, 2, seed=10), nodes=32, stiffness=False)
    other = noise(600, 2, seed=20)
    for steps in (8, 16, 24, 32, 64):
        assert 1 / 1.15 < d.predicted_error(steps) / euler_error(flow.velocity, other, steps) < 1.15


def test_first_order_alone_is_right_for_wide_modes_and_too_large_for_narrow_ones() -> None:
    for std, low, high in ((0.3, 1.0, 1.06), (0.03, 1.2, 1.5)):
        d = fs.diagnose(ring(std).velocity, noise(60, 2), nodes=32, stiffness=False)
        measured = d.euler_error_trimmed[list(d.euler_steps).index(16)]
        assert low < d.unit_error_trimmed / 16 / measured < high
        assert (d.euler_steps.max() > 16) == (std < 0.1)  # runs go on until first order holds


def pair(std: float) -> closed_form.Mixture:
    return closed_form.mixture(torch.tensor([0.4, 0.6]), torch.tensor([[-1.2], [0.9]]), torch.full((2,), std))


def even_noise(num: int) -> Tensor:
    """Quantiles of N(0, 1): as many lie next to a boundary between modes as should."""
    return torch.special.ndtri((torch.arange(num, dtype=torch.float64) + 0.5) / num)[:, None]


@pytest.mark.parametrize("std", [0.3, 0.1, 0.03])
def test_the_error_over_all_samples_counts_those_that_end_in_another_mode(std: float) -> None:
    """Their share falls as 1/N: N RMS keeps growing, and first order alone is several times too small."""
    flow, z = pair(std), even_noise(10_000)
    d = fs.diagnose(flow.velocity, even_noise(1000), nodes=32, stiffness=False)
    exact = flow.flow_map(z, torch.zeros(len(z)), torch.ones(len(z)))
    share, everyone = [], 0.0
    for steps in (8, 16, 64, 128):
        errors = (fs.solve(flow.velocity, z, steps=steps).x - exact).abs()[:, 0].numpy()
        everyone = root_mean_square(errors, trimmed=False)
        assert 1 / 1.3 < d.predicted_error(steps, trimmed=False) / everyone < 1.3
        assert d.predicted_error(steps) == pytest.approx(root_mean_square(errors, trimmed=True), rel=0.12)
        share.append(steps * float((errors > 1).mean()))
    if std < 0.3:
        assert share[2] == pytest.approx(share[1], rel=0.1)
        assert everyone > 4 * d.unit_error / 128


def test_without_jumps_the_error_over_all_samples_is_first_order() -> None:
    """Boundaries between equal modes on a circle are fixed by symmetry: nobody changes sides from 16 steps on."""
    std = 0.1
    d = fs.diagnose(ring(std).velocity, noise(600, 2, seed=10), nodes=32, stiffness=False)
    other = noise(1000, 2, seed=20)
    for steps in (16, 64):
        true = euler_error(ring(std).velocity, other, steps, trimmed=False)
        assert d.predicted_error(steps, trimmed=False) == pytest.approx(true, rel=0.12)
    assert d.euler_jumps[-1] < 1e-3 * d.euler_error[-1] ** 2


def test_too_few_samples_to_count_jumps_are_refused() -> None:
    d = fs.diagnose(pair(0.1).velocity, noise(100, 1), nodes=16, stiffness=False)
    assert d.predicted_error(16) > 0
    with pytest.raises(UserError, match=r"derivatives of 100 samples are too few.*at least 500"):
        d.predicted_error(16, trimmed=False)


def test_the_part_of_jumps_is_extrapolated_by_its_own_law() -> None:
    """E^2 = (a / N)^2 + b / N is met exactly; the runs with fewer than 8 steps are given back as they are."""
    steps = np.array([1, 2, 4, 8, 16])
    jumps = 0.3 / steps
    known = np.sqrt((0.5 / steps) ** 2 + jumps)
    for number in (8, 11, 64, 1000):
        assert with_jumps(number, 0.5, steps, known, jumps) == pytest.approx(
            math.hypot(0.5 / number, (0.3 / number) ** 0.5)
        )
    assert with_jumps(4, 0.5, steps, known, jumps) == pytest.approx(known[2])
    norms = np.array([[1.0, 0.5], [5.0, 0.2], [0.4, 0.01]])
    np.testing.assert_allclose(jump_squares(norms, np.array([1.0, 1.0, 0.1]), np.array([1, 2])), [(25 + 0.16) / 3, 0])


def test_the_plain_sum_of_local_errors_is_no_prediction() -> None:
    """Later contraction takes most of them back: the sum is several times the error."""
    d = fs.diagnose(ring(0.08).velocity, noise(100, 2), nodes=32, stiffness=False)
    plain = float(np.trapezoid(d.local_error, d.times))
    assert plain / 64 > 3 * euler_error(ring(0.08).velocity, noise(100, 2), 64)
    weighted = float(np.trapezoid(d.weighted_error, d.times))
    assert weighted < plain / 2


def test_a_trained_network_is_predicted() -> None:
    """A network with forward, double reverse and plain derivatives, on images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(17, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 16)).double()

    def v(x: Tensor, t: Tensor) -> Tensor:
        return 4 * net(torch.cat([x.flatten(1), 2 * t[:, None]], 1)).reshape(x.shape)

    d = fs.diagnose(v, noise(128, 1, 4, 4), nodes=32, stiffness=False)
    assert d.unit_error / 64 == pytest.approx(euler_error(v, noise(128, 1, 4, 4), 64, trimmed=False), rel=0.05)
    for steps in (8, 16, 32, 64):
        assert d.predicted_error(steps) == pytest.approx(euler_error(v, noise(500, 1, 4, 4, seed=1), steps), rel=0.08)


@pytest.mark.parametrize("s", [2.0, 0.5, 0.1])
def test_the_weighted_error_of_a_gaussian_flow_is_its_closed_form(s: float) -> None:
    """Φ(1, t) x'' = s^3 / q^2 per unit of noise; random signs are exact in one dimension."""
    d = fs.diagnose(gaussian(s).velocity, standardised(64, 1), stiffness=False)
    q = (1 - d.times) ** 2 + (s * d.times) ** 2
    np.testing.assert_allclose(d.weighted_error, s**3 / q**2 / 2, rtol=5e-3)


def test_the_weighted_error_of_a_shear_needs_both_directions() -> None:
    """x' = (y, 0) + (0, f(t)): Φ(1, t) = [[1, 1 - t], [0, 1]] carries x'' = (f, f') to (f + (1 - t) f', f')."""

    def v(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([x[:, 1], 4 * t**3], 1)

    d = fs.diagnose(v, noise(4000, 2), nodes=16, stiffness=False)
    t = d.times
    exact = np.sqrt((4 * t**3 + (1 - t) * 12 * t**2) ** 2 + (12 * t**2) ** 2) / 2
    np.testing.assert_allclose(d.weighted_error, exact, rtol=0.03, atol=1e-9)
    np.testing.assert_allclose(d.local_error, np.sqrt((4 * t**3) ** 2 + (12 * t**2) ** 2) / 2, atol=1e-9)


def test_the_weighted_grid_of_a_gaussian_is_equal_in_angle() -> None:
    """Density sqrt(s^3 / q^2) ~ 1 / q: t_k = sin φ_k / (sin φ_k + s cos φ_k), φ_k = k π / (2 K); and it is better."""
    s, steps = 0.1, 8
    flow, x0 = gaussian(s), standardised(64, 1)
    d = fs.diagnose(flow.velocity, x0, stiffness=False)
    angle = np.arange(steps + 1) * math.pi / 2 / steps
    exact = np.sin(angle) / (np.sin(angle) + s * np.cos(angle))
    np.testing.assert_allclose(d.grid(steps, weighted=True), exact, atol=2e-3)
    x1 = flow.flow_map(x0, torch.zeros(64), torch.ones(64))
    errors = [
        float((fs.solve(flow.velocity, x0, grid=grid).x - x1).square().mean().sqrt()) / s
        for grid in (d.grid(steps, weighted=True), d.grid(steps), np.linspace(0, 1, steps + 1).tolist())
    ]
    assert errors[0] == pytest.approx(0.144, abs=3e-3)
    assert errors[0] < 0.8 * errors[1] < 0.8 * errors[2]


def test_a_network_that_hides_part_of_its_input_from_gradients_has_no_weighted_error() -> None:
    def v(x: Tensor, t: Tensor) -> Tensor:
        return x + 2 * x.detach() + t[:, None]

    d = fs.diagnose(v, noise(32, 2), nodes=16)
    assert d.derivatives == "finite_difference"
    assert d.weighted_error is None
    np.testing.assert_allclose(d.stiffness, 3, rtol=1e-5)


def diagnosis(unit: float, errors: list[float]) -> Diagnosis:
    d = fs.diagnose(lambda x, t: x, noise(2, 1), nodes=8)
    new = {"unit_error_trimmed": unit, "euler_steps": np.array([1, 2, 4]), "euler_error_trimmed": np.array(errors)}
    return Diagnosis(**{**vars(d), **new})


def test_prediction_returns_the_runs_and_tends_to_first_order() -> None:
    d = diagnosis(2.0, [1.0, 0.8, 0.45])
    assert [d.predicted_error(k) for k in (1, 2, 4)] == pytest.approx([1.0, 0.8, 0.45])
    assert d.predicted_error(10_000) * 10_000 == pytest.approx(2.0, rel=1e-3)
    assert 0.45 > d.predicted_error(5) > d.predicted_error(6) > 0.3
    # N error = 2 exp(-c / N) is met exactly
    steps = np.array([1, 2, 4])
    assert interpolated(7, 2.0, steps, 2 * np.exp(-0.3 / steps) / steps) == pytest.approx(2 * math.exp(-0.3 / 7) / 7)
    assert diagnosis(0.0, [0.0, 0.0, 0.0]).predicted_error(3) < 1e-29


def test_a_trimmed_mean_leaves_out_the_largest_twentieth() -> None:
    norms = np.concatenate([np.full(95, 2.0), np.full(5, 1e6)])
    assert root_mean_square(norms, trimmed=True) == 2.0
    assert root_mean_square(norms, trimmed=False) == pytest.approx(1e6 * 0.05**0.5, rel=1e-6)
    assert root_mean_square(np.array([3.0]), trimmed=True) == 3.0
