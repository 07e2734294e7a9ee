"""Consistency models against exact flow maps: fixed point, shrinking gap, boundary, samples, and trained ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.errors import UserError
from fewstep.flow.noise import Draws, generator_for, noise_rows
from fewstep.flow.paths import make_path
from fewstep.flow.time_laws import make_time_law
from fewstep.generator import load
from fewstep.generator.maps import Fresh, restart
from fewstep.methods.consistency import ConsistencyOptions, EndConsistency
from fewstep.networks import build, resolve
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.training.world import LocalWorld
from test_consistency_fm import GAUSSIAN, MEAN, MIXTURE, STD, Fixed, Rows, batch, w1
from training_cases import start

UNIFORM = make_time_law("uniform")


def to_the_data(x: Tensor, t: Tensor) -> Tensor:
    """``u(x, t, 1)`` of the Gaussian flow."""
    left = (1 - t)[:, None]
    return (GAUSSIAN.flow_map(x, t, torch.ones_like(t)) - x) / left.clamp_min(1e-9)


def loss(student: nn.Module, gap: float, teacher: bool, block: int = 0) -> Tensor:
    velocity = GAUSSIAN.velocity if teacher else None
    objective = EndConsistency(student, (gap, gap), 0, UNIFORM, teacher=velocity)
    return objective.loss("student", batch(20_000, block), Draws(generator_for("t", block), 20_000))["loss"]


def test_the_exact_map_to_the_data_is_consistent_to_the_order_of_the_step() -> None:
    losses = [loss(Fixed(to_the_data), gap, teacher=True).item() for gap in (0.08, 0.04, 0.02)]
    assert losses[0] / losses[1] == pytest.approx(64, rel=0.4)
    assert losses[1] / losses[2] == pytest.approx(64, rel=0.4)


def test_another_map_is_pulled_and_the_exact_one_hardly() -> None:
    def pull(velocity: object) -> float:
        student = Fixed(velocity)
        return abs(torch.autograd.grad(loss(student, 0.02, teacher=True), student.epsilon)[0].item())

    assert pull(GAUSSIAN.velocity) > 50 * pull(to_the_data)


def test_from_data_the_pull_vanishes_with_the_gap() -> None:
    def pull(gap: float) -> float:
        found = []
        for block in range(10):
            student = Fixed(to_the_data)
            found.append(torch.autograd.grad(loss(student, gap, False, block), student.epsilon)[0].item())
        return abs(sum(found) / len(found)) / gap

    assert pull(0.025) < 0.7 * pull(0.1)


def test_with_the_whole_way_as_gap_the_target_is_the_data_row() -> None:
    """``f(x, 1) = x``: the widest gap is the regression of endpoints that a flow model has learned already."""
    student, pair = Fixed(GAUSSIAN.velocity), batch(500)
    objective = EndConsistency(student, (1.0, 1.0), 0, UNIFORM)
    found = objective.loss("student", pair, Draws(generator_for("t"), 500))["loss"].item()
    t = Draws(generator_for("t"), 500).uniform().double()[:, None]
    x_t = (1 - t) * pair.x0 + t * pair.x1
    guess = x_t + (1 - t) * GAUSSIAN.velocity(x_t, t[:, 0])
    assert found == pytest.approx((guess - pair.x1).square().mean().item(), rel=1e-12)


def test_the_gap_shrinks_geometrically_and_then_stays() -> None:
    objective = EndConsistency(Fixed(GAUSSIAN.velocity), (0.4, 0.1), 10, UNIFORM)
    gaps = []
    for _ in range(15):
        gaps.append(objective.gap())
        objective.taken.add_(1)
    assert gaps[:11] == pytest.approx([0.4 * 0.25 ** (k / 10) for k in range(11)])
    assert gaps[11:] == pytest.approx([0.1] * 4)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_restarts_of_the_exact_map_keep_the_law_of_the_data(steps: int) -> None:
    rows = 40_000
    x0 = noise_rows(rows, (2,), seed=3, dtype=torch.float64)
    times = tuple(k / steps for k in range(steps + 1))
    x = restart(to_the_data, x0, times, {}, Fresh(make_path("linear"), seed=3))
    error = STD / rows**0.5
    assert ((x.mean(0) - MEAN).abs() < 4 * error).all()
    assert ((x.std(0) - STD).abs() < 4 * error).all()
    if steps > 1:  # the noise is fresh: endpoints are not those of one call
        assert (x - MEAN - STD * x0).abs().mean() > 0.1


def test_a_stage_is_sampled_by_restarts(tmp_path: Path) -> None:
    stages = {"flow": {"method": "consistency", "samples": 2560}}
    fields = {"data": {"name": "moons", "samples": 400}, "network": {"name": "mlp", "preset": "tiny"}, "stages": stages}
    run_recipe(make_recipe(fields, "test"), tmp_path, LocalWorld(quiet=True))
    model = load(tmp_path / "flow")
    assert [model.draw(300, steps=steps).nfe for steps in (1, 2, 4)] == [1, 2, 4]
    torch.testing.assert_close(model.draw(300, steps=3, batch_size=64).x, model.draw(300, steps=3).x)
    with pytest.raises(UserError, match="leave grid out"):
        model.sample(4, grid="0,0.5,1")


@pytest.mark.slow
@pytest.mark.parametrize("taught", [True, False])
def test_one_step_has_the_law_of_the_data(taught: bool) -> None:
    noise = torch.randn(8000, 1, generator=generator_for("noise"))
    euler = w1(fs.solve(MIXTURE.velocity, noise, solver="euler", steps=1).x)
    torch.manual_seed(0)
    student = build(resolve({"name": "mlp", "width": 64, "blocks": 2, "embedding": 16}, (1,)))
    run = start(student, batch_size=256, lr=2e-3, ema=0.995)
    teacher, gaps = (MIXTURE.velocity, (0.25, 0.02)) if taught else (None, (0.5, 0.02))
    run.trainer.train(0, 256 * 1100, EndConsistency(student, gaps, 700, UNIFORM, teacher=teacher), Rows(), "x")
    student.load_state_dict(run.trainer.ema.state)
    with torch.no_grad():
        found = w1(noise + student(noise, torch.zeros(8000)))
    assert found < euler / 5 / (2 if taught else 1)


def test_wrong_options_are_refused() -> None:
    for fields, message in (({"gaps": [0.1, 0.2]}, "gaps shrink"), ({"guidance": 2}, "from a teacher")):
        with pytest.raises(ValueError, match=message):
            ConsistencyOptions(method="consistency", **fields)  # type: ignore[arg-type]
