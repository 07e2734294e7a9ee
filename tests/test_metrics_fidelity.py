from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from fewstep.errors import UserError
from fewstep.metrics import expected_coverage, frechet_distance, moment_matched_gaussian, prdc
from fewstep.metrics.neighbours import nearest


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample_with(mean: Tensor, cov: Tensor, n: int, seed: int) -> Tensor:
    """A sample whose mean and covariance (over n - 1) are exactly the given ones."""
    z = normal(n, len(mean), seed=seed)
    q = torch.linalg.qr(z - z.mean(dim=0)).Q * math.sqrt(n - 1)
    values, vectors = torch.linalg.eigh(cov)
    return mean + q @ (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def wishart(dim: int, seed: int, rank: int | None = None) -> Tensor:
    a = normal(dim, rank or dim, seed=seed)
    return a @ a.T / dim


# --- Fréchet -------------------------------------------------------------------------------------------


def test_frechet_distance_of_commuting_covariances() -> None:
    a, b = torch.tensor([1.0, 4.0, 0.25, 0.0]).double(), torch.tensor([9.0, 1.0, 0.25, 2.0]).double()
    mean = torch.tensor([1.0, -2.0, 0.0, 0.5]).double()
    x = sample_with(mean, torch.diag(a), 50, 0)
    y = sample_with(torch.zeros(4).double(), torch.diag(b), 70, 1)
    result = frechet_distance(x, y)
    covariance = float((a.sqrt() - b.sqrt()).square().sum())
    assert result.mean_term == pytest.approx(5.25)
    assert result.covariance_term == pytest.approx(covariance)
    assert float(result) == pytest.approx(5.25 + covariance)
    assert result.percent == pytest.approx(100 * (5.25 + covariance) / float(b.sum()))


@pytest.mark.parametrize("dim", [3, 40])
def test_frechet_distance_is_scipys_matrix_root(dim: int) -> None:
    a, b = wishart(dim, 0), wishart(dim, 1)
    mean = normal(dim, seed=3)
    root = np.real(linalg.sqrtm((a @ b).numpy()))
    exact = float(mean.square().sum() + a.trace() + b.trace()) - 2 * np.trace(root)
    x, y = sample_with(mean, a, 90, 4), sample_with(torch.zeros_like(mean), b, 100, 5)
    assert frechet_distance(x, y).value == pytest.approx(exact, rel=1e-8)
    assert frechet_distance(x.float(), y.float()).value == pytest.approx(exact, rel=1e-5)


def test_frechet_distance_with_rank_deficient_covariances_and_fewer_samples_than_dimensions() -> None:
    x, y = normal(12, 30), normal(20, 30, seed=1) * 2
    a, b = torch.cov(x.T).numpy(), torch.cov(y.T).numpy()
    values, vectors = np.linalg.eigh(a)
    half = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(half @ b @ half).clip(0)).sum()
    exact = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(a) + np.trace(b) - 2 * cross
    assert frechet_distance(x, y).value == pytest.approx(exact, rel=1e-6)
    assert frechet_distance(x, x).value < 1e-10


def test_frechet_distance_to_constant_features_is_refused() -> None:
    with pytest.raises(UserError, match="real features are all equal"):
        frechet_distance(normal(5, 3), torch.ones(5, 3))


# --- precision, recall, density, coverage --------------------------------------------------------------


