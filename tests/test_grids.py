"""Time grids: ends, monotony, formulas, explicit times, and every refusal."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from fewstep.errors import UserError
from fewstep.flow.grids import GRIDS, check_steps, check_times, explicit_times, make_grid

NAMED = ["uniform", "shift", "shift:0.1", "shift:0.3", "shift:7", "shift:100", "quadratic", "quadratic:-2"]
NAMED += ["quadratic:0.5", "quadratic:3", "quadratic:-1.5", "karras", "karras:3", "karras:7,20,0.01"]
NAMED += ["logit_normal", "logit_normal:-1,0.7", "logit_normal:0.5", "uniform_lambda", "uniform_lambda:-3,7"]
NAMED += ["sigmoid", "sigmoid:1e-3", "sigmoid:20"]


def logit(t: np.ndarray) -> np.ndarray:
    return np.log(t) - np.log1p(-t)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 1000])
@pytest.mark.parametrize("spec", NAMED)
def test_named_grids_rise_from_exactly_zero_to_exactly_one(spec: str, steps: int) -> None:
    times = make_grid(spec, steps)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (0.0, 1.0)
    assert np.all(np.diff(times) > 0)
    assert all(type(t) is float for t in times)


def test_every_grid_has_its_formula_tested_here() -> None:
    assert set(GRIDS) == {spec.partition(":")[0] for spec in NAMED}


def test_uniform_is_k_over_n() -> None:
    assert make_grid("uniform", 8) == tuple(k / 8 for k in range(9))
    assert make_grid(steps=3) == (0.0, 1 / 3, 2 / 3, 1.0)


@pytest.mark.parametrize("s", [0.25, 1.0, 1.5, 3.0, 12.0])
def test_shift_moves_log_snr_by_minus_log_s(s: float) -> None:
    """lambda = log(alpha / sigma) = logit t on the linear path; shift:s is lambda - log s."""
    inner, before = np.array(make_grid(f"shift:{s}", 16)[1:-1]), np.array(make_grid("uniform", 16)[1:-1])
    np.testing.assert_allclose(logit(inner), logit(before) - np.log(s), atol=1e-12)


def test_shift_is_the_noise_level_formula_of_its_paper() -> None:
    """(arXiv:2403.03206, eq. 23): sigma' = s sigma / (1 + (s - 1) sigma)."""
    sigma = 1 - np.array(make_grid("uniform", 10))
    expected = 1 - 3 * sigma / (1 + 2 * sigma)
    np.testing.assert_allclose(make_grid("shift", 10), expected, atol=1e-15)


def test_shifts_compose_and_one_is_uniform() -> None:
    np.testing.assert_allclose(make_grid("shift:1", 9), make_grid("uniform", 9), atol=1e-16)
    two = np.array(make_grid("shift:2", 9))
    np.testing.assert_allclose(two / (two + 3 * (1 - two)), make_grid("shift:6", 9), atol=1e-15)


def test_quadratic_is_dense_near_noise_or_near_data() -> None:
    np.testing.assert_allclose(make_grid("quadratic", 4), [0, 1 / 16, 1 / 4, 9 / 16, 1])
    np.testing.assert_allclose(make_grid("quadratic:-2", 4), [0, 7 / 16, 3 / 4, 15 / 16, 1])
    np.testing.assert_allclose(make_grid("quadratic:3", 2), [0, 1 / 8, 1])
    mirrored = 1 - np.array(make_grid("quadratic:2.5", 12))[::-1]
    np.testing.assert_allclose(make_grid("quadratic:-2.5", 12), mirrored, atol=1e-15)


def test_karras_is_the_formula_of_its_paper() -> None:
    """(arXiv:2206.00364, eq. 5): sigma_i = (smax^(1/rho) + i/(N-1) (smin^(1/rho) - smax^(1/rho)))^rho, sigma_N = 0."""
    i, n = np.arange(1, 10), 10
    sigma = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(make_grid("karras", n), [0, *(1 / (1 + sigma)), 1], rtol=1e-13)
    assert make_grid("karras", 3)[2] == pytest.approx(1 / 1.002)
    ratio = 1 / np.array(make_grid("karras:1,4,1", 4)[1:-1]) - 1
    np.testing.assert_allclose(ratio, [3, 2, 1])  # rho = 1: even steps in sigma / alpha


@pytest.mark.parametrize(("mu", "s"), [(0.0, 1.0), (-0.8, 0.6), (1.0, 2.0)])
def test_logit_normal_grids_are_the_laws_quantiles(mu: float, s: float) -> None:
    """logit(t_k) is normal with mean mu and deviation s: its distribution function at t_k is k/N."""
    inner = logit(np.array(make_grid(f"logit_normal:{mu},{s}", 12)[1:-1]))
    levels = [NormalDist(mu, s).cdf(value) for value in inner]
    np.testing.assert_allclose(levels, np.arange(1, 12) / 12, atol=1e-12)


