"""Time laws: the quantile function agrees with the density, and with figures known for each law."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.errors import UserError
from fewstep.flow.paths import PATHS, AffinePath
from fewstep.flow.time_laws import TIME_LAWS, Exponential, LogitNormal, TimeLaw, Uniform, UShaped, make_time_law

LAWS = [
    Uniform(),
    LogitNormal(),
    LogitNormal(-1.2, 0.5),
    UShaped(),
    UShaped(0.5),
    UShaped(20.0),
    Exponential(),
    Exponential(-3.0),
    Exponential(20.0),
]
GRID = torch.linspace(0, 1, 400_001, dtype=torch.float64)


def moment(law: TimeLaw, power: int) -> float:
    return float(torch.trapezoid(law.density(GRID) * GRID**power, GRID))


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_density_integrates_to_one(law: TimeLaw) -> None:
    assert moment(law, 0) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_quantiles_invert_the_integrated_density(law: TimeLaw) -> None:
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    distribution = torch.cumulative_trapezoid(law.density(GRID), GRID)
    index = torch.searchsorted(distribution, u)
    torch.testing.assert_close(law.sample(u), GRID[1:][index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_sample_moments_are_those_of_the_density(law: TimeLaw) -> None:
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    t = law.sample(u)
    for power in (1, 2, 3):
        assert float((t**power).mean()) == pytest.approx(moment(law, power), abs=2e-6)


@pytest.mark.parametrize("law", LAWS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_stay_in_the_unit_interval_and_grow(law: TimeLaw, dtype: torch.dtype) -> None:
    u = torch.linspace(0, 1, 10_001, dtype=dtype)
    t = law.sample(u)
    assert t.dtype == dtype
    assert bool((t.diff() >= 0).all())
    assert float(t[0]) == pytest.approx(0.0, abs=2e-7)
    assert float(t[-1]) == pytest.approx(1.0, abs=2e-7)
    assert bool(((t >= 0) & (t < 1)).all())


EXTREME = [*LAWS, LogitNormal(0, 4), LogitNormal(6, 2), LogitNormal(20, 0.1), UShaped(100), Exponential(-80)]


@pytest.mark.parametrize("law", EXTREME, ids=repr)
@pytest.mark.parametrize("path", [path() for path in PATHS.values()], ids=repr)
def test_the_largest_uniform_draw_gives_a_time_whose_target_is_finite(law: TimeLaw, path: AffinePath) -> None:
    """torch.rand gives at most 1 - 2^-24 in float32 and 1 - 2^-53 in float64; 1 itself is what rounding can make."""
    for dtype, digits in ((torch.float32, 24), (torch.float64, 53)):
        u = torch.tensor([0.0, 1 - 2.0**-8, 1 - 2.0 ** (1 - digits), 1 - 2.0**-digits, 1.0], dtype=dtype)
        t = law.sample(u)
        assert float(t.max()) < 1.0
        assert float(t.min()) >= 0.0
        x = torch.ones(len(t), 2, dtype=dtype)
        assert bool(torch.isfinite(path.target(x, -x, t)).all())


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_draws_away_from_one_are_the_quantiles_themselves(law: TimeLaw) -> None:
    u = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    quantiles = law.quantile(u)
    assert float((quantiles < 1).float().mean()) > 0.9
    assert torch.equal(law.sample(u)[quantiles < 1], quantiles[quantiles < 1])


@pytest.mark.parametrize("law", [Uniform(), LogitNormal(0, 0.7), UShaped(4)], ids=repr)
def test_symmetric_laws_are_symmetric(law: TimeLaw) -> None:
    u = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    torch.testing.assert_close(law.sample(1 - u), 1 - law.sample(u))
    torch.testing.assert_close(law.density(1 - u), law.density(u))


def test_exponential_with_the_other_sign_is_the_mirror_image() -> None:
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(Exponential(-3).quantile(u), 1 - Exponential(3).quantile(1 - u))
    torch.testing.assert_close(Exponential(-3).density(u), Exponential(3).density(1 - u))


def test_ushape_figures() -> None:
    """a = 4: variance .11567, P(t < .1) = .1725, end / middle = cosh 2, and the sum of exponentials."""
    law = UShaped(4.0)
    t = torch.tensor([0.0, 0.5, 0.3], dtype=torch.float64)
    density = law.density(t)
    assert float(density[0] / density[1]) == pytest.approx(math.cosh(2), rel=1e-12)
    summed = 4 * (math.exp(1.2) + math.exp(2.8)) / (2 * (math.exp(4) - 1))
    assert float(density[2]) == pytest.approx(summed, rel=1e-12)
    assert moment(law, 2) - moment(law, 1) ** 2 == pytest.approx(0.11567, abs=5e-6)
    assert float(law.sample(torch.tensor(0.1725, dtype=torch.float64))) == pytest.approx(0.1, abs=5e-5)


def test_default_exponential_is_a_power_of_ten() -> None:
    law = Exponential()
    assert moment(law, 1) == pytest.approx(0.3232, abs=5e-5)
    ratio = law.density(torch.tensor([0.2, 0.7], dtype=torch.float64))
    assert float(ratio[0] / ratio[1]) == pytest.approx(10**0.5, rel=1e-12)


def test_logit_normal_quantiles_are_sigmoids_of_normal_quantiles() -> None:
    u = torch.tensor([0.158655254, 0.5, 0.841344746], dtype=torch.float64)
    expected = torch.sigmoid(torch.tensor([-1.5, 0.5, 2.5], dtype=torch.float64))
    torch.testing.assert_close(LogitNormal(0.5, 2.0).sample(u), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("spec", "law"),
    [
        ("uniform", Uniform()),
        ("logit_normal:0,1", LogitNormal(0, 1)),
        ("logit_normal:-0.4", LogitNormal(-0.4, 1)),
        ("ushape", UShaped(4)),
        ("ushape:2.5", UShaped(2.5)),
        ("exponential", Exponential(math.log(10))),
    ],
)
def test_specs_make_laws(spec: str, law: TimeLaw) -> None:
    assert make_time_law(spec) == law


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("logitnormal:0,1", "did you mean 'logit_normal'"),
        ("ushape:a", "write ushape:a"),
        ("ushape:1,2", "too many"),
        ("uniform:3", "it has no numbers"),
        ("logit_normal:0,-1", "must be positive"),
        ("ushape:0", r"\(0, 100\]"),
        ("exponential:0", "not 0"),
        ("exponential:nan", "finite"),
    ],
)
def test_bad_specs_say_what_to_write(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_time_law(spec)


def test_every_registered_law_has_defaults() -> None:
    assert {type(make_time_law(name)) for name in TIME_LAWS} == set(TIME_LAWS.values())
