"""Consistency methods against exact flow maps: identities, stationarity, samplers, refusals, small trained maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.errors import UserError
from fewstep.flow.couplings import Facts, Pair
from fewstep.flow.noise import Draws, generator_for
from fewstep.flow.paths import Linear, make_path
from fewstep.flow.time_laws import make_time_law
from fewstep.generator import load
from fewstep.generator.config import Config
from fewstep.methods.consistency import ContinuousConsistency
from fewstep.methods.consistency_fm import ConsistencyFM, segment_end
from fewstep.methods.contract.objective import Objective
from fewstep.methods.families.consistency_loss import Consistency, consistent, gap_at, neighbour, step_velocity
from fewstep.methods.families.consistency_loss import TeacherStep as Steps
from fewstep.methods.families.target_average import TargetAverage
from fewstep.methods.families.velocity_source import VelocitySource
from fewstep.networks import build, resolve
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.solvers.maps import FreshNoise, SampleRule
from fewstep.training.world import LocalWorld
from objective_cases import loss_of, train_on_a_line

GAUSSIAN = fs.closed_form.gaussian(torch.tensor([0.5]), torch.tensor([0.3]))
MIXTURE = fs.closed_form.mixture(torch.tensor([0.4, 0.6]), torch.tensor([[-1.2], [0.9]]), torch.tensor([0.25, 0.35]))
TARGETS: dict[str, Any] = {"gaussian": GAUSSIAN, "mixture": MIXTURE}
UNIFORM = make_time_law("uniform")


def taught(teacher: Any = None) -> VelocitySource:
    """From a velocity, or from data pairs."""
    velocity = None if teacher is None else teacher.velocity
    return VelocitySource(Linear(), velocity, Facts(independent=True, deterministic=False), lambda: None)  # type: ignore[arg-type, return-value]


class ToEnd(nn.Module):
    """``u(x, t, e)`` of an exact flow, with e the segment's end or r, and a polynomial added that starts at zero."""

    def __init__(self, flow: Any, segments: int = 1, exact: bool = True) -> None:
        super().__init__()
        self.flow, self.segments, self.exact = flow, segments, exact
        self.added = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        end = segment_end(t, self.segments) if r is None else r
        u = self.flow.average_velocity(x, t, end) if self.exact else self.flow.velocity(x, t)
        out: Tensor = u + self.added[0] + self.added[1] * x + self.added[2] * x.square()
        return out


def pairs(flow: Any, rows: int, *key: int | str) -> tuple[Pair, torch.Generator]:
    generator = generator_for("consistency", *key)
    x1 = flow.sample(rows, generator, dtype=torch.float64)
    return Pair(torch.randn(x1.shape, generator=generator, dtype=torch.float64), x1), generator


# --- the equation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("segments", [1, 2, 3])
def test_an_exact_step_and_the_exact_map_agree(name: str, segments: int) -> None:
    """``a u(x, t, r) + (1 - a) u(X_r, r, e) = u(x, t, e)``, at the segment's end too."""
    flow = TARGETS[name]
    batch, generator = pairs(flow, 300)
    t = torch.rand(300, generator=generator, dtype=torch.float64)
    end = segment_end(t, segments)
    r = (t + 0.1).minimum(end)
    x = Linear().interpolate(batch.x0, batch.x1, t)
    w = flow.average_velocity(x, t, r)
    after = neighbour(x, w, t, r)
    torch.testing.assert_close(after, flow.flow_map(x, t, r), rtol=1e-9, atol=1e-9)
    found = consistent(w, flow.average_velocity(after, r, end), t, r, end)
    torch.testing.assert_close(found, flow.average_velocity(x, t, end), rtol=1e-7, atol=1e-7)
    assert bool((r == end).any())


