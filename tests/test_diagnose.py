"""Diagnoses against the closed forms of Gaussian flows, straight fields and rotations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.diagnostics import diagnose as module
from fewstep.diagnostics.diagnose import Diagnosis
from fewstep.diagnostics.profiles import simpson_weights, with_middles
from fewstep.diagnostics.verdict import verdict
from fewstep.errors import UserError
from fewstep.flow import closed_form
from fewstep.flow.field import CountedField, Guided
from fewstep.flow.paths import VP, AffinePath, Cosine, Interpolant

PLAIN: dict[str, Any] = {"sensitivity": False, "stiffness": False}  # straightness and curvature alone


def standardised(num: int, *shape: int, seed: int = 0) -> Tensor:
    """Noise with sample mean zero and sample variance one, entry by entry: second moments are exact."""
    z = torch.randn(num, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    z = z - z.mean(0)
    return z / z.square().mean(0).sqrt()


def gaussian(mean: float, *stds: float) -> closed_form.Gaussian:
    s = torch.tensor(stds, dtype=torch.float64)
    return closed_form.gaussian(torch.full_like(s, mean), s)


def q(d: Diagnosis, s: float) -> np.ndarray:
    return (1 - d.times) ** 2 + (s * d.times) ** 2


@pytest.mark.parametrize("stds", [(0.1,), (0.3, 1.0), (2.0, 0.5, 1.5)])
def test_straightness_of_a_gaussian_flow_is_two_less_half_pi_times_its_stds(stds: tuple[float, ...]) -> None:
    """S = (2 - pi/2) sum s, whatever the mean."""
    flow, x0 = gaussian(1.3, *stds), standardised(64, len(stds))
    d = fs.diagnose(flow.velocity, x0, nodes=32, **PLAIN)
    assert d.straightness == pytest.approx((2 - math.pi / 2) * sum(stds), rel=2e-3)
    assert d.straightness == pytest.approx(flow.straightness(), rel=2e-3)


def test_straightness_of_a_correlated_coupling_is_its_closed_form() -> None:
    """S = 2 s (1 - rho) - s sqrt(1 - rho^2) arccos(rho): less the closer the pairs."""
    x0, previous = standardised(64, 2), math.inf
    for rho in (-0.5, 0.0, 0.5, 0.9, 1.0):
        flow = closed_form.coupled_gaussian(0.5, 0.7, rho, shape=(2,))
        d = fs.diagnose(flow.velocity, x0, nodes=32, **PLAIN)
        expected = 2 * 0.7 * (2 * (1 - rho) - math.sqrt(1 - rho**2) * math.acos(rho))
        assert d.straightness == pytest.approx(expected, rel=2e-3, abs=1e-10)
        assert d.straightness < previous
        previous = d.straightness


def test_random_noise_gives_straightness_within_its_standard_error() -> None:
    flow = gaussian(0.0, 0.5, 0.5)
    errors = []
    for seed in range(20):
        x0 = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        d = fs.diagnose(flow.velocity, x0, nodes=16, **PLAIN)
        errors.append((d.straightness - (2 - math.pi / 2)) / d.straightness_error)
    assert 0.6 < float(np.std(errors)) < 1.5  # chi-square, 20 seeds
    assert abs(float(np.mean(errors))) < 4 / 20**0.5


@pytest.mark.parametrize("shape", [(2,), (1,), (1, 5, 5)])
def test_a_straight_field_has_nothing_to_measure(shape: tuple[int, ...]) -> None:
    """Pairs (x0, a + b x0): the exact velocity along a trajectory is its constant chord."""
    b = 0.3

    def v(x: Tensor, t: Tensor) -> Tensor:
        s = t.reshape(-1, *(1,) * (x.ndim - 1))
        return 2 + (b - 1) * (x - 2 * s) / (1 + (b - 1) * s)

    d = fs.diagnose(v, standardised(16, *shape), **PLAIN)
    assert d.straightness < 1e-12
    assert d.one_step_gap < 1e-6
    assert d.curvature.max() < 1e-5
    assert d.path_length_ratio == pytest.approx(1, abs=1e-8)
    size = math.prod(shape)
    assert d.displacement == pytest.approx(size * (4 + (b - 1) ** 2), rel=1e-8)


@pytest.mark.parametrize("s", [0.2, 0.5, 1.0, 2.0])
def test_acceleration_of_a_gaussian_flow_is_its_closed_form(s: float) -> None:
    """Z'' = z (sqrt q)'' = z s^2 / q^(3/2): RMS over samples, root of the sum over dimensions."""
    d = fs.diagnose(gaussian(-0.4, s, s).velocity, standardised(32, 2), **PLAIN)
    expected = math.sqrt(2) * s**2 / q(d, s) ** 1.5
    np.testing.assert_allclose(d.curvature, expected, atol=2e-3 * expected.max())
    np.testing.assert_allclose(d.local_error, expected / 2, atol=1e-3 * expected.max())


def test_deviation_at_every_node_is_its_closed_form() -> None:
    """chord - v = ((s - 1) - (sqrt q)') z."""
    s = 0.5
    d = fs.diagnose(gaussian(2.0, s).velocity, standardised(32, 1), **PLAIN)
    rate = (d.times * s**2 - (1 - d.times)) / np.sqrt(q(d, s))
    np.testing.assert_allclose(d.deviation, ((s - 1) - rate) ** 2, atol=1e-6)
    assert d.straightness == pytest.approx(float(d.deviation @ simpson_weights(d.times)), rel=1e-12)


def test_the_one_step_gap_of_a_gaussian_flow_is_its_closed_form() -> None:
    """v(z, 0) = m - z: Euler's step ends at m for every z, the flow at m + s z, so the gap is s each."""
    d = fs.diagnose(gaussian(0.7, 0.4, 0.3).velocity, standardised(32, 2), **PLAIN)
    assert d.one_step_gap == pytest.approx(0.5, rel=1e-6)
    displacement = 2 * 0.7**2 + 0.6**2 + 0.7**2
    assert d.displacement == pytest.approx(displacement, rel=1e-6)
    assert d.relative_gap == pytest.approx(0.5 / math.sqrt(displacement), rel=1e-6)
    assert d.relative_straightness == pytest.approx(d.straightness / displacement, rel=1e-6)


def test_in_one_dimension_a_path_that_never_turns_is_as_long_as_its_chord() -> None:
    flow = closed_form.mixture(torch.tensor([0.5, 0.5]), torch.tensor([[8.0], [10.0]]), torch.tensor([0.5, 1.0]))
    d = fs.diagnose(flow.velocity, standardised(64, 1), **PLAIN)
    assert d.path_length_ratio == pytest.approx(1, abs=1e-6)
    assert d.straightness > 0.1  # it changes speed all the same
    assert d.normal_curvature.max() < 1e-6 * d.curvature.max()


@pytest.mark.parametrize("angle", [1.0, 2.0, math.pi])
def test_a_rotation_has_the_length_and_curvature_of_its_arc(angle: float) -> None:
    """v = w J x: arc over chord is (w/2) / sin(w/2), the acceleration w^2 r is all normal."""
    turn = torch.tensor([[0.0, angle], [-angle, 0.0]], dtype=torch.float64)
    x0 = standardised(32, 2)
    d = fs.diagnose(lambda x, t: x @ turn, x0, **PLAIN)
    radius2 = float(x0.square().sum(1).mean())
    assert d.path_length_ratio == pytest.approx(angle / 2 / math.sin(angle / 2), rel=1e-6)
    np.testing.assert_allclose(d.curvature, angle**2 * math.sqrt(radius2), rtol=1e-3)
    np.testing.assert_allclose(d.normal_curvature, d.curvature, rtol=1e-4)
    assert d.grid(5) == pytest.approx(tuple(k / 5 for k in range(6)), abs=1e-3)


def test_images_are_measured_as_their_flattened_vectors() -> None:
    stds = torch.linspace(0.2, 1.5, 12, dtype=torch.float64).reshape(3, 2, 2)
    x0 = standardised(40, 3, 2, 2)
    image = fs.diagnose(closed_form.gaussian(torch.zeros(3, 2, 2), stds).velocity, x0, nodes=32)
    flat = fs.diagnose(closed_form.gaussian(torch.zeros(12), stds.flatten()).velocity, x0.flatten(1), nodes=32)
    assert image.straightness == pytest.approx((2 - math.pi / 2) * float(stds.sum()), rel=2e-3)
    for name, value in image.as_dict().items():
        if name not in ("solver", "derivatives"):
            np.testing.assert_allclose(value, flat.as_dict()[name], rtol=1e-9, atol=1e-12)


def test_the_result_does_not_depend_on_how_samples_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def v(x: Tensor, t: Tensor, label: Tensor, power: float) -> Tensor:
        return label[:, None] * torch.sin(x) ** power + t[:, None]

    x0, cond = standardised(50, 2), {"label": torch.arange(50.0).double() / 25, "power": 2.0}
    monkeypatch.setattr(module, "DERIVED", 20)  # fewer than samples: a cut falls among those with derivatives
    monkeypatch.setattr(module, "DERIVED_NUMBERS", 1)
    whole = fs.diagnose(v, x0, cond=cond, nodes=8)
    monkeypatch.setattr(module, "CHUNK", 7)
    small = fs.diagnose(v, x0, cond=cond, nodes=8)
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 1)
    single = fs.diagnose(v, x0, cond=cond, nodes=8)
    assert whole.derivative_samples == 20
    for other in (small, single):
        for name, value in whole.as_dict().items():
            if name not in ("solver", "derivatives"):
                np.testing.assert_allclose(other.as_dict()[name], value, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("num", [1, 256, 600])
def test_nfe_is_counted_per_sample(num: int) -> None:
    """RK4 is 4 calls a step, the acceleration one more at every node, and the last node 2."""
    rows, flow = [], gaussian(0.0, 1.0)

    def v(x: Tensor, t: Tensor) -> Tensor:
        rows.append(len(x))
        return flow.velocity(x, t)

    field = CountedField(v)
    x0 = standardised(max(num, 2), 1)[:num]
    d = fs.diagnose(field, x0, nodes=8, adaptive=False, **PLAIN)
    assert field.calls == len(rows)
    assert d.nfe == round(sum(rows) / num)
    if num > 100:  # the way to take derivatives is tried on four rows
        assert d.nfe == 8 * 4 + 2 + 9

    whole = fs.diagnose(v, x0, nodes=8)
    assert whole.nfe > d.nfe + 8 + 16 + 4 * 3 * 2  # Euler runs, and derivatives forwards and backwards on 4 panels
    guided = Guided(lambda x, t, label: x, 2.0)
    twice = fs.diagnose(guided, torch.ones(64, 1), cond={"label": torch.ones(64)}, nodes=8).nfe
    assert twice == 2 * fs.diagnose(lambda x, t: x, torch.ones(64, 1), nodes=8).nfe


def profile(local_error: np.ndarray) -> Diagnosis:
    n = len(local_error) - 1
    d = fs.diagnose(lambda x, t: x, torch.ones(2, 1), nodes=n, adaptive=False, **PLAIN)
    return Diagnosis(**{**vars(d), "local_error": local_error})


@pytest.mark.parametrize("level", [0.0, 1e-20, 0.3, 1e6])
def test_a_constant_profile_gives_the_uniform_grid(level: float) -> None:
    for steps in (1, 2, 7):
        grid = profile(np.full(65, level)).grid(steps)
        np.testing.assert_allclose(grid, np.linspace(0, 1, steps + 1), atol=1e-12)


def test_the_grid_gives_every_step_the_same_share_of_the_root_of_the_error() -> None:
    times = np.linspace(0, 1, 65)
    d = profile((1 + 3 * times) ** 2)  # root 1 + 3 t, mass t + 3/2 t^2
    grid = np.array(d.grid(5))
    np.testing.assert_allclose(grid + 1.5 * grid**2, 2.5 * np.linspace(0, 1, 6), atol=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 5, 64, 500])
