"""Grids that are made from a field."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.diagnostics.model_grids import DISCOUNT, cheapest_path, dp_grid, model_grid
from fewstep.errors import UserError
from fewstep.flow import closed_form

NARROW = closed_form.gaussian(torch.tensor([0.5, -0.5]), torch.tensor([0.1, 0.1]))


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_cheapest_path_is_that_of_an_exhaustive_search(steps: int) -> None:
    random = np.random.default_rng(steps)
    cost = np.where(np.triu(np.ones((9, 9)), 1) > 0, random.random((9, 9)), np.inf)

    def total(path: tuple[int, ...]) -> float:
        return sum(DISCOUNT**m * cost[i, j] for m, (i, j) in enumerate(itertools.pairwise(path)))

    paths = [(0, *inner, 8) for inner in itertools.combinations(range(1, 8), steps - 1)]
    assert tuple(cheapest_path(cost, steps)) == min(paths, key=total)


@pytest.mark.parametrize("name", ["error", "dp"])
@pytest.mark.parametrize("steps", [4, 8])
def test_euler_on_a_grid_of_the_model_beats_the_uniform_one(name: str, steps: int) -> None:
    """Narrow data: the flow turns in a short time near t = 1."""
    x0 = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    x1 = NARROW.flow_map(x0, torch.zeros(256), torch.ones(256))
    grid = model_grid(name, NARROW.velocity, x0, steps)
    assert (len(grid), grid[0], grid[-1]) == (steps + 1, 0.0, 1.0)
    on_grid, uniform = (
        float((fs.solve(NARROW.velocity, x0, **how).x - x1).square().mean())
        for how in ({"grid": grid}, {"steps": steps})
    )
    assert on_grid < 0.5 * uniform


def test_equal_errors_make_equal_steps() -> None:
    """On a circle run at constant speed every stretch of time looks like every other."""
    turn = torch.tensor([[0.0, 2.0], [-2.0, 0.0]])
    x0 = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(model_grid("error", lambda x, t: x @ turn, x0, 5), np.linspace(0, 1, 6), atol=2e-3)


def test_mistakes_are_named() -> None:
    x0 = torch.randn(8, 2)
    with pytest.raises(UserError, match="chooses among 60 even steps"):
        dp_grid(NARROW.velocity, x0, 61)
    with pytest.raises(UserError, match="unknown grid of a model 'uniform'"):
        model_grid("uniform", NARROW.velocity, x0, 4)
    with pytest.raises(UserError, match=r"grid 'dp' is made from a model"):
        fs.solve(NARROW.velocity, x0, steps=4, grid="dp")