@pytest.mark.parametrize(("steps", "order"), [("euler", 2), ("heun", 3)])
def test_a_teachers_step_leaves_a_residual_of_its_own_order(steps: Any, order: int) -> None:
    """Inside the segment ``f(x_t, t) - f(x_r, r)`` falls as the step's local error does."""
    batch, generator = pairs(MIXTURE, 400, "order")
    t = 0.9 * torch.rand(400, generator=generator, dtype=torch.float64)
    x, end = Linear().interpolate(batch.x0, batch.x1, t), torch.ones_like(t)
    sizes = []
    for gap in (0.02, 0.01):
        r = t + gap
        w = step_velocity(taught(MIXTURE), batch, x, t, r, steps)
        y = consistent(w, MIXTURE.average_velocity(neighbour(x, w, t, r), r, end), t, r, end)
        residual = (end - t)[:, None] * (MIXTURE.average_velocity(x, t, end) - y)
        sizes.append(float(residual.square().mean().sqrt()))
    assert math.log2(sizes[0] / sizes[1]) == pytest.approx(order, abs=0.2)


CASES: dict[str, Callable[[nn.Module], Objective]] = {
    "fm-2": lambda net: ConsistencyFM(net, taught(), 2, 2**-10, alpha=0.0),
    "fm-1": lambda net: ConsistencyFM(net, taught(), 1, 2**-10, alpha=0.0),
    "discrete": lambda net: Consistency(net, taught(), UNIFORM, 6),
    "continuous": lambda net: ContinuousConsistency(net, taught(), UNIFORM),
}


def scores(case: str, flow: Any, exact: bool, chunks: int = 40, rows: int = 1000) -> Tensor:
    """z-scores of the mean of residual times 1, x, x^2: the loss's gradient over chunks of data pairs."""
    net = ToEnd(flow, 2 if case == "fm-2" else 1, exact)
    gradients = []
    for number in range(chunks):
        objective = CASES[case](net)
        batch, generator = pairs(flow, rows, number)
        # at the end of the training the gap is the last one, and the derivative has its full weight
        loss = loss_of(objective, "student", batch, Draws(generator, rows), done=1.0)["loss"]
        gradients.append(torch.autograd.grad(loss, net.added)[0])
    values = torch.stack(gradients)
    return values.mean(0) / (values.std(0) / math.sqrt(chunks))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_the_exact_map_is_a_stationary_point_of_the_losses_on_data_pairs(case: str, name: str) -> None:
    few = {"chunks": 20, "rows": 500} if name == "mixture" else {}
    assert scores(case, TARGETS[name], True, **few).abs().max() < 4


@pytest.mark.parametrize("case", CASES)
def test_the_flows_velocity_is_not(case: str) -> None:
    assert scores(case, GAUSSIAN, False).abs()[1] > 10


def test_the_widest_gap_is_flow_matching() -> None:
    """With r at the end the target is the pair's velocity, whatever the network is."""
    batch, _ = pairs(MIXTURE, 256, "fm")
    net = ToEnd(MIXTURE)
    t = torch.rand(256, generator=generator_for("times")).double()
    v = net(Linear().interpolate(batch.x0, batch.x1, t), t)
    error = (v - (batch.x1 - batch.x0)).square()

    def loss(objective: Objective) -> Tensor:
        return loss_of(objective, "student", batch, Draws(generator_for("times"), 256))["loss"]

    assert torch.equal(loss(Consistency(net, taught(), UNIFORM)), error.mean())
    weighted = ((1 - t)[:, None] * (v - (batch.x1 - batch.x0))).square().mean()
    assert torch.equal(loss(ConsistencyFM(net, taught(), 1, 1.0)), weighted)


def test_the_gap_is_halved_in_the_first_half() -> None:
    gaps = [gap_at(done / 100, 5) for done in range(100)]
    assert gaps == sorted(gaps, reverse=True)
    assert [gaps.count(2.0**-k) for k in range(6)] == [10, 10, 10, 10, 10, 50]
    assert gap_at(0.7, 0) == 1.0


def test_a_knot_belongs_to_the_segment_that_starts_there() -> None:
    for segments in (1, 2, 3, 7):
        knots = torch.arange(segments + 1) / segments
        assert torch.equal(segment_end(knots[:-1], segments), knots[1:])
        assert torch.equal(segment_end(knots[1:] - 1e-6, segments), knots[1:])
        assert segment_end(torch.ones(1), segments).item() == 1.0


