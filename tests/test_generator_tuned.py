"""A generator finds its own sampler, keeps it, and uses it again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import fewstep as fs
from fewstep.errors import UserError


@pytest.fixture
def teacher(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run / "teacher", tmp_path / "teacher"))


@pytest.mark.parametrize("solver", ["auto", "fitted"])
def test_tuned_samplers_are_nearer_to_the_flow_and_stored_with_the_model(teacher: Path, solver: str) -> None:
    model = fs.load(teacher)
    draw = model.draw(500, steps=4, solver=solver, seed=3)
    assert draw.nfe == 4
    exact = model.draw(500, steps=50, solver="rk4", seed=3).x
    euler = model.draw(500, steps=4, seed=3).x
    assert float((draw.x - exact).square().mean()) < 0.5 * float((euler - exact).square().mean())

    again = fs.load(teacher)
    assert torch.equal(again.draw(500, steps=4, solver=solver, seed=3).x, draw.x)
    assert again.samplers is not None
    assert again.tune(4, solver).nfe == model.tune(4, solver).nfe  # read, not found anew: the count is the stored one
    other = model.save(teacher.parent / "copy")
    assert (other / "samplers.json").read_text() == (teacher / "samplers.json").read_text()


def test_samplers_of_other_weights_are_found_anew(teacher: Path) -> None:
    fs.load(teacher).tune(2)
    stored = json.loads((teacher / "samplers.json").read_text())
    stored["weights"] = "0" * 16
    (teacher / "samplers.json").write_text(json.dumps(stored))
    fs.load(teacher).tune(3)
    assert list(json.loads((teacher / "samplers.json").read_text())["choices"]) == ["auto, 3 calls"]


def test_what_a_tuned_sampler_cannot_take_is_refused(teacher: Path, tiny_run: Path) -> None:
    with pytest.raises(UserError, match="finds its own grid"):
        fs.load(teacher).sample(4, solver="auto", grid="uniform")
    with pytest.raises(UserError, match="its own sampler"):
        fs.load(tiny_run / "onestep").tune(2)
    (teacher / "samplers.json").write_text('{"format": 1, "weights": "?"}')
    fs.load(teacher).tune(1)


def test_grids_made_from_the_model_are_kept_and_used(teacher: Path) -> None:
    model = fs.load(teacher)
    for grid in ("error", "dp"):
        draw = model.draw(300, steps=4, grid=grid, seed=3)
        assert draw.nfe == 4
    grids = json.loads((teacher / "samplers.json").read_text())["grids"]
    assert sorted(grids) == ["dp, 4 steps", "error, 4 steps"]
    times = ",".join(map(repr, grids["dp, 4 steps"]))
    assert torch.equal(fs.load(teacher).draw(300, grid=times, seed=3).x, draw.x)


def test_adaptive_solvers_count_their_calls_and_choose_their_steps(teacher: Path) -> None:
    model = fs.load(teacher)
    exact = model.draw(300, steps=100, solver="rk4", seed=3).x
    draws = [model.draw(300, solver=f"rk45:{tolerance}", seed=3, batch_size=70) for tolerance in ("1e-2", "1e-4")]
    assert draws[0].nfe < draws[1].nfe
    assert float((draws[1].x - exact).abs().max()) < 0.02
    with pytest.raises(UserError, match="chooses its own steps"):
        model.draw(4, solver="rk45", steps=4)


def test_stochastic_samples_do_not_depend_on_the_batch_and_need_an_independent_coupling(
    teacher: Path, tiny_run: Path
) -> None:
    model = fs.load(teacher)
    for solver in ("dpm++sde", "ddim:1", "sde:0.5"):
        x = model.draw(300, solver=solver, steps=8, seed=3).x
        torch.testing.assert_close(model.draw(300, solver=solver, steps=8, seed=3, batch_size=77).x, x)
        with pytest.raises(UserError, match="was trained on dependent pairs"):
            fs.load(tiny_run / "straight").draw(4, solver=solver, steps=8)


def test_a_guided_sampler_is_tuned_guided(labelled_run: Path, tmp_path: Path) -> None:
    model = fs.load(Path(shutil.copytree(labelled_run / "teacher", tmp_path / "labelled")))
    draw = model.draw(300, steps=4, solver="auto", guidance=2.0, seed=3)
    assert draw.nfe == 8
    exact = model.draw(300, steps=50, solver="rk4", guidance=2.0, seed=3).x
    euler = model.draw(300, steps=4, guidance=2.0, seed=3).x
    assert float((draw.x - exact).square().mean()) < 0.5 * float((euler - exact).square().mean())
    stored = json.loads((tmp_path / "labelled" / "samplers.json").read_text())["choices"]
    assert list(stored) == ["auto, 4 calls, guidance 2"]
