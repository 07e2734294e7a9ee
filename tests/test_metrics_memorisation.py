from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.metrics import data_rows, moment_matched_gaussian, nearest_neighbour_check


def mixture(n: int, seed: int, dim: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(8, dim, generator=torch.Generator().manual_seed(99))
    label = torch.randint(8, (n,), generator=generator)
    return centres[label] + torch.randn(n, dim, generator=generator)


TRAIN, HELD_OUT, FRESH = mixture(2000, 0), mixture(400, 1), mixture(1000, 2)


def test_fresh_samples_of_the_law_are_not_flagged() -> None:
    check = nearest_neighbour_check(FRESH, TRAIN, HELD_OUT)
    assert check.share == pytest.approx(0.05, abs=0.03)
    assert check.auroc == pytest.approx(0.5, abs=0.05)
    assert check.median_ratio == pytest.approx(1.0, abs=0.05)
    assert abs(check.copied.value) < 3 * check.copied.standard_error
    assert check.replicas <= 0.005
    assert not check.flagged


def test_fresh_samples_are_rarely_flagged_over_many_draws_even_in_two_dimensions() -> None:
    flags = [
        nearest_neighbour_check(mixture(300, 3 * s, 2), mixture(500, 3 * s + 1, 2), mixture(100, 3 * s + 2, 2)).flagged
        for s in range(100)
    ]
    assert sum(flags) <= 3


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1])
def test_copies_and_near_copies_are_flagged(noise: float) -> None:
    jitter = torch.randn(1000, 12, generator=torch.Generator().manual_seed(3))
    check = nearest_neighbour_check(TRAIN[:1000] + noise * jitter, TRAIN, HELD_OUT)
    assert check.share > 0.99
    assert check.auroc > 0.98
    assert check.median_ratio < 0.3
    assert check.copied.value > 0.95
    assert check.flagged


def test_the_share_of_copies_is_estimated_and_one_in_ten_is_flagged() -> None:
    fake = torch.cat([TRAIN[:300], FRESH[:700]])
    check = nearest_neighbour_check(fake, TRAIN, HELD_OUT)
    assert check.copied.value == pytest.approx(0.3, abs=2 * check.copied.standard_error)
    assert check.share == pytest.approx(0.3 + 0.7 * 0.05, abs=0.03)
    assert check.replicas == pytest.approx(0.3, abs=0.01)
    assert nearest_neighbour_check(torch.cat([TRAIN[:100], FRESH[:900]]), TRAIN, HELD_OUT).flagged


def test_blurred_samples_are_near_to_training_data_and_are_not_flagged() -> None:
    centres = 3 * torch.randn(8, 12, generator=torch.Generator().manual_seed(99))
    nearest = torch.cdist(FRESH, centres).argmin(dim=1)
    blurred = centres[nearest] + 0.4 * (FRESH - centres[nearest])
    check = nearest_neighbour_check(blurred, TRAIN, HELD_OUT)
    assert check.share > 0.5
    assert check.auroc > 0.9
    assert not check.flagged


def test_standard_error_of_the_share_of_copies_is_its_spread_over_splits() -> None:
    pool, fake = mixture(700, 5), mixture(400, 6)
    checks = []
    for seed in range(150):
        order = torch.randperm(700, generator=torch.Generator().manual_seed(seed))
        checks.append(nearest_neighbour_check(fake, pool[order[100:]], pool[order[:100]]).copied)
    values = np.array([c.value for c in checks])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(150)
    assert checks[0].standard_error == pytest.approx(values.std(), rel=0.2)


def test_auroc_counts_pairs_with_ties_half() -> None:
    train = torch.zeros(3, 1)
    fake, held = torch.tensor([[1.0], [2.0], [2.0]]), torch.tensor([[2.0], [3.0], [1.0], [0.5]])
    pairs = [(f < h) + 0.5 * (f == h) for f in (1.0, 2.0, 2.0) for h in (2.0, 3.0, 1.0, 0.5)]
    assert nearest_neighbour_check(fake, train, held).auroc == pytest.approx(sum(pairs) / 12)


def test_held_out_data_of_another_space_are_refused() -> None:
    with pytest.raises(UserError, match=r"fake has 12 numbers per sample .* held_out has 2"):
        nearest_neighbour_check(FRESH, TRAIN, torch.zeros(10, 2))


# --- controls ------------------------------------------------------------------------------------------


def test_moment_matched_gaussian_has_the_moments_and_is_gaussian() -> None:
    data = mixture(500, 7, 4).double().reshape(500, 2, 2)
    fake = moment_matched_gaussian(data, 200_000, seed=1)
    assert fake.shape == (200_000, 2, 2)
    flat, drawn = data.flatten(1), fake.flatten(1)
    cov = torch.cov(flat.T)
    scale = float(cov.diagonal().max())
    torch.testing.assert_close(drawn.mean(0), flat.mean(0), rtol=0.0, atol=5 * math.sqrt(scale / 200_000))
    torch.testing.assert_close(torch.cov(drawn.T), cov, rtol=0.0, atol=8 * scale / math.sqrt(200_000))
    kurtosis = ((drawn - drawn.mean(0)) / drawn.std(0)).pow(4).mean(0)
    torch.testing.assert_close(kurtosis, torch.full((4,), 3.0).double(), rtol=0.0, atol=0.06)


def test_moment_matched_gaussian_stays_in_the_span_of_rank_deficient_data() -> None:
    low = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    basis = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(1)).double()).Q
    data = 2.0 + low @ basis[:3]
    fake = moment_matched_gaussian(data, 100)
    assert float(((fake - 2.0) @ basis[3:].T).abs().max()) < 1e-12
    assert float(((fake - 2.0) @ basis[:3].T).std()) > 0.5
    few = moment_matched_gaussian(data[:3], 50)  # fewer samples than dimensions
    assert int(torch.linalg.matrix_rank(few - few.mean(0), rtol=1e-10)) == 2


def test_controls_leave_the_global_random_state_alone_and_repeat() -> None:
    state = torch.get_rng_state()
    first = moment_matched_gaussian(TRAIN, 10, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, moment_matched_gaussian(TRAIN, 10, seed=4))
    assert not torch.equal(first, moment_matched_gaussian(TRAIN, 10, seed=5))


def test_data_rows_are_different_rows_of_the_data() -> None:
    rows = data_rows(torch.arange(100), 30, seed=2)
    assert len(set(rows.tolist())) == 30
    assert torch.equal(rows, rows.sort().values)
    assert torch.equal(data_rows(torch.arange(5), 30), torch.arange(5))
    with pytest.raises(UserError, match="n = 0"):
        data_rows(torch.arange(5), 0)
