"""Log-likelihoods, their gradients and their bits per dimension against closed-form densities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diagnostics import jacobian_trace as forms
from fewstep.diagnostics.jacobian_trace import rademacher
from fewstep.diagnostics.likelihood import Likelihood, dequantise, log_likelihood
from fewstep.errors import UserError
from fewstep.flow import closed_form
from fewstep.flow.field import Guided
from fewstep.flow.paths import expand_time

SHAPES = [(3,), (1, 4, 4), (2, 3, 3)]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gaussian(*shape: int) -> closed_form.Gaussian:
    return closed_form.gaussian(noise(*shape, seed=1), 0.4 + noise(*shape, seed=2).abs())


def mixture(*shape: int) -> closed_form.Mixture:
    return closed_form.mixture(torch.tensor([0.3, 0.7]), noise(2, *shape, seed=3), torch.tensor([0.5, 0.8]))


FLOWS: dict[str, Any] = {"gaussian": gaussian, "mixture": mixture}


def data(flow: Any, n: int, seed: int = 5) -> Tensor:
    return flow.sample(n, torch.Generator().manual_seed(seed), torch.float64)


def likelihood(flow: Any, x1: Tensor, **options: Any) -> Likelihood:
    return log_likelihood(flow.velocity, x1, **{"steps": 24, "check": False, **options})


def linear(matrix: Tensor) -> Any:
    """v = A x: log p_1(x) = log N(e^-A x; 0, I) - tr A."""
    return lambda x, t: x @ matrix.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("flow", FLOWS)
def test_exact_divergence_gives_the_closed_form_density(flow: str, shape: tuple[int, ...]) -> None:
    exact = FLOWS[flow](*shape)
    x1 = data(exact, 8)
    found = likelihood(exact, x1, divergence="exact", steps=40)
    torch.testing.assert_close(found.log_prob, exact.log_density(x1), rtol=0, atol=1e-5)
    zero = x1.new_zeros(len(x1))
    torch.testing.assert_close(found.x0, exact.flow_map(x1, zero + 1, zero), rtol=0, atol=1e-5)
    assert found.probe_error is None
    assert (found.directions, found.dimensions) == (math.prod(shape), math.prod(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_hutchinson_is_unbiased_and_knows_its_error(shape: tuple[int, ...]) -> None:
    """z = (estimate - truth) / SE over 24 samples with 64 probes has mean square near 1."""
    exact = mixture(*shape)
    x1 = data(exact, 24)
    found = likelihood(exact, x1, divergence="hutchinson", probes=64, steps=24)
    assert found.probe_error is not None
    z = (found.log_prob - exact.log_density(x1)) / found.probe_error
    assert z.abs().max() < 4
    assert 0.5 < float(z.square().mean()) < 1.7
    assert abs(float(z.mean())) < 3 / math.sqrt(24)


@pytest.mark.parametrize("solver", ["heun", "rk4", "ab4", "unipc2"])
def test_any_deterministic_solver_converges_to_the_density_at_its_order(solver: str) -> None:
    exact = mixture(2)
    x1 = data(exact, 16)
    errors = [
        float((likelihood(exact, x1, solver=solver, steps=n).log_prob - exact.log_density(x1)).abs().mean())
        for n in (16, 32)
    ]
    assert errors[1] < errors[0] / 3.2
    assert errors[1] < 5e-3


def test_a_linear_field_by_hand_and_the_variance_of_the_probes() -> None:
    """Var e^T A e = 2 (|A_s|_F^2 - sum_i A_ii^2) for random signs e, and l(0) = -e^T A e."""
    a = 0.5 * noise(4, 4, seed=7)
    x1 = noise(4000, 4)
    exact = log_likelihood(linear(a), x1, steps=12, check=False)
    truth = -0.5 * (x1 @ torch.linalg.matrix_exp(-a).T).square().sum(1) - 2 * math.log(2 * math.pi) - a.trace()
    torch.testing.assert_close(exact.log_prob, truth, rtol=0, atol=2e-4)
    random = log_likelihood(linear(a), x1, steps=12, divergence="hutchinson", check=False)
    symmetric = (a + a.T) / 2
    variance = 2 * (symmetric.square().sum() - a.diag().square().sum())
    estimate = random.log_prob - exact.log_prob
    assert float(estimate.var()) == pytest.approx(float(variance), rel=0.1)
    assert abs(float(estimate.mean())) < 3 * math.sqrt(float(variance) / 4000)


def test_a_field_without_mixing_has_no_probe_error() -> None:
    """Signs square to one, so a diagonal Jacobian is exact with every probe."""
    flow = gaussian(5)
    x1 = data(flow, 6)
    random = likelihood(flow, x1, divergence="hutchinson", probes=3)
    torch.testing.assert_close(random.log_prob, flow.log_density(x1), rtol=0, atol=1e-5)
    assert random.probe_error is not None
    assert float(random.probe_error.max()) < 1e-10


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("flow", FLOWS)
def test_its_gradient_is_the_score(flow: str, shape: tuple[int, ...]) -> None:
    exact = FLOWS[flow](*shape)
    x1 = data(exact, 4).requires_grad_()
    found = likelihood(exact, x1, grad=True, steps=24)
    (score,) = torch.autograd.grad(found.log_prob.sum(), x1)
    torch.testing.assert_close(score, exact.score(x1.detach(), torch.ones(4)), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.log_prob, exact.log_density(x1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mean_gradient_over_probes_is_the_score(shape: tuple[int, ...]) -> None:
    """Copies of one sample, which differ in their probes."""
    exact, count = mixture(*shape), 64
    x1 = data(exact, 1).expand(count, *shape).contiguous().requires_grad_()
    found = likelihood(exact, x1, grad=True, steps=16, divergence="hutchinson", seed=1)
    (scores,) = torch.autograd.grad(found.log_prob.sum(), x1)
    gap = (scores.mean(0) - exact.score(x1.detach()[:1], torch.ones(1))[0]).flatten()
    z = gap / (scores.flatten(1).std(0) / math.sqrt(count))
    assert float(z.abs().max()) < 3


class Trained(nn.Module):
    """The Gaussian flow with its mean and log std as parameters."""

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(mean), nn.Parameter(log_std)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time, s2 = expand_time(t, x), (2 * self.log_std).exp()
        rate = (time * s2 - (1 - time)) / ((1 - time) ** 2 + time**2 * s2)
        return self.mean + rate * (x - time * self.mean)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_its_gradient_reaches_the_parameters(divergence: str) -> None:
    """d log p / d m = (x - m) / s^2 and d log p / d log s = (x - m)^2 / s^2 - 1, summed over samples."""
    net = Trained(noise(3, seed=1), 0.3 * noise(3, seed=2))
    x1 = noise(5, 3)
    found = log_likelihood(net, x1, steps=40, grad=True, divergence=divergence, check=True)
    found.log_prob.sum().backward()
    with torch.no_grad():
        z = (x1 - net.mean) / net.log_std.exp()
        by_mean, by_spread = (z / net.log_std.exp()).sum(0), (z**2 - 1).sum(0)
    torch.testing.assert_close(net.mean.grad, by_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.log_std.grad, by_spread, rtol=1e-5, atol=1e-5)


def test_gradients_are_only_built_when_asked_for_and_need_a_network_that_has_them() -> None:
    net = Trained(noise(3, seed=1), 0.3 * noise(3, seed=2))
    x1 = noise(5, 3).requires_grad_()
    assert not log_likelihood(net, x1, steps=4, check=False).log_prob.requires_grad
    with torch.no_grad():
        assert log_likelihood(net, x1, steps=4, grad=True, check=False).log_prob.requires_grad
    for velocity in (without_gradients, half_detached, lambda x, t: torch.zeros_like(x)):
        with pytest.raises(UserError, match="no_grad"):
            log_likelihood(velocity, x1, steps=4, grad=True)


def half_detached(x: Tensor, t: Tensor) -> Tensor:
    return -x.detach() / 2 - x / 2


def without_gradients(x: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        return -x


@pytest.mark.parametrize(
    ("velocity", "way"),
    [(lambda x, t: -x, "reverse"), (without_gradients, "forward"), (half_detached, "finite_difference")],
)
def test_networks_that_hide_their_derivative_have_the_same_likelihood(velocity: Any, way: str) -> None:
    """x' = -x: log p = log N(e x; 0, I) + D."""
    x1 = noise(5, 3)
    found = log_likelihood(velocity, x1, steps=30)
    truth = torch.distributions.Normal(0.0, 1.0).log_prob(math.e * x1).sum(1) + 3
    torch.testing.assert_close(found.log_prob, truth, rtol=0, atol=1e-4)
    assert found.divergence == f"exact, 3 directions, {way}"


