"""Two-time networks and the flow-map family against exact maps: identities, stationarity, warm starts, small runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.data.load import load_data
from fewstep.errors import UserError
from fewstep.flow.couplings import Facts, GaussianSource, Independent, Pair
from fewstep.flow.derivatives import Derivative
from fewstep.flow.field import CountedField
from fewstep.flow.grids import make_grid
from fewstep.flow.noise import Draws, generator_for
from fewstep.flow.paths import Linear
from fewstep.flow.time_laws import make_time_law
from fewstep.generator import load
from fewstep.methods.contract.objective import Objective
from fewstep.methods.contract.stage import Stage
from fewstep.methods.families.derivative_mode import end_derivative, settle_derivative, total_derivative
from fewstep.methods.families.end_derivative import EndDerivative
from fewstep.methods.families.flow_map import Times, composition_target, derivative_target, draw_times, weighted_square
from fewstep.methods.families.velocity_source import VelocitySource, velocity_source
from fewstep.methods.lagrangian import Lagrangian, LagrangianOptions
from fewstep.methods.meanflow import MeanFlow, MeanflowOptions, SelfGuidance, alpha_at
from fewstep.methods.meanflow import network as meanflow_network
from fewstep.methods.shortcut import Shortcut, draw_steps
from fewstep.networks import build, resolve
from fewstep.networks.two_time import take_weights
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.pipeline.stage_networks import same_weights
from fewstep.solvers.maps import run_map
from fewstep.training.world import LocalWorld
from mixture_cases import MIXTURE, NETWORK, train_beside_a_teacher, w1
from objective_cases import loss_of

GAUSSIAN = fs.closed_form.gaussian(torch.tensor([0.5, -1.0]), torch.tensor([0.3, 2.0]))
TARGETS: dict[str, Any] = {"gaussian": GAUSSIAN, "mixture": MIXTURE}
UNIFORM = make_time_law("uniform")


def average(target: Any) -> Callable[..., Tensor]:
    return lambda x, t, r: target.average_velocity(x, t, r)


def points(target: Any, rows: int = 200) -> tuple[Tensor, Times]:
    """States of the flow at t, and times t < r."""
    generator = generator_for("points")
    t, r = torch.rand(2, rows, generator=generator, dtype=torch.float64).sort(0).values
    x1 = target.sample(rows, generator, dtype=torch.float64)
    x0 = torch.randn(x1.shape, generator=generator, dtype=torch.float64)
    return Linear().interpolate(x0, x1, t), Times(t, r, torch.zeros(rows, dtype=torch.bool))


# --- two-time networks ------------------------------------------------------------------------------------------

CONFIGS = [
    pytest.param({"name": "mlp", "width": 24, "blocks": 2, "embedding": 16}, (5,), id="mlp"),
    pytest.param({"name": "unet", "widths": [16, 32], "blocks": 1, "middle": 2, "embedding": 16}, (1, 8, 8), id="unet"),
]


def network(config: dict[str, Any], shape: tuple[int, ...], two_time: bool = False, classes: int = 3) -> nn.Module:
    """A network whose zero weights are drawn, as after training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(resolve({**config, "two_time": two_time}, shape, classes))
        for parameter in net.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.3)
    return net.eval()


