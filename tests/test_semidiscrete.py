"""Semidiscrete optimal transport against its closed form, exact assignment, and what its pairs must be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from scipy.optimize import linear_sum_assignment

import fewstep as fs
from fewstep.errors import UserError
from fewstep.flow.couplings import Pair
from fewstep.flow.noise import generator_for
from fewstep.flow.semidiscrete import BALANCED, Potentials, assign, imbalance
from fewstep.generator import load
from fewstep.methods.training_pairs.semidiscrete_batches import SemidiscreteBatches
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.training.world import LocalWorld


def draw(dim: int):  # type: ignore[no-untyped-def]
    return lambda count, generator: torch.randn(count, dim, generator=generator)


def test_in_one_dimension_cells_meet_at_the_quantiles_whatever_the_rows() -> None:
    y = torch.tensor([[-3.0], [-1.0], [-0.5], [0.2], [0.3], [1.0], [2.0], [5.0]])
    fit = Potentials(y, draw(1), generator_for("line"))
    fit.fit(balanced=0.0005)
    meet = (fit.h[1:] - fit.h[:-1]) / (y[1:, 0] - y[:-1, 0])
    torch.testing.assert_close(meet, torch.special.ndtri(torch.arange(1, 8) / 8), rtol=0, atol=0.04)
    x = torch.linspace(-4, 4, 400)[:, None]
    assert (assign(x, y, fit.h).diff() >= 0).all()  # monotone


@pytest.fixture(scope="module")
def plane() -> Potentials:
    y = 0.4 * torch.randn(60, 2, generator=generator_for("rows")) + torch.tensor([2.0, -1.0])
    fit = Potentials(y, draw(2), generator_for("plane"))
    fit.fit()
    return fit


def test_every_row_receives_its_share(plane: Potentials) -> None:
    assert plane.chi2 <= BALANCED
    x = torch.randn(200_000, 2, generator=generator_for("fresh"))
    share = torch.bincount(assign(x, plane.y, plane.h), minlength=60) / len(x)
    deviation = (60 * share - 1).square().mean().sqrt().item()
    assert deviation < BALANCED**0.5 + 0.02
    nearest = torch.bincount(assign(x, plane.y, 0.5 * plane.y.square().sum(1)), minlength=60) / len(x)
    assert (60 * nearest - 1).square().mean().sqrt().item() > 1.0  # where it began


def test_the_cost_is_that_of_exact_assignment(plane: Potentials) -> None:
    """Against an exact solution for 60 x 15 noises, every row taken 15 times."""
    x = torch.randn(900, 2, generator=generator_for("assignment"))
    cost = torch.cdist(x, plane.y.repeat_interleave(15, 0)).square()
    rows, columns = linear_sum_assignment(cost.numpy())
    exact = cost[rows, columns].mean().item()
    found = (x - plane.y[assign(x, plane.y, plane.h)]).square().sum(1).mean().item()
    assert found == pytest.approx(exact, rel=0.05)


def test_equal_rows_and_rows_far_from_the_base_are_fitted_like_others(plane: Potentials) -> None:
    """Equal rows cannot be told apart, and a shift of all rows shifts the map and no cell."""
    x = torch.randn(200_000, 2, generator=generator_for("fresh"))
    rows = torch.cat([plane.y, plane.y[:20]]) + 50.0
    fit = Potentials(rows, draw(2), generator_for("equal"))
    fit.fit()
    assert fit.chi2 <= BALANCED
    share = torch.bincount(assign(x, rows, fit.h), minlength=80) / len(x)
    assert share[60:].sum() == 0  # the first of two equal rows is taken
    wanted = torch.tensor([2 / 80] * 20 + [1 / 80] * 40)
    assert (share[:60] / wanted - 1).square().mean().sqrt().item() < BALANCED**0.5 + 0.02


def test_many_rows_in_few_dimensions_are_settled_in_as_many_draws_as_tell_them() -> None:
    """An imbalance of .02 cannot be told from 0 with fewer than 50 draws per row: five times that are enough."""
    rows = torch.randn(1500, 2, generator=generator_for("many")).tanh()
    fit = Potentials(rows, draw(2), generator_for("many", 1))
    steps = fit.fit()
    assert fit.chi2 <= BALANCED
    assert steps * 256 <= 250 * len(rows)


def test_the_imbalance_is_unbiased() -> None:
    share = torch.tensor([0.5, 0.2, 0.2, 0.1])
    truth = 4 * share.square().sum().item() - 1
    found = [
        imbalance(torch.multinomial(share, 40, replacement=True, generator=generator_for("chi", k)), 4)
        for k in range(4000)
    ]
    values = torch.tensor(found)
    assert values.mean().item() == pytest.approx(truth, abs=4 * values.std().item() / len(found) ** 0.5)
    assert imbalance(torch.arange(4), 4) == -1.0  # no two in one cell


def run(out: Path, **fields: object) -> None:
    stage = {"method": "flow_matching", "coupling": "semidiscrete", "samples": 20_000, "label_dropout": 0.0, **fields}
    data = {"name": "moons", "rows": 200}
    recipe = make_recipe({"data": data, "network": {"name": "mlp", "preset": "tiny"}, "stages": {"flow": stage}}, "x")
    run_recipe(recipe, out, LocalWorld(quiet=True))


def test_a_flow_learns_from_it_and_is_straighter(tmp_path: Path) -> None:
    run(tmp_path / "semidiscrete")
    run(tmp_path / "independent", coupling="independent")
    kept = (tmp_path / "semidiscrete/flow/pairs/potentials.safetensors").read_bytes()
    run(tmp_path / "again")
    assert (tmp_path / "again/flow/pairs/potentials.safetensors").read_bytes() == kept
    x0 = torch.randn(256, 2, generator=generator_for("noise"))
    straight, usual = (
        fs.diagnose(load(tmp_path / name / "flow").module, x0) for name in ("semidiscrete", "independent")
    )
    assert straight.straightness < 0.4 * usual.straightness
    model = load(tmp_path / "semidiscrete/flow")
    assert model.config.coupling is not None
    assert model.config.coupling.independent is False
    with pytest.raises(UserError, match="needs the score"):
        model.sample(4, steps=4, solver="sde:1")


def test_pairs_stay_within_their_class(labelled_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Pair] = []
    batch = SemidiscreteBatches.batch

    def spied(self: SemidiscreteBatches, start: int, count: int, generator: torch.Generator) -> Pair:
        found.append(batch(self, start, count, generator))
        return found[-1]

    monkeypatch.setattr(SemidiscreteBatches, "batch", spied)
    fields = yaml.safe_load((labelled_run.parent / "labelled.yaml").read_text(encoding="utf-8"))
    fields["stages"] = {"flow": {"method": "flow_matching", "coupling": "semidiscrete", "samples": 512}}
    run_recipe(make_recipe(fields, "x"), tmp_path, LocalWorld(quiet=True))
    x1, label = torch.cat([pair.x1 for pair in found]), torch.cat([pair.cond["label"] for pair in found])
    shares = torch.bincount(label, minlength=3).double() / len(label)
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), rtol=0, atol=0.08)
    centres = [x1[label == kind, 0].mean().item() for kind in range(3)]  # class k lies around (4 k, 0)
    assert centres == sorted(centres)
    assert max(x1[label == kind, 0].std().item() for kind in range(3)) < 0.2 * (centres[2] - centres[0])