def test_the_density_integrates_to_one_over_a_plane() -> None:
    flow = mixture(2)
    axis = torch.linspace(-6, 6, 41, dtype=torch.float64)
    x1 = torch.cartesian_prod(axis, axis)
    found = likelihood(flow, x1, steps=16)
    assert float(found.log_prob.exp().sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1.0, abs=1e-4)


def test_samples_do_not_depend_on_how_the_batch_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = mixture(1, 4, 4)
    x1 = data(flow, 270)
    options: dict[str, Any] = {"steps": 1, "divergence": "hutchinson", "probes": 2}
    whole = likelihood(flow, x1, **options)
    part = likelihood(flow, x1[250:270], row=250, **options)
    torch.testing.assert_close(part.log_prob, whole.log_prob[250:270], rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(forms, "ROWS", 180)
    small = likelihood(flow, x1, **options)
    torch.testing.assert_close(small.log_prob, whole.log_prob, rtol=1e-12, atol=1e-12)
    assert small.nfe == whole.nfe
    monkeypatch.setattr(forms, "ROWS", 5)  # fewer than the 16 directions of one sample
    exact = likelihood(flow, x1[:3], steps=16)
    torch.testing.assert_close(exact.log_prob, flow.log_density(x1[:3]), rtol=0, atol=1e-3)


def test_probes_are_signs_and_a_function_of_seed_row_and_number() -> None:
    one, two = rademacher(300, 5, 1, seed=3, row=0), rademacher(20, 5, 3, seed=3, row=250)
    assert torch.equal(one[250:270, 0], two[:, 0])
    assert set(two.flatten().tolist()) == {-1, 1}
    assert not torch.equal(two[:, 0], two[:, 1])
    assert not torch.equal(two, rademacher(20, 5, 3, seed=4, row=250))
    many = rademacher(20_000, 4, 1, seed=0, row=0)[:, 0].double()
    covariance = many.T @ many / len(many)
    torch.testing.assert_close(covariance, torch.eye(4, dtype=torch.float64), rtol=0, atol=4 / math.sqrt(20_000))


def test_conditions_travel_with_their_samples() -> None:
    """x' = label - x moves N(0, I) to mean label (1 - 1/e), std 1/e."""
    label = torch.tensor([0.0, 3.0, -2.0, 1.0, 5.0], dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor, label: Tensor, word: str) -> Tensor:
        assert word == "as it is"
        return label[:, None] - x

    x1 = noise(5, 3)
    found = log_likelihood(velocity, x1, cond={"label": label, "word": "as it is"}, steps=20)
    mean, std = label[:, None] * (1 - math.exp(-1)), math.exp(-1)
    truth = torch.distributions.Normal(mean, std).log_prob(x1).sum(1)
    torch.testing.assert_close(found.log_prob, truth, rtol=0, atol=1e-4)


def test_network_calls_are_counted_with_every_direction() -> None:
    seen: list[int] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append(len(x))
        return -x

    found = log_likelihood(velocity, noise(6, 3), steps=5, check=False, divergence="exact")
    assert found.nfe == 5 * 4 * 3
    assert sum(n for n in seen if n == 18) == found.nfe * 6
    guided = Guided(lambda x, t, label: -x if label is None else 0 * x, 3.0)
    cond = {"label": torch.zeros(6)}
    assert log_likelihood(guided, noise(6, 3), cond=cond, steps=5, check=False).nfe == 2 * found.nfe
    assert log_likelihood(velocity, noise(6, 3), steps=5, divergence="hutchinson", probes=2).nfe == 5 * 4 * 2


def test_converged_solves_are_told_from_few_step_ones() -> None:
    """Euler's log-density of a narrow flow is far off, and says so; a fine solve's error is bounded by its estimate."""
    flow = closed_form.gaussian(0.5, 0.1, shape=(3,))
    x1 = data(flow, 16)
    truth = flow.log_density(x1)
    few = likelihood(flow, x1, solver="euler", steps=8, check=True)
    assert few.converged is False
    assert "not a likelihood" in few.notes[0]
    assert float((few.log_prob - truth).abs().mean()) > 0.5
    assert likelihood(flow, x1, solver="euler", steps=1, check=True).converged is False
    fine = likelihood(flow, x1, steps=64, check=True)
    assert fine.converged is True
    assert fine.notes == ()
    assert fine.discretisation is not None
    assert float((fine.log_prob - truth).abs().mean()) < fine.discretisation * 3 * math.log(2)
    assert fine.round_trip is not None
    assert fine.round_trip < 1e-3 < few.round_trip  # type: ignore[operator]
    assert fine.coarse is not None
    torch.testing.assert_close(fine.coarse, likelihood(flow, x1, steps=32).log_prob, rtol=0, atol=1e-10)
    unchecked = likelihood(flow, x1, steps=2)
    assert (unchecked.converged, unchecked.round_trip, unchecked.coarse) == (None, None, None)
    assert "not checked" in unchecked.notes[0]


def test_explicit_grids_run_in_either_direction_and_must_span_the_flow() -> None:
    flow = gaussian(2)
    x1 = data(flow, 4)
    times = torch.linspace(0, 1, 25, dtype=torch.float64).square().tolist()
    up, down = likelihood(flow, x1, grid=times, steps=None), likelihood(flow, x1, grid=times[::-1], steps=None)
    assert torch.equal(up.log_prob, down.log_prob)
    torch.testing.assert_close(up.log_prob, flow.log_density(x1), rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="from 0 to 1"):
        likelihood(flow, x1, grid=[0.0, 0.5], steps=None)


def test_single_precision_is_kept() -> None:
    flow = mixture(4)
    x1 = data(flow, 8)
    found = likelihood(flow, x1.float())
    assert (found.log_prob.dtype, found.x0.dtype, found.dtype) == (torch.float32,) * 3
    torch.testing.assert_close(found.log_prob.double(), flow.log_density(x1), rtol=0, atol=1e-4)


def test_auto_is_exact_up_to_128_dimensions() -> None:
    for size, name in ((128, "exact"), (129, "Hutchinson")):
        found = log_likelihood(lambda x, t: -x, noise(2, size), steps=2, check=False)
        assert name in found.divergence
        assert found.directions == (128 if size == 128 else 1)


def test_summaries_are_those_of_their_values() -> None:
    """The mean log-density of a Gaussian is minus its entropy, sum_i log(s_i sqrt(2 pi e))."""
    flow = gaussian(3)
    found = likelihood(flow, data(flow, 2000), steps=20)
    entropy = float((flow.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum())
    assert abs(found.mean + entropy) < 4 * found.mean_error
    assert found.mean_error == pytest.approx(math.sqrt(1.5 / 2000), rel=0.1), "Var log p = D / 2"
    torch.testing.assert_close(found.nats_per_dim * 3, found.log_prob)


def test_bits_of_eight_bit_images_in_the_unit_cube_add_seven() -> None:
    flow = gaussian(1, 4, 4)
    found = likelihood(flow, data(flow, 3), steps=10)
    torch.testing.assert_close(found.bits_per_dim(2 / 256), -found.log_prob / (16 * math.log(2)) + 7)


def test_bits_of_a_discrete_law_are_its_code_length() -> None:
    """P(k) is the mass that N(m, s^2) has in cell k; fine cells make the bound tight: E bits = entropy in bits.

    The gap is KL(uniform in the cell || density in the cell), of order delta^2 / (24 s^2 ln 2).
    """
    delta, s, m = 2 / 256, 0.2, 0.1
    flow = closed_form.gaussian(m, s, shape=(2,))
    k = ((data(flow, 4000) + 1) / delta).floor()
    edges = k * delta - 1
    law = torch.distributions.Normal(torch.tensor(m, dtype=torch.float64), s)
    mass = law.cdf(edges + delta) - law.cdf(edges)
    code = -mass.log2().mean(1)
    found = likelihood(flow, dequantise(edges, delta, seed=1), steps=24)
    torch.testing.assert_close(found.bits_per_dim(delta).mean(), code.mean(), rtol=0, atol=2e-3)


def test_coarse_cells_make_the_bits_an_upper_bound() -> None:
    delta, s = 0.5, 0.2
    flow = closed_form.gaussian(0.0, s, shape=(1,))
    edges = (data(flow, 4000) / delta).floor() * delta
    law = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), s)
    code = -(law.cdf(edges + delta) - law.cdf(edges)).log2()[:, 0]
    found = likelihood(flow, dequantise(edges, delta), steps=24)
    u = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    bound = -(law.log_prob(edges + delta * u).mean(1) + math.log(delta)) / math.log(2)
    assert float((bound - code).min()) > 0.1
    error = float((found.bits_per_dim(delta) - bound).std()) / math.sqrt(4000)
    assert abs(float((found.bits_per_dim(delta) - bound).mean())) < 3 * error