def test_grids_rise_strictly_from_zero_to_one(steps: int) -> None:
    rng = np.random.default_rng(0)
    for profile_ in (rng.random(65) ** 8, np.eye(65)[40], np.eye(65)[0], np.eye(65)[64] * 1e30):
        grid = profile(profile_).grid(steps)
        assert len(grid) == steps + 1
        assert (grid[0], grid[-1]) == (0.0, 1.0)
        assert np.all(np.diff(grid) > 0)


@pytest.mark.parametrize("steps", [3, 4, 6, 8, 16])
def test_euler_on_the_recommended_grid_beats_the_uniform_one(steps: int) -> None:
    """Narrow data: the flow turns in a short time near t = 1."""
    flow, x0 = gaussian(0.5, 0.1, 0.1), standardised(64, 2)
    d = fs.diagnose(flow.velocity, x0, **PLAIN)
    x1 = flow.flow_map(x0, torch.zeros(64), torch.ones(64))
    errors = [
        float((fs.solve(flow.velocity, x0, **how).x - x1).square().mean().sqrt())
        for how in ({"grid": d.grid(steps)}, {"steps": steps})
    ]
    assert errors[0] < 0.8 * errors[1]


def test_as_dict_holds_plain_values() -> None:
    d = fs.diagnose(gaussian(0.0, 1.0).velocity, standardised(4, 1), nodes=8, adaptive=False).as_dict()
    assert d["times"] == [k / 8 for k in range(9)]
    assert all(isinstance(value, (int, float, str, list)) for value in d.values())


