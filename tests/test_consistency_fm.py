"""Consistency flow matching against exact flow maps: fixed point, order, first phase, samples, and a trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.errors import UserError
from fewstep.flow.couplings import Facts, Pair
from fewstep.flow.noise import Draws, generator_for
from fewstep.generator import load
from fewstep.methods.consistency_fm import SegmentConsistency
from fewstep.methods.piecewise import window_start
from fewstep.networks import build, resolve
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.training.world import LocalWorld
from training_cases import start

MEAN, STD = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([0.3, 2.0], dtype=torch.float64)
GAUSSIAN = fs.closed_form.gaussian(MEAN, STD)


class Fixed(nn.Module):
    """A function of (x, t) as a network, with one parameter that adds ``epsilon x``."""

    def __init__(self, velocity: Any) -> None:
        super().__init__()
        self.velocity = velocity
        self.epsilon = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.velocity(x, t) + self.epsilon * x
        return out


def to_the_end(segments: int) -> Any:
    """``u(x, t, e)`` of the Gaussian flow; at a segment's end the velocity, its limit."""

    def average(x: Tensor, t: Tensor) -> Tensor:
        left = (window_start(t, segments) + 1 / segments - t)[:, None]
        moved = GAUSSIAN.flow_map(x, t, t + left[:, 0]) - x
        return torch.where(left > 1e-9, moved / left.clamp_min(1e-9), GAUSSIAN.velocity(x, t))

    return average


def batch(rows: int, *key: int | str) -> Pair:
    generator = generator_for("consistency", *key)
    x0 = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    return Pair(x0, GAUSSIAN.sample(rows, generator, dtype=torch.float64))


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_k_steps_of_the_exact_map_are_exact_and_more_are_not(segments: int) -> None:
    x0 = batch(300).x0
    x = fs.solve(to_the_end(segments), x0, solver="euler", steps=segments).x
    torch.testing.assert_close(x, MEAN + STD * x0, rtol=1e-12, atol=1e-12)
    more = fs.solve(to_the_end(segments), x0, solver="euler", steps=2 * segments).x
    assert (more - MEAN - STD * x0).abs().max() > 0.01


def test_the_exact_map_to_the_segments_end_is_consistent_to_the_order_of_the_step() -> None:
    """Heun's step is wrong by its cube: the squared loss falls by about 64 with half the gap; another map is pulled."""

    def loss(velocity: Any, gap: float) -> tuple[float, float]:
        student = Fixed(velocity)
        objective = SegmentConsistency(student, 2, gap, teacher=GAUSSIAN.velocity)
        found = objective.loss("student", batch(20_000), Draws(generator_for("t"), 20_000))["loss"]
        return found.item(), torch.autograd.grad(found, student.epsilon)[0].item()

    losses = [loss(to_the_end(2), gap)[0] for gap in (0.08, 0.04, 0.02)]
    assert losses[0] / losses[1] == pytest.approx(64, rel=0.35)
    assert losses[1] / losses[2] == pytest.approx(64, rel=0.35)
    at_optimum, elsewhere = (abs(loss(velocity, 0.02)[1]) for velocity in (to_the_end(2), GAUSSIAN.velocity))
    assert elsewhere > 50 * at_optimum


def test_from_data_the_pull_at_the_exact_map_vanishes_with_the_gap() -> None:
    """x_r on the pair's line is not on the flow, but its conditional mean is, to first order in the gap."""

    def pull(gap: float) -> float:
        found = []
        for block in range(10):
            student = Fixed(to_the_end(2))
            objective = SegmentConsistency(student, 2, gap, boundary=1.0)
            loss = objective.loss("student", batch(20_000, block), Draws(generator_for("t", block), 20_000))["loss"]
            found.append(torch.autograd.grad(loss, student.epsilon)[0].item())
        return abs(sum(found) / len(found)) / gap

    assert pull(0.025) < 0.7 * pull(0.1)


