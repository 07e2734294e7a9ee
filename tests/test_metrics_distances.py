from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fewstep.errors import UserError
from fewstep.metrics import Estimate, energy, energy_floor, mmd, sliced_w2, sliced_w2_floor
from fewstep.metrics.rows import as_rows, half_tiles, pick, squared_distances, tiles
from fewstep.metrics.sample_distances import median_distance, squared_w2


def normal(*shape: int, seed: int = 0, mean: float = 0.0, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(*shape, generator=generator, dtype=torch.float64)


def mean_abs(mean: float, std: float) -> float:
    """E|Z| for Z ~ N(mean, std^2): the folded normal."""
    z = mean / std
    return std * math.sqrt(2 / math.pi) * math.exp(-(z**2) / 2) + mean * math.erf(z / math.sqrt(2))


# --- rows and tiles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 3, 50])
@pytest.mark.parametrize("wide", [False, True])
def test_tiles_put_together_are_the_distance_matrix(dim: int, wide: bool) -> None:
    x, y = normal(1500, dim, seed=1), normal(1100, dim, seed=2, mean=5.0)
    d2 = torch.full((1500, 1100), math.nan, dtype=torch.float64)
    for rows, cols, tile in tiles(x, y, wide):
        d2[rows, cols] = tile
    exact = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(d2, exact, rtol=1e-10, atol=1e-10)


def test_half_tiles_visit_each_pair_of_tiles_once() -> None:
    x = normal(2500, 6)
    seen = torch.zeros(2500, 2500)
    for rows, cols, _ in half_tiles(x):
        seen[rows, cols] += 1
        if rows != cols:
            seen[cols, rows] += 1
    assert bool((seen == 1).all())


def test_equal_rows_far_from_the_origin_are_at_distance_zero() -> None:
    x = normal(400, 784) + 1e3
    _, _, d2 = next(iter(tiles(x, x.clone())))
    assert float(d2.diagonal().max()) == 0.0
    assert float((d2 + 1e9 * torch.eye(400, dtype=torch.float64)).min()) > 1000.0


def test_close_pairs_keep_their_distance() -> None:
    x = normal(300, 64)
    y = x + 1e-5 * normal(300, 64, seed=3)
    d = squared_distances(x, y).diagonal().sqrt()
    torch.testing.assert_close(d, (x - y).norm(dim=1), rtol=1e-3, atol=0.0)


def test_pick_is_a_fixed_set_of_different_rows() -> None:
    chosen = pick(1000, 300)
    assert len(set(chosen.tolist())) == 300
    assert np.array_equal(chosen, pick(1000, 300))
    assert np.array_equal(pick(10, 300), np.arange(10))
    counts = np.bincount(pick(6000, 1000) % 10, minlength=10)  # classes stored in turn stay balanced
    assert counts.min() > 60


# --- energy --------------------------------------------------------------------------------------------


def test_energy_is_scipys_in_one_dimension() -> None:
    x, y = normal(300), normal(200, seed=1, mean=0.5, std=2.0)
    assert float(energy(x, y)) == pytest.approx(stats.energy_distance(x, y) ** 2, rel=1e-10)


def test_energy_is_the_v_statistic_with_diagonals() -> None:
    x, y = normal(1300, 3, 4), normal(1100, 3, 4, seed=1, mean=0.2)
    a, b = x.flatten(1), y.flatten(1)
    brute = 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()
    assert energy(x, y).value == pytest.approx(float(brute), abs=1e-9)
    assert energy(x.numpy().astype(">f8"), y).value == energy(x, y).value


def test_energy_of_equal_samples_is_zero_and_of_gaussians_the_closed_form() -> None:
    x, y = normal(4000), normal(4000, seed=1, mean=1.0, std=1.5)
    exact = 2 * mean_abs(1.0, math.hypot(1.0, 1.5)) - mean_abs(0, math.sqrt(2)) - mean_abs(0, 1.5 * math.sqrt(2))
    measured = energy(x, y)
    assert abs(measured.value - exact) < 3 * measured.standard_error < 0.2 * exact
    high = normal(500, 100)
    assert abs(energy(high, high).value) < 1e-9


def energies(n: int, m: int, dim: int, repeats: int, shift: float = 0.0, std: float = 1.0) -> list[Estimate]:
    generator = torch.Generator().manual_seed(12345)
    draw = torch.randn(repeats, n + m, dim, generator=generator, dtype=torch.float64)
    return [energy(d[:n], shift + std * d[n:]) for d in draw]


@pytest.mark.parametrize(
    ("shift", "std", "dim"), [(0.0, 1.0, 2), (0.0, 1.0, 40), (0.15, 1.2, 3), (0.3, 1.0, 2), (1.0, 1.0, 5)]
)
def test_standard_error_of_energy_is_the_spread_over_draws(shift: float, std: float, dim: int) -> None:
    draws = energies(120, 80, dim, 300, shift, std)
    spread = np.std([d.value for d in draws])
    assert np.median([d.standard_error for d in draws]) == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize(("n", "m", "dim"), [(40, 40, 3), (30, 90, 10)])
def test_energy_floor_is_mean_and_spread_between_samples_of_one_law(n: int, m: int, dim: int) -> None:
    draws = [d.value for d in energies(n, m, dim, 800)]
    floor = energy_floor(normal(2000, dim, seed=9999), n, m)
    assert abs(floor.value - np.mean(draws)) < 4 * np.std(draws) / math.sqrt(800) < 0.07 * floor.value
    assert floor.standard_error == pytest.approx(np.std(draws), rel=0.12)


def test_energy_floor_of_a_gaussian_is_its_closed_form_at_any_size() -> None:
    y = normal(4000, std=2.0)
    mean_distance = mean_abs(0.0, 2.0 * math.sqrt(2))
    assert energy_floor(y, 100, 25).value == pytest.approx((1 / 100 + 1 / 25) * mean_distance, rel=0.03)
    assert energy_floor(y, 10**6).value == pytest.approx((1e-6 + 1 / 4000) * mean_distance, rel=0.03)


# --- sliced W2 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 30), (7, 91), (1, 12)])
def test_w2_of_unequal_samples_is_the_optimal_transport(n: int, m: int) -> None:
    x, y = normal(n, 2), normal(m, 2, seed=1, mean=1.0)
    common = math.lcm(n, m)  # repeat to equal sizes: the same two measures
    repeated = x.repeat_interleave(common // n, dim=0), y.repeat_interleave(common // m, dim=0)
    torch.testing.assert_close(squared_w2(x, y), squared_w2(*repeated))
    order = [t.sort(dim=0).values for t in repeated]
    torch.testing.assert_close(squared_w2(x, y), (order[0] - order[1]).square().mean(dim=0))


def test_sliced_w2_in_one_dimension_is_w2() -> None:
    x, y = normal(4000), normal(3000, seed=1, mean=1.0, std=2.0)
    assert sliced_w2(x, y, projections=3) == pytest.approx(float(squared_w2(x[:, None], y[:, None])) ** 0.5)
    assert sliced_w2(x, y, projections=3) == pytest.approx(math.sqrt(1.0 + 1.0), rel=0.05)  # (mu, sigma) shifts


def test_sliced_w2_of_gaussians_is_the_closed_form_along_its_directions() -> None:
    dim, scale = 6, torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 0.1], dtype=torch.float64)
    x, y = normal(6000, dim), normal(5000, dim, seed=1) * scale + 0.5
    theta = torch.nn.functional.normalize(normal(200000, dim, seed=2), dim=1)
    w2 = (theta.sum(dim=1) * 0.5).square() + ((theta * scale).norm(dim=1) - 1.0).square()
    assert sliced_w2(x, y, projections=512) == pytest.approx(float(w2.mean().sqrt()), rel=0.06)


