"""Students of several steps, and halving the teacher's steps, against closed forms and explicit Euler steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.errors import UserError
from fewstep.flow.couplings import Pair
from fewstep.flow.noise import Draws, generator_for
from fewstep.generator import load
from fewstep.methods.distill import DistillOptions, GridRegression, Halving, halvings, two_steps
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.training.world import LocalWorld
from objective_cases import loss_of

MOONS = {"name": "moons", "rows": 500}
MIXTURE = fs.closed_form.mixture(torch.tensor([0.4, 0.6]), torch.tensor([[2.0, 0.0], [-1.0, 1.0]]), torch.ones(2) / 3)


class Exact(nn.Module):
    """A closed-form velocity as a network, which remembers where it was called."""

    def __init__(self, velocity: Any) -> None:
        super().__init__()
        self.velocity, self.unused = velocity, nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self.calls.append((x, t))
        return self.velocity(x, t) + 0.0 * self.unused


class Affine(nn.Module):
    """``a_k x + b_k`` at time k / steps: all that an affine flow needs."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.a, self.b = (nn.Parameter(torch.zeros(steps, 1, dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        k = (t * self.steps).round().long()
        return self.a[k] * x + self.b[k]


def noise(count: int, shape: tuple[int, ...] = (1,)) -> Tensor:
    return torch.randn(count, *shape, generator=generator_for("steps", count), dtype=torch.float64)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_exact_pairs_of_a_line_make_an_exact_student_of_any_steps(steps: int) -> None:
    flow = fs.closed_form.coupled_gaussian(1.5, 0.4, 1.0)
    x0 = noise(4000)
    student = Exact(flow.velocity)
    terms = loss_of(GridRegression(student, steps), "student", Pair(x0, 1.5 + 0.4 * x0), Draws(generator_for(0), 4000))
    assert terms["loss"].item() < 1e-12
    assert torch.allclose(fs.solve(flow.velocity, x0, solver="euler", steps=steps).x, 1.5 + 0.4 * x0, atol=1e-6)
    x_t, t = student.calls[0]
    grid, counts = (t * steps).unique(return_counts=True)
    assert grid.tolist() == pytest.approx(range(steps))
    assert counts.double().sub(4000 / steps).abs().max() < 4 * math.sqrt(4000 / steps)
    assert torch.allclose(x_t, (1 - t)[:, None] * x0 + t[:, None] * (1.5 + 0.4 * x0))


def test_two_steps_are_two_euler_steps() -> None:
    x, h = noise(64, (2,)), 0.125
    for begin in (0.0, 0.25, 0.75):
        grid = (begin, begin + h, begin + 2 * h)
        end = fs.solve(MIXTURE.velocity, x, solver="euler", grid=grid).x
        v = two_steps(MIXTURE.velocity, x, torch.full((64,), begin, dtype=torch.float64), h, {})
        assert torch.allclose(x + 2 * h * v, end, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_halving_learns_on_the_trajectory_from_where_it_is_to_two_steps_on(steps: int) -> None:
    student = Exact(lambda x, t: torch.zeros_like(x))
    x0, label = noise(400, (2,)), torch.arange(400) % 3

    def flow(x: Tensor, t: Tensor, label: Tensor) -> Tensor:  # every class has its own flow
        return MIXTURE.velocity(x, t) * (1 + label[:, None])

    objective = Halving(student, flow, steps)
    draws = Draws(generator_for("halving"), 400)
    loss = loss_of(objective, "student", Pair(x0, x0, {"label": label}), draws)["loss"].item()
    number = (Draws(generator_for("halving"), 400).uniform() * steps).long()
    states = [x0]
    for fine in range(2 * steps):
        t = torch.full((400,), fine / (2 * steps), dtype=torch.float64)
        states.append(states[-1] + flow(states[-1], t, label) / (2 * steps))
    path = torch.stack(states)
    rows = torch.arange(400)
    here, there = path[2 * number, rows], path[2 * number + 2, rows]
    x, t = student.calls[0]
    assert torch.allclose(x, here, atol=1e-12)
    assert torch.allclose(t, number.double() / steps)
    assert loss == pytest.approx(((there - here) * steps).square().mean().item(), rel=1e-9)
    exact = objective.pieces(x0, number, {"label": label})[1]
    assert torch.allclose(here + exact / steps, there, atol=1e-12)


def fitted(objective: Halving, x0: Tensor) -> Affine:
    """The student of least loss: regression of the mean velocity on the place, at each of its times."""
    student = Affine(objective.steps)
    with torch.no_grad():
        for k in range(objective.steps):
            x, v = objective.pieces(x0, torch.full((len(x0),), k), {})
            slope, level = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x)], 1), v).solution.flatten()
            student.a[k], student.b[k] = slope, level
    return student


