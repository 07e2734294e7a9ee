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
