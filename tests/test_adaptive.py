"""Adaptive solvers: the pair's own conditions, tolerances against closed forms and torchdiffeq, samples apart."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.errors import MissingExtra, UserError
from fewstep.flow import closed_form
from fewstep.flow.field import CountedField, Guided
from fewstep.solvers import adaptive
from fewstep.solvers.adaptive import ADAPTIVE, B_HAT, DENSE, A, B, C, solve_adaptive

UP, DOWN = (0.0, 1.0), (1.0, 0.0)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def mixture() -> closed_form.Mixture:
    return closed_form.mixture(torch.tensor([0.4, 0.6]), torch.tensor([[-1.2], [0.9]]), torch.tensor([0.3, 0.6]))


def gaussian(std: float = 0.5) -> closed_form.Gaussian:
    return closed_form.gaussian(torch.tensor([0.7, -0.4], dtype=torch.float64), std)


FLOWS: dict[str, Any] = {"gaussian": (gaussian(), 2), "mixture": (mixture(), 1)}


def run(
    velocity: Any, x0: Tensor, tolerance: float | None = None, *, name: str = "rk45", times: Any = UP, **cond: Any
) -> tuple[Tensor, Tensor]:
    end, _, nfe = solve_adaptive(name, tolerance, CountedField(velocity), x0, times, cond, trajectory=False)
    return end, nfe


def mapped(flow: Any, x: Tensor, t: float, r: float) -> Tensor:
    return flow.flow_map(x, x.new_full((len(x),), t), x.new_full((len(x),), r))


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def trees(order: int) -> list[tuple[Any, ...]]:
    """Rooted trees of an order, each the tuple of its branches."""
    if order == 1:
        return [()]
    found = set()
    for parts in _partitions(order - 1):
        for choice in itertools.product(*(trees(part) for part in parts)):
            found.add(tuple(sorted(choice, key=repr)))
    return sorted(found, key=repr)


def _partitions(n: int, least: int = 1) -> list[list[int]]:
    return [[n], *([k, *rest] for k in range(least, n // 2 + 1) for rest in _partitions(n - k, k))]


def size(tree: tuple[Any, ...]) -> int:
    return 1 + sum(map(size, tree))


def gamma(tree: tuple[Any, ...]) -> int:
    return size(tree) * int(np.prod([gamma(branch) for branch in tree], dtype=int))


def phi(tree: tuple[Any, ...], a: np.ndarray) -> np.ndarray:
    """Elementary weights of the stages."""
    return np.prod([a @ phi(branch, a) for branch in tree], axis=0) if tree else np.ones(len(a))


SQUARE = np.array([[*row, *[0.0] * (7 - len(row))] for row in A])


def test_rows_of_the_tableau_sum_to_their_times_and_the_last_stage_is_the_next_first() -> None:
    np.testing.assert_allclose(SQUARE.sum(1), C, atol=1e-14)
    assert (*A[-1], 0.0) == B
    assert len(A) == len(B) == len(B_HAT) == len(C) == len(DENSE) == 7


@pytest.mark.parametrize(("weights", "order"), [(B, 5), (B_HAT, 4)])
def test_both_weights_meet_butchers_order_conditions_and_no_more(weights: tuple[float, ...], order: int) -> None:
    """sum_i b_i phi_i(tree) = 1 / gamma(tree) for every tree up to the order; not one order higher."""
    defect = {
        q: max(abs(np.dot(weights, phi(tree, SQUARE)) - 1 / gamma(tree)) for tree in trees(q)) for q in range(1, 7)
    }
    assert [len(trees(q)) for q in range(1, 7)] == [1, 1, 2, 4, 9, 20]
    assert max(defect[q] for q in range(1, order + 1)) < 1e-14
    assert defect[order + 1] > 1e-5


def test_the_continuous_extension_is_of_order_four_and_meets_both_ends_smoothly() -> None:
    """b_i(theta) by solving x' = k_i alone; sum_i b_i(theta) phi_i(tree) = theta^|tree| / gamma(tree)."""
    theta = torch.linspace(0, 1, 9, dtype=torch.float64)
    one = torch.ones(9, 1, dtype=torch.float64)
    columns = []
    for i in range(7):
        slopes = [one * (i == j) for j in range(7)]
        columns.append(adaptive.dense(theta, torch.ones_like(theta), 0 * one, slopes)[:, 0].numpy())
    b = np.stack(columns, 1)
    for q in range(1, 5):
        for tree in trees(q):
            np.testing.assert_allclose(b @ phi(tree, SQUARE), theta.numpy() ** q / gamma(tree), atol=1e-13)
    np.testing.assert_allclose(b[-1], B, atol=1e-14)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("times", [UP, DOWN, (0.2, 0.9), (0.8, 0.3)])
