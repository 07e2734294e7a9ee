"""Affine paths: coefficients, derivatives, conversions and their singular times."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from fewstep.errors import UserError
from fewstep.flow import closed_form
from fewstep.flow.couplings import EmpiricalSource, GaussianSource
from fewstep.flow.paths import PATHS, VP, AffinePath, Cosine, Interpolant, Linear, expand_time, make_path
from fewstep.methods.flow_matching import FlowMatchingOptions, make_coupling

ALL = [Linear(), Cosine(), VP(), VP(0.5, 5.0), Interpolant()]
INSIDE = torch.tensor([0.03, 0.2, 0.5, 0.77, 0.96], dtype=torch.float64)
KINDS = ("velocity", "data", "noise", "score")


def state(path: AffinePath, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """x, t and the four equivalent predictions of a random pair."""
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn((2, len(INSIDE), *shape), generator=generator, dtype=torch.float64)
    t = INSIDE
    sigma = path.sigma(t).reshape(-1, *[1] * len(shape))
    return {
        "x": path.interpolate(x0, x1, t),
        "t": t,
        "velocity": path.target(x0, x1, t),
        "data": x1,
        "noise": x0,
        "score": -x0 / sigma,
    }


@pytest.mark.parametrize("path", ALL, ids=repr)
@pytest.mark.parametrize("shape", [(1,), (3,), (5,), (2, 5, 5)])  # five rows: (5,) and (2, 5, 5) have B == D
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(KINDS, 2)))
def test_every_conversion_returns_the_truth(path: AffinePath, shape: tuple[int, ...], source: str, target: str) -> None:
    s = state(path, shape)
    converted = getattr(path, f"{source}_to_{target}")(s[source], s["x"], s["t"])
    torch.testing.assert_close(converted, s[target], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", ALL, ids=repr)
def test_dotted_coefficients_are_derivatives(path: AffinePath) -> None:
    t = INSIDE.clone().requires_grad_()
    for value, dot in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        (derivative,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(derivative, dot(t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(path.sigma_sigma_dot(t), path.sigma(t) * path.sigma_dot(t))


@pytest.mark.parametrize("path", ALL, ids=repr)
@pytest.mark.parametrize("time", [0.0, 0.3, 1.0])
def test_the_noise_variance_has_finite_derivatives_at_both_ends_too(path: AffinePath, time: float) -> None:
    """(sigma^2)' = 2 sigma sigma' and (sigma^2)'' against one-sided differences from inside."""
    t = torch.tensor([time], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(path.sigma_squared(t), path.sigma(t.detach()) ** 2, rtol=1e-13, atol=1e-15)
    (first,) = torch.autograd.grad(path.sigma_squared(t).sum(), t, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), t)
    torch.testing.assert_close(first, 2 * path.sigma_sigma_dot(t))
    h = 1e-4 if time < 0.5 else -1e-4
    one, two, three = (path.sigma_squared(t.detach() + k * h) for k in (1, 2, 3))
    zero = path.sigma_squared(t.detach())
    torch.testing.assert_close(
        first.detach(), (-11 * zero + 18 * one - 9 * two + 2 * three) / (6 * h), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(second, (2 * zero - 5 * one + 4 * two - three) / h**2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ALL, ids=repr)
def test_ends_are_exact_and_signal_to_noise_grows(path: AffinePath) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert path.alpha(ends)[1] == 1
    assert path.sigma(ends)[1] == 0
    if not isinstance(path, VP):
        assert path.alpha(ends)[0] == 0
        assert path.sigma(ends)[0] == 1
    t = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
    assert bool(((path.alpha(t) / path.sigma(t)).log().diff() > 0).all())


@pytest.mark.parametrize("path", [Cosine(), VP(), Interpolant()], ids=repr)
def test_variance_is_preserved(path: AffinePath) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t))


def test_vp_matches_the_integrated_noise_schedule() -> None:
    tau = 0.7
    beta = torch.linspace(0, tau, 100_001, dtype=torch.float64) * (20 - 0.1) + 0.1
    integral = torch.trapezoid(beta, dx=tau / 100_000)
    alpha = VP().alpha(torch.tensor([1 - tau], dtype=torch.float64))
    assert float(alpha) == pytest.approx(math.exp(-0.5 * float(integral)), rel=1e-9)


def test_linear_target_is_the_remaining_way_over_the_remaining_time() -> None:
    s = state(Linear(), (3,))
    remaining = (s["data"] - s["x"]) / (1 - s["t"][:, None])
    torch.testing.assert_close(remaining, s["velocity"])
    wrong = (s["data"] - s["noise"]) / (1 - s["t"][:, None])
    assert float((wrong - s["velocity"]).abs().max()) > 1


@pytest.mark.parametrize("path", ALL, ids=repr)
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_velocity_to_data_and_noise_are_regular_at_both_ends(path: AffinePath, end: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn((2, 4, 3), generator=generator, dtype=torch.float64)
    at, near = (torch.full((4,), e, dtype=torch.float64) for e in (end, abs(end - 1e-12)))
    for convert in (path.velocity_to_data, path.velocity_to_noise):
        torch.testing.assert_close(convert(v, x, at), convert(v, x, near), rtol=0, atol=1e-4)


SINGULAR = [
    ("data_to_velocity", 1.0, set(PATHS)),
    ("data_to_noise", 1.0, set(PATHS)),
    ("data_to_score", 1.0, set(PATHS)),
    ("noise_to_score", 1.0, set(PATHS)),
    ("velocity_to_score", 1.0, {"linear", "cosine"}),
    ("noise_to_velocity", 1.0, {"vp", "interpolant"}),
    ("noise_to_velocity", 0.0, {"linear", "cosine", "interpolant"}),
    ("noise_to_data", 0.0, {"linear", "cosine", "interpolant"}),
    ("score_to_velocity", 0.0, {"linear", "cosine", "interpolant"}),
    ("score_to_velocity", 1.0, set()),
    ("score_to_data", 0.0, {"linear", "cosine", "interpolant"}),
]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("conversion", "time", "refusing"), SINGULAR)
def test_conversions_refuse_exactly_their_singular_times(
    name: str, conversion: str, time: float, refusing: set[str]
) -> None:
    convert = getattr(make_path(name), conversion)
    x = torch.ones(2, 3, dtype=torch.float64)
    t = torch.tensor([0.5, time], dtype=torch.float64)
    if name in refusing:
        with pytest.raises(UserError, match=f"singular at t = {time:g}"):
            convert(x, x, t)
        assert bool(torch.isfinite(convert(x, x, (t - 0.5).mul(1 - 1e-9) + 0.5)).all())
    else:
        assert bool(torch.isfinite(convert(x, x, t)).all())


@pytest.mark.parametrize("path", [VP(), Interpolant()], ids=repr)
def test_targets_with_an_infinite_noise_rate_are_refused_at_the_data_end(path: AffinePath) -> None:
    with pytest.raises(UserError, match="sigma'"):
        path.target(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1))


def test_the_interpolant_is_the_line_with_its_latent_noise_merged() -> None:
    """x_t = t x1 + (1 - t) x0 + gamma z, gamma^2 = 2 t (1 - t): law, and E[dx_t/dt | x_t] for Gaussian data."""
    t, mean, std = INSIDE, 0.7, 0.4
    gamma_squared, gamma_gamma_dot = 2 * t * (1 - t), 1 - 2 * t
    torch.testing.assert_close(Interpolant().sigma(t) ** 2, (1 - t) ** 2 + gamma_squared)
    # with x_t - t mean = y: dx_t/dt = x1 - x0 + gamma' z regressed on it
    slope = (t * std**2 - (1 - t) + gamma_gamma_dot) / (t**2 * std**2 + (1 - t) ** 2 + gamma_squared)
    flow = closed_form.gaussian(torch.tensor([mean]), torch.tensor([std]), path=Interpolant())
    x = torch.linspace(-1, 2, len(t), dtype=torch.float64)
    expected = mean + slope * (x - t * mean)
    torch.testing.assert_close(flow.velocity(x[:, None], t)[:, 0], expected, rtol=1e-6, atol=1e-6)


def test_the_interpolant_is_the_cosine_path_in_another_time() -> None:
    s = INSIDE
    t = torch.sin(math.pi / 2 * s)
    torch.testing.assert_close(Interpolant().alpha(t), Cosine().alpha(s))
    torch.testing.assert_close(Interpolant().sigma(t), Cosine().sigma(s))


@pytest.mark.parametrize("coupling", ["ot", "inpainting", "super_resolution"])
def test_flow_matching_refuses_the_interpolant_with_dependent_pairs(coupling: str) -> None:
    with pytest.raises(ValueError, match="adds a second noise to x0.*leave 'coupling: " + coupling):
        FlowMatchingOptions(method="flow_matching", path="interpolant", coupling=coupling)  # type: ignore[arg-type]


def test_flow_matching_refuses_the_interpolant_from_another_base() -> None:
    options = FlowMatchingOptions(method="flow_matching", path="interpolant")
    assert make_coupling(options, SimpleNamespace(source=GaussianSource((2,)))).facts.independent  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"adds a second noise to x0.*leave 'base' out"):
        make_coupling(options, SimpleNamespace(source=EmpiricalSource(torch.ones(3, 2))))  # type: ignore[arg-type]


def test_expand_time_goes_by_dimensions_and_refuses_other_shapes() -> None:
    x = torch.zeros(3, 3)
    t = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    moved = expand_time(t, x) + x
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved[:, 0], t.float())  # rows carry the time, columns repeat it
    torch.testing.assert_close(moved[:, 2], t.float())
    for bad in (torch.tensor(0.1), t[:, None], t[:2]):
        with pytest.raises(UserError, match=r"t must be \(B,\)"):
            expand_time(bad, x)


def test_states_of_different_shape_are_not_broadcast() -> None:
    with pytest.raises(UserError, match="must be equal"):
        Linear().interpolate(torch.zeros(4, 1), torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(UserError, match="must be equal"):
        Linear().velocity_to_data(torch.zeros(4, 1), torch.zeros(4, 3), torch.zeros(4))


def test_unknown_path_and_bad_schedule_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'linear'"):
        make_path("liner")
    with pytest.raises(UserError, match="beta_min"):
        VP(beta_min=0.0)