def test_quadrature_on_unequal_panels_is_exact_for_cubics() -> None:
    times = with_middles(np.array([0.0, 0.3, 0.35, 0.9, 1.0]))
    for power in range(4):
        assert simpson_weights(times) @ times**power == pytest.approx(1 / (power + 1), abs=1e-15)
    np.testing.assert_allclose(simpson_weights(np.array([0, 0.25, 0.5, 0.75, 1])), np.array([1, 4, 2, 4, 1]) / 12)


@pytest.mark.parametrize("s", [2.0, 1.0, 0.3, 0.1, 0.01, 1e-3])
def test_nodes_resolve_data_of_any_width(s: float) -> None:
    """The acceleration s^2 / q^(3/2) has a peak of height 1/s and width s next to t = 1."""
    d = fs.diagnose(gaussian(0.3, s, s).velocity, standardised(64, 2), **PLAIN)
    assert d.straightness == pytest.approx((2 - math.pi / 2) * 2 * s, rel=5e-3)
    np.testing.assert_allclose(d.curvature, math.sqrt(2) * s**2 / q(d, s) ** 1.5, rtol=1e-2)
    assert np.all(np.diff(d.times) > 0)
    assert len(d.times) == 65 if s >= 0.1 else 65 < len(d.times) < 90
    if s < 0.02:  # the nodes of the start alone would not do
        fixed = fs.diagnose(gaussian(0.3, s, s).velocity, standardised(64, 2), adaptive=False, **PLAIN)
        assert abs(fixed.straightness / d.straightness - 1) > 0.05