def test_the_second_term_is_of_rows_inside_their_segment() -> None:
    """For a flow along straight lines at constant speed both terms vanish; for another one the second does not."""
    still = fs.closed_form.gaussian(torch.tensor([3.0]), torch.tensor([1e-6]))  # a point: all move straight there
    cases: list[tuple[Any, Steps, float, float]] = [(still, "euler", 0.0, 1e-8), (GAUSSIAN, "heun", 1e-5, 1.0)]
    for flow, step, least, most in cases:
        batch, generator = pairs(flow, 500, "alpha")
        objective = ConsistencyFM(ToEnd(flow, 2), taught(flow), 2, 0.01, alpha=7.0, teacher_step=step)
        terms = loss_of(objective, "student", batch, Draws(generator, 500))
        assert terms["endpoint"] < 1e-6
        assert least <= terms["velocity"] <= most
        assert terms["loss"].item() == pytest.approx((terms["endpoint"] + 7.0 * terms["velocity"]).item())


# --- weights of the target ----------------------------------------------------------------------------------------


def test_the_target_follows_the_student_and_drops_what_the_student_drops() -> None:
    net = build(resolve({"name": "mlp", "width": 16, "blocks": 2, "embedding": 8, "dropout": 0.5}, (3,), 0)).train()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    follower = TargetAverage(net, 0.75)
    x, t = torch.randn(50, 3), torch.rand(50)
    torch.testing.assert_close(follower(x, t), net(x, t), rtol=0, atol=0)
    assert not torch.equal(net(x, t), net(x, t))
    name, weight = next(iter(net.named_parameters()))
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    follower.update()
    torch.testing.assert_close(follower.state[f"target.{name}"], before + 0.25)
    assert not follower(x, t).requires_grad


# --- samplers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_as_many_euler_steps_as_segments_are_the_flow_map(segments: int) -> None:
    z = torch.randn(200, 1, generator=generator_for("z"), dtype=torch.float64)
    zero, one = z.new_zeros(200), z.new_ones(200)
    with torch.no_grad():
        x = fs.solve(ToEnd(MIXTURE, segments), z, solver="euler", steps=segments).x
        more = fs.solve(ToEnd(MIXTURE, segments), z, solver="euler", steps=2 * segments).x
    truth = MIXTURE.flow_map(z, zero, one)
    torch.testing.assert_close(x, truth, rtol=1e-9, atol=1e-9)
    assert (more - truth).abs().mean() > 0.01


def restarted(**changes: Any) -> fs.Generator:
    config = Config(shape=(1,), rule=SampleRule("map", default_steps=1, sampler="restart"))
    rows = changes.pop("base_rows", None)
    return fs.Generator(ToEnd(GAUSSIAN), config=replace(config, **changes), base_rows=rows)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_restarts_of_the_exact_map_keep_the_datas_law(steps: int) -> None:
    draw = restarted().draw(40_000, steps=steps, batch_size=8192)
    assert draw.nfe == steps
    n, std = 40_000, 0.3
    assert draw.x.mean().item() == pytest.approx(0.5, abs=4 * std / math.sqrt(n))
    assert draw.x.std().item() == pytest.approx(std, abs=4 * std / math.sqrt(2 * n))
    z = (draw.x0 - draw.x0.mean()) / draw.x0.std()
    kept = float((z * (draw.x - 0.5) / std).mean())  # what is left of x0: y_k = m + s z_k, x = t y + (1 - t) eps
    expected = math.prod(0.3 * k / math.hypot(steps - k, 0.3 * k) for k in range(1, steps))
    assert kept == pytest.approx(expected, abs=4 / math.sqrt(n))


def test_a_sample_is_a_function_of_seed_and_row() -> None:
    generator = restarted()
    few, many = generator.sample(5, steps=3, batch_size=2), generator.sample(600, steps=3)
    torch.testing.assert_close(few, many[:5])
    assert not torch.equal(few, generator.sample(5, steps=3, seed=1))
    start = generator.draw(5, steps=3).x0
    torch.testing.assert_close(generator.sample(noise=start, steps=3), few)


