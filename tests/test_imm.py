"""Inductive moment matching: the estimate against its definition, exact maps as stationary points, short trainings."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep import closed_form
from fewstep.errors import UserError
from fewstep.flow.noise import Draws, generator_for
from fewstep.flow.time_laws import make_time_law
from fewstep.methods.imm import IMM, Comparison, comparison, squared_mmd
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.training.world import LocalWorld
from objective_cases import loss_of, train_on_a_line
from test_flow_maps import DIRECTIONS, Perturbed, batch_of, taught

UNIFORM = make_time_law("uniform")
MIXTURE = closed_form.mixture(torch.tensor([0.2, 0.8]), torch.tensor([[1.5], [-0.5]]), torch.tensor([0.15, 0.3]))
GAUSSIAN = closed_form.gaussian(torch.tensor([1.0, -0.5]), torch.tensor([0.5, 0.8]))


def kernel(a: Tensor, b: Tensor, smoothing: float) -> float:
    return -math.sqrt(float((a - b).square().mean()) + smoothing**2)


@pytest.mark.parametrize("paired", [False, True])
def test_the_estimate_is_the_plain_double_sum(paired: bool) -> None:
    y, z = torch.randn(2, 10, 3, generator=generator_for("mmd"), dtype=torch.float64)
    found = squared_mmd(y, z, 5, 0.7, paired=paired)
    for group in range(2):
        total = 0.0
        for i in range(5 * group, 5 * group + 5):
            for j in range(5 * group, 5 * group + 5):
                if i != j:
                    total += kernel(y[i], y[j], 0.7) + kernel(z[i], z[j], 0.7)
                if i != j or paired:
                    total -= 2 * kernel(y[i], z[j], 0.7)
        assert float(found[group]) == pytest.approx(total / (25 if paired else 20), rel=1e-9)


def test_the_estimate_is_zero_in_the_mean_between_equal_laws_and_not_between_others() -> None:
    y, z = torch.randn(2, 40_000, 2, generator=generator_for("equal"), dtype=torch.float64)
    for shift, low, high in ((0.0, -4.0, 4.0), (0.3, 10.0, math.inf)):
        rows = squared_mmd(y, z + shift, 8)
        score = float(rows.mean() / (rows.std() / math.sqrt(len(rows))))
        assert low < score < high


def scores(target: Any, direction: str, compare: Comparison, done: float, rows: int = 1024) -> float:
    """z-score of the loss's gradient in a direction around the exact average velocity."""
    found = []
    for block in range(24):
        net = Perturbed(target, DIRECTIONS[direction])
        objective, generator = IMM(net, taught(target, False), UNIFORM, compare), generator_for("imm", block)
        loss = loss_of(objective, "student", batch_of(target, rows, generator), Draws(generator, rows), done)["loss"]
        found.append(torch.autograd.grad(loss, net.epsilon)[0].item())
    return float(np.mean(found) / (np.std(found, ddof=1) / math.sqrt(len(found))))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("halvings", [1, 4])