def test_the_error_follows_the_tolerance(flow: str, times: tuple[float, float]) -> None:
    """Some tens of steps, each within the tolerance, add up."""
    exact, dimension = FLOWS[flow]
    x = mapped(exact, noise(64, dimension), 0.0, times[0])
    truth = mapped(exact, x, *times)
    tolerances = (1e-5, 1e-7, 1e-9)
    errors = [rms(run(exact.velocity, x, tolerance, times=times)[0] - truth) for tolerance in tolerances]
    assert all(error < 30 * tolerance for error, tolerance in zip(errors, tolerances, strict=True)), errors


def rotation(x: Tensor, t: Tensor) -> Tensor:
    return 20 * torch.stack([-x[:, 1], x[:, 0]], 1)


def test_error_and_cost_are_the_theoretical_powers_of_the_tolerance() -> None:
    """Estimates ~ h^5 give steps ~ tolerance^(1/5), and local errors ~ h^6 in 1/h steps an error ~ tolerance."""
    x, tolerances = noise(16, 2), (1e-6, 1e-8, 1e-10)
    x1 = torch.stack([x[:, 0] * np.cos(20) - x[:, 1] * np.sin(20), x[:, 0] * np.sin(20) + x[:, 1] * np.cos(20)], 1)
    runs = [run(rotation, x, tolerance) for tolerance in tolerances]
    errors = [rms(end - x1) for end, _ in runs]
    calls = [float(nfe.double().mean()) for _, nfe in runs]
    assert np.polyfit(np.log(tolerances), np.log(errors), 1)[0] == pytest.approx(1.0, abs=0.1)
    assert np.polyfit(np.log(tolerances), np.log(calls), 1)[0] == pytest.approx(-0.2, abs=0.01)


def test_the_default_tolerance_is_1e_5() -> None:
    x = noise(8, 1)
    default, nfe = run(mixture().velocity, x)
    explicit, calls = run(mixture().velocity, x, 1e-5)
    assert torch.equal(default, explicit)
    assert torch.equal(nfe, calls)
    assert not torch.equal(default, run(mixture().velocity, x, 1.1e-5)[0])


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("tolerance", [1e-5, 1e-7])
@pytest.mark.parametrize("times", [UP, DOWN])
def test_one_sample_costs_and_errs_as_in_torchdiffeq(flow: str, tolerance: float, times: tuple[float, float]) -> None:
    """The pairs differ in the fourth-order weights, torchdiffeq's being Shampine's."""
    pytest.importorskip("torchdiffeq")
    exact, dimension = FLOWS[flow]
    ours, theirs, calls = [], [], []
    for seed in range(5):
        x = mapped(exact, noise(1, dimension, seed=seed), 0.0, times[0])
        truth = mapped(exact, x, *times)
        end, nfe = run(exact.velocity, x, tolerance, times=times)
        other, cost = run(exact.velocity, x, tolerance, name="dopri5", times=times)
        ours.append(rms(end - truth))
        theirs.append(rms(other - truth))
        calls.append((int(nfe), int(cost)))
    assert np.mean(ours) < 2 * np.mean(theirs)
    mine, its = np.mean(calls, 0)
    assert mine == pytest.approx(its, rel=0.3)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_narrow_gaussian_is_solved_with_more_steps_near_the_data(name: str) -> None:
    """s = 1e-3: the velocity turns within (1 - t) ~ s."""
    if name == "dopri5":
        pytest.importorskip("torchdiffeq")
    flow, asked = gaussian(1e-3), []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t[0]))
        return flow.velocity(x, t)

    x = noise(1, 2)
    end, _ = run(velocity, x, 1e-6, name=name)
    assert rms(end - mapped(flow, x, 0.0, 1.0)) < 1e-5
    assert sum(t > 0.95 for t in asked) > 0.4 * len(asked), "in a twentieth of the time"


@pytest.mark.parametrize("flow", FLOWS)
def test_there_and_back_is_the_start(flow: str) -> None:
    exact, dimension = FLOWS[flow]
    x0 = noise(32, dimension)
    x1, _ = run(exact.velocity, x0, 1e-9)
    torch.testing.assert_close(run(exact.velocity, x1, 1e-9, times=DOWN)[0], x0, rtol=0, atol=1e-7)