def test_fresh_noise_is_the_bases_own_and_differs_by_step() -> None:
    y = torch.zeros(1000, 1)
    gaussian = FreshNoise(Linear(), seed=3)
    one, two = (gaussian(y, 0.5, step) for step in (0, 1))
    assert abs(float((one * two).mean())) < 4 * 0.25 / math.sqrt(1000)
    rows = torch.tensor([[-8.0], [8.0]])
    values = FreshNoise(Linear(), 3, base_rows=rows)(y + 1, 0.5, 0)
    assert sorted(values.unique().tolist()) == [-3.5, 4.5]
    vp = FreshNoise(make_path("cosine"), 3)(y + 1, 0.5, 0)
    torch.testing.assert_close(vp, math.sqrt(0.5) * (1 + 2 * one), rtol=1e-5, atol=1e-5)


def test_maps_are_sampled_their_own_way() -> None:
    generator = restarted()
    ways: list[dict[str, Any]] = [{"solver": "heun"}, {"grid": "0,0.5,1"}]
    for wrong in ways:
        with pytest.raises(UserError, match="a map with its own sampler"):
            generator.sample(3, **wrong)
    with pytest.raises(UserError, match="steps"):
        generator.sample(3, steps=0)
    fm = fs.Generator(ToEnd(GAUSSIAN, 2), config=Config(shape=(1,), rule=SampleRule("map", (2,), 2)))
    for steps in (1, 3, 4):
        with pytest.raises(UserError, match=rf"made for 2 step\(s\), not {steps}"):
            fm.sample(3, steps=steps)
    assert fm.draw(3).nfe == 2


# --- trained ------------------------------------------------------------------------------------------------------

ROWS = 2000
Z = torch.special.ndtri((torch.arange(ROWS, dtype=torch.float64) + 0.5) / ROWS)[:, None]
QUANTILES = MIXTURE.flow_map(Z, Z.new_zeros(ROWS), Z.new_ones(ROWS))


def wasserstein(field: Callable[[Tensor, Tensor], Tensor], steps: int = 1) -> float:
    """W1 of the Euler steps' images of the normal's quantiles from the data's quantiles."""
    x, dtype = Z.float(), torch.float32
    with torch.no_grad():
        for step in range(steps):
            x = x + field(x, torch.full((ROWS,), step / steps, dtype=dtype)) / steps
    return float((x.double().sort(0).values - QUANTILES).abs().mean())


LEARNED: dict[str, tuple[int, Callable[[nn.Module], Objective]]] = {
    "distilled": (1, lambda net: Consistency(net, taught(MIXTURE), UNIFORM)),
    "tuned": (1, lambda net: Consistency(net, taught(), UNIFORM, target_ema=0.5)),  # 250 steps are few
    "continuous": (1, lambda net: ContinuousConsistency(net, taught(MIXTURE), UNIFORM)),
    "fm from a teacher": (2, lambda net: ConsistencyFM(net, taught(MIXTURE))),
    "fm from data": (2, lambda net: ConsistencyFM(net, taught())),
}


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_map_is_five_times_nearer_than_the_teachers_one_step(name: str) -> None:
    steps, make = LEARNED[name]
    net = train_on_a_line(make, MIXTURE, "trained", 250, two_time=name == "continuous")
    field = (lambda x, t: net(x, t, r=torch.ones_like(t))) if name == "continuous" else net
    found, teachers = wasserstein(field, steps), wasserstein(MIXTURE.velocity)
    assert found < teachers / 5


# --- stages -------------------------------------------------------------------------------------------------------

DATA = {"name": "moons", "rows": 500}
SHORT = {"samples": 2_000, "batch_size": 128}