def test_with_the_end_given_everywhere_it_is_flow_matching_weighed_by_the_squared_time_left() -> None:
    student = Fixed(GAUSSIAN.velocity)
    pair = batch(500)
    loss = SegmentConsistency(student, 4, 0.02, boundary=0.0).loss("student", pair, Draws(generator_for("t"), 500))
    t = Draws(generator_for("t"), 500).uniform().double()[:, None]
    x_t = (1 - t) * pair.x0 + t * pair.x1
    left = window_start(t[:, 0], 4)[:, None] + 0.25 - t
    truth = (left * (GAUSSIAN.velocity(x_t, t[:, 0]) - (pair.x1 - pair.x0))).square().mean() * 16
    assert loss["loss"].item() == pytest.approx(truth.item(), rel=1e-12)


MIXTURE = fs.closed_form.mixture(torch.tensor([0.4, 0.6]), torch.tensor([[-1.2], [0.9]]), torch.tensor([0.25, 0.35]))


class Rows:
    """Fresh rows of the mixture with fresh noise."""

    facts = Facts(independent=True, deterministic=False)

    def batch(self, first: int, count: int, generator: torch.Generator) -> Pair:
        return Pair(torch.randn(count, 1, generator=generator), MIXTURE.sample(count, generator))


def w1(x: Tensor) -> float:
    """1-Wasserstein distance to the mixture, by sorted samples."""
    truth = MIXTURE.sample(len(x), generator_for("truth"))
    return float((x[:, 0].sort().values - truth[:, 0].sort().values).abs().mean())


@pytest.mark.slow
@pytest.mark.parametrize("taught", [True, False])
def test_two_steps_have_the_law_of_the_data(taught: bool) -> None:
    noise = torch.randn(8000, 1, generator=generator_for("noise"))
    euler = w1(fs.solve(MIXTURE.velocity, noise, solver="euler", steps=1).x)
    torch.manual_seed(0)
    student = build(resolve({"name": "mlp", "width": 64, "blocks": 2, "embedding": 16}, (1,)))
    run = start(student, batch_size=256, lr=2e-3, ema=0.995)
    if not taught:
        run.trainer.train(0, 256 * 400, SegmentConsistency(student, 2, 0.05, boundary=0.0), Rows(), "matching")
    teacher = MIXTURE.velocity if taught else None
    loss = SegmentConsistency(student, 2, 0.05, 1e-5, teacher, 1.0 if taught else 0.9)
    run.trainer.train(1, 256 * 700, loss, Rows(), "consistency")
    student.load_state_dict(run.trainer.ema.state)
    with torch.no_grad():
        found = w1(fs.solve(student, noise, solver="euler", steps=2).x)
    assert found < euler / 5 / (2 if taught else 1)


def test_a_stage_from_a_teacher_is_sampled_with_its_own_steps(tmp_path: Path) -> None:
    stages = {
        "teacher": {"method": "flow_matching", "samples": 2560},
        "ot": {"method": "flow_matching", "coupling": "ot", "samples": 256},
        "two": {"method": "consistency_fm", "teacher": "teacher", "samples": 2560},
        "data": {"method": "consistency_fm", "segments": 3, "samples": 2560},
    }
    fields = {"data": {"name": "moons", "samples": 400}, "network": {"name": "mlp", "preset": "tiny"}, "stages": stages}
    run_recipe(make_recipe(fields, "test"), tmp_path, LocalWorld(quiet=True))
    two, three = load(tmp_path / "two"), load(tmp_path / "data")
    assert (two.draw(8).nfe, three.draw(8).nfe) == (2, 3)
    with pytest.raises(UserError, match=r"made for 2 step\(s\), not 4"):
        two.sample(4, steps=4)
    stages["two"]["teacher"] = "ot"
    with pytest.raises(UserError, match="'ot' does not pass through those"):
        run_recipe(make_recipe(fields, "test"), tmp_path / "other", LocalWorld(quiet=True))
    with pytest.raises(UserError, match="guidance is baked in from a teacher"):
        make_recipe({**fields, "stages": {"two": {"method": "consistency_fm", "guidance": 2}}}, "test")