@pytest.mark.parametrize(("config", "shape"), CONFIGS)
def test_a_warm_start_is_the_teacher_for_every_end(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    teacher, student = network(config, shape), network(config, shape, two_time=True)
    take_weights(student, teacher.state_dict())
    x, t, label = torch.randn(4, *shape), torch.rand(4), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        v = teacher(x, t, label)
        for r in (None, t, torch.ones(4), torch.zeros(4)):
            assert torch.equal(student(x, t, label=label, r=r), v)
    student(x, t, label=label, r=torch.ones(4)).sum().backward()
    assert student.conditioning.interval.second.weight.grad.abs().sum() > 0
    take_weights(teacher, network(config, shape).state_dict())  # of the same kind
    with pytest.raises(UserError, match="another network"):
        take_weights(teacher, student.state_dict())


@pytest.mark.parametrize(("config", "shape"), CONFIGS)
def test_a_two_time_network_depends_on_the_end_and_a_velocity_refuses_one(
    config: dict[str, Any], shape: tuple[int, ...]
) -> None:
    net, x, t = network(config, shape, two_time=True), torch.randn(4, *shape), torch.full((4,), 0.3)
    assert not torch.allclose(net(x, t, r=torch.ones(4)), net(x, t, r=t))
    assert torch.equal(net(x, t, r=t), net(x, t))
    with pytest.raises(UserError, match="two_time: true"):
        network(config, shape)(x, t, r=t)
    with pytest.raises(UserError, match="r has shape"):
        net(x, t, r=torch.ones(3))
    with pytest.raises(UserError, match=r"network\.two_time"):
        resolve({**config, "two_time": "yes"}, shape)


def test_a_resolved_configuration_says_two_time_only_where_it_is() -> None:
    one, two = (resolve({"name": "mlp", "two_time": flag}, (2,)) for flag in (False, True))
    assert "two_time" not in one
    assert resolve(two, (2,)) == two == {**one, "two_time": True}
    assert same_weights(one, two)
    assert same_weights(two, two)
    assert not same_weights(two, one)


# --- exact maps: the three equations ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_exact_maps_fulfil_the_derivative_equation(name: str) -> None:
    target = TARGETS[name]
    x, times = points(target)
    if name == "mixture":  # near r = t the chord of bisected maps is a quotient of small numbers
        times = times._replace(r=torch.maximum(times.r, times.t + 0.05))
    v, u = target.velocity(x, times.t), average(target)
    exact = target.average_velocity(x, times.t, times.r)
    mode = "forward" if name == "gaussian" else "double_vjp"  # the mixture's map is solved under no_grad
    found = derivative_target(Derivative(u, mode), x, times, v, {})
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)
    wrong = 2 * v - found  # the other sign
    assert (wrong - exact).abs().max() > 0.1


