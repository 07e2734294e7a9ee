"""Couplings: right marginals, conditions that travel, and facts that are true."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.errors import UserError
from fewstep.flow.coupled_gaussian import joint_gaussian_velocity
from fewstep.flow.couplings import (
    Coupling,
    EmpiricalSource,
    Facts,
    GaussianSource,
    Independent,
    Inpainting,
    MinibatchOT,
    Paired,
    SuperResolution,
    require_independent,
)
from fewstep.flow.degradations import block_average, inpainting_base, random_mask
from fewstep.flow.ot import assignment


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(x: torch.Tensor) -> list[tuple[float, ...]]:
    """The rows as a multiset."""
    return sorted(map(tuple, x.flatten(1).tolist()))


def two_classes(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    label = torch.arange(n) % 2
    return (4.0 * label - 2)[:, None] + 0.1 * torch.randn(n, 1, generator=seeded(9)), label


ALL: list[Coupling] = [
    Independent(GaussianSource((4,))),
    MinibatchOT(GaussianSource((4,))),
    Inpainting(),
    SuperResolution(2, 0.1),
]


@pytest.mark.parametrize("coupling", ALL, ids=lambda c: type(c).__name__)
def test_data_and_labels_stay_in_place_and_draws_repeat(coupling: Coupling) -> None:
    x1 = torch.randn(40, 4, generator=seeded(1), dtype=torch.float64)
    cond = {"label": torch.arange(40) % 3}
    before = torch.random.get_rng_state()
    pair, again, other = (coupling.pair(x1, cond, seeded(s)) for s in (2, 2, 3))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(pair.x1, x1)
    assert torch.equal(pair.cond["label"], cond["label"])
    assert set(cond) == {"label"}
    assert pair.x0.dtype == torch.float64
    assert torch.equal(pair.x0, again.x0)
    assert not torch.equal(pair.x0, other.x0)


def test_only_the_independent_coupling_says_independent() -> None:
    assert Independent(GaussianSource((2,))).facts == Facts(independent=True, deterministic=False)
    assert not Independent(EmpiricalSource(torch.zeros(3, 2))).facts.gaussian
    for coupling in ALL[1:]:
        assert not coupling.facts.independent
        assert not coupling.facts.deterministic
    paired = Paired(teacher="abc", guidance=2.0).facts
    assert paired == Facts(independent=False, deterministic=True, teacher="abc", guidance=2.0)


def test_scores_are_refused_after_a_dependent_coupling_or_another_base() -> None:
    require_independent(Independent(GaussianSource((2,))).facts, "dpm++sde")
    with pytest.raises(UserError, match=r"dpm\+\+sde needs the score.*dependent pairs.*Use an ODE solver"):
        require_independent(MinibatchOT(GaussianSource((2,))).facts, "dpm++sde")
    with pytest.raises(UserError, match="not standard normal"):
        require_independent(Independent(EmpiricalSource(torch.zeros(3, 2))).facts, "a score")


def test_the_score_formula_is_indeed_false_after_optimal_transport() -> None:
    """E[x0 x_t] / E[x_t^2], the slope of the noise prediction, against that of the true score -x/q."""
    t, slopes = 0.5, []
    for coupling in (Independent(GaussianSource((1,))), MinibatchOT(GaussianSource((1,)), 64)):
        x1 = 0.5 * torch.randn(64_000, 1, generator=seeded(1))
        pair = coupling.pair(x1, {}, seeded(2))
        x = (1 - t) * pair.x0 + t * pair.x1
        score_from_noise = -float((pair.x0 * x).mean() / (x * x).mean()) / (1 - t)
        slopes.append(score_from_noise * float(x.var()))  # true score: exactly -1
    assert slopes[0] == pytest.approx(-1, abs=0.02)
    assert slopes[1] < -1.3


def test_independent_noise_is_standard_normal_and_uncorrelated() -> None:
    x1 = torch.randn(50_000, 2, generator=seeded(1))
    x0 = Independent(GaussianSource((2,))).pair(x1, {}, seeded(2)).x0
    both = torch.cat([x0, x1], 1).T
    torch.testing.assert_close(torch.cov(both), torch.eye(4), rtol=0, atol=0.025)


def test_empirical_source_draws_its_rows() -> None:
    bank = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    drawn = EmpiricalSource(bank).sample(3000, seeded())
    assert drawn.dtype == torch.float32
    for row in bank:
        assert float((drawn == row).all(1).float().mean()) == pytest.approx(1 / 3, abs=0.04)


@pytest.mark.parametrize("n", [50, 300])
def test_transport_permutes_the_noise_and_lowers_the_cost(n: int) -> None:
    x1 = torch.randn(n, 3, generator=seeded(1))
    source = GaussianSource((3,))
    free, matched = (c.pair(x1, {}, seeded(2)).x0 for c in (Independent(source), MinibatchOT(source)))
    assert rows(matched) == rows(free)
    assert float((matched - x1).pow(2).sum()) < 0.3 * float((free - x1).pow(2).sum())


def test_transport_stays_within_each_class() -> None:
    x1, label = two_classes(200)
    source = GaussianSource((1,))
    free = Independent(source).pair(x1, {}, seeded(3)).x0
    pair = MinibatchOT(source).pair(x1, {"label": label}, seeded(3))
    for c in (0, 1):
        own = label == c
        assert rows(pair.x0[own]) == rows(free[own])
        expected = free[own][assignment(free[own], x1[own])]
        assert torch.equal(pair.x0[own], expected)


def test_pairing_across_classes_would_leak_the_label_into_the_noise() -> None:
    """Classes at +-2: within class E[x0 | class] = 0, globally sqrt(2 / pi)."""
    x1, label = two_classes(4000)
    source = GaussianSource((1,))
    within = MinibatchOT(source).pair(x1, {"label": label}, seeded(4)).x0[label == 1]
    across = MinibatchOT(source).pair(x1, {}, seeded(4)).x0[label == 1]
    bound = 4 / math.sqrt(len(within))
    assert abs(float(within.mean())) < bound
    assert float(across.mean()) == pytest.approx(math.sqrt(2 / math.pi), abs=bound)


def test_batch_size_cuts_into_consecutive_problems() -> None:
    x1 = torch.randn(70, 2, generator=seeded(1))
    source = GaussianSource((2,))
    free = source.sample(70, seeded(5))
    matched = MinibatchOT(source, batch_size=32).pair(x1, {}, seeded(5)).x0
    for piece in (slice(0, 32), slice(32, 64), slice(64, 70)):
        expected = free[piece][assignment(free[piece], x1[piece])]
        assert torch.equal(matched[piece], expected)


def test_transport_refuses_conditions_it_would_leak() -> None:
    coupling = MinibatchOT(GaussianSource((2,)))
    x1 = torch.zeros(4, 2)
    with pytest.raises(UserError, match=r"'context'.*independent coupling"):
        coupling.pair(x1, {"context": torch.zeros(4, 2)}, seeded())
    with pytest.raises(UserError, match="whole numbers"):
        coupling.pair(x1, {"label": torch.zeros(4)}, seeded())
    with pytest.raises(UserError, match="at least 2"):
        MinibatchOT(GaussianSource((2,)), batch_size=1)


@pytest.mark.parametrize("shape", [(6,), (3, 8, 8), (1, 5, 7)])
def test_inpainting_keeps_the_known_part_and_redraws_the_rest(shape: tuple[int, ...]) -> None:
    x1 = 10 + torch.randn(400, *shape, generator=seeded(1))
    pair = Inpainting().pair(x1, {}, seeded(2))
    channels = shape[0] if len(shape) == 1 else 1
    mask, known = pair.cond["context"][:, :channels], pair.cond["context"][:, channels:]
    assert torch.equal(known, mask * x1)
    full = mask.expand_as(x1).bool()
    assert torch.equal(pair.x0[full], x1[full])
    hidden = pair.x0[~full]
    assert abs(float(hidden.mean())) < 4 / math.sqrt(len(hidden))
    assert float(hidden.std()) == pytest.approx(1, abs=4 / math.sqrt(2 * len(hidden)))
    assert bool((mask == 0).flatten(1).any(1).all())


def test_vector_masks_are_uniform_in_size_and_place() -> None:
    mask = random_mask(torch.zeros(20_000, 4), seeded(3))
    sizes = torch.bincount(mask.sum(1).long(), minlength=5) / 20_000
    torch.testing.assert_close(sizes, torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0]), rtol=0, atol=0.015)
    torch.testing.assert_close(mask.mean(0), torch.full((4,), 1.5 / 4), rtol=0, atol=0.015)


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 1)])
def test_image_masks_hide_one_rectangle_and_halves_half_of_the_time(size: tuple[int, int]) -> None:
    height, width = size
    hidden = random_mask(torch.zeros(4000, 2, height, width), seeded(4))[:, 0] == 0
    tall, wide = hidden.any(2).sum(1), hidden.any(1).sum(1)
    assert torch.equal(hidden.sum((1, 2)), tall * wide)  # a full block ...
    for line in (hidden.any(2), hidden.any(1)):  # ... without gaps
        assert bool((line.int().diff(dim=1).abs().sum(1) + line[:, 0] + line[:, -1] == 2).all())
    if size == (8, 8):
        half = ((tall == 4) & (wide == 8)) | ((tall == 8) & (wide == 4))
        assert float(half.float().mean()) == pytest.approx(0.5, abs=0.04)
        corners = hidden[half][:, [0, 0, -1, -1], [0, -1, 0, -1]].float().mean(0)
        torch.testing.assert_close(corners, torch.full((4,), 0.5), rtol=0, atol=0.06)


def test_super_resolution_starts_from_block_means_plus_noise() -> None:
    x1 = torch.randn(2000, 2, 4, 6, generator=seeded(1), dtype=torch.float64)
    pair = SuperResolution(2, 0.3).pair(x1, {}, seeded(2))
    blocks = x1.reshape(2000, 2, 2, 2, 3, 2).mean((3, 5), keepdim=True).expand(-1, -1, -1, 2, -1, 2)
    torch.testing.assert_close(pair.cond["context"], blocks.reshape(x1.shape))
    noise = pair.x0 - pair.cond["context"]
    assert float(noise.std()) == pytest.approx(0.3, rel=0.01)
    assert abs(float((noise * x1).mean())) < 0.005
    vector = block_average(torch.tensor([[1.0, 3.0, 5.0, 9.0]]), 2)
    assert vector.tolist() == [[2.0, 2.0, 7.0, 7.0]]


def test_super_resolution_of_gaussians_follows_the_joint_gaussian_velocity() -> None:
    """x0 = M x1 + sigma z is jointly Gaussian: regressing x1 - x0 on x_t must find the matrix formula."""
    n, sigma, t = 200_000, 0.4, 0.6
    factor = torch.randn(4, 4, generator=seeded(1), dtype=torch.float64)
    cov1 = factor @ factor.T / 4 + 0.2 * torch.eye(4, dtype=torch.float64)
    x1 = torch.randn(n, 4, generator=seeded(2), dtype=torch.float64) @ torch.linalg.cholesky(cov1).T
    pair = SuperResolution(2, sigma).pair(x1, {}, seeded(3))
    x = (1 - t) * pair.x0 + t * pair.x1
    slope = torch.linalg.lstsq(x, pair.x1 - pair.x0).solution  # v(x) = x @ slope
    m = torch.kron(torch.eye(2), torch.full((2, 2), 0.5)).double()
    cov0 = m @ cov1 @ m.T + sigma**2 * torch.eye(4)
    zero, eye = torch.zeros(4), torch.eye(4, dtype=torch.float64)
    exact = joint_gaussian_velocity(eye, torch.full((4,), t), zero, zero, cov0, cov1, cov1 @ m.T)
    torch.testing.assert_close(slope, exact, rtol=0, atol=0.02)


def test_stored_pairs_take_their_noise_from_the_conditions() -> None:
    x0, x1 = torch.randn((2, 5, 3), generator=seeded())
    cond = {"x0": x0, "label": torch.arange(5)}
    pair = Paired("hash").pair(x1, cond, seeded())
    assert torch.equal(pair.x0, x0)
    assert set(pair.cond) == {"label"}
    assert set(cond) == {"x0", "label"}
    with pytest.raises(UserError, match=r"cond\['x0'\]"):
        Paired("hash").pair(x1, {}, seeded())


def test_wrong_inputs_are_refused() -> None:
    coupling = Independent(GaussianSource((3,)))
    with pytest.raises(UserError, match="equal shapes"):
        coupling.pair(torch.zeros(4, 2), {}, seeded())
    with pytest.raises(UserError, match="one row of it per row"):
        coupling.pair(torch.zeros(4, 3), {"label": torch.zeros(5)}, seeded())
    with pytest.raises(UserError, match="at least one row"):
        EmpiricalSource(torch.zeros(0, 2))
    with pytest.raises(UserError, match="sigma > 0"):
        SuperResolution(2, 0.0)
    with pytest.raises(UserError, match="multiples of 3"):
        SuperResolution(3, 0.1).pair(torch.zeros(2, 1, 8, 8), {}, seeded())
    with pytest.raises(UserError, match="'context' itself"):
        Inpainting().pair(torch.zeros(2, 3), {"context": torch.zeros(2, 3)}, seeded())
    with pytest.raises(UserError, match="vectors"):
        random_mask(torch.zeros(2, 3, 4), seeded())


def test_inpainting_base_can_be_made_for_a_given_mask() -> None:
    x1, noise = torch.ones(1, 3), torch.full((1, 3), 5.0)
    x0, context = inpainting_base(x1, torch.tensor([[1.0, 0.0, 1.0]]), noise)
    assert x0.tolist() == [[1, 5, 1]]
    assert context.tolist() == [[1, 0, 1, 1, 0, 1]]