def test_sliced_w2_of_a_shift_needs_no_sampling_in_the_mean() -> None:
    x = normal(200, 16)
    shift = normal(16, seed=5)
    assert sliced_w2(x, x + shift, projections=4000) == pytest.approx(float(shift.norm()) / 4.0, rel=0.05)
    assert sliced_w2(x, x) == 0.0
    assert sliced_w2(x, x + shift, seed=1) != sliced_w2(x, x + shift, seed=2)
    assert sliced_w2(x, x + shift, seed=1) == sliced_w2(x, x + shift, seed=1)


@pytest.mark.parametrize(("n", "m"), [(200, 200), (150, 600)])
def test_sliced_w2_floor_is_what_two_samples_of_one_law_score(n: int, m: int) -> None:
    draws = [sliced_w2(normal(n, 8, seed=2 * s), normal(m, 8, seed=2 * s + 1), 64) for s in range(40)]
    floor = sliced_w2_floor(normal(1000, 8, seed=777), n, m)
    assert floor == pytest.approx(math.sqrt(np.mean(np.square(draws))), rel=0.1)


# --- mmd -----------------------------------------------------------------------------------------------


def kernel_mean(dim: int, shift: float, variance: float, width: float) -> float:
    """E exp(-|Z|^2 / (2 h^2)) for Z ~ N(shift, variance I)."""
    total = width**2 + variance
    return (width**2 / total) ** (dim / 2) * math.exp(-dim * shift**2 / (2 * total))