@pytest.mark.parametrize("target", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_the_exact_map_is_stationary_for_every_gap(target: Any, halvings: int, direction: str) -> None:
    assert abs(scores(target, direction, Comparison(False, 32, halvings), done=0.9)) < 4.5


def test_pairs_of_equal_rows_move_the_solution_in_one_dimension() -> None:
    """Their terms are a robust consistency loss: with few particles the exact map is not stationary."""
    assert abs(scores(MIXTURE, "one", Comparison(True, 4, 1), done=0.9)) > 6


@pytest.mark.parametrize("paired", [False, True])
def test_steps_of_no_length_have_no_gradient(paired: bool) -> None:
    """With q = r = t both samples are x_t itself, whatever the network."""
    net = Perturbed(GAUSSIAN, DIRECTIONS["x"])
    batch = batch_of(GAUSSIAN, 64, generator_for("still"))
    objective = IMM(net, taught(GAUSSIAN, False), UNIFORM, Comparison(paired, 8, 0), 0.0)
    t = torch.full((64,), 0.4, dtype=torch.float64)
    times = objective.draw(Draws(generator_for("t"), 64), batch.x1)._replace(t=t, r=t)
    y, z = objective.ends(net, batch, times, 1.0)
    assert torch.equal(y, z)
    (slope,) = torch.autograd.grad(squared_mmd(y, z, 8, paired=paired).sum(), net.epsilon)
    assert float(slope) == 0.0


def test_rows_of_a_group_share_their_times_and_the_stated_share_ends_at_the_data() -> None:
    objective = IMM(nn.Linear(1, 1), taught(MIXTURE, False), UNIFORM, Comparison(False, 8, 1), 0.4)
    times = objective.draw(Draws(generator_for("groups"), 40_000), torch.zeros(()))
    for part in (times.t, times.r):
        groups = part.view(-1, 8)
        assert torch.equal(groups, groups[:, :1].expand(-1, 8))
        assert len(groups[:, 0].unique()) > 2000
    assert bool((times.t <= times.r).all())
    assert float((times.r == 1).float().mean()) == pytest.approx(0.4, abs=0.03)


def w1_after(make: Callable[[nn.Module], IMM], steps: int = 500) -> float:
    """W1 of one call to the mixture after a short training, in units of one Euler step of the exact velocity."""
    net = train_on_a_line(make, MIXTURE, "imm trained", steps, two_time=True)
    z, real = torch.randn(20_000, 1, generator=generator_for("z")), MIXTURE.sample(20_000, generator_for("real"))
    start, end = torch.zeros(20_000), torch.ones(20_000)
    with torch.no_grad():
        one, euler = z + net(z, start, r=end), z + MIXTURE.velocity(z, start)
    ends = [x.flatten().sort().values for x in (one, euler, real)]
    return float((ends[0] - ends[2]).abs().mean() / (ends[1] - ends[2]).abs().mean())


def test_a_short_training_is_five_times_nearer_than_one_euler_step() -> None:
    assert w1_after(lambda net: IMM(net, taught(MIXTURE, False), UNIFORM, comparison(IMMOPTIONS, (1,)))) < 0.2


IMMOPTIONS = make_recipe({"data": "moons", "stages": {"map": {"method": "imm"}}}, "x").stages["map"]


def test_classes_are_compared_within_themselves_and_the_map_is_sampled(tmp_path: Path) -> None:
    """Two classes far apart: every group has one class, and one step gives each its own place."""
    rows = torch.randn(400, 2, generator=generator_for("rows")) * 0.1
    labels = torch.arange(400) % 2
    rows[:, 0] += 4.0 * labels
    np.save(tmp_path / "rows.npy", rows.numpy())
    np.save(tmp_path / "labels.npy", labels.numpy())
    data = {"path": str(tmp_path / "rows.npy"), "labels": str(tmp_path / "labels.npy")}
    stage = {"method": "imm", "samples": 60_000, "lr": 4e-3}
    recipe = make_recipe({"data": data, "network": {"name": "mlp", "preset": "tiny"}, "stages": {"map": stage}}, "x")
    run_recipe(recipe, tmp_path / "out", LocalWorld(quiet=True))
    from fewstep.generator import load

    model = load(tmp_path / "out" / "map")
    for label in (0, 1):
        x = torch.as_tensor(model.sample(200, steps=1, label=label))
        assert x.mean(0).tolist() == pytest.approx([4.0 * label, 0.0], abs=0.15)
        assert float(x.std(0).max()) < 0.5


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    for stage, words in (
        ({"method": "imm", "particles": 7}, "batch_size 256 does not divide into groups of 7 particles"),
        ({"method": "imm", "guidance": 2.0}, "guidance is the teacher's"),
    ):
        with pytest.raises(UserError, match=words):
            make_recipe({"data": "moons", "stages": {"map": stage}}, "x")
    stages = {"flow": {"method": "flow_matching"}, "map": {"method": "imm", "teacher": "flow"}}
    with pytest.raises(UserError, match="it learns from data: leave 'teacher' out"):
        make_recipe({"data": "moons", "stages": stages}, "x")
    recipe = make_recipe({"data": "moons", "stages": {"map": {"method": "imm", "batch_size": 100}}}, "x")
    with pytest.raises(UserError, match="batch_size 100 does not divide into groups of 32 rows: make it a"):
        run_recipe(recipe, tmp_path, LocalWorld(quiet=True))