def test_a_jump_of_the_velocity_stops_the_halving() -> None:
    """v turns from 1 to 2 at t = .3: the end is x0 + 1.7 to the width of the shortest panel."""
    d = fs.diagnose(lambda x, t: 1 + (t[:, None] > 0.3).to(x), standardised(8, 1), nodes=16, **PLAIN)
    assert len(d.times) - 1 <= 4 * 16
    assert d.displacement == pytest.approx(1.7**2, rel=1e-3)
    assert d.times[np.argmin(np.diff(d.times))] == pytest.approx(0.3, abs=1e-3)


def test_standard_errors_are_the_spread_over_seeds() -> None:
    flow, found = gaussian(0.0, 0.3, 0.6), []
    for seed in range(40):
        x0 = torch.randn(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        found.append(fs.diagnose(flow.velocity, x0, nodes=8, adaptive=False, **PLAIN))
    for name in ("deviation", "curvature"):
        spread = np.std([getattr(d, name) for d in found], axis=0)
        stated = np.mean([getattr(d, f"{name}_error") for d in found], axis=0)
        np.testing.assert_allclose(stated, spread, rtol=0.45)  # 40 seeds know a spread to 11 %, four of those


@pytest.mark.parametrize("s", [0.3, 1.0])
def test_step_doubling_finds_the_local_error_to_first_order(s: float) -> None:
    gaps = []
    for nodes in (16, 32, 64):
        d = fs.diagnose(gaussian(0.1, s).velocity, standardised(16, 1), nodes=nodes, adaptive=False, **PLAIN)
        gaps.append(np.abs(d.doubling_error - d.local_error).max() / d.local_error.max())
    assert gaps[-1] < 0.03
    assert [math.log2(a / b) for a, b in itertools.pairwise(gaps)] == pytest.approx([1, 1], abs=0.25)


def test_a_network_without_derivatives_is_measured_by_differences() -> None:
    flow, x0 = gaussian(0.5, 0.4), standardised(64, 1)

    def v(x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return flow.velocity(x.detach(), t.detach())

    d, exact = fs.diagnose(v, x0, nodes=32), fs.diagnose(flow.velocity, x0, nodes=32)
    assert (d.derivatives, exact.derivatives) == ("finite_difference", "forward")
    np.testing.assert_allclose(d.curvature, exact.curvature, rtol=1e-4)
    np.testing.assert_allclose(d.stiffness, exact.stiffness, rtol=1e-4, atol=1e-5)
    assert d.unit_error == pytest.approx(exact.unit_error, rel=1e-4)
    assert d.weighted_error is None
    with pytest.raises(UserError, match="no weighted error"):
        d.grid(4, weighted=True)


@pytest.mark.parametrize("path", [VP(), Interpolant(), Cosine()], ids=repr)
def test_flows_on_every_path_are_measured_up_to_the_ends(path: AffinePath) -> None:
    """Z'' = alpha'' m + z (sqrt q)'' with q = sigma^2 + alpha^2 s^2, by differences of the coefficients."""
    m, s = 0.7, 0.5
    flow = closed_form.gaussian(torch.tensor([m]), torch.tensor([s]), path)
    d = fs.diagnose(flow.velocity, standardised(32, 1), nodes=32)
    for name, value in d.as_dict().items():
        assert isinstance(value, str) or np.isfinite(np.asarray(value, dtype=float)).all(), name
    h = 1e-4
    t = torch.from_numpy(d.times).clamp(2 * h, 1 - 2 * h)  # an error of h times the third derivative at the ends

    def bend(values: Callable[[Tensor], Tensor]) -> Tensor:
        return (values(t + h) - 2 * values(t) + values(t - h)) / h**2

    mean = bend(path.alpha) * m
    spread = bend(lambda u: (path.sigma(u) ** 2 + (path.alpha(u) * s) ** 2).sqrt())
    expected = (mean**2 + spread**2).sqrt()  # the z are standardised
    np.testing.assert_allclose(d.curvature, expected, atol=5e-3 * float(expected.max()))
    assert d.derivatives == "forward"


def test_a_measure_that_is_not_finite_is_refused_by_name_and_place() -> None:
    with pytest.raises(UserError, match=r"derivative along its trajectories is NaN or infinite at t = 1 .*square root"):
        fs.diagnose(lambda x, t: x * (1 - t).sqrt()[:, None], standardised(8, 2), nodes=8, **PLAIN)

    def escaping(x: Tensor, t: Tensor) -> Tensor:
        """Contracts along every trajectory; one long Euler step overshoots and then grows beyond float32."""
        return -60 * x * (1 + 1e4 * (x * (x < -5)).square()) ** 4

    x0 = torch.linspace(0.1, 1.0, 8)[:, None]
    with pytest.raises(UserError, match=r"no finite euler_error with 4, 6, .* Euler steps.*sensitivity=False"):
        fs.diagnose(escaping, x0, nodes=128, stiffness=False)
    assert np.isfinite(fs.diagnose(escaping, x0, nodes=128, **PLAIN).curvature).all()


def test_one_sample_has_no_standard_error_and_is_measured_all_the_same() -> None:
    d = fs.diagnose(gaussian(0.0, 0.5).velocity, torch.ones(1, 1), nodes=16)
    assert math.isnan(d.straightness_error)
    assert np.isfinite(d.curvature).all()


def test_what_is_switched_off_is_none_and_refused() -> None:
    d = fs.diagnose(lambda x, t: -x, standardised(8, 2), nodes=8, **PLAIN)
    assert d.weighted_error is d.unit_error is d.euler_error is d.stiffness is d.contraction is None
    with pytest.raises(UserError, match="sensitivity=False"):
        d.predicted_error(4)
    assert len(verdict(d)) == 3  # straightness, ReFlow, and where local errors are made


def test_the_verdict_tells_a_crooked_flow_from_a_straight_one() -> None:
    x0 = standardised(16, 2)
    crooked = closed_form.mixture(torch.ones(2), torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.2, 0.2]))
    d = fs.diagnose(crooked.velocity, x0, nodes=16)
    words = verdict(d)
    assert words[0].startswith("The flow is not straight")
    assert words[1].startswith("ReFlow will pay")
    assert verdict(d, deterministic=True)[1].startswith("ReFlow again will pay")
    share = d.predicted_error(8) / math.sqrt(d.displacement)
    assert f"is {share:.1%} with 8 and" in words[-1]

    coupled = closed_form.coupled_gaussian(0.5, 0.7, 1.0, shape=(2,))  # monotone pairs: straight lines
    words = verdict(fs.diagnose(coupled.velocity, x0, nodes=16), deterministic=True)
    assert words[0].startswith("The flow is straight")
    assert "one Euler step misses by 0%" in words[0]
    assert words[1].startswith("Another round of ReFlow would gain little")
    assert words[2].startswith("It is not stiff")

    narrow = verdict(fs.diagnose(gaussian(0.0, 0.01, 0.01).velocity, x0))
    assert "It is stiff between t = 0.938 and" in narrow[2]  # -1/(1 - t) passes -8 at t = .875
    assert "(eigenvalue -49" in narrow[2]  # -1/(2 s)
    assert "has no scale" not in narrow[0]
    assert "no scale" in verdict(fs.diagnose(gaussian(0.0, 1.0, 1.0).velocity, x0, nodes=16))[0]


