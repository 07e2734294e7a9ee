"""Minibatch optimal transport against scipy's exact solver."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits, make_moons

from fewstep.errors import UserError
from fewstep.flow.ot import EXACT_ROWS, assignment


def batch(kind: str, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(x0, x1): Gaussian noise and n rows of a data set."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "eight_gaussians":
        angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
        x1 = 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(n, 2, generator=generator)
    elif kind == "moons":
        x1 = torch.from_numpy(make_moons(n, noise=0.05, random_state=seed)[0]).float()
    elif kind == "digits":
        rows = torch.randperm(1797, generator=generator)[:n]
        x1 = torch.from_numpy(load_digits().data).float()[rows] / 8 - 1
    elif kind == "low_rank":
        hidden = torch.randn(n, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
        x1 = torch.tanh(hidden / 2) + 0.1 * torch.randn(n, 64, generator=generator)
    elif kind == "heavy_tails":
        x1 = torch.randn(n, 2, generator=generator) / torch.rand(n, 1, generator=generator).sqrt()
    elif kind == "few_points":
        x1 = torch.randn(5, 3, generator=generator)[torch.randint(5, (n,), generator=generator)]
    else:
        raise AssertionError(kind)
    return torch.randn(x1.shape, generator=generator), x1


def cost(x0: torch.Tensor, x1: torch.Tensor) -> float:
    return float((x0.double() - x1.double()).pow(2).sum())


def optimum(x0: torch.Tensor, x1: torch.Tensor) -> float:
    distances = torch.cdist(x0.double(), x1.double(), compute_mode="donot_use_mm_for_euclid_dist").pow(2)
    rows, columns = linear_sum_assignment(distances.numpy())
    return float(distances[rows, columns].sum())


@pytest.mark.parametrize("kind", ["eight_gaussians", "digits", "few_points"])
@pytest.mark.parametrize("n", [1, 2, 7, 128, 129, 300])
def test_result_is_a_permutation(kind: str, n: int) -> None:
    perm = assignment(*batch(kind, n, 0))
    assert perm.dtype == torch.int64
    assert torch.equal(perm.sort().values, torch.arange(n))


@pytest.mark.parametrize("kind", ["eight_gaussians", "moons", "digits", "heavy_tails"])
@pytest.mark.parametrize("n", [2, 37, EXACT_ROWS])
def test_small_batches_are_optimal(kind: str, n: int) -> None:
    x0, x1 = batch(kind, n, n)
    assert cost(x0[assignment(x0, x1)], x1) == pytest.approx(optimum(x0, x1), rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "excess"),
    [
        ("eight_gaussians", 0.02),
        ("moons", 0.02),
        ("heavy_tails", 0.02),
        ("digits", 0.01),
        ("low_rank", 0.01),
        ("few_points", 0.02),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_large_batches_are_close_to_optimal(kind: str, excess: float, seed: int) -> None:
    x0, x1 = batch(kind, 512, seed)
    best = optimum(x0, x1)
    found = cost(x0[assignment(x0, x1)], x1)
    assert best * (1 - 1e-9) <= found <= (1 + excess) * best


@pytest.mark.parametrize("n", [50, 700])
def test_one_dimension_is_the_sorted_pairing(n: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x0, x1 = torch.randn((2, n, 1), generator=generator)
    matched = x0[assignment(x0, x1)]
    order = x1[:, 0].argsort()
    assert torch.equal(matched[order], x0.sort(0).values)


@pytest.mark.parametrize(("n", "expected"), [(1, 2.0), (4, 0.85), (16, 0.28), (64, 0.081), (256, 0.025)])
def test_cost_between_two_normal_samples_falls_with_the_batch(n: int, expected: float) -> None:
    """E|x1 - x0|^2 of the n-point optimal pairing of two N(0, 1) samples."""
    generator = torch.Generator().manual_seed(4)
    batches = max(300, 20_000 // n)
    pairs = torch.randn((batches, 2, n, 1), generator=generator)
    found = torch.tensor([cost(x0[assignment(x0, x1)], x1) / n for x0, x1 in pairs[:1200]])
    error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean()) - expected) < 4 * error + 0.02 * expected


def test_images_pair_like_their_flat_vectors() -> None:
    x0, x1 = batch("digits", 200, 5)
    square = assignment(x0.reshape(-1, 1, 8, 8), x1.reshape(-1, 1, 8, 8))
    assert torch.equal(square, assignment(x0, x1))


def test_shift_and_scale_of_the_data_do_not_spoil_the_pairing() -> None:
    """Both change the cost only by terms that every permutation shares, up to the scale."""
    x0, x1 = batch("low_rank", 512, 6)
    far = 1e3 * x1 + 3e3
    matched = x0[assignment(x0, far)]
    gain, best = ((cost(x0, x1) - c) for c in (cost(matched, x1), optimum(x0, x1)))
    assert gain > 0.98 * best


def test_equal_points_do_not_fail() -> None:
    flat = torch.zeros(300, 2)
    noise = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(assignment(noise, flat).sort().values, torch.arange(300))


def test_global_random_state_is_untouched() -> None:
    before = torch.random.get_rng_state()
    assignment(*batch("moons", 300, 0))
    assert torch.equal(before, torch.random.get_rng_state())


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(UserError, match="equally many"):
        assignment(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(UserError, match="equally many"):
        assignment(torch.zeros(3), torch.zeros(3))
    with pytest.raises(UserError, match="NaN"):
        assignment(torch.full((3, 2), math.nan), torch.zeros(3, 2))