def test_dequantisation_is_uniform_over_each_cell_and_a_function_of_seed_and_row() -> None:
    x = torch.zeros(4000, 3, dtype=torch.float64)
    y = dequantise(x, 0.25, seed=2)
    u = y / 0.25
    assert float(u.min()) >= 0.0
    assert float(u.max()) < 1.0
    assert float(u.mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * 12_000))
    assert float(u.var()) == pytest.approx(1 / 12, rel=0.03)
    assert torch.equal(dequantise(x[:7], 0.25, seed=2, row=300), y[300:307])
    assert not torch.equal(dequantise(x, 0.25, seed=3), y)


@pytest.mark.parametrize("quantum", [0.0, -1.0, float("nan"), float("inf"), None, True, "2/256"])
def test_bits_without_a_quantum_are_refused(quantum: Any) -> None:
    found = likelihood(gaussian(2), noise(2, 2), steps=2)
    with pytest.raises(UserError, match="quantum"):
        found.bits_per_dim(quantum)
    with pytest.raises(UserError, match="quantum"):
        dequantise(noise(2, 2), quantum)


def test_mistakes_are_named() -> None:
    flow, x1 = gaussian(2), noise(4, 2)
    for options, words in [
        ({"base": "uniform"}, "gaussian"),
        ({"divergence": "trace"}, "hutchinson"),
        ({"probes": 0}, "probes"),
        ({"solver": "rk5"}, "rk4"),
        ({"cond": {"label": torch.zeros(3)}}, "'label' .* inside the network's adapter"),
        ({"steps": 0}, "steps"),
    ]:
        with pytest.raises(UserError, match=words):
            likelihood(flow, x1, **options)
    with pytest.raises(UserError, match="floating"):
        likelihood(flow, x1.long())
    with pytest.raises(UserError, match="velocity is NaN or infinite at t = 1"):
        log_likelihood(lambda x, t: x * torch.nan, x1, steps=2)
    with pytest.raises(UserError, match="4 of 4"):
        log_likelihood(lambda x, t: torch.where(t[:, None] > 0.4, x, torch.nan), x1, steps=2)