def test_a_sample_does_not_depend_on_its_companions() -> None:
    """Companions are easy and hard: a linear flow, a narrow one, and a start ten times as far."""
    flow = gaussian(0.05)
    x = torch.cat([noise(3, 2), 10 * noise(2, 2, seed=1), torch.zeros(1, 2, dtype=torch.float64)])

    def velocity(x: Tensor, t: Tensor, hard: Tensor) -> Tensor:
        return torch.where(hard[:, None], flow.velocity(x, t), torch.ones_like(x))

    hard = torch.tensor([True, False, True, True, False, True])
    together, nfe = run(velocity, x, 1e-6, hard=hard)
    assert len(set(nfe.tolist())) > 2
    for i in range(len(x)):
        alone, calls = run(velocity, x[i : i + 1], 1e-6, hard=hard[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-13, atol=1e-13)
        assert int(calls) == int(nfe[i])


def test_conditions_are_cut_with_the_samples_and_others_are_handed_on() -> None:
    """Samples arrive after different numbers of steps, and the cut follows: each turns at its own speed."""
    speed = torch.tensor([0.0, 40.0, 1.0, 15.0], dtype=torch.float64)
    table = torch.arange(3.0)
    seen: list[int] = []

    def velocity(x: Tensor, t: Tensor, speed: Tensor, table: Tensor, word: str, none: None) -> Tensor:
        assert table.shape == (3,)
        assert (word, none) == ("as it is", None)
        assert len(speed) == len(x) == len(t)
        seen.append(len(x))
        return speed[:, None] * torch.stack([-x[:, 1], x[:, 0]], 1)

    x0 = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(4, 1)
    end, nfe = run(velocity, x0, 1e-8, speed=speed, table=table, word="as it is", none=None)
    torch.testing.assert_close(end, torch.stack([speed.cos(), speed.sin()], 1), rtol=0, atol=1e-5)
    assert nfe.argsort().tolist() == [0, 2, 3, 1]
    assert seen[0] == 4
    assert seen[-1] == 1
    assert sorted(seen, reverse=True) == seen


def test_calls_are_counted_for_every_sample() -> None:
    """A sample's calls are the batches it was in, and the last to arrive was in all of them."""
    widths: list[int] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        widths.append(len(x))
        return gaussian(0.05).velocity(x, t)

    field = CountedField(velocity)
    field.calls = 7
    _, _, nfe = solve_adaptive("rk45", 1e-6, field, 3 * noise(16, 2), UP, {}, trajectory=False)
    assert (nfe.dtype, nfe.shape) == (torch.int64, (16,))
    assert int(nfe.max()) == field.calls - 7 == len(widths)
    assert int(nfe.sum()) == sum(widths)
    assert set(((nfe - 2) % 6).tolist()) == {0}, "v at the start, the trial step, and six for every step"


def test_rejected_steps_are_counted() -> None:
    """A velocity that is nearly nothing, then a jump in its slope: first steps grow, and one is too long."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (50 * (t[:, None] - 0.7).clamp(min=0) * 10).sin().expand_as(x)

    starts: list[float] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        starts.append(float(t[0]))
        return velocity(x, t)

    end, nfe = run(watched, torch.zeros(1, 1, dtype=torch.float64), 1e-6)
    assert int(nfe) == len(starts)
    assert any(b < a - 0.02 for a, b in itertools.pairwise(starts)), "a step was taken back"
    assert float(end) == pytest.approx((1 - np.cos(150.0)) / 500, abs=5e-5)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_guided_evaluation_costs_two_calls(name: str) -> None:
    if name == "dopri5":
        pytest.importorskip("torchdiffeq")

    def velocity(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return -x if label is None else label[:, None] - x

    label, x = torch.tensor([1.0, 2.0], dtype=torch.float64), noise(2, 3)
    end, _, nfe = solve_adaptive(name, 1e-8, Guided(velocity, 3.0), x, UP, {"label": label}, trajectory=False)
    plain, calls = run(lambda x, t: 3 * label[: len(x), None] - x, x[1:] * 0 + x[:1], 1e-8, name=name)
    assert plain.shape == (1, 3)
    truth = 3 * label[:, None] + (x - 3 * label[:, None]) * np.exp(-1)
    torch.testing.assert_close(end, truth, rtol=0, atol=1e-7)
    if name == "rk45":
        assert int(nfe[0]) == 2 * int(calls)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("times", [(0.0, 0.13, 0.5, 0.51, 0.52, 1.0), (1.0, 0.9, 0.2, 0.0), (0.3, 0.4)])
def test_states_at_given_times_are_the_flow_and_cost_nothing(name: str, times: tuple[float, ...]) -> None:
    if name == "dopri5":
        pytest.importorskip("torchdiffeq")
    flow = mixture()
    x = mapped(flow, noise(16, 1), 0.0, times[0])
    field = CountedField(flow.velocity)
    end, states, nfe = solve_adaptive(name, 1e-7, field, x, times, {}, trajectory=True)
    assert len(states) == len(times)
    assert torch.equal(states[0], x)
    assert torch.equal(states[-1], end)
    for time, state in zip(times, states, strict=True):
        torch.testing.assert_close(state, mapped(flow, x, times[0], time), rtol=0, atol=2e-5)
    plain, calls = run(flow.velocity, x, 1e-7, name=name, times=times)
    torch.testing.assert_close(plain, end, rtol=1e-12, atol=1e-12)
    assert torch.equal(calls, nfe)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("times", [UP, DOWN, (0.1, 0.7), (0.7, 0.1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_time_outside_is_asked_for_and_the_dtype_is_kept(
    name: str, times: tuple[float, float], dtype: torch.dtype
) -> None:
    if name == "dopri5":
        pytest.importorskip("torchdiffeq")
    asked: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert (x.dtype, t.dtype, t.shape) == (dtype, dtype, (len(x),))
        asked.append(t)
        return gaussian(0.3).velocity(x, t).double()

    end, _ = run(velocity, noise(4, 2, dtype=dtype), 1e-5, name=name, times=times)
    assert end.dtype == dtype
    low, high = torch.tensor(sorted(times), dtype=torch.float64).to(dtype)
    assert all(t.min() >= low and t.max() <= high for t in asked)


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (3, 2, 3, 3)])
def test_images_are_solved_as_vectors_are(shape: tuple[int, ...]) -> None:
    flow, x = closed_form.gaussian(0.2, 0.5, shape=shape[1:]), noise(*shape)
    end, _ = run(flow.velocity, x, 1e-8)
    torch.testing.assert_close(end, mapped(flow, x, 0.0, 1.0), rtol=0, atol=1e-6)


def test_gradients_flow_through_the_accepted_steps() -> None:
    """d x(1) / d x(0) = s on the Gaussian flow, and d x(1) / d m = 1."""
    x = noise(4, 2).requires_grad_()
    flow = gaussian(0.5)
    end, _ = run(flow.velocity, x, 1e-9)
    (slope,) = torch.autograd.grad(end.sum(), x)
    torch.testing.assert_close(slope, torch.full_like(slope, 0.5), rtol=0, atol=1e-7)


def test_states_are_not_written_into() -> None:
    x = noise(4, 2)
    before = x.clone()
    end, states, _ = solve_adaptive("rk45", None, CountedField(lambda x, t: x), x, UP, {}, trajectory=True)
    assert torch.equal(x, before)
    torch.testing.assert_close(end, before * np.exp(1), rtol=0, atol=1e-4)
    assert len(states) == 2


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e6])
def test_starts_of_any_size_are_solved(scale: float) -> None:
    """x' = 1 - x, from float32 starts as well."""
    for dtype in (torch.float64, torch.float32):
        x = scale * noise(3, 2, dtype=dtype)
        end, nfe = run(lambda x, t: 1 - x, x)
        torch.testing.assert_close(end, 1 + (x - 1) * np.exp(-1), rtol=2e-5, atol=2e-5)
        assert int(nfe.max()) < 60


def bad_half(x: Tensor, t: Tensor) -> Tensor:
    return torch.where(t[:, None] > 0.5, torch.nan, 1.0).expand_as(x).to(x)


def singular(x: Tensor, t: Tensor) -> Tensor:
    """x' = x^2 from 2: infinite at t = 1/2."""
    return x**2


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_solve_that_cannot_go_on_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "dopri5":
        pytest.importorskip("torchdiffeq")
    one = torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(UserError, match=r"NaN.*t = 0\.5.*1e-05"):
        run(bad_half, one, name=name)
    with pytest.raises(UserError, match=r"NaN.*near t = 0,"):
        run(lambda x, t: x * torch.nan, one, name=name)
    with pytest.raises(UserError, match="tolerance"):
        run(singular, 2 * one, 1e-4, name=name)
    with pytest.raises(UserError, match=r"input of shape"):
        run(lambda x, t: x[:, :0], one, name=name)
    monkeypatch.setattr(adaptive, "MAX_CALLS", 100)
    with pytest.raises(UserError, match=r"tolerance 1e-07 has used more than 100"):
        run(lambda x, t: torch.cos(300 * t)[:, None] * 300 + 0 * x, one, 1e-7, name=name)


@pytest.mark.parametrize("tolerance", [0.0, -1e-3, float("nan"), float("inf"), True, "1e-5", 1e-17])
def test_tolerances_that_mean_nothing_are_refused(tolerance: Any) -> None:
    with pytest.raises(UserError, match="tolerance"):
        run(lambda x, t: x, noise(2, 2), tolerance)


def test_a_dtype_too_coarse_for_the_tolerance_is_refused() -> None:
    with pytest.raises(UserError, match="float32"):
        run(lambda x, t: x, noise(2, 2, dtype=torch.bfloat16))


def test_unknown_names_and_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="rk45"):
        run(lambda x, t: x, noise(2, 2), name="rk54")
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(MissingExtra, match=r"fewstep\[adaptive\]"):
        run(lambda x, t: x, noise(2, 2), name="dopri5")
