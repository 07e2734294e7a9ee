"""Distribution matching against closed forms: gradients, identities, noise, several calls, small runs, collapse."""

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
from fewstep.flow.couplings import GaussianSource, Independent, Pair
from fewstep.flow.noise import Draws, generator_for
from fewstep.flow.paths import Linear
from fewstep.flow.time_laws import TimeLaw, make_time_law
from fewstep.generator import load
from fewstep.methods.dmd import DMD
from fewstep.methods.families.distribution import (
    PRIOR_VALUES,
    DistributionMatching,
    Divergence,
    PerCall,
    Point,
    Setting,
    flow_matching_loss,
    rows_mean,
)
from fewstep.methods.families.distribution_stage import generator_rule
from fewstep.methods.fgm import FGM, FGMOptions
from fewstep.methods.realuid import RealUID, RealUIDOptions
from fewstep.methods.sid import SiD
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.training.world import LocalWorld
from mixture_cases import NETWORK, train_beside_a_teacher, w1
from objective_cases import loss_of

MEAN, WIDTH = 1.0, 0.5  # of the teacher
SHIFT, SCALE = 0.2, 1.2  # of the generator
TIMES = torch.linspace(0.02, 0.9, 45, dtype=torch.float64)
TEACHER = fs.closed_form.gaussian(torch.tensor([MEAN]), torch.tensor([WIDTH]))
UNIFORM = make_time_law("uniform")