def brute_force(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """The definitions of the papers, point by point, in exact integer arithmetic."""

    def d(a: np.ndarray, b: np.ndarray) -> int:
        return int(((a - b) ** 2).sum())

    def radii(points: np.ndarray) -> list[int]:
        return [sorted(d(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]

    r_real, r_fake = radii(real), radii(fake)
    precision = np.mean([any(d(x, y) <= r for x, r in zip(real, r_real, strict=True)) for y in fake])
    recall = np.mean([any(d(x, y) <= r for y, r in zip(fake, r_fake, strict=True)) for x in real])
    inside = sum(d(x, y) < r for x, r in zip(real, r_real, strict=True) for y in fake)
    coverage = np.mean([any(d(x, y) <= r for y in fake) for x, r in zip(real, r_real, strict=True)])
    return float(precision), float(recall), inside / (k * len(fake)), float(coverage)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("dim", "high"), [(1, 6), (2, 30), (8, 3), (8, 100)])
def test_prdc_is_the_definition_with_ties_and_duplicates(k: int, dim: int, high: int) -> None:
    rng = np.random.default_rng(k + dim + high)
    real, fake = rng.integers(0, high, (70, dim)), rng.integers(0, high + 1, (50, dim)) + 1
    result = prdc(real, fake, k)
    measured = (result.precision, result.recall, result.density, result.coverage)
    assert measured == pytest.approx(brute_force(real, fake, k), abs=1e-12)
    # Thirds are not exact in binary: the same ties now differ by rounding, and must still be ties.
    scaled = prdc(real / 3.0 + 7.0, fake / 3.0 + 7.0, k)
    assert (scaled.precision, scaled.recall, scaled.density, scaled.coverage) == pytest.approx(measured)


def test_prdc_does_not_depend_on_the_tiling() -> None:
    real, fake = normal(1100, 6), normal(4500, 6, seed=1) * 1.2
    d2 = torch.cdist(real, fake, compute_mode="donot_use_mm_for_euclid_dist").square()
    own = [
        torch.cdist(t, t, compute_mode="donot_use_mm_for_euclid_dist").square().kthvalue(6, dim=1).values
        for t in (real, fake)
    ]
    result = prdc(real, fake)
    assert result.precision == pytest.approx(float((d2 <= own[0][:, None]).any(0).double().mean()))
    assert result.recall == pytest.approx(float((d2 <= own[1]).any(1).double().mean()))
    assert result.density == pytest.approx(float((d2 < own[0][:, None]).sum()) / (5 * 4500))
    assert result.coverage == pytest.approx(float((d2.min(1).values <= own[0]).double().mean()))


def test_nearest_gives_indices_across_tiles_and_leaves_itself_out() -> None:
    x, y = normal(300, 5), normal(9000, 5, seed=1)
    exact = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").topk(3, dim=1, largest=False)
    d2, index = nearest(x, y, 3)
    assert torch.equal(index, exact.indices)
    torch.testing.assert_close(d2.sqrt(), exact.values)
    doubled = torch.cat([x, x])
    d2, index = nearest(doubled, doubled)
    assert torch.equal(index[:, 0], (torch.arange(600) + 300) % 600)  # the copy, not itself
    assert float(d2.max()) == 0.0


def test_identical_sets_score_one_on_all_four() -> None:
    x = normal(800, 20)
    result = prdc(x, x.clone())
    assert result.density == pytest.approx(1.0)
    assert (result.precision, result.recall, result.coverage) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("n", "m", "k"), [(150, 150, 5), (300, 60, 3), (50, 200, 1)])
def test_a_perfect_generator_has_density_one_and_the_expected_coverage(n: int, m: int, k: int) -> None:
    results = [prdc(normal(n, 3, seed=2 * s), normal(m, 3, seed=2 * s + 1), k) for s in range(100)]
    density, coverage = [r.density for r in results], [r.coverage for r in results]
    assert abs(np.mean(density) - 1.0) < 4 * np.std(density) / 10
    assert abs(np.mean(coverage) - expected_coverage(n, m, k)) < 4 * np.std(coverage) / 10


def structured(n: int, seed: int) -> Tensor:
    """64-d data on ten 4-d clusters: like images, nearly all directions of the Gaussian hull are empty."""
    generator = torch.Generator().manual_seed(123)
    centres = 2 * torch.randn(10, 64, generator=generator)
    bases = torch.randn(10, 4, 64, generator=generator)
    generator.manual_seed(seed)
    label = torch.arange(n) % 10
    z = torch.randn(n, 1, 4, generator=generator)
    return centres[label] + 0.5 * (z @ bases[label])[:, 0] + 0.05 * torch.randn(n, 64, generator=generator)


def test_a_moment_matched_gaussian_has_low_precision_although_its_moments_agree() -> None:
    data = structured(1000, 0)
    fake = moment_matched_gaussian(data, 1000, seed=1)
    assert prdc(data, fake).precision < 0.1
    assert prdc(data, structured(1000, 2)).precision > 0.9
    assert frechet_distance(fake, data).percent < 5.0


def test_a_generator_of_one_mode_has_precision_but_no_recall() -> None:
    data = structured(1000, 0)
    one_mode = structured(10000, 2)[::10]
    result = prdc(data, one_mode)
    assert result.precision > 0.9
    assert result.recall < 0.15
    assert result.coverage < 0.15


def test_an_outlier_raises_precision_but_not_density() -> None:
    data = torch.cat([normal(500, 2), torch.full((1, 2), 100.0).double()])
    fake = 50 + 10 * normal(500, 2, seed=1)  # inside the outlier's ball, away from the data
    result = prdc(data, fake)
    assert result.precision > 0.9
    assert result.density < 0.3  # one ball of the five that would make 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prdc(normal(5, 2), normal(50, 2)), "real has 5 rows, and this needs at least 6"),
        (lambda: prdc(normal(50, 2), normal(50, 2), k=0), "k = 0"),
        (lambda: expected_coverage(5, 10, 5), "1 <= k < real"),
    ],
)
def test_too_few_points_are_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        call()