def test_stages_from_a_teacher_and_from_data(tiny_run: Path, tmp_path: Path) -> None:
    teacher = str(tiny_run / "teacher")
    stages = {
        "cd": {"method": "consistency", "teacher": teacher, **SHORT},
        "ct": {"method": "consistency", "init": teacher, "halvings": 3, "target_ema": 0.9, **SHORT},
        "scm": {"method": "consistency", "teacher": teacher, "target": "continuous", "loss": "huber", **SHORT},
        "cfm": {"method": "consistency_fm", "teacher": teacher, **SHORT},
        "three": {"method": "consistency_fm", "segments": 3, **SHORT},
    }
    recipe = make_recipe({"data": DATA, "network": {"name": "mlp", "preset": "tiny"}, "stages": stages}, "x")
    run_recipe(recipe, tmp_path, LocalWorld(quiet=True))
    loaded = {name: load(tmp_path / name) for name in stages}
    assert {name: model.config.rule.steps for name, model in loaded.items()} == {
        "cd": None,
        "ct": None,
        "scm": None,
        "cfm": (2,),
        "three": (3,),
    }
    assert [loaded[name].draw(10).nfe for name in stages] == [1, 1, 1, 2, 3]
    assert loaded["scm"].draw(10, steps=4).nfe == 4
    digest = loaded["cd"].config.coupling.teacher
    assert digest
    assert digest == loaded["cfm"].config.coupling.teacher
    assert loaded["ct"].config.coupling.teacher is None
    assert (tmp_path / "three" / "rounds" / "regression").is_dir()
    # a teacher's start and two thousand samples: already nearer to its ends than its own one step
    whole = load(tiny_run / "teacher")
    truth = whole.draw(500, solver="rk4", steps=16).x
    own = (whole.draw(500, steps=1).x - truth).norm(dim=1).median()
    assert (loaded["cd"].draw(500).x - truth).norm(dim=1).median() < own


def test_guidance_is_baked_in_and_known(labelled_run: Path, tmp_path: Path) -> None:
    folder = labelled_run.parent
    teacher = str(labelled_run / "teacher")
    stages = {
        "cd": {"method": "consistency", "teacher": teacher, "guidance": 2, **SHORT},
        "cfm": {"method": "consistency_fm", "teacher": teacher, "guidance": 2, **SHORT},
    }
    data = {"path": str(folder / "rows.npy"), "labels": str(folder / "labels.npy")}
    header = {"data": data, "conditional": True, "network": {"name": "mlp", "preset": "tiny"}}
    run_recipe(make_recipe({**header, "stages": stages}, "x"), tmp_path, LocalWorld(quiet=True))
    for name in stages:
        model = load(tmp_path / name)
        assert model.config.guidance == 2
        assert model.config.coupling.guidance == 2
        with pytest.raises(UserError, match=r"guidance 2(\.0)? baked"):
            model.sample(4, guidance=2.0)
        at = [float(np.median(model.sample(50, label=label)[:, 0])) for label in (2, 9)]
        assert at[1] > at[0]


def test_guidance_of_a_teacher_is_in_the_steps() -> None:
    """The step's velocity is the guided one: ``v_0 + 3 (v_c - v_0)``."""
    from fewstep.methods.contract.teacher import Teacher

    def velocity(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return torch.ones_like(x) * (1.0 if label is None else 2.0)

    guided = Teacher(velocity, "digest").guided(3.0)
    batch = Pair(torch.zeros(4, 1), torch.ones(4, 1), {"label": torch.zeros(4, dtype=torch.long)})
    lesson = replace(taught(), velocity=guided)
    t = torch.full((4,), 0.25)
    ways: tuple[Steps, ...] = ("euler", "heun")
    for steps in ways:
        torch.testing.assert_close(step_velocity(lesson, batch, batch.x0, t, t + 0.1, steps), torch.full((4, 1), 4.0))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "consistency", "guidance": 2}, "guidance is the teacher's"),
    ({"method": "consistency", "anchor": 0.5}, "anchor belongs to 'target: continuous'"),
    ({"method": "consistency", "target": "continuous", "halvings": 3}, "halvings belongs to 'target: discrete'"),
    ({"method": "consistency", "time": "normal"}, "normal"),
    ({"method": "consistency_fm", "gap": 0}, "gap"),
]


@pytest.mark.parametrize(("stage", "words"), REFUSED, ids=[words[:20] for _, words in REFUSED])
def test_options_that_contradict_each_other_are_refused(stage: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_recipe({"data": DATA, "stages": {"a": stage}}, "x")


def test_a_robust_loss_on_data_pairs_in_few_dimensions_is_refused(tmp_path: Path) -> None:
    stages = {"a": {"method": "consistency", "loss": "huber", **SHORT}}
    with pytest.raises(UserError, match="another map would be learned"):
        run_recipe(make_recipe({"data": DATA, "stages": stages}, "x"), tmp_path, LocalWorld(quiet=True))