def test_steep_rows_are_shortened_and_others_left_alone() -> None:
    """u = k t x with the velocity 0 has the target (r - t) k x."""
    x = torch.tensor([[3.0, 4.0], [300.0, 400.0]], dtype=torch.float64)
    times = Times(torch.full((2,), 0.5).double(), torch.ones(2).double(), torch.zeros(2, dtype=torch.bool))
    u = lambda x, t, r: t[:, None] * x  # noqa: E731
    found = derivative_target(Derivative(u, "forward"), x, times, torch.zeros_like(x), {})
    torch.testing.assert_close(found[0], x[0] / 2)
    torch.testing.assert_close(found[1], x[1] * (5 / math.sqrt(125_000)))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_exact_maps_fulfil_the_composition_equation(name: str, share: float) -> None:
    target = TARGETS[name]
    x, times = points(target)
    times = times._replace(r=torch.where(torch.arange(200) < 5, times.t, times.r))  # some on the diagonal
    q = times.t + share * (times.r - times.t)
    found = composition_target(average(target), x, times, q, {})
    torch.testing.assert_close(found, target.average_velocity(x, times.t, times.r), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("mode", ["forward", "finite_difference"])
def test_exact_maps_fulfil_the_lagrangian_equation(mode: Any) -> None:
    x, times = points(GAUSSIAN)
    end, speed = EndDerivative(average(GAUSSIAN), mode)(x, times, {})
    close = {"rtol": 1e-8, "atol": 1e-8} if mode == "forward" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(end, GAUSSIAN.flow_map(x, times.t, times.r), **close)
    torch.testing.assert_close(speed, GAUSSIAN.velocity(end, times.r), **close)


@pytest.mark.parametrize(("config", "shape"), CONFIGS)
def test_derivatives_of_networks_are_finite_differences(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    net = network(config, shape, two_time=True, classes=0).double()
    generator = generator_for("net")
    x, v = torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    times = Times(t, t + 0.2, t < 0)
    exact, differences = (
        derivative_target(Derivative(net, mode), x, times, v, {}) for mode in ("forward", "finite_difference")
    )
    torch.testing.assert_close(exact, differences, rtol=1e-6, atol=1e-6)
    (end, speed), (end_d, speed_d) = (
        EndDerivative(net, mode)(x, times, {}) for mode in ("forward", "finite_difference")
    )
    torch.testing.assert_close(speed, speed_d, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(end, end_d, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("config", "shape"), CONFIGS)
def test_the_gradient_through_the_end_derivative_is_that_of_differences(
    config: dict[str, Any], shape: tuple[int, ...]
) -> None:
    net = network(config, shape, two_time=True, classes=0).double()
    x = torch.randn(3, *shape, generator=generator_for("grad"), dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    times, parameters = Times(t, t + 0.2, t < 0), list(net.parameters())
    derivative = EndDerivative(net, "auto")
    one, two = (
        torch.autograd.grad(d(x, times, {})[1].square().sum(), parameters)
        for d in (derivative, EndDerivative(net, "finite_difference"))
    )
    assert derivative.mode_at(x, times, {}) in ("forward", "finite_difference")
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()) + 1e-9)


class Plain(torch.autograd.Function):
    """The sine, of which autograd is told the first reverse derivative alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


class NoForwardMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        out: Tensor = Plain.apply(self.scale * x + (t + r)[:, None])  # type: ignore[no-untyped-call]
        return out


def some_stage(said: list[str], network: dict[str, Any]) -> Stage:
    data = load_data({"name": "moons", "rows": 200})
    world = LocalWorld(quiet=True)
    world.say = said.append  # type: ignore[method-assign]
    source = GaussianSource(data.shape)
    return Stage("maps", Path("maps"), data, source, 0, (), network, NoForwardMode, None, 0.0, world)


@pytest.mark.parametrize("choose", [total_derivative, end_derivative])
def test_a_network_without_forward_mode_falls_back_and_says_so_once(choose: Any) -> None:
    said: list[str] = []
    stage = some_stage(said, {})
    source = velocity_source(MeanflowOptions(method="meanflow"), stage)
    net = NoForwardMode().train()
    assert settle_derivative(stage, net, source, "auto", choose) == "finite_difference"
    assert len(said) == 1
    assert "no forward-mode derivative: finite_difference is taken instead" in said[0]
    assert net.training
    for mode in ("forward", "finite_difference"):
        assert settle_derivative(stage, net, source, mode, choose) == mode
    assert len(said) == 1


@pytest.mark.parametrize("mode", ["auto", "finite_difference"])
def test_differences_of_a_network_with_dropout_are_refused(mode: Any) -> None:
    """Also where they are what ``auto`` comes to: two calls drop different values."""
    stage = some_stage([], {"dropout": 0.1})
    source = velocity_source(MeanflowOptions(method="meanflow"), stage)
    with pytest.raises(UserError, match="dropout makes every call another function"):
        settle_derivative(stage, NoForwardMode(), source, mode)


# --- losses at the exact map ------------------------------------------------------------------------------------


class Perturbed(nn.Module):
    """``u + epsilon psi`` around an exact average velocity."""

    def __init__(self, target: Any, psi: Callable[..., Tensor], sign: float = 1.0) -> None:
        super().__init__()
        self.target, self.psi, self.sign = target, psi, sign
        self.epsilon = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        u: Tensor = self.sign * self.target.average_velocity(x, t, r)
        return u + self.epsilon * self.psi(x, t, r)


DIRECTIONS: dict[str, Callable[..., Tensor]] = {
    "one": lambda x, t, r: torch.ones_like(x),
    "x": lambda x, t, r: x,
    "x squared": lambda x, t, r: x**2,
    "x (r - t)": lambda x, t, r: x * (r - t)[:, None],
}
SHAPES = {"gaussian": (2,), "mixture": (1,)}


def taught(target: Any, teacher: bool) -> VelocitySource:
    facts = Facts(independent=True, deterministic=False)
    return VelocitySource(Linear(), target.velocity if teacher else None, facts, lambda: None)  # type: ignore[arg-type, return-value]


def batch_of(target: Any, rows: int, generator: torch.Generator) -> Pair:
    x1 = target.sample(rows, generator, dtype=torch.float64)
    return Independent(GaussianSource(tuple(x1.shape[1:]))).pair(x1, {}, generator)


def gradient_score(
    make: Callable[[nn.Module], Objective], target: Any, psi: Any, sign: float = 1.0, rows: int = 1500
) -> float:
    student = Perturbed(target, psi, sign)
    objective, gradients = make(student), []
    for block in range(24):
        generator = generator_for("map stationary", block)
        batch = batch_of(target, rows, generator)
        loss = loss_of(objective, "student", batch, Draws(generator, rows))["loss"]
        gradients.append(torch.autograd.grad(loss, student.epsilon)[0].item())
    return float(np.mean(gradients) / (np.std(gradients, ddof=1) / math.sqrt(len(gradients))))


FROM_DATA: dict[str, Callable[[nn.Module, Any], Objective]] = {
    "meanflow": lambda net, target: MeanFlow(net, taught(target, False), UNIFORM),
    "split": lambda net, target: MeanFlow(net, taught(target, False), UNIFORM, target="split"),
    "improved": lambda net, target: MeanFlow(net, taught(target, False), UNIFORM, target="improved"),
    "lagrangian": lambda net, target: Lagrangian(net, taught(target, False), UNIFORM),
}


@pytest.mark.parametrize("method", FROM_DATA)
def test_the_exact_map_is_stationary_when_learning_from_pairs(method: str) -> None:
    def make(net: nn.Module) -> Objective:
        return FROM_DATA[method](net, GAUSSIAN)

    scores = {name: gradient_score(make, GAUSSIAN, psi) for name, psi in DIRECTIONS.items()}
    assert max(map(abs, scores.values())) < 4, scores
    assert abs(gradient_score(make, GAUSSIAN, DIRECTIONS["x"], sign=-1.0)) > 20


@pytest.mark.parametrize("way", ["auto", "finite_difference"])
def test_meanflow_from_pairs_is_stationary_at_the_mixtures_map(way: Any) -> None:
    def make(net: nn.Module) -> Objective:
        return MeanFlow(net, taught(MIXTURE, False), UNIFORM, derivative=way)

    assert abs(gradient_score(make, MIXTURE, DIRECTIONS["x"], rows=300)) < 4


def test_losses_from_an_exact_teacher_vanish_at_the_exact_map() -> None:
    generator = generator_for("vanish")
    batch = batch_of(GAUSSIAN, 400, generator)
    net, source = Perturbed(GAUSSIAN, DIRECTIONS["x"]), taught(GAUSSIAN, True)
    for objective in (
        MeanFlow(net, source, UNIFORM, derivative="forward"),
        MeanFlow(net, source, UNIFORM, target="split"),
        Lagrangian(net, source, UNIFORM),
    ):
        assert loss_of(objective, "student", batch, Draws(generator, 400))["loss"].item() < 1e-12
    with torch.no_grad():
        net.epsilon += 0.1
    assert loss_of(Lagrangian(net, source, UNIFORM), "student", batch, Draws(generator, 400))["loss"].item() > 1e-3


def alpha_residual(student: nn.Module, alpha: float, teacher: bool = True) -> Tensor:
    """``(u - y) / a`` on the same rows for every a."""
    generator = generator_for("alpha")
    batch = batch_of(GAUSSIAN, 400, generator)
    x_t, times = points(GAUSSIAN, 400)
    objective = MeanFlow(student, taught(GAUSSIAN, teacher), UNIFORM, target="alpha")
    target = objective.target(student, batch, x_t, times, Draws(generator, 400), alpha)
    return (student(x_t, times.t, r=times.r).detach() - target) / alpha


def test_the_alpha_targets_residual_at_the_exact_map_is_of_second_order() -> None:
    net = Perturbed(GAUSSIAN, DIRECTIONS["x"])
    sizes = [float(alpha_residual(net, 0.5**k).square().mean().sqrt()) for k in range(2, 8)]
    slopes = [math.log2(one / two) for one, two in itertools.pairwise(sizes)]
    assert slopes[-1] == pytest.approx(1, abs=0.05), slopes


def test_small_alphas_have_the_gradient_of_the_derivatives_target() -> None:
    net = Perturbed(GAUSSIAN, DIRECTIONS["x squared"])
    with torch.no_grad():
        net.epsilon += 0.2  # away from the solution
    x_t, times = points(GAUSSIAN, 400)
    exact = derivative_target(Derivative(net, "forward"), x_t, times, GAUSSIAN.velocity(x_t, times.t), {})
    limit = net(x_t, times.t, r=times.r).detach() - exact
    errors = [float((alpha_residual(net, a) - limit).square().mean().sqrt()) for a in (1e-2, 1e-3, 1e-4)]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[2] < 1e-3 * float(limit.square().mean().sqrt())


def test_alpha_falls_from_one_along_a_sigmoid() -> None:
    assert alpha_at(0.0) == alpha_at(0.2) == 1.0
    assert alpha_at(0.5) == pytest.approx(0.5)
    assert alpha_at(0.6) == pytest.approx(1 / (1 + math.exp(2.5)))
    assert alpha_at(0.8) == alpha_at(1.0) == 0.005


@pytest.mark.parametrize("own", [0.0, 0.5, 0.9])
def test_self_guidance_is_a_fixed_point_of_the_guided_velocity(own: float) -> None:
    generator = generator_for("guided")
    free, known, x = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64)
    label, scale, t = torch.tensor([0, 1, 2, 0, 3]), 2.5, torch.full((5,), 0.4, dtype=torch.float64)
    guided = free + scale * (known - free)

    def student(x: Tensor, t: Tensor, r: Tensor, label: Tensor) -> Tensor:
        assert torch.equal(r, t)
        return torch.where(label[:, None] == 3, free, guided)

    guide = SelfGuidance(scale, own, nulls={"label": 3}, dropout=0.1)
    found = guide(student, known, x, t, {"label": label}, label == 3)
    torch.testing.assert_close(found[:4], guided[:4], rtol=1e-12, atol=1e-12)
    assert torch.equal(found[4], known[4])  # it lost its label


def euler(target: Any, smallest: float) -> Callable[..., Tensor]:
    """The average velocity of Euler steps of the smallest length."""

    def u(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        y, steps = x, ((r - t) / smallest).round().long()
        for k in range(int(steps.max())):
            moved = y + smallest * target.velocity(y, (t + k * smallest).clamp(max=1.0))
            y = torch.where((k < steps)[:, None], moved, y)
        return (y - x) / (r - t)[:, None]

    return u


class Fixed(nn.Module):
    def __init__(self, u: Callable[..., Tensor]) -> None:
        super().__init__()
        self.u = u

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return self.u(x, t, r)


def test_shortcuts_of_euler_steps_have_no_loss_at_any_level() -> None:
    generator = generator_for("shortcut")
    batch, draws = batch_of(GAUSSIAN, 500, generator), Draws(generator, 500)
    objective = Shortcut(Fixed(euler(GAUSSIAN, 1 / 16)), taught(GAUSSIAN, True), levels=4, composed=0.5)
    assert loss_of(objective, "student", batch, draws)["loss"].item() < 1e-24
    exact = Shortcut(Fixed(average(GAUSSIAN)), taught(GAUSSIAN, True), levels=4, composed=0.5)
    assert 1e-6 < loss_of(exact, "student", batch, draws)["loss"].item() < 0.05  # the floor of 16 Euler steps


# --- times and weights ------------------------------------------------------------------------------------------


def test_times_are_sorted_and_the_stated_share_is_on_the_diagonal() -> None:
    times = draw_times(UNIFORM, 0.3, Draws(generator_for("times"), 40_000), torch.zeros((), dtype=torch.float64))
    assert bool((times.r >= times.t).all())
    assert torch.equal(times.r == times.t, times.diagonal)
    assert times.diagonal.double().mean().item() == pytest.approx(0.3, abs=0.01)
    apart = ~times.diagonal
    assert times.t[apart].mean().item() == pytest.approx(1 / 3, abs=0.01)
    assert times.r[apart].mean().item() == pytest.approx(2 / 3, abs=0.01)


def test_shortcut_steps_start_at_multiples_of_their_length() -> None:
    steps = draw_steps(3, 0.25, Draws(generator_for("steps"), 40_000), torch.zeros((), dtype=torch.float64))
    length = steps.r - steps.t
    assert torch.equal(steps.t / length, (steps.t / length).round())
    assert float(steps.r.max()) == 1.0
    assert (length == 0.125).double().mean().item() == pytest.approx(0.75, abs=0.01)
    for d in (1.0, 0.5, 0.25):
        assert (length == d).double().mean().item() == pytest.approx(0.25 / 3, abs=0.01)


def test_the_adaptive_weight_is_its_formula_and_has_no_gradient() -> None:
    e = torch.tensor([[3.0, 4.0], [0.0, 1.0]], requires_grad=True)
    assert weighted_square(e).item() == pytest.approx(26 / 4)
    weights = (torch.tensor([25.0, 1.0]) + 0.01) ** -0.5
    loss = weighted_square(e, 0.5, 0.01)
    assert loss.item() == pytest.approx(float((weights * torch.tensor([25.0, 1.0])).mean() / 2), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, e)
    torch.testing.assert_close(gradient, weights[:, None] * e.detach() / 2)


def test_targets_have_no_graph() -> None:
    generator = generator_for("graph")
    batch, net = batch_of(GAUSSIAN, 50, generator), Perturbed(GAUSSIAN, DIRECTIONS["x"])
    for target in ("derivative", "improved", "alpha", "split"):
        objective = MeanFlow(net, taught(GAUSSIAN, False), UNIFORM, target=target)  # type: ignore[arg-type]
        times = draw_times(UNIFORM, 0.5, Draws(generator, 50), batch.x1)
        assert not objective.target(net, batch, batch.x0, times, Draws(generator, 50)).requires_grad
    shortcut = Shortcut(net, taught(GAUSSIAN, False))
    steps = draw_steps(5, 0.5, Draws(generator, 50), batch.x1)
    assert not shortcut.target(net, batch, batch.x0, steps).requires_grad


# --- sampling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["uniform", "shift:3", "karras", "0,0.1,0.9,1"])
def test_a_chain_of_the_exact_map_ends_at_one_place_on_every_grid(grid: str) -> None:
    x0 = torch.randn(100, 2, generator=generator_for("chain"), dtype=torch.float64)
    times = make_grid(grid, None if grid[0] == "0" else 5)
    x, nfe = run_map("chain", CountedField(average(GAUSSIAN)), x0, times, {})
    assert nfe == len(times) - 1
    torch.testing.assert_close(x, GAUSSIAN.mean + GAUSSIAN.std * x0, rtol=1e-12, atol=1e-12)


# --- whole runs -------------------------------------------------------------------------------------------------

STAGES: dict[str, dict[str, Any]] = {
    "meanflow": {"method": "meanflow", "samples": 64_000, "derivative": "finite_difference"},
    "split": {"method": "meanflow", "target": "split", "samples": 64_000},
    "alpha": {"method": "meanflow", "target": "alpha", "samples": 64_000},
    "lagrangian": {"method": "lagrangian", "samples": 50_000},
    "shortcut": {"method": "shortcut", "samples": 64_000},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_beside_a_teacher(tmp_path_factory.mktemp("maps"), STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_one_step_of_a_learned_map_is_five_times_nearer_than_the_teachers(trained: Path, stage: str) -> None:
    teacher, student = load(trained / "teacher"), load(trained / stage)
    assert w1(student.sample(4000, steps=1)) < w1(teacher.sample(4000, steps=1)) / 5
    draw = student.draw(4000, steps=4)
    assert draw.nfe == 4
    assert w1(draw.x) < w1(teacher.sample(4000, steps=4)) / 1.5


def test_steps_and_grids_that_a_map_has_no_meaning_for_are_refused(trained: Path) -> None:
    shortcut, free = load(trained / "shortcut"), load(trained / "lagrangian")
    with pytest.raises(UserError, match=r"made for 1, 2, 4, 8, 16, 32 step\(s\), not 3"):
        shortcut.draw(4, steps=3)
    with pytest.raises(UserError, match="leave grid out"):
        shortcut.draw(4, steps=4, grid="shift:3")
    assert free.draw(4, steps=3, grid="shift:3").nfe == 3
    assert free.draw(4, grid="0,0.3,1").nfe == 2
    for wrong in ({"grid": "dp", "steps": 4}, {"solver": "heun"}, {"grid": "0,0.5"}, {"guidance": 2.0}):
        with pytest.raises(UserError):
            free.draw(4, **wrong)  # type: ignore[arg-type]


def test_a_student_starts_as_its_teacher(trained: Path, tmp_path: Path) -> None:
    """A learning rate of nearly nothing leaves the warm start: one call is the teacher's Euler step."""
    out = trained / "start"
    stage = {"method": "lagrangian", "teacher": str(trained / "teacher"), "samples": 256, "lr": 1e-12}
    data = {"path": str(trained.parent / "x.npy"), "scale": "none"}
    recipe = make_recipe({"data": data, "network": NETWORK, "stages": {"s": stage}}, "x")
    run_recipe(recipe, out, LocalWorld(quiet=True))
    start, teacher = load(out / "s"), load(trained / "teacher")
    torch.testing.assert_close(start.sample(100, steps=1), teacher.sample(100, steps=1), rtol=0, atol=1e-6)


def test_robust_weights_on_pairs_in_few_dimensions_are_refused() -> None:
    moons = load_data({"name": "moons", "rows": 200})
    with pytest.raises(UserError, match="another map"):
        meanflow_network(MeanflowOptions(method="meanflow", p=0.75), moons, {}, 0)
    assert meanflow_network(MeanflowOptions(method="meanflow", p=0.75), load_data("digits"), {}, 0)["two_time"]
    assert meanflow_network(MeanflowOptions(method="meanflow", p=0.75, teacher="t"), moons, {}, 0)["two_time"]


def test_guidance_needs_a_teacher_where_it_cannot_be_learned_alone() -> None:
    with pytest.raises(ValueError, match="guidance is the teacher's"):
        LagrangianOptions(method="lagrangian", guidance=2.0)
    assert MeanflowOptions(method="meanflow", guidance=2.0).guidance == 2.0
    with pytest.raises(ValueError, match="own belongs to guidance without a teacher"):
        MeanflowOptions(method="meanflow", own=0.2)
    with pytest.raises(ValueError, match="a teacher's velocity has none"):
        MeanflowOptions(method="meanflow", target="improved", teacher="t")


def test_guidance_learned_alone_is_that_of_a_guided_teacher(tmp_path: Path) -> None:
    """Two classes on the line: one step with the guidance learned beside the guided flow in forty."""
    generator = generator_for("two classes")
    label = torch.randint(2, (20_000,), generator=generator)
    x = 0.5 * torch.randn(20_000, 1, generator=generator) + (2.0 * label - 1)[:, None]
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", label.numpy())
    data = {"path": str(tmp_path / "x.npy"), "labels": str(tmp_path / "y.npy"), "scale": "none"}
    alone = {"method": "meanflow", "guidance": 2.0, "samples": 128_000, "derivative": "finite_difference"}
    stages = {"teacher": {"method": "flow_matching", "samples": 96_000}, "alone": alone}
    fields = {"data": data, "conditional": True, "network": NETWORK, "stages": stages}
    run_recipe(make_recipe(fields, "x"), tmp_path / "run", LocalWorld(quiet=True))
    teacher, student = load(tmp_path / "run" / "teacher"), load(tmp_path / "run" / "alone")
    assert student.config.guidance == 2.0
    guided = teacher.sample(4000, steps=40, label=1, guidance=2.0).flatten().sort().values
    plain = teacher.sample(4000, steps=40, label=1).flatten().sort().values
    found = student.sample(4000, steps=1, label=1).flatten().sort().values
    moved = (guided - plain).abs().mean()
    assert (found - guided).abs().mean() < 0.3 * moved, (found.mean(), guided.mean(), plain.mean())
    with pytest.raises(UserError, match="baked"):
        student.sample(4, steps=1, label=1, guidance=2.0)


def test_guidance_learned_alone_needs_labels() -> None:
    fields = {"data": "digits", "network": NETWORK, "stages": {"m": {"method": "meanflow", "guidance": 2.0}}}
    with pytest.raises(UserError, match="conditional: true"):
        make_recipe({**fields, "conditional": False}, "x")
