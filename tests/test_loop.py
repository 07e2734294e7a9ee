"""The two loops agree and keep their manners; tables, adaptive and compiled solves behind ``fs.solve``."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.errors import UserError
from fewstep.flow import closed_form
from fewstep.flow.field import CountedField, Guided
from fewstep.flow.paths import expand_time
from fewstep.solvers import compiled
from fewstep.solvers.adaptive import ADAPTIVE
from fewstep.solvers.loop import MAX_DENSE_COEFFICIENTS, run, run_terms
from fewstep.solvers.solve import plan
from fewstep.solvers.tables import ADAPTIVE_NAMES, find_solver, table

UNEVEN = (0.0, 0.1, 0.35, 0.5, 0.9, 1.0)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def nonlinear(x: Tensor, t: Tensor) -> Tensor:
    """No symmetry, no closed form, every entry coupled to every other."""
    return torch.sin(x.roll(1, -1) * (1 + expand_time(t, x))) - 0.3 * x + expand_time(t, x) ** 2


def test_a_table_is_a_solver() -> None:
    made = table("unipc2", UNEVEN)
    x0 = noise(5, 3)
    by_table = fs.solve(nonlinear, x0, solver=made, trajectory=True)
    by_name = fs.solve(nonlinear, x0, solver="unipc2", grid=UNEVEN, trajectory=True)
    assert by_table.trajectory is not None
    assert by_name.trajectory is not None
    assert torch.equal(by_table.trajectory, by_name.trajectory)
    assert by_table.times == UNEVEN
    assert by_table.nfe == 5
    assert plan(made, "uniform", None) is plan(made, "uniform", None)


def test_a_table_takes_no_steps_and_no_grid_and_runs_one_way() -> None:
    made, x0 = table("heun", UNEVEN), noise(2, 2)
    for arguments in ({"steps": 5}, {"grid": "shift"}, {"grid": UNEVEN}):
        with pytest.raises(UserError, match="table of 5 steps on a grid of its own: leave steps and grid out"):
            fs.solve(nonlinear, x0, solver=made, **arguments)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"cannot be run backwards: name a solver \(solver='heun'\)"):
        fs.invert(nonlinear, x0, solver=made)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("path", ["linear", "cosine", "vp", "interpolant"])
@pytest.mark.parametrize("solver", ["ab3", "abm2", "deis2", "deis3-rho", "dpm++2m", "dpm++3m", "unipc2", "unipc3-t"])
def test_both_loops_compute_the_same_to_rounding(solver: str, path: str, dtype: torch.dtype) -> None:
    """On a contraction, so that rounding does not grow by the flow itself."""

    def v(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x.roll(1, -1)) - x + expand_time(t, x)

    x0 = noise(6, 2, 3, dtype=dtype)
    for grid, backward in (("uniform", False), ("uniform", True), ("shift:3", False), ("karras", False)):
        made = plan(solver, grid, 8, path=path, backward=backward)
        with torch.no_grad():
            x, states = run(made, CountedField(v), x0, {}, trajectory=True)
            times = made.times(6, dtype, x0.device)
            y, others = run_terms(made.rows, made.end, made.slots, CountedField(v), x0, times, {}, True)
        scale = max(float(state.abs().max()) for state in others)
        error = max(float((a - b).abs().max()) for a, b in zip([x, *states], [y, *others], strict=True))
        assert error <= 64 * torch.finfo(dtype).eps * max(scale, 1.0)


def test_short_histories_keep_their_terms_and_long_ones_of_small_problems_take_the_dense_form() -> None:
    assert not any(plan(solver, "uniform", 8).dense for solver in ("euler", "midpoint", "heun", "rk4", "ab2", "ddim"))
    assert all(plan(solver, "uniform", 8).dense for solver in ("dpm++2m", "unipc2", "deis3", "ab4", "unipc3"))
    assert not plan("sde", "uniform", 8).dense


def test_the_dense_form_is_left_where_its_coefficients_are_large() -> None:
    """Sums of large terms that cancel would cost digits."""
    made = plan("ab4", "karras", 8)
    a, b = made.table.dense
    assert (np.abs(a) + np.abs(b).sum(1)).max() > MAX_DENSE_COEFFICIENTS
    assert not made.dense


@pytest.mark.parametrize("solver", ["unipc2", "deis3", "ab4"])
def test_a_network_may_use_the_memory_of_its_result_again(solver: str) -> None:
    x0 = noise(4, 3)
    memory = torch.empty_like(x0)

    def v(x: Tensor, t: Tensor) -> Tensor:
        return memory.copy_(nonlinear(x, t))

    expected = fs.solve(nonlinear, x0, solver=solver, steps=6).x
    assert torch.equal(fs.solve(v, x0, solver=solver, steps=6).x, expected)


@pytest.mark.parametrize("solver", ["unipc2", "rk4"])
def test_states_that_a_network_has_seen_are_never_changed(solver: str) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def v(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, x.clone()))
        return nonlinear(x, t)

    ends = [fs.solve(v, noise(4, 3, seed=k), solver=solver, steps=6, trajectory=True) for k in range(3)]
    copies = [end.x.clone() for end in ends]
    fs.solve(v, noise(4, 3, seed=9), solver=solver, steps=6)
    assert all(torch.equal(x, copy) for x, copy in seen)
    assert all(torch.equal(end.x, copy) for end, copy in zip(ends, copies, strict=True))


def test_a_network_may_solve_with_the_same_plan_itself() -> None:
    x0 = noise(4, 3)

    def inner(x: Tensor, t: Tensor) -> Tensor:
        return fs.solve(nonlinear, x, solver="unipc2", steps=4).x

    by_terms = fs.solve(inner, x0, solver="unipc2", steps=4, grad=True).x.detach()
    for _ in range(2):
        torch.testing.assert_close(fs.solve(inner, x0, solver="unipc2", steps=4).x, by_terms, rtol=1e-13, atol=1e-13)


def test_the_dense_form_works_across_inference_mode_and_precision_of_the_network() -> None:
    x0 = noise(4, 3, dtype=torch.float32)
    grid = (0.0, 0.15, 0.45, 0.8, 1.0)  # nobody else's plan
    with torch.inference_mode():
        first = fs.solve(nonlinear, x0, solver="unipc2", grid=grid).x
    assert torch.equal(fs.solve(nonlinear, x0, solver="unipc2", grid=grid).x, first)
    by_terms = fs.solve(nonlinear, x0, solver="unipc2", grid=grid, grad=True).x
    torch.testing.assert_close(by_terms, first, rtol=1e-6, atol=1e-6)

    def double(x: Tensor, t: Tensor) -> Tensor:
        return nonlinear(x, t).double()

    x = fs.solve(double, x0, solver="unipc2", grid=grid).x
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, first, rtol=1e-6, atol=1e-6)


def test_the_adaptive_solvers_are_the_named_ones_and_have_no_table() -> None:
    assert sorted(ADAPTIVE) == sorted(ADAPTIVE_NAMES)
    for name in ("rk45", "rk45:1e-3"):
        with pytest.raises(UserError, match="'rk45' chooses its own steps, so it has no table"):
            find_solver(name)


def test_an_adaptive_solver_keeps_its_tolerance_and_counts_every_sample() -> None:
    flow = closed_form.mixture(torch.tensor([0.4, 0.6]), torch.tensor([[-1.2], [0.9]]), torch.tensor([0.5, 0.6]))
    v, x0 = flow.velocity, noise(64, 1)
    x1 = flow.flow_map(x0, x0.new_zeros(64), x0.new_ones(64))
    calls: list[int] = []

    def counting(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return v(x, t)

    loose, tight = (fs.solve(counting, x0, solver=f"rk45:{tolerance}") for tolerance in ("1e-4", "1e-8"))
    assert float((tight.x - x1).abs().max()) < 1e-7 < 1e-6 < float((loose.x - x1).abs().max()) < 1e-2
    for solution in (loose, tight):
        assert solution.nfe_each is not None
        assert solution.nfe == -(-int(solution.nfe_each.sum()) // len(x0))
    assert sum(calls) == int(loose.nfe_each.sum() + tight.nfe_each.sum())  # type: ignore[union-attr]
    assert fs.solve(v, x0, steps=2).nfe_each is None


def test_an_adaptive_solver_takes_times_for_its_trajectory_and_runs_backwards() -> None:
    flow = closed_form.gaussian(torch.tensor([0.7, -0.4]), torch.tensor([0.6, 1.4]))
    v, x0 = flow.velocity, noise(64, 2)
    zero = x0.new_zeros(64)
    solution = fs.solve(v, x0, solver="rk45:1e-9", grid=UNEVEN, trajectory=True)
    assert solution.trajectory is not None
    assert solution.times == UNEVEN
    for t, state in zip(UNEVEN, solution.trajectory, strict=True):
        torch.testing.assert_close(state, flow.flow_map(x0, zero, zero + t), rtol=1e-6, atol=1e-6)
    back = fs.invert(v, flow.flow_map(x0, zero, zero + 1), solver="rk45:1e-9")
    assert back.times == (1.0, 0.0)
    torch.testing.assert_close(back.x, x0, rtol=1e-7, atol=1e-7)
    w = noise(3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fs.solve(nonlinear, x, solver="rk45:1e-9", grad=True).x, w)


@pytest.mark.parametrize("solver", ["euler", "unipc2"])
def test_a_traced_solve_equals_the_loop_and_counts_its_calls(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tracer alone; the compiler itself is in the slow test."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    layer = nn.Linear(3, 3)

    def v(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return layer(x) if label is None else layer(x) + label[:, None]

    x0, guided, cond = noise(4, 3, dtype=torch.float32), Guided(v, 2.0), {"label": torch.arange(4)}
    for field, given, calls in ((v, {}, 3), (guided, cond, 6), (guided, cond, 6)):
        ours = fs.solve(field, x0, solver=solver, steps=3, cond=given, compile=True, trajectory=True)
        plain = fs.solve(field, x0, solver=solver, steps=3, cond=given, trajectory=True)
        torch.testing.assert_close(ours.trajectory, plain.trajectory, rtol=1e-5, atol=1e-5)
        assert ours.nfe == plain.nfe == calls
    with pytest.raises(UserError, match="cannot draw the noise of 'sde'"):
        fs.solve(v, x0, solver="sde", steps=3, compile=True)


@pytest.mark.slow
def test_a_compiled_solve_equals_the_loop_forgets_its_network_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # the compiler's shared cache does not distinguish the instruction sets that ATEN_CPU_CAPABILITY chooses
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    net = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 2))

    class Velocity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.net(x) * t[:, None]

    v, x0 = Velocity(), noise(8, 2, dtype=torch.float32)
    ours = fs.solve(v, x0, solver="unipc2", steps=3, compile=True)
    torch.testing.assert_close(ours.x, fs.solve(v, x0, solver="unipc2", steps=3).x, rtol=1e-5, atol=1e-5)
    assert ours.nfe == 3
    with torch.no_grad():
        net[0].weight.mul_(1.5)  # a program is of a network, not of its weights
    again = fs.solve(v, x0, solver="unipc2", steps=3, compile=True).x
    torch.testing.assert_close(again, fs.solve(v, x0, solver="unipc2", steps=3).x, rtol=1e-5, atol=1e-5)
    gone = weakref.ref(v)
    del v
    gc.collect()
    assert gone() is None
    monkeypatch.setattr(compiled, "BACKEND", "no such compiler")
    with pytest.raises(UserError, match=r"could not be compiled .*: leave compile out"):
        fs.solve(Velocity(), x0, solver="unipc2", steps=3, compile=True)
