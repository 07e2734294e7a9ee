"""SlimFlow against closed forms: the law of blended noise, the Gaussian family it walks through, the guided target."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import fewstep as fs
from fewstep.data.load import load_data
from fewstep.errors import UserError
from fewstep.flow.couplings import Facts, GaussianSource, Pair
from fewstep.flow.noise import Draws, generator_for
from fewstep.flow.paths import Linear
from fewstep.flow.time_laws import make_time_law
from fewstep.generator import load
from fewstep.methods.contract.stage import Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.straight_line import VelocityRegression
from fewstep.methods.slimflow import AnnealedBatches, GuidedEndpoint, SlimflowOptions, guided_target, noise_law, plan
from fewstep.metrics import energy
from fewstep.networks import build, parameter_count, resolve
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.training.world import LocalWorld
from objective_cases import loss_of

MEAN, STD = 1.5, 0.4
SHARES = (0.0, 0.3, 0.7, 1.0)
GAUSS = [(0.5 + 0.5 * node, 0.5 * weight) for node, weight in zip(*np.polynomial.legendre.leggauss(12), strict=True)]


class ExactPairs:
    """Pairs of a perfect flow to N(MEAN, STD^2): ``x1 = MEAN + STD x0``."""

    facts = Facts(independent=False, deterministic=True)

    def batch(self, start: int, count: int, generator: torch.Generator) -> Pair:
        x0 = torch.randn(count, 1, generator=generator, dtype=torch.float64)
        return Pair(x0, MEAN + STD * x0, {"label": torch.arange(count)})


class Exact(nn.Module):
    """A closed-form velocity as a network."""

    def __init__(self, velocity: Any) -> None:
        super().__init__()
        self.velocity, self.shift = velocity, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.velocity(x, t) + self.shift


def annealed(b: float, count: int) -> Pair:
    """A batch of exact pairs whose noise is blended with the share ``b``."""
    return AnnealedBatches(ExactPairs(), lambda seen: b).batch(0, count, generator_for("annealed", int(100 * b)))


@pytest.mark.parametrize("b", SHARES)
def test_blended_noise_is_standard_normal_and_correlated_as_stated(b: float) -> None:
    pair = annealed(b, 50_000)
    assert stats.kstest(pair.x0[:, 0].numpy(), "norm").pvalue > 1e-3
    rho = np.corrcoef(pair.x0[:, 0], pair.x1[:, 0])[0, 1]
    assert rho == pytest.approx(math.sqrt(1 - b * b), abs=4 / math.sqrt(50_000))
    assert torch.equal(pair.cond["label"], torch.arange(50_000))


@pytest.mark.parametrize("b", SHARES)
def test_the_loss_of_blended_pairs_is_the_floor_of_the_gaussian_family_and_cannot_be_less(b: float) -> None:
    flow = fs.closed_form.coupled_gaussian(MEAN, STD, math.sqrt(1 - b * b))
    pair = annealed(b, 200_000)
    objective = VelocityRegression(Exact(flow.velocity), Linear(), make_time_law("uniform"))
    loss = loss_of(objective, "student", pair, Draws(generator_for("floor"), 200_000))["loss"].item()
    assert loss == pytest.approx(flow.loss_floor(), rel=0.015, abs=1e-12)
    # the best linear predictor, which is the best of all for Gaussian pairs, at Gauss-Legendre times
    floor = 0.0
    for node, weight in GAUSS:
        x_t, u = ((1 - node) * pair.x0 + node * pair.x1)[:, 0].numpy(), (pair.x1 - pair.x0)[:, 0].numpy()
        floor += weight * u.var() * (1 - min(1.0, np.corrcoef(x_t, u)[0, 1] ** 2))
    assert floor == pytest.approx(flow.loss_floor(), rel=0.015, abs=1e-9)


@pytest.mark.parametrize("b", SHARES)
def test_straightness_and_one_step_spread_follow_the_gaussian_family(b: float) -> None:
    rho = math.sqrt(1 - b * b)
    flow = fs.closed_form.coupled_gaussian(MEAN, STD, rho)
    pair = annealed(b, 200_000)
    # at t = 0 the best velocity is the regression of x1 - x0 on x0, and one Euler step adds it
    slope = float(((pair.x1 - pair.x1.mean()) * (pair.x0 - pair.x0.mean())).mean() / pair.x0.var())
    assert slope == pytest.approx(rho * STD, abs=4 * STD * b / math.sqrt(200_000) + 1e-5)
    assert flow.one_step_std().item() == pytest.approx(rho * STD)
    # the best velocity of the pairs, fitted, along the exact flow, which carries z to MEAN + STD z whatever the pairs
    straightness = 0.0
    for node, weight in GAUSS:
        x_t, u = (1 - node) * pair.x0 + node * pair.x1, pair.x1 - pair.x0
        slope = float(((x_t - x_t.mean()) * u).mean() / x_t.var())
        z = flow.flow_map(pair.x0, *torch.tensor([[0.0], [node]], dtype=torch.float64).expand(2, len(pair.x0)))
        off = MEAN + (STD - 1) * pair.x0 - u.mean() - slope * (z - x_t.mean())
        straightness += weight * off.square().mean().item()
    assert straightness == pytest.approx(flow.straightness(), rel=0.03, abs=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
def test_the_share_of_fresh_noise_falls_from_one_to_nothing(schedule: str) -> None:
    law = noise_law(schedule, 1000)
    values = [law(seen) for seen in range(0, 1500, 10)]
    assert values[0] == 1.0
    assert all(value == 0.0 for value in values[100:])
    assert all(a > b for a, b in itertools.pairwise(values[:101]))
    assert law(999) < 0.01  # it does not jump
    assert noise_law("linear", 1000)(300) == pytest.approx(0.7)


def test_after_the_annealing_the_pairs_are_the_banks_own() -> None:
    batches = AnnealedBatches(ExactPairs(), noise_law("linear", 1000))
    plain = ExactPairs().batch(1000, 64, generator_for("after"))
    late = batches.batch(1000, 64, generator_for("after"))
    assert torch.equal(late.x0, plain.x0)
    assert torch.equal(late.x1, plain.x1)
    # before it, every step draws its own fresh noise, a function of the generator alone
    first, again, other = (batches.batch(0, 64, generator_for("step", step)).x0 for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_on_a_straight_flow_the_guided_target_is_the_pairs_target_for_every_time() -> None:
    flow = fs.closed_form.coupled_gaussian(MEAN, STD, 1.0)
    x0 = torch.randn(500, 1, generator=generator_for("straight"), dtype=torch.float64)
    for t in torch.linspace(0.0, 1.0, 21, dtype=torch.float64):
        target = guided_target(flow.velocity, x0, t.expand(500), {})
        assert (target - (MEAN + STD * x0)).abs().max() < 1e-6
    objective = GuidedEndpoint(Exact(flow.velocity), flow_with_labels(flow), GaussianSource((1,)))
    terms = loss_of(objective, "student", annealed(0.0, 500), Draws(generator_for("loss"), 500))
    assert max(value.item() for value in terms.values()) < 1e-12


def flow_with_labels(flow: Any) -> Any:
    """A velocity that takes and ignores labels."""
    return lambda x, t, label=None: flow.velocity(x, t)


def test_the_guided_target_is_two_euler_steps_of_a_curved_flow() -> None:
    flow = fs.closed_form.mixture(torch.tensor([0.4, 0.6]), torch.tensor([[2.0, 0.0], [-1.0, 1.0]]), torch.ones(2) / 3)
    x0 = torch.randn(64, 2, generator=generator_for("curved"), dtype=torch.float64)
    for t in (0.2, 0.5, 0.8):
        target = guided_target(flow.velocity, x0, torch.full((64,), t, dtype=torch.float64), {})
        assert torch.allclose(target, fs.solve(flow.velocity, x0, solver="euler", grid=(0.0, t, 1.0)).x, atol=1e-12)


def test_the_guided_term_is_that_of_fresh_noise_with_its_own_labels() -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def flow(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append((x, t, label))
        return torch.zeros_like(x)

    student = Exact(lambda x, t: torch.zeros_like(x))
    objective = GuidedEndpoint(student, flow, GaussianSource((1,)), weight=0.5)
    batch = annealed(0.0, 20_000)
    terms = loss_of(objective, "student", batch, Draws(generator_for("fresh"), 20_000))
    fresh, times = seen[0][0][:, 0], seen[1][1]
    assert stats.kstest(fresh.numpy(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(fresh, batch.x0[:, 0])[0, 1]) < 4 / math.sqrt(20_000)
    assert torch.equal(seen[0][1], torch.zeros(20_000))
    assert stats.kstest(times.numpy(), "uniform", args=(0.2, 0.6)).pvalue > 1e-3
    assert torch.equal(seen[0][2], batch.cond["label"])
    assert terms["guided"].item() == 0.0  # both stand still
    assert terms["loss"].item() == pytest.approx(terms["paired"].item() + 0.5 * terms["guided"].item())
    assert terms["paired"].item() == pytest.approx((batch.x0 - batch.x1).square().mean().item())


def test_no_gradient_reaches_the_flow_and_ranks_share_the_batch() -> None:
    student, flow = (Exact(fs.closed_form.coupled_gaussian(MEAN, STD, rho).velocity) for rho in (0.2, 0.5))
    batch = annealed(0.0, 512)
    objective = GuidedEndpoint(student, flow, GaussianSource((1,)))
    whole = loss_of(objective, "student", batch, Draws(generator_for("ranks"), 512))["loss"]
    whole.backward()
    assert flow.shift.grad is None
    assert student.shift.grad is not None
    halves = []
    for rows in (slice(0, 256), slice(256, 512)):
        part = Pair(batch.x0[rows], batch.x1[rows], {"label": batch.cond["label"][rows]})
        halves.append(loss_of(objective, "student", part, Draws(generator_for("ranks"), 512, rows))["loss"].item())
    assert sum(halves) / 2 == pytest.approx(whole.item(), rel=1e-9)


def stage_for(tmp_path: Path, source: Any = None) -> Stage:
    """A stage on moons whose teacher is a closed-form flow."""
    data = load_data({"name": "moons", "rows": 500})
    network = resolve({"name": "mlp", "preset": "tiny"}, (2,))
    flow = fs.closed_form.gaussian(torch.zeros(2), torch.ones(2) / 2)
    return Stage(
        name="slim",
        folder=tmp_path,
        data=data,
        source=source or GaussianSource((2,)),
        seed=0,
        conditions=(),
        network=network,
        build=lambda: build(network),
        teacher=Teacher(flow.velocity, "digest"),
        dequantise=0.0,
        world=LocalWorld(quiet=True),
    )


def test_the_second_phase_starts_from_the_average_of_the_first(tmp_path: Path) -> None:
    options = SlimflowOptions(method="slimflow", teacher="teacher", pairs=300, samples=1000, share=0.3)
    made = plan(options, stage_for(tmp_path))
    assert [(phase.name, phase.samples) for phase in made.phases] == [("anneal", 300), ("distil", 700)]
    average = {name: torch.full_like(value, 0.25) for name, value in made.student.state_dict().items()}
    objective, batches = made.phases[1].prepare(Teacher(lambda x, t: x, "other", state=average))
    assert all(torch.equal(value, average[name]) for name, value in made.student.state_dict().items())
    assert isinstance(objective, GuidedEndpoint)
    pair = batches.batch(0, 64, generator_for("bank"))
    assert torch.allclose(pair.x1, pair.x0 / 2, atol=0.02)  # the teacher's endpoints


def test_annealing_is_refused_where_the_base_is_not_gaussian(tmp_path: Path) -> None:
    class Flat:
        gaussian = False

    options = SlimflowOptions(method="slimflow", teacher="teacher")
    with pytest.raises(UserError, match="'annealing: false'"):
        plan(options, stage_for(tmp_path, Flat()))
    plain = SlimflowOptions(method="slimflow", teacher="teacher", annealing=False, flow_weight=False)
    assert plain.flow_weight == 0.0
    assert len(plan(plain, stage_for(tmp_path, Flat())).phases) == 2


def test_a_slim_student_is_small_takes_one_step_and_beats_its_teacher_there(tmp_path: Path, tiny_run: Path) -> None:
    stages = {
        "slim": {
            "method": "slimflow",
            "teacher": str(tiny_run / "teacher"),
            "samples": 60_000,
            "pairs": 2000,
            "nfe": 16,
        },
    }
    data = {"name": "moons", "rows": 500}
    run_recipe(make_recipe({"data": data, "stages": stages}, "test"), tmp_path / "run", LocalWorld(quiet=True))
    teacher, slim = load(tiny_run / "teacher"), load(tmp_path / "run" / "slim")
    assert parameter_count(slim.module) / parameter_count(teacher.module) == pytest.approx(0.25, rel=0.06)
    assert slim.draw(5).nfe == 1
    with pytest.raises(UserError, match="made for 1 step"):
        slim.sample(5, steps=2)
    ends = teacher.draw(2000, steps=50, seed=9).x
    one = [float(energy(model.draw(2000, steps=1).x, ends)) for model in (slim, teacher)]
    assert one[0] < one[1] / 4
