"""Picked, refined and fitted samplers against the exact flow of a mixture."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.diagnostics.fit import Unknowns, can_start
from fewstep.diagnostics.pick import candidates, restore
from fewstep.diagnostics.pilot import Pilot
from fewstep.errors import UserError
from fewstep.flow import closed_form
from fewstep.solvers.tables import table

FLOW = closed_form.mixture(
    torch.tensor([0.4, 0.6]), torch.tensor([[-1.2, 0.3], [0.9, -0.5]]), torch.tensor([0.25, 0.4])
)


def noise(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def truth(x: Tensor) -> Tensor:
    return FLOW.flow_map(x, x.new_zeros(len(x)), x.new_ones(len(x)))


def error(x0: Tensor, x1: Tensor, **how: object) -> float:
    return float((fs.solve(FLOW.velocity, x0, **how).x - x1).square().mean().sqrt())  # type: ignore[arg-type]


def test_the_reference_is_the_exact_flow() -> None:
    x0 = noise(128, 0)
    assert float((Pilot(FLOW.velocity, x0).x1 - truth(x0)).abs().max()) < 2e-3


def test_pilots_evaluate_tables_as_the_solver_loop_does_whatever_came_before() -> None:
    pilot = Pilot(FLOW.velocity, noise(32, 0))
    grid = (0.0, 0.2, 0.5, 0.7, 1.0)
    for name, times in (("ab3", grid), ("ab3", (*grid[:3], 0.8, 1.0)), ("unipc2", grid), ("heun", grid)):
        made = table(name, times)
        x = fs.solve(FLOW.velocity, pilot.x0, solver=made).x
        torch.testing.assert_close(pilot.end(made), x, rtol=1e-11, atol=1e-11)


def test_what_tables_have_in_common_is_evaluated_once() -> None:
    pilot = Pilot(FLOW.velocity, noise(8, 0))
    pilot.error(table("ab2", (0.0, 0.2, 0.5, 0.7, 1.0)))
    before = pilot.nfe
    pilot.error(table("ab2", (0.0, 0.2, 0.5, 0.8, 1.0)))
    assert pilot.nfe == before + 1  # only the call at 0.8 is new


@pytest.mark.parametrize("calls", [4, 8])
def test_auto_is_near_the_best_of_the_whole_scan_and_fitted_is_far_better_on_fresh_noise(calls: int) -> None:
    fresh = noise(2000, 9)
    x1 = truth(fresh)
    best = min(error(fresh, x1, solver=made) for _, _, made in candidates(calls))
    picked = fs.tune(FLOW.velocity, noise(2048, 1), calls=calls)
    fitted = fs.tune(FLOW.velocity, noise(2048, 1), calls=calls, kind="fitted")
    on_fresh = error(fresh, x1, solver=picked.table)
    assert on_fresh <= 1.10 * best
    assert picked.error <= picked.uniform
    assert picked.error == pytest.approx(on_fresh, rel=0.25)
    sol = fs.solve(FLOW.velocity, fresh, solver=fitted.table)
    assert sol.nfe == calls
    assert float((sol.x - x1).square().mean().sqrt()) <= 0.5 * on_fresh


@pytest.mark.parametrize("calls", [1, 2])
def test_one_and_two_calls_are_fitted_too(calls: int) -> None:
    """With one call, ``a x_0 + b v(x_0, 0)``: linear least squares, so nothing of that form is nearer on the pilot."""
    x0 = noise(1024, 4)
    choice = fs.tune(FLOW.velocity, x0, calls=calls, kind="fitted")
    assert choice.solver == "fitted"
    assert choice.error < choice.uniform
    if calls == 1:
        pilot = x0[:512]
        columns = torch.stack([pilot, FLOW.velocity(pilot, torch.zeros(512))], -1).flatten(0, 1)
        target = truth(pilot).flatten()[:, None]
        left = target - columns @ torch.linalg.lstsq(columns, target).solution
        assert choice.pilot_error == pytest.approx(float(left.square().mean().sqrt()), rel=1e-3)


def test_a_fit_can_only_start_where_times_rise_before_the_end() -> None:
    assert can_start(table("midpoint", (0.0, 0.4, 1.0)))
    assert not can_start(table("heun", (0.0, 0.4, 1.0)))
    assert not can_start(table("rk4", (0.0, 1.0)))


@pytest.mark.parametrize("kind", ["auto", "fitted"])
def test_choices_survive_json(kind: str) -> None:
    choice = fs.tune(FLOW.velocity, noise(128, 3), calls=3, kind=kind)
    again = restore(json.loads(json.dumps(choice.as_dict())))
    for ours, theirs in zip(choice.table.dense, again.table.dense, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(theirs), rtol=1e-14, atol=1e-14)
    assert again.as_dict() == choice.as_dict()
    with pytest.raises(UserError, match="cannot be read"):
        restore({"solver": "ab2"})


def test_reading_the_unknowns_and_making_the_table_of_them_gives_the_same_table() -> None:
    made = table("abm2", (0.0, 0.3, 0.6, 0.8, 1.0))
    unknowns = Unknowns(4)
    assert len(unknowns.entries) == 3 + 4 + 10
    again = unknowns.table(unknowns.read(made))
    assert again is not None
    for ours, theirs in zip(made.dense, again.dense, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(theirs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calls": 0}, "at least 1"),
        ({"kind": "best"}, "unknown kind of tuning 'best'"),
        ({"x0": torch.zeros(10, 2)}, "at least 64 noises"),
        ({"v": lambda x, t: x * torch.nan}, "NaN or infinite"),
        ({"cond": {"table": torch.zeros(3, 2)}}, r"condition 'table' has shape \(3, 2\) for 128 samples"),
    ],
)
def test_what_cannot_be_tuned_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fs.tune(**{"v": FLOW.velocity, "x0": noise(128, 0), "calls": 4, **arguments})  # type: ignore[arg-type]