class Affine(nn.Module):
    """``G(z) = a + b z`` as a one-step student ``z + v(z, 0)``."""

    def __init__(self, a: float = SHIFT, b: float = SCALE) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(b, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.a + (self.b - 1) * x


class Exact(nn.Module):
    """A closed form as an online model, with a weight that does nothing."""

    def __init__(self, velocity: Callable[..., Tensor]) -> None:
        super().__init__()
        self.velocity = velocity
        self.idle = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.velocity(x, t) + 0 * self.idle


class Listed(TimeLaw):
    """Uniform on the test's list of times."""

    def quantile(self, u: Tensor) -> Tensor:
        return TIMES[(u * len(TIMES)).long().clamp(max=len(TIMES) - 1)]

    def density(self, t: Tensor) -> Tensor:
        raise NotImplementedError


class Only:
    """One of flow generator matching's two terms."""

    through = True

    def __init__(self, term: int) -> None:
        self.term = term

    def __call__(self, point: Point) -> Tensor:
        apart = point.teacher - point.online
        return rows_mean(apart**2 if self.term == 1 else 2 * apart * (point.online - point.c))


def game(
    divergence: Divergence, student: nn.Module | None = None, cut: bool = False, **options: Any
) -> DistributionMatching:
    """The Gaussian game with the exact online model; ``cut``: the networks do not see where x_t comes from."""
    student = Affine() if student is None else student
    own = fs.closed_form.gaussian(torch.tensor([SHIFT]), torch.tensor([SCALE]))

    def seen(velocity: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return (lambda x, t: velocity(x.detach(), t)) if cut else velocity

    online = options.pop("online", Exact(seen(own.velocity)))
    online_loss = options.pop("online_loss", flow_matching_loss)
    setting = Setting(Listed(), **{"latest": 1.0, **options})
    return DistributionMatching(student, online, seen(TEACHER.velocity), Linear(), divergence, setting, online_loss)


def point_of(objective: DistributionMatching, batch: Pair, draws: Draws) -> Point:
    """The generator's samples from the batch's noise, noised, and both velocities there."""
    made = objective.generate(objective.modules["student"], batch.x0, {}, draws)
    return objective.point(objective.modules["online"], made, {}, draws)


def latents(rows: int, generator: torch.Generator, size: int = 1) -> Pair:
    z = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    return Pair(z, torch.zeros_like(z))


def monte_carlo(objective: DistributionMatching, blocks: int = 8, rows: int = 500_000) -> np.ndarray[Any, Any]:
    """Gradient of the generator's loss in (a, b)."""
    student, found = objective.modules["student"], []
    for block in range(blocks):
        generator = generator_for("matching", block)
        loss = loss_of(objective, "student", latents(rows, generator), Draws(generator, rows))["loss"]
        found.append([part.item() for part in torch.autograd.grad(loss, list(student.parameters()))])
    return np.mean(found, axis=0)


def spread_at(width: Tensor | float, t: Tensor) -> Tensor:
    return ((1 - t) ** 2 + (t * width) ** 2).sqrt()


def goal(a: Tensor, b: Tensor) -> Tensor:
    """``E |v_theta - u*|^2`` at the listed times, both velocities being affine in x ~ N(t a, S_t^2)."""
    t = TIMES
    own, real = ((t * w**2 - (1 - t)) / spread_at(w, t) ** 2 for w in (b, torch.tensor(WIDTH, dtype=torch.float64)))
    slope, mean = own - real, t * a
    offset = (a - own * t * a) - (MEAN - real * t * MEAN)
    return (slope**2 * (spread_at(b, t) ** 2 + mean**2) + 2 * slope * offset * mean + offset**2).mean()


def exact_gradient(function: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (SHIFT, SCALE))
    return [part.item() for part in torch.autograd.grad(function(a, b), (a, b))]


# --- gradients --------------------------------------------------------------------------------------------------


def test_fgm_has_the_gradient_of_the_distance_between_the_flows() -> None:
    exact = exact_gradient(goal)
    assert exact == pytest.approx([-2.7660, 2.4309], abs=1e-4)
    assert monte_carlo(game(FGM(normalised=False))) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(
    ("divergence", "cut", "gradient"),
    [
        pytest.param(Only(1), False, (-1.143, 0.998), id="first term"),
        pytest.param(Only(2), False, (-1.623, 1.436), id="second term"),
        pytest.param(FGM(normalised=False), True, (-2.05, 1.25), id="detached"),
    ],
)
def test_parts_of_fgm_have_the_known_wrong_gradients(
    divergence: Divergence, cut: bool, gradient: tuple[float, float]
) -> None:
    assert monte_carlo(game(divergence, cut=cut)) == pytest.approx(gradient, abs=0.01)


def test_dmd_has_the_gradient_of_the_kullback_leibler_divergence() -> None:
    def divergence(a: Tensor, b: Tensor) -> Tensor:
        own, real = spread_at(b, TIMES), spread_at(WIDTH, TIMES)
        return ((real / own).log() + (own**2 + (TIMES * (a - MEAN)) ** 2) / (2 * real**2) - 0.5).mean()

    exact = exact_gradient(divergence)
    assert monte_carlo(game(DMD(normalised=False))) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("divergence", [FGM(), FGM(False), SiD(1.0), DMD(), DMD(False)], ids=repr)
def test_where_the_laws_agree_there_is_no_gradient(divergence: Divergence) -> None:
    online = Exact(TEACHER.velocity)
    objective = game(divergence, Affine(MEAN, WIDTH), online=online)
    assert np.abs(monte_carlo(objective, 1, 1000)).max() < 1e-10


def test_real_data_leave_the_online_model_at_the_teacher_where_the_laws_agree() -> None:
    """Its loss with real data is stationary there, whatever the two weights, in the direction x too."""

    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.epsilon = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            e = self.epsilon
            return TEACHER.velocity(x, t) + e[0] + e[1] * x + e[2] * x**2

    def scores(width: float) -> np.ndarray[Any, Any]:
        matching, found, online = RealUID(0.8, 0.9), [], Moved()
        objective = game(matching, Affine(MEAN, width), online=online, online_loss=matching.online)
        for block in range(24):
            generator = generator_for("real", block)
            z = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
            real = TEACHER.sample(20_000, generator, dtype=torch.float64)
            loss = loss_of(objective, "online", Pair(z, real), Draws(generator, 20_000))["loss"]
            found.append(torch.autograd.grad(loss, online.epsilon)[0].numpy())
        return np.mean(found, axis=0) / (np.std(found, axis=0, ddof=1) / math.sqrt(len(found)))

    assert np.abs(scores(WIDTH)).max() < 4
    assert np.abs(scores(2 * WIDTH)).max() > 20


# --- identities -------------------------------------------------------------------------------------------------


def some_point(rows: int = 64) -> Point:
    generator = generator_for("identities")
    return point_of(game(FGM()), latents(rows, generator), Draws(generator, rows))


def test_the_two_terms_are_the_difference_of_two_misses_row_by_row() -> None:
    point = some_point()
    both = Only(1)(point) + Only(2)(point)
    misses = rows_mean((point.teacher - point.c) ** 2 - (point.online - point.c) ** 2)
    torch.testing.assert_close(both, misses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(FGM(normalised=False)(point), misses, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_is_a_mixture_of_fgms_terms_and_at_a_half_half_of_it(alpha: float) -> None:
    point = some_point()
    terms = (1 - alpha) * Only(1)(point) + Only(2)(point) / 2
    torch.testing.assert_close(SiD(alpha)(point), point.weight * terms, rtol=1e-10, atol=1e-12)
    if alpha == 0.5:
        torch.testing.assert_close(SiD(alpha)(point), FGM()(point) / 2, rtol=1e-10, atol=1e-12)


def test_sid_is_the_papers_in_data_predictions_and_so_is_the_weight_of_many_entries() -> None:
    """``w (f_T - f_S)((f_T - x1) - alpha (f_T - f_S))``; ``w = 1 / mean |x1 - f_T|``, and more than a few entries."""
    point = some_point()
    teacher, online = (Linear().velocity_to_data(v, point.x_t, point.t) for v in (point.teacher, point.online))
    miss = rows_mean((point.x1 - teacher).abs())
    t = point.t
    gaussian = math.sqrt(2 / math.pi) * 0.7 * (1 - t) / ((0.7 * t) ** 2 + (1 - t) ** 2).sqrt()
    w = (1 + PRIOR_VALUES) / (miss + PRIOR_VALUES * gaussian)
    point = replace(point, spread=0.7)
    rows = w * rows_mean((teacher - online) * ((teacher - point.x1) - 1.2 * (teacher - online)))
    torch.testing.assert_close(SiD(1.2)(point), rows, rtol=1e-9, atol=1e-12)
    (pull,) = torch.autograd.grad(DMD()(point).sum(), point.x1, retain_graph=True)
    torch.testing.assert_close(pull, (w[:, None] * (online - teacher)), rtol=1e-9, atol=1e-12)
    wide = [part.expand(-1, 100_000) for part in (point.x1, point.x_t, point.c, point.teacher, point.online)]
    torch.testing.assert_close(Point(*wide, t, point.path).weight, (1 - t) ** 2 / miss, rtol=0.02, atol=0)


def test_the_weight_hardly_pulls_where_the_online_model_is_right() -> None:
    """On a skewed law of one entry ``E w (s - c)`` is far from its zero with the paper's weight."""
    law = fs.closed_form.mixture(torch.tensor([0.1, 0.9]), torch.tensor([[-0.1], [-1.8]]), torch.tensor([0.3, 0.13]))
    generator, rows, path = generator_for("skewed"), 200_000, Linear()
    x1 = law.sample(rows, generator, dtype=torch.float64)
    t = 0.98 * torch.rand(rows, generator=generator, dtype=torch.float64)
    eps = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    x_t, c = path.interpolate(eps, x1, t), path.target(eps, x1, t)
    s = law.velocity(x_t, t)
    point = Point(x1, x_t, c, s, s, t, path, float(x1.std()))

    def pull(w: Tensor) -> float:
        apart = w * (s - c).flatten()
        return float(apart.mean().abs() / apart.abs().mean())

    assert pull(torch.ones_like(t)) < 0.02
    assert pull(point.weight) < 0.1
    assert pull(point.kappa / rows_mean((s - c).abs())) > 0.3


def test_realuid_without_its_changes_is_fgm() -> None:
    point = some_point()
    torch.testing.assert_close(RealUID(1.0, 1.0)(point), FGM()(point))


# --- noise, turns and calls -------------------------------------------------------------------------------------


def test_the_paths_noise_is_independent_of_the_latent() -> None:
    generator, rows = generator_for("fresh"), 40_000
    objective, batch = game(FGM()), latents(rows, generator)
    point = point_of(objective, batch, Draws(generator, rows))
    eps = ((point.x_t - point.t[:, None] * point.x1) / (1 - point.t[:, None])).detach()
    assert abs(float((eps * batch.x0).mean())) < 4 / math.sqrt(rows)
    assert float(eps.var()) == pytest.approx(1, abs=0.03)
    assert float((eps * eps.roll(1, 0)).mean()) == pytest.approx(0, abs=0.03)


def test_the_online_model_learns_from_the_generator_as_it_is_and_the_generator_from_a_frozen_one() -> None:
    generator = generator_for("turns")
    objective, batch = game(FGM(), online_turns=3), latents(100, generator)
    assert objective.turns(0) == objective.turns(7) == ("online", "online", "online", "student")
    assert game(FGM(), online_turns=1, head_start=5).turns(4) == ("online",)
    assert game(FGM(), online_turns=1, head_start=5).turns(5) == ("online", "student")
    student, online = objective.modules["student"], objective.modules["online"]
    loss_of(objective, "online", batch, Draws(generator, 100))["loss"].backward()
    assert online.idle.grad is not None
    assert all(p.grad is None for p in student.parameters())
    small = loss_of(objective, "online", batch, Draws(generator_for("same"), 100))["loss"].item()
    with torch.no_grad():
        student.b.mul_(4)
    large = loss_of(objective, "online", batch, Draws(generator_for("same"), 100))["loss"].item()
    assert large > 2 * small


def test_the_generator_may_be_compared_with_an_average_of_the_online_model() -> None:
    """After n updates of s, ``s' = (1 - d^n) s`` where s' began at zero; no other turn moves it. s itself learns."""
    online, generator = Affine(0.0, 1.0), generator_for("average")
    objective, batch = game(FGM(), online=online, online_ema=0.8), latents(50, generator)
    assert set(objective.state) == {"target.a", "target.b"}
    with torch.no_grad():
        online.a.fill_(2.0)
    for role in ("online", "student", "online", "student", "online", "student"):
        loss_of(objective, role, batch, Draws(generator, 50))
        objective.after_step(role)
    point = point_of(objective, batch, Draws(generator, 50))
    torch.testing.assert_close(point.online, torch.full_like(point.online, 2 * (1 - 0.8**3)))
    (slope,) = torch.autograd.grad(loss_of(objective, "online", batch, Draws(generator, 50))["loss"], online.a)
    assert float(slope) != 0


def test_several_calls_are_trained_where_they_are_made() -> None:
    """With the exact map to the data, samples of every call have its law, and later calls their noised states."""
    seen: dict[float, list[Tensor]] = {}

    class Map(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            for time in t.unique().tolist():
                seen.setdefault(round(time, 3), []).append(x[t == time])
            return TEACHER.average_velocity(x, t, torch.ones_like(t))

    generator, rows = generator_for("calls"), 40_000
    objective = game(FGM(), Map(), steps=4)
    x1, which = objective.generate(
        objective.modules["student"], latents(rows, generator).x0, {}, Draws(generator, rows)
    )
    assert torch.equal(which.unique(), torch.arange(4.0, dtype=torch.float64))
    assert float(x1.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x1.std()) == pytest.approx(WIDTH, abs=0.02)
    assert sorted(seen) == [0, 0.25, 0.5, 0.75]
    for time, parts in seen.items():  # the last of them are those that are trained, a quarter of the rows each
        assert len(parts[-1]) == pytest.approx(rows / 4, rel=0.05)
        assert float(parts[-1].mean()) == pytest.approx(time * MEAN, abs=0.03)
        width = float(spread_at(WIDTH, torch.tensor(time)))
        assert float(parts[-1].std()) == pytest.approx(width, abs=0.03)


def test_every_call_has_an_online_model_of_its_own() -> None:
    models = PerCall(Affine(), 3)
    for call, model in enumerate(models.models):
        model.a.data.fill_(call)  # type: ignore[union-attr, operator]
    x, which = torch.zeros(4, 1, dtype=torch.float64), torch.tensor([0, 2, 0, 2])
    found = models(x, x[:, 0], which=which)
    assert found.flatten().tolist() == [0, 2, 0, 2]
    found.sum().backward()
    assert [float(model.a.grad) for model in models.models] == [2, 0, 2]  # type: ignore[arg-type, union-attr]


def test_a_generator_of_several_calls_may_be_asked_for_every_divisor() -> None:
    assert generator_rule(4).steps == (1, 2, 4)
    assert generator_rule(6).steps == (1, 2, 3, 6)
    assert generator_rule(1).sampler == "euler"
    assert generator_rule(2).sampler == "restart"


def test_recomputed_networks_give_the_same_gradient() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1).double()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.layer(torch.cat([x, t[:, None].to(x)], 1)).tanh()

    torch.manual_seed(0)
    online = Small()
    found = [monte_carlo(game(FGM(), online=online, checkpointing=switch), 1, 500) for switch in (False, True)]
    assert np.array_equal(*found)


# --- whole runs -------------------------------------------------------------------------------------------------

STAGES: dict[str, dict[str, Any]] = {
    "fgm": {"method": "fgm", "samples": 96_000},
    "sid": {"method": "sid", "samples": 96_000},
    "dmd": {"method": "dmd", "samples": 96_000},
    "realuid": {"method": "realuid", "samples": 96_000},
    "two": {"method": "dmd", "samples": 128_000, "steps": 2},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_beside_a_teacher(tmp_path_factory.mktemp("matching"), STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_one_call_is_five_times_nearer_than_the_teachers(trained: Path, stage: str) -> None:
    teacher, student = load(trained / "teacher"), load(trained / stage)
    euler = w1(teacher.sample(4000, steps=1))
    assert w1(student.sample(4000, steps=1)) < euler / 5
    if stage == "two":
        draw = student.draw(4000, steps=2)
        assert draw.nfe == 2
        assert w1(draw.x) < euler / 5
        with pytest.raises(UserError, match=r"made for 1, 2 step\(s\), not 3"):
            student.draw(4, steps=3)
    else:
        with pytest.raises(UserError, match="made for 1 step"):
            student.draw(4, steps=2)


def test_how_far_the_game_is_stands_in_the_statistics(trained: Path) -> None:
    lines = [line for line in (trained / "stats.jsonl").read_text().splitlines() if '"check"' in line]
    assert len(lines) == 20 * len(STAGES)
    assert all(name in lines[0] for name in ("energy", "precision", "recall", "gap", "lag"))


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        pytest.param(0.003, r"'s' is diverging.*online_turns \(now 1\).*best is in", id="seen"),
        pytest.param(3.0, r"non-finite losses.*Lower lr \(now 3\).*best is in", id="not finite"),
    ],
)
def test_a_diverging_game_is_stopped_with_its_best_model_and_the_knobs_named(
    trained: Path, tmp_path: Path, lr: float, message: str
) -> None:
    """An online model that hardly learns knows nothing of the generator, which runs after its own tail."""
    stage = {"method": "fgm", "teacher": str(trained / "teacher"), "samples": 400_000, "start": 0}
    stage |= {"lr": lr, "online_lr": 1e-5, "online_turns": 1, "ema": 0.9}
    data = {"path": str(trained.parent / "x.npy"), "scale": "none"}
    recipe = make_recipe({"data": data, "network": NETWORK, "stages": {"s": stage}}, "x")
    with pytest.raises(UserError, match=message) as failed:
        run_recipe(recipe, tmp_path / "run", LocalWorld(quiet=True))
    best = load(tmp_path / "run" / "s" / "best")
    assert str(tmp_path / "run" / "s" / "best") in str(failed.value)
    assert w1(best.sample(4000, steps=1)) < 2 * w1(load(trained / "teacher").sample(4000, steps=1))


def test_guidance_is_baked_in_once(tmp_path: Path) -> None:
    stages = {
        "teacher": {"method": "flow_matching", "samples": 2560},
        "fgm": {"method": "fgm", "teacher": "teacher", "guidance": 2.0, "samples": 2560},
    }
    fields = {"data": "digits", "conditional": True, "network": NETWORK, "stages": stages}
    run_recipe(make_recipe(fields, "x"), tmp_path, LocalWorld(quiet=True))
    assert load(tmp_path / "fgm").config.guidance == 2.0
    again = {"again": {"method": "sid", "teacher": str(tmp_path / "fgm"), "guidance": 2.0}}
    with pytest.raises(UserError):
        make_recipe({**fields, "stages": again}, "x")
    with pytest.raises(ValueError, match="not that of the real data"):
        RealUIDOptions(method="realuid", teacher="t", guidance=2.0)


@pytest.mark.parametrize(
    ("stages", "complaint"),
    [
        pytest.param({"s": {"method": "fgm"}}, "add 'teacher: STAGE'", id="no teacher"),
        pytest.param({"s": {"method": "dmd", "teacher": "ot"}}, "was trained on dependent pairs", id="coupled"),
    ],
)
def test_what_cannot_be_matched_is_refused(tmp_path: Path, stages: dict[str, Any], complaint: str) -> None:
    first = {"ot": {"method": "flow_matching", "coupling": "ot", "samples": 256}}
    fields = {"data": {"name": "moons", "rows": 300}, "network": NETWORK, "stages": {**first, **stages}}
    with pytest.raises(UserError, match=complaint):
        run_recipe(make_recipe(fields, "x"), tmp_path, LocalWorld(quiet=True))


def test_a_smaller_generator_learns_from_scratch(trained: Path, tmp_path: Path) -> None:
    stage = {"method": "dmd", "teacher": str(trained / "teacher"), "network": {"size": 0.25}, "samples": 96_000}
    data = {"path": str(trained.parent / "x.npy"), "scale": "none"}
    recipe = make_recipe({"data": data, "network": NETWORK, "stages": {"s": {**stage, "lr": 2e-3}}}, "x")
    run_recipe(recipe, tmp_path / "run", LocalWorld(quiet=True))
    small = load(tmp_path / "run" / "s")
    assert w1(small.sample(4000, steps=1)) < w1(load(trained / "teacher").sample(4000, steps=1)) / 4


def test_the_game_goes_on_from_a_consistency_model_or_from_the_teacher(trained: Path, tmp_path: Path) -> None:
    data = {"path": str(trained.parent / "x.npy"), "scale": "none"}
    common = {"method": "fgm", "teacher": str(trained / "teacher"), "samples": 40_000, "lr": 1e-9}
    stages = {"started": {**common, "start": 0.8}, "bare": {**common, "start": 0}}
    run_recipe(make_recipe({"data": data, "network": NETWORK, "stages": stages}, "x"), tmp_path, LocalWorld(quiet=True))
    noise = GaussianSource((1,)).sample(4000, generator_for("noise"))
    teacher, started, bare, start = (
        load(path).sample(noise=noise, steps=1)
        for path in (trained / "teacher", tmp_path / "started", tmp_path / "bare", tmp_path / "started/rounds/start")
    )
    torch.testing.assert_close(bare, teacher, rtol=0, atol=1e-4)
    torch.testing.assert_close(started, start, rtol=0, atol=1e-4)
    assert w1(start) < w1(teacher) / 3
    assert FGMOptions(method="fgm", teacher="t", init="map").start == 0
    assert FGMOptions(method="fgm", teacher="t", init="flow", start=0.3).start == 0.3


def test_a_generator_starts_from_a_one_step_map_which_others_may_not(trained: Path, tmp_path: Path) -> None:
    data = {"path": str(trained.parent / "x.npy"), "scale": "none"}

    def run(**stage: Any) -> Path:
        stages = {"s": {"teacher": str(trained / "teacher"), "init": str(trained / "fgm"), "samples": 2560, **stage}}
        run_recipe(
            make_recipe({"data": data, "network": NETWORK, "stages": stages}, "x"), tmp_path, LocalWorld(quiet=True)
        )
        return tmp_path / "s"

    noise = GaussianSource((1,)).sample(10, generator_for("noise"))
    start, found = (load(path).sample(noise=noise) for path in (trained / "fgm", run(method="sid", lr=1e-9)))
    torch.testing.assert_close(found, start, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="is a one-step map, not a velocity"):
        run(method="meanflow")
    with pytest.raises(UserError, match="is a map of another network"):
        run(method="dmd", network={"name": "mlp", "width": 32})
    stages = {"segments": {"method": "consistency_fm", "teacher": str(trained / "teacher"), "samples": 2560}}
    recipe = make_recipe({"data": data, "network": NETWORK, "stages": stages}, "x")
    run_recipe(recipe, tmp_path / "other", LocalWorld(quiet=True))
    with pytest.raises(UserError, match="init must be a one-step map"):
        run(method="dmd", init=str(tmp_path / "other/segments"))


def test_latents_of_a_run_are_the_bases(trained: Path) -> None:
    """The same noise gives the same sample, alone or among others."""
    student = load(trained / "fgm")
    noise = Independent(GaussianSource((1,))).source.sample(10, generator_for("noise"))
    torch.testing.assert_close(student.sample(noise=noise)[3:4], student.sample(noise=noise[3:4]))
