"""The comparison: its protocol and controls, equal to calling the metrics by hand, and names that differ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import quietly
from fewstep.data.dataset import DataSet
from fewstep.data.load import from_array, load_data
from fewstep.errors import UserError
from fewstep.generator import BaseRows, Config, Generator, load
from fewstep.metrics import data_rows, evaluate, moment_matched_gaussian
from fewstep.pipeline.compare import GAUSSIAN, TRAINING, compare, name_apart, table

MOONS = {"name": "moons", "rows": 500}


def hush(_: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def moons() -> DataSet:
    return load_data(MOONS)


def test_rows_are_the_metrics_of_the_samples_that_the_models_draw(tiny_run: Path, moons: DataSet) -> None:
    models = [load(tiny_run / name) for name in ("teacher", "onestep")]
    result = compare(models, moons, steps=(2, 1, 2), samples=80, seed=3, say=hush).result
    assert [(row["model"], row.get("steps"), row.get("nfe")) for row in result["rows"]] == [
        ("teacher", 1, 1),
        ("teacher", 2, 2),
        ("onestep", 1, 1),
        (GAUSSIAN, None, None),
        (TRAINING, None, None),
    ]
    assert result["protocol"]["samples"] == 80
    assert result["protocol"]["seed"] == 3
    assert result["protocol"]["held_out"] == len(moons.held_out)
    train, held_out = moons.train_rows(), moons.held_out_rows()
    drawn = [
        models[0].draw(80, steps=1, seed=3).x,
        models[0].draw(80, steps=2, seed=3).x,
        models[1].draw(80, seed=3).x,
        moment_matched_gaussian(train, 80, 3),
        data_rows(train, 80),
    ]
    for row, x in zip(result["rows"], drawn, strict=True):
        assert row["scores"] == evaluate(x, train, held_out).as_dict()
    assert list(result["diagnosis"]) == ["teacher"]  # a map has no velocity along t
    assert max(row["relative_time"] for row in result["rows"][:3]) == 1.0
    assert json.loads(json.dumps(result, allow_nan=False))


def test_the_gaussian_control_passes_energy_and_fails_precision_on_digits() -> None:
    digits = load_data("digits")

    @torch.no_grad()
    def zero(module: nn.Linear) -> nn.Linear:
        for parameter in module.parameters():
            parameter.zero_()
        return module

    class Still(nn.Module):
        """A velocity of zero: its samples are the noise."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = zero(nn.Linear(1, 1)).weight

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * 0.0

    noise = Generator(Still(), shape=(1, 8, 8))
    result = compare([noise], digits, steps=[1], samples=600, say=hush).result
    scores = {row["model"]: row["scores"] for row in result["rows"]}
    gaussian, training, untrained = scores[GAUSSIAN], scores[TRAINING], scores["Still"]
    assert gaussian["energy"] < untrained["energy"] / 10
    assert gaussian["precision"] < 0.2
    assert training["precision"] == 1.0
    assert training["memorised"] == 1.0
    assert training["energy"] < 0.01


def test_training_rows_of_a_file_sorted_by_class_are_no_single_class() -> None:
    rows = np.repeat(np.arange(40.0), 25)[:, None] + np.zeros((1, 2))
    rows = rows + np.random.default_rng(0).normal(size=rows.shape) * 0.01
    data = from_array(rows)
    result = compare([linear(2)], data, steps=[1], samples=100, say=hush).result
    training = result["rows"][-1]["scores"]
    assert training["energy"] < 0.02  # the first 100 rows alone would be a tenth of the range: 0.6


def linear(size: int, bias: float = 0.0, **config: object) -> Generator:
    """The field v(x, t) = bias: one Euler step moves noise by it."""
    net = nn.Linear(size, size)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.fill_(bias)

    class Timeless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.net(x)

    return Generator(Timeless(), config=Config(shape=(size,), **config))  # type: ignore[arg-type]


def test_a_model_is_measured_on_no_more_samples_than_it_has_starts() -> None:
    rows = np.random.default_rng(0).normal(size=(600, 2))
    data = from_array(rows)
    starts = torch.as_tensor(rows[:40] + 0.1, dtype=torch.float32)
    config = {"scaling": data.scaling.as_dict(), "base": "examples"}
    few = Generator(linear(2).module, config=Config(shape=(2,), stage="few", **config), base_rows=starts)  # type: ignore[arg-type]
    many = linear(2, scaling=data.scaling.as_dict(), stage="many")
    result = compare([few, many], data, steps=[1], samples=200, say=hush).result
    counts = {row["model"]: row["samples"] for row in result["rows"] if not row.get("control")}
    assert counts == {"few": 40, "many": 200}
    assert result["rows"][0]["scores"]["n_generated"] == 40
    assert "few: 40 samples only" in table(result)
    assert "many:" not in table(result)
    few.base = BaseRows(starts[:5])
    with pytest.raises(UserError, match="5 different starts"):
        compare([few], data, steps=[1], samples=200, say=hush)