def test_halving_a_gaussian_flow_ends_in_its_euler_map() -> None:
    """8 steps to 4 to 2 to 1: the last student's one step is the teacher's eight, not the exact map."""
    flow: Any = fs.closed_form.gaussian(torch.tensor([1.5]), torch.tensor([0.4])).velocity
    x0 = noise(1000)
    eight = fs.solve(flow, x0, solver="euler", steps=8).x
    assert rms(eight - (1.5 + 0.4 * x0)) > 0.05
    for steps in (4, 2, 1):
        student = fitted(Halving(nn.Identity(), flow, steps), x0)
        objective = Halving(student, flow, steps)
        terms = loss_of(objective, "student", Pair(x0, x0), Draws(generator_for("least"), 1000))
        assert terms["loss"].item() < 1e-20
        gradient = torch.autograd.grad(terms["loss"], [student.a, student.b])
        assert max(g.abs().max().item() for g in gradient) < 1e-9
        flow = student
    one = x0 + flow(x0, torch.zeros(1000, dtype=torch.float64)).detach()
    assert rms(one - eight) < 1e-9


@pytest.mark.parametrize(("steps", "progressive"), [(1, 6), (1, 3), (3, 4), (2, 2), (2, 3), (4, 2), (3, 9)])
def test_numbers_that_do_not_halve_are_refused(steps: int, progressive: int) -> None:
    example = f"such as {2 * steps}, {4 * steps}, {8 * steps}"
    with pytest.raises(ValueError, match=rf"progressive: {progressive} does not halve to steps: {steps}.*{example}"):
        DistillOptions(method="distill", teacher="t", steps=steps, progressive=progressive)


def test_a_number_of_steps_below_one_is_refused() -> None:
    for fields in ({"steps": 0}, {"progressive": 1}, {"progressive": 0}):
        stages = {"a": "flow_matching", "b": {"method": "distill", "teacher": "a", **fields}}
        with pytest.raises(UserError, match="stage 'b'"):
            make_recipe({"data": MOONS, "stages": stages}, "test")


def test_phases_halve_and_share_the_samples() -> None:
    options = DistillOptions(method="distill", teacher="t", steps=3, progressive=24, samples=1000)
    phases = halvings(options, None, nn.Identity())  # type: ignore[arg-type]
    assert [phase.name for phase in phases] == ["steps-12", "steps-6", "steps-3"]
    assert sum(phase.samples for phase in phases) == 1000
    assert max(phase.samples for phase in phases) - min(phase.samples for phase in phases) <= 1


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """A two-step student and a halved one of the tiny run's teacher."""
    out = tmp_path_factory.mktemp("students")
    common = {"method": "distill", "teacher": str(tiny_run / "teacher"), "batch_size": 128}
    stages = {
        "two": {**common, "steps": 2, "samples": 30_000, "pairs": 2000, "nfe": 8, "tolerance": 1},
        "halved": {**common, "progressive": 4, "samples": 60_000},
    }
    network = {"name": "mlp", "preset": "tiny"}
    recipe = make_recipe({"data": MOONS, "network": network, "stages": stages}, "test")
    run_recipe(recipe, out / "run", LocalWorld(quiet=True))
    return out / "run"


def test_a_two_step_student_takes_two_steps_and_nothing_else(students: Path, tiny_run: Path) -> None:
    two, teacher = load(students / "two"), load(tiny_run / "teacher")
    noise = torch.randn(1000, 2, generator=generator_for("two"))
    draw = two.draw(noise=noise)
    assert draw.nfe == 2
    v = two.module
    half = noise + 0.5 * v(noise, torch.zeros(1000))
    assert torch.allclose(draw.x, half + 0.5 * v(half, torch.full((1000,), 0.5)), atol=1e-5)
    for steps in (1, 3, 4):
        with pytest.raises(UserError, match=f"made for 2 step.*not {steps}"):
            two.draw(10, steps=steps)
    ends = teacher.draw(noise=noise, steps=50).x
    assert rms(draw.x - ends) < 0.5 * rms(teacher.draw(noise=noise, steps=2).x - ends)


def test_a_halved_student_does_in_one_step_what_its_teacher_does_in_four(students: Path, tiny_run: Path) -> None:
    halved, teacher = load(students / "halved"), load(tiny_run / "teacher")
    noise = torch.randn(1000, 2, generator=generator_for("halved"))
    four = teacher.draw(noise=noise, steps=4).x
    one = halved.draw(noise=noise)
    assert one.nfe == 1
    assert rms(one.x - four) < 0.15 * np.std(four.numpy())
    assert not (students / "halved" / "pairs").exists()
    rounds = sorted(path.name for path in (students / "halved" / "rounds").iterdir())
    assert rounds == ["steps-2"]
    before = load(students / "halved" / "rounds" / "steps-2")
    middle = noise + 0.5 * before.module(noise, torch.zeros(1000))
    assert rms(middle - fs.solve(teacher.module, noise, solver="euler", grid=(0.0, 0.25, 0.5)).x) < 0.1