@pytest.mark.parametrize("widths", [1.0, [0.7, 2.0]])
def test_mmd_of_gaussians_is_the_closed_form(widths: float | list[float]) -> None:
    dim, shift, std = 3, 0.4, 1.3
    exact = np.mean(
        [
            kernel_mean(dim, 0, 2, h) + kernel_mean(dim, 0, 2 * std**2, h) - 2 * kernel_mean(dim, shift, 1 + std**2, h)
            for h in np.atleast_1d(widths)
        ]
    )
    measured = mmd(normal(3000, dim), normal(2500, dim, seed=1, mean=shift, std=std), widths)
    assert abs(measured.value - exact) < 3 * measured.standard_error < 0.3 * exact


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_mmd_is_unbiased_and_its_standard_error_is_the_spread(shift: float) -> None:
    draws = [mmd(normal(60, 2, seed=2 * s), normal(90, 2, seed=2 * s + 1, mean=shift), 1.0) for s in range(300)]
    values = np.array([d.value for d in draws])
    exact = 2 * kernel_mean(2, 0, 2, 1.0) - 2 * kernel_mean(2, shift, 2, 1.0)
    assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(300)
    assert math.sqrt(np.mean([d.standard_error**2 for d in draws])) == pytest.approx(values.std(), rel=0.2)


def test_mmd_takes_the_median_distance_of_the_reference() -> None:
    x, y = normal(300, 4), normal(400, 4, seed=1)
    assert median_distance(y) == pytest.approx(float(torch.nn.functional.pdist(y).median()))
    assert mmd(x, y) == mmd(x, y, bandwidth=median_distance(y))


# --- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: energy(torch.zeros(5, 3), torch.zeros(5, 4)), r"x has 3 numbers per sample .* y has 4"),
        (lambda: energy(torch.zeros(1, 3), torch.zeros(5, 3)), "x has 1 rows, and this needs at least 2"),
        (
            lambda: energy(torch.full((5, 3), math.nan), torch.zeros(5, 3)),
            "NaN or infinity in 5 of 5 samples",
        ),
        (lambda: energy([[1.0], [2.0]], torch.zeros(5, 1)), "x must be a tensor or an array .* a list"),  # type: ignore[arg-type]
        (lambda: energy(torch.zeros(5, 3, dtype=torch.complex64), torch.zeros(5, 3)), "real numbers"),
        (lambda: energy(torch.zeros(5, 0), torch.zeros(5, 0)), "its samples are empty"),
        (lambda: energy_floor(torch.zeros(5, 3), 0), "n = 0"),
        (lambda: sliced_w2(torch.zeros(5, 3), torch.zeros(5, 3), projections=0), "projections = 0"),
        (lambda: mmd(torch.zeros(5, 3), torch.zeros(5, 3)), "their median distance is 0: give a bandwidth"),
        (lambda: mmd(torch.zeros(5, 3), torch.ones(5, 3), -1.0), "positive, finite width"),
    ],
)
def test_unusable_samples_are_refused_with_a_reason(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        call()


def test_integer_and_read_only_arrays_are_read_as_numbers() -> None:
    counts = np.arange(12, dtype=np.uint8).reshape(6, 2)
    counts.flags.writeable = False
    assert torch.equal(as_rows(counts, "x"), torch.arange(12).reshape(6, 2).double())