@pytest.mark.parametrize("s", [0.1, 10.0])
def test_the_verdict_says_where_the_error_is_made(s: float) -> None:
    """The shortest stretch with half of the integral of s^3 / q^2, q = (1 - t)^2 + (s t)^2, at one end or inside."""
    t = np.linspace(0, 1, 100_001)
    mass = np.cumsum(s**3 / ((1 - t) ** 2 + (s * t) ** 2) ** 2)
    ends = np.interp(mass + mass[-1] / 2, mass, t, right=2.0)
    k = int(np.argmin(ends - t))
    (words,) = [w for w in verdict(fs.diagnose(gaussian(1.0, s).velocity, standardised(64, 1))) if "Half" in w]
    begin, end = (float(word.rstrip(".")) for word in words.split("between t = ")[1].split(" and "))
    assert (begin, end) == pytest.approx((t[k], ends[k]), abs=5e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": 5}, "even number of at least 4, got 5"),
        ({"nodes": 2}, "even number of at least 4, got 2"),
        ({"nodes": 8.5}, "even number of at least 4, got 8.5"),
        ({"x0": torch.ones(3)}, "the start must have shape"),
        ({"cond": {"label": torch.ones(1)}}, r"condition 'label' has shape \(1,\) for 3 samples"),
        ({"cond": {"label": torch.ones(4, 2)}}, r"condition 'label' has shape \(4, 2\) for 3 samples"),
        ({"cond": {"label": torch.tensor(1.0)}}, r"condition 'label' has shape \(\) for 3 samples"),
        ({"v": lambda x, t: x / (t[:, None] < 0.6)}, r"NaN or infinite at t = 0.625"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fs.diagnose(**{"v": lambda x, t, label=None: x, "x0": torch.ones(3, 2), "nodes": 8, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [0, 2.5, True])
def test_a_grid_of_no_whole_number_of_steps_is_refused(steps: object) -> None:
    d = fs.diagnose(lambda x, t: x, torch.ones(2, 1), nodes=8)
    with pytest.raises(UserError, match="steps must be a whole number"):
        d.grid(steps)  # type: ignore[arg-type]


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    fs.diagnose(lambda x, t: x, torch.ones(2, 1), nodes=8)
    assert torch.equal(torch.get_rng_state(), before)
