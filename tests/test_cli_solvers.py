"""Solvers and grids on the command line and in recipes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.cli.diagnosis_text import likelihood
from fewstep.cli.main import main
from fewstep.data.load import load_data
from fewstep.errors import UserError
from fewstep.flow.grids import make_grid
from fewstep.generator import Config
from fewstep.pipeline.recipe import make_recipe
from fewstep.solvers.tables import table


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_a_table_is_printed_with_the_numbers_that_are_run(capsys: pytest.CaptureFixture[str]) -> None:
    printed = said(capsys, "list", "solvers", "--table", "unipc2", "--steps", "4")
    lines = [line.split() for line in printed.splitlines() if line.split()[:1] in (["y_1"], ["y_3"], ["end"])]
    made = table("unipc2", make_grid("uniform", 4))
    a, b = made.dense
    for line, j in zip(lines, (1, 3, 4), strict=True):
        np.testing.assert_allclose([float(word) for word in line[2:]], [a[j], *b[j, :j]], atol=5e-7)
    shifted = said(capsys, "list", "solvers", "--table", "ddim", "--grid", "0,0.3,1", "--path", "cosine")
    assert "0.300000" in shifted
    assert "2 steps, cosine path: 2 network calls" in shifted


@pytest.mark.usefixtures("quick_comparison")
def test_every_solver_and_grid_goes_through_sample_and_compare(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = Path(shutil.copytree(tiny_run / "teacher", tmp_path / "teacher"))
    for solver in ("auto", "fitted", "unipc2", "deis3"):
        how = ["--num", "5", "--steps", "4", "--solver", solver, "--out", tmp_path / "x.npy"]
        assert (f"{solver}, 4 calls: " in said(capsys, "sample", teacher, *how)) == (solver in ("auto", "fitted"))
        assert np.load(tmp_path / "x.npy").shape == (5, 2)
    np.save(tmp_path / "moons.npy", load_data({"name": "moons", "rows": 500}).rows)
    how = ["--data", tmp_path / "moons.npy", "--samples", "50", "--out", tmp_path / "out"]
    printed = said(capsys, "compare", teacher, tiny_run / "onestep", *how, "--steps", "2,4", "--solver", "auto")
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert [(row["model"], row["nfe"], row["solver"]) for row in rows[:3]] == [
        ("teacher", 2, "auto"), ("teacher", 4, "auto"), ("onestep", 1, "own"),
    ]  # fmt: skip
    assert "teacher at 4 step(s)" in printed
    said(capsys, "compare", teacher, *how, "--solver", "heun", "--grid", "0,0.4,1")
    (row, *_) = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert (row["steps"], row["nfe"], row["solver"], row["grid"]) == (2, 4, "heun", "0,0.4,1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "solvers", "--table", "eulr"], "did you mean 'euler'"),
        (["list", "grids", "--table", "euler"], "--table belongs to solvers"),
        (["list", "solvers", "--steps", "4"], "belong to --table"),
        (["list", "solvers", "--table", "euler", "--steps", "3", "--grid", "0,1"], "contradict each other"),
        (["list", "solvers", "--table", "euler", "--steps", "0"], "at least 1"),
        (["list", "solvers", "--table", "euler", "--grid", "0,0.7,0.3,1"], "turns round"),
        (["list", "solvers", "--table", "euler", "--path", "curved"], "unknown path"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_compares_with_any_solver_and_refuses_unknown_ones() -> None:
    stages = {"teacher": {"method": "flow_matching"}}
    compare = {"steps": [4, 8], "solver": "unipc3", "grid": "shift:0.5"}
    recipe = make_recipe({"data": "moons", "stages": stages, "compare": compare}, "recipe")
    assert recipe.header.compare.solver == "unipc3"
    for wrong, message in (
        ({"solver": "eulr"}, "did you mean 'euler'"),
        ({"grid": "unifrm"}, "unknown grid"),
        ({"solver": "auto", "grid": "uniform"}, "finds its own grid"),
    ):
        with pytest.raises(UserError, match=message):
            make_recipe({"data": "moons", "stages": stages, "compare": wrong}, "recipe")


def test_diagnose_reports_samplers_likelihood_and_a_verdict(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = Path(shutil.copytree(tiny_run / "teacher", tmp_path / "teacher"))
    data = tmp_path / "moons.npy"
    model = fs.load(teacher)
    np.save(data, model.sample(300, steps=50, seed=11).numpy())  # data of the model's own law
    how = ["--num", "64", "--calls", "2,4", "--out", tmp_path / "out"]
    printed = said(capsys, "diagnose", teacher, *how)
    values = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert [choice["calls"] for choice in values["choices"]] == [2, 4]
    assert all(line in printed for line in values["verdict"])
    assert "ReFlow will pay" in printed
    assert values["choices"][1] == fs.load(teacher).tune(4).as_dict()
    assert main(["diagnose", str(teacher), "--data", str(data), "--calls", "none"]) == 2
    assert "has another scaling" in capsys.readouterr().err


def test_the_likelihood_of_a_models_own_data_is_measured_in_its_units(labelled_run: Path, tmp_path: Path) -> None:
    teacher = fs.load(Path(shutil.copytree(labelled_run / "teacher", tmp_path / "teacher")))
    source = str(labelled_run.parent / "rows.npy")
    with pytest.raises(UserError, match="does not have the labels"):
        likelihood(teacher, load_data(source), 0)


def test_likelihood_of_digits_counts_bits(tmp_path: Path) -> None:
    """A flow that stands still has the density of N(0, I): known in closed form on dequantised held-out digits."""
    data = load_data("digits")
    assert data.quantum is not None
    config = Config(shape=data.shape, scaling=data.scaling.as_dict())
    lines, values = likelihood(fs.Generator(Still(), config=config), data, 0)
    rows = data.network_rows(data.held_out).double()
    x = fs.dequantise(rows, data.quantum, seed=0) - data.quantum / 2
    nats = -0.5 * (x.square() + math.log(2 * math.pi)).mean()
    assert values["nats_per_dim"] == pytest.approx(float(nats), abs=1e-5)
    assert values["bits_per_dim"] == pytest.approx(float(-nats / math.log(2) - math.log2(data.quantum)), abs=1e-5)
    assert "bits per dimension" in lines[1]


class Still(torch.nn.Module):
    """v = 0, computed from x so that autograd has a graph."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.0 * x