def test_a_model_with_another_scaling_is_measured_in_the_datas_units() -> None:
    rows = np.random.default_rng(0).normal(size=(600, 2)) * 5.0 + 20.0
    data = from_array(rows)
    # both are N(0, I) moved to the data: one in the data's own network units, one in units of its own
    same = linear(2, scaling=data.scaling.as_dict())
    other = linear(2, scaling={"shift": 20.0, "scale": 5.0, "shape": [2]})
    raw = linear(2, bias=20.0)  # no scaling: its network units are the data's units, so N(20, 1)
    names = ("same", "other", "raw")
    models = [same, other, raw]
    for model, name in zip(models, names, strict=True):
        model.name = name
    result = compare(models, data, steps=[1], samples=300, say=hush).result
    energy = {row["model"]: row["scores"]["energy"] for row in result["rows"]}
    assert energy["other"] == pytest.approx(energy["same"], abs=0.01)
    assert energy["raw"] > 20 * energy["same"]
    moved = data.scaling.normalise(raw.draw(300, steps=1).x.numpy())
    assert energy["raw"] == evaluate(moved, data.train_rows()).energy


def test_more_samples_than_the_protocol_has_are_not_claimed(tiny_run: Path, moons: DataSet) -> None:
    said: list[str] = []
    result = compare([load(tiny_run / "onestep")], moons, samples=10_000, say=said.append).result
    assert result["protocol"]["samples"] == len(moons.train)
    assert result["rows"][0]["scores"]["n_generated"] == len(moons.train)
    assert any(f"{len(moons.train)} of the 10000" in line for line in said)


def test_models_of_one_name_are_told_apart_by_their_folders() -> None:
    models = [linear(2, stage=name) for name in ("teacher", "teacher", "onestep", "teacher")]
    name_apart(models, [Path("/r/a/teacher"), Path("/r/b/teacher"), Path("/r/b/onestep"), Path("/q/a/teacher")])
    assert [model.name for model in models] == ["r/a/teacher", "r/b/teacher", "onestep", "q/a/teacher"]
    models = [linear(2, stage="teacher"), linear(2, stage="teacher")]
    name_apart(models, [Path("/r/a/teacher"), Path("/r/b/teacher")])
    assert [model.name for model in models] == ["a/teacher", "b/teacher"]
    with pytest.raises(UserError, match="given twice"):
        name_apart(models, [Path("/r/a"), Path("/r/b/../a")])


def test_a_comparison_from_the_command_line_is_the_runs(tiny_run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "moons.npy", load_data(MOONS).rows)
    models = [tiny_run / name for name in ("teacher", "straight", "onestep")]
    out = tmp_path / "new/out"
    said = quietly(
        "compare", *models, "--data", tmp_path / "moons.npy", "--steps", "1,2", "--samples", 100, "--out", out
    )
    assert f"wrote   {out}: compare.json" in said
    assert said.strip().splitlines()[-1].startswith("next    fewstep sample")
    assert (out / "report.html").is_file()
    found = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    of_run = json.loads((tiny_run / "compare.json").read_text(encoding="utf-8"))
    for row, same in zip(found["rows"], of_run["rows"], strict=True):
        for key in ("energy", "precision", "recall", "sliced_w2"):
            assert row["scores"][key] == pytest.approx(same["scores"][key], rel=1e-4), (row["model"], key)
    assert (out / "compare.md").read_text(encoding="utf-8") == table(found) + "\n"


def test_a_table_of_data_without_enough_held_out_rows_has_no_nan(tiny_run: Path) -> None:
    rows = load_data({"name": "moons", "rows": 20}).rows
    result = compare([load(tiny_run / "onestep")], from_array(rows), say=hush).result
    assert "nan" not in table(result)
    assert "held-out 0" not in table(result)


def test_a_further_row_costs_no_distances_within_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances are counted: one more row compares its n samples with N data rows, and never those with each other."""
    from fewstep.metrics import rows as tiling

    data = from_array(np.random.default_rng(0).normal(size=(2200, 2)))
    size, samples, counted = len(data.train), 40, [0]
    real = tiling.squared_distances

    def counting(x: Tensor, y: Tensor) -> Tensor:
        counted[0] += len(x) * len(y)
        return real(x, y)

    monkeypatch.setattr(tiling, "squared_distances", counting)
    costs = []
    for steps in ((1,), (1, 2)):
        counted[0] = 0
        compare([linear(2)], data, steps=steps, samples=samples, say=hush)
        costs.append(counted[0])
    assert costs[0] > size**2 / 2  # the reference's own distances, once
    assert samples * size <= costs[1] - costs[0] < 5 * samples * size < size**2 / 8


def test_the_training_control_of_a_sorted_file_is_drawn_from_all_of_it() -> None:
    """Rows in the order of their first coordinate: the first hundred alone would be a tenth of its range."""
    random = np.random.default_rng(0)
    rows = np.stack([np.linspace(-3, 3, 1100), random.normal(size=1100)], axis=1)
    control, floor = {}, {}
    for name, order in (("sorted", np.arange(1100)), ("mixed", random.permutation(1100))):
        data = from_array(rows[order])
        scores = compare([linear(2)], data, steps=[1], samples=100, say=hush).rows[-1]["scores"]
        control[name] = (scores["FD-pixels_percent"], scores["sliced_w2"])
        floor[name] = (scores["energy_floor"], scores["sliced_w2_floor"])
        # what independent rows of the same law score, from an independent draw
        fresh = data.scaling.normalise(rows[random.permutation(1100)[:100]])
        assert control[name][0] < 3.0 + 3 * evaluate(fresh, data.train_rows()).fd_percent
    assert control["sorted"] == pytest.approx(control["mixed"], rel=1.0, abs=0.5)
    assert floor["sorted"] == pytest.approx(floor["mixed"], rel=0.25)