def test_uniform_lambda_steps_evenly_in_log_snr() -> None:
    np.testing.assert_allclose(logit(np.array(make_grid("uniform_lambda", 10)[1:-1])), np.arange(-4, 5), atol=1e-12)
    np.testing.assert_allclose(logit(np.array(make_grid("uniform_lambda:-1,3", 4)[1:-1])), [0, 1, 2], atol=1e-12)
    assert make_grid("uniform_lambda:2", 7) == make_grid("uniform_lambda:-2,2", 7)


@pytest.mark.parametrize(
    "spec",
    [
        "0,0.25,1",
        " 0, 0.25 ,1",
        "0,.25,1,",
        [0, 0.25, 1],
        (0.0, 0.25, 1.0),
        np.array([0, 0.25, 1]),
        iter([0, 0.25, 1]),
    ],
)
def test_explicit_times_are_read_from_words_and_sequences(spec: object) -> None:
    assert make_grid(spec) == (0.0, 0.25, 1.0)  # type: ignore[arg-type]


def test_explicit_times_run_in_either_direction_and_need_not_reach_the_ends() -> None:
    assert make_grid("1,0.5,0") == (1.0, 0.5, 0.0)
    assert make_grid([0.2, 0.7]) == (0.2, 0.7)
    assert make_grid((0.9, 0.1), steps=1) == (0.9, 0.1)
    assert make_grid("1e-3,1") == (0.001, 1.0)


def test_names_are_not_taken_for_times() -> None:
    assert explicit_times("uniform") is None
    assert explicit_times("shift:3") is None
    assert explicit_times("0.5,1") == (0.5, 1.0)


@pytest.mark.parametrize(
    ("spec", "steps", "message"),
    [
        ("unifrm", 4, "unknown grid 'unifrm': did you mean 'uniform'"),
        ("shfit:3", 4, "unknown grid 'shfit': did you mean 'shift'"),
        ("", 4, "unknown grid ''"),
        ("uniform", None, "needs the number of steps: pass steps=N"),
        ("uniform:2", 4, "takes no value"),
        ("shift:0", 4, "needs a positive value"),
        ("shift:-3", 4, "needs a positive value"),
        ("shift:three", 4, "'three' is not a number"),
        ("shift:nan", 4, "must be finite"),
        ("shift:inf", 4, "must be finite"),
        ("shift:1e-300", 4, "squeezes times together"),
        ("quadratic:0", 4, "non-zero power"),
        ("shift:3,4", 4, "at most 1 value, got 'shift:3,4'"),
        ("logit_normal:0,1,2", 4, "at most 2 values"),
        ("logit_normal:0,", 4, "'' is not a number"),
        ("logit_normal:0,0", 4, "s = 0.0 is a standard deviation and must be positive"),
        ("logit_normal:0,1e9", 9, "squeezes times together"),
        ("karras:0", 4, "needs rho > 0"),
        ("karras:7,1,2", 4, "largest > smallest"),
        ("uniform_lambda:-5", 4, "needs lambda to grow, got 5 to -5"),
        ("uniform_lambda:0,4000", 4, "squeezes times together"),
        ("quadratic:5000", 4, "squeezes times together"),
        ("0,0.5,1", 3, "steps=3 and the explicit grid of 2 steps contradict each other"),
        ((0, 0.5, 1), 1, "contradict each other"),
        ("0", None, "at least two times"),
        ([], None, "at least two times"),
        ("0,x,1", None, "not a list of times"),
        ("0;0.5;1", None, "not a list of times"),
        ([0, None, 1], None, "not a list of times"),
        (3, None, "neither a name"),
        (None, 3, "neither a name"),
        ("-0.1,1", None, r"must lie in \[0, 1\].* got -0.1"),
        ([0, 1.5], None, r"must lie in \[0, 1\].* got 1.5"),
        ([0, float("nan"), 1], None, r"must lie in \[0, 1\].* got nan"),
        ([0, float("inf")], None, r"must lie in \[0, 1\].* got inf"),
        ("0,0.5,0.5,1", None, "turns round or repeats a time"),
        ("0,0.5,0.2,1", None, "turns round or repeats a time"),
        ([0, 1, 0], None, "turns round or repeats a time"),
    ],
)
def test_wrong_grids_are_refused_with_a_reason(spec: object, steps: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_grid(spec, steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "4", float("nan"), float("inf"), None, [3]])
def test_steps_that_are_no_count_are_refused(steps: object) -> None:
    with pytest.raises(UserError, match="steps must be a whole number of at least 1, got"):
        check_steps(steps)  # type: ignore[arg-type]


def test_counts_of_any_kind_become_integers() -> None:
    assert [check_steps(n) for n in (4, 4.0, np.int64(4))] == [4, 4, 4]
    assert make_grid("uniform", 4.0) == make_grid("uniform", 4)  # type: ignore[arg-type]


def test_check_times_accepts_what_it_should() -> None:
    check_times((0.0, 1.0))
    check_times((1.0, 0.999, 0.0))
    with pytest.raises(UserError, match="at least two times"):
        check_times((0.5,))
