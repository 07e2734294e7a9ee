"""Directional derivatives against closed forms, finite differences and the transpose identity; how `auto` chooses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UserError
from fewstep.flow import closed_form
from fewstep.flow.derivatives import WAYS, Derivative, Mode, pullback, rows_of
from fewstep.flow.paths import expand_time
from fewstep.networks import build, resolve


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def times(batch: int, seed: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(batch, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def layers(*modules: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The modules in a row, with weights that do not come from the global generator."""
    net = nn.Sequential(*modules).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
    return net


def mlp(dimension: int = 3, dtype: torch.dtype = torch.float64) -> Any:
    net = layers(nn.Linear(dimension + 1, 24), nn.Tanh(), nn.Linear(24, dimension), dtype=dtype)
    return lambda x, t: net(torch.cat([x, t[:, None]], 1))


def mixture(*shape: int) -> closed_form.Mixture:
    return closed_form.mixture(torch.tensor([0.3, 0.7]), noise(2, *shape, seed=3), torch.tensor([0.5, 0.8]))


def difference(velocity: Any, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, h: float = 1e-5) -> Tensor:
    """Central difference of order two; t must keep h away from the ends."""
    ahead = velocity(x + h * dx, t + h * dt)
    return (ahead - velocity(x - h * dx, t - h * dt)) / (2 * h)


@pytest.mark.parametrize("mode", ["auto", *WAYS])
@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)])
def test_acceleration_of_a_gaussian_flow_has_its_closed_form(mode: Mode, shape: tuple[int, ...]) -> None:
    """x'' = s^2 q^(-3/2) z0 with q = (1 - t)^2 + t^2 s^2, also at both ends."""
    s = noise(*shape, seed=1).abs() + 0.4
    flow = closed_form.gaussian(noise(*shape, seed=2), s)
    z0 = noise(6, *shape)
    t = torch.tensor([0.0, 0.2, 0.5, 0.7, 0.95, 1.0], dtype=torch.float64)
    x = flow.flow_map(z0, torch.zeros_like(t), t)
    v, acceleration = Derivative(flow.velocity, mode)(x, t, flow.velocity(x, t), torch.ones_like(t))
    q = expand_time((1 - t) ** 2, x) + expand_time(t**2, x) * s**2
    torch.testing.assert_close(acceleration, s**2 / q**1.5 * z0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(v, flow.velocity(x, t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["auto", *WAYS])
@pytest.mark.parametrize("velocity", [mixture(3).velocity, mlp(3)], ids=["mixture", "mlp"])
@pytest.mark.parametrize("moves", ["x", "t", "both"])
def test_every_way_equals_a_central_difference(mode: Mode, velocity: Any, moves: str) -> None:
    x, dx, t = noise(8, 3), noise(8, 3, seed=1) * (moves != "t"), 0.05 + 0.9 * times(8)
    dt = noise(8, seed=2) * (moves != "x")
    derivative = Derivative(velocity, mode)
    _, dv = derivative(x, t, dx, None if moves == "x" else dt)
    torch.testing.assert_close(dv, difference(velocity, x, t, dx, dt), rtol=1e-6, atol=1e-6)
    assert derivative.used == ("forward" if mode == "auto" else mode)


def test_finite_differences_are_of_second_order_at_the_ends_too() -> None:
    """Exact on v = x^2 + t^2 but for rounding: one-sided differences of first order would be off by h."""
    x, t = noise(3, 2), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    dx, dt = noise(3, 2, seed=1), torch.ones(3, dtype=torch.float64)
    _, dv = Derivative(lambda x, t: x**2 + t[:, None] ** 2, "finite_difference")(x, t, dx, dt)
    torch.testing.assert_close(dv, 2 * x * dx + 2 * t[:, None], rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["auto", *WAYS])
@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_time_outside_the_unit_interval_is_asked_for(mode: Mode, direction: float, dtype: torch.dtype) -> None:
    asked: list[Tensor] = []
    field = mlp(dtype=dtype)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t.detach())
        return field(x, t)

    t = torch.tensor([0.0, 1.0, 1e-7, 1 - 1e-7], dtype=dtype)
    Derivative(velocity, mode)(noise(4, 3, dtype=dtype), t, noise(4, 3, seed=1, dtype=dtype), t * 0 + direction)
    assert all(float(s.min()) >= 0.0 and float(s.max()) <= 1.0 for s in asked)


def test_a_row_without_a_direction_has_no_derivative() -> None:
    dx = noise(4, 3)
    dx[2] = 0
    for mode in WAYS:
        _, dv = Derivative(mlp(), mode)(noise(4, 3, seed=1), times(4), dx)
        assert not dv[2].any()
        assert dv[[0, 1, 3]].any(1).all()


class Attention(nn.Module):
    """Fused attention over the entries of x as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = layers(nn.Linear(2, 24), seed=1)
        self.out = layers(nn.Linear(8, 1), seed=2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = torch.stack([x, t[:, None].expand_as(x)], -1)
        q, k, v = self.lift(tokens)[:, None].chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v))[:, 0, :, 0]


class Normed(nn.Module):
    """Convolution, group normalisation and a reshape, on images of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.net = layers(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x + expand_time(t, x)).transpose(2, 3).reshape(len(x), -1).reshape(x.shape)


@pytest.mark.parametrize(("net", "shape"), [(Attention(), (5,)), (Normed(), (1, 4, 4))], ids=["attention", "norm"])
def test_attention_and_group_normalisation_are_differentiated_by_autograd(
    net: nn.Module, shape: tuple[int, ...]
) -> None:
    x, dx, t = noise(6, *shape), noise(6, *shape, seed=1), 0.1 + 0.8 * times(6)
    derivative = Derivative(net)
    _, dv = derivative(x, t, dx, torch.ones_like(t))
    assert derivative.used in ("forward", "double_vjp")
    torch.testing.assert_close(dv, difference(net, x, t, dx, torch.ones_like(t)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"name": "mlp", "width": 24, "blocks": 2, "embedding": 16}, (5,)),
        ({"name": "unet", "widths": [16, 32], "blocks": 1, "middle": 2, "patch": 1, "embedding": 16}, (2, 8, 8)),
    ],
)
def test_the_built_in_networks_work_in_forward_mode_and_conditions_travel(
    config: dict[str, Any], shape: tuple[int, ...]
) -> None:
    """The choice is made on the first rows, and every row keeps its label."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(resolve(config, shape, 3, 0)).double().eval()
        for parameter in net.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.3)
    x, dx, t, label = noise(7, *shape), noise(7, *shape, seed=1), 0.1 + 0.8 * times(7), torch.arange(7) % 4
    derivative = Derivative(net)
    v, dv = derivative(x, t, dx, torch.ones_like(t), label=label)
    assert derivative.used == "forward"

    def labelled(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t, label=label)

    torch.testing.assert_close(dv, difference(labelled, x, t, dx, torch.ones_like(t)), rtol=1e-6, atol=1e-6)
    for i in range(7):
        alone, _ = derivative(x[i : i + 1], t[i : i + 1], dx[i : i + 1], label=label[i : i + 1])
        torch.testing.assert_close(alone, v[i : i + 1], rtol=1e-10, atol=1e-10)


def test_rows_of_conditions_are_cut_and_what_is_no_tensor_belongs_to_all() -> None:
    given = {"label": torch.arange(5), "text": torch.arange(10.0).reshape(5, 2), "word": "a", "none": None}
    found = rows_of(given, 5, torch.tensor([4, 4]))
    assert found["label"].tolist() == [4, 4]
    assert found["text"].tolist() == [[8.0, 9.0]] * 2
    assert (found["word"], found["none"]) == ("a", None)


@pytest.mark.parametrize("constant", [torch.zeros(3, 5), torch.tensor(2.0), torch.zeros(1, 5), torch.zeros(0)])
def test_a_constant_tensor_is_no_condition_and_is_refused_by_name(constant: Tensor) -> None:
    """One with as many rows as samples by chance could not be told from a condition."""
    given = {"label": torch.arange(5), "table": constant}
    with pytest.raises(
        UserError, match=r"condition 'table' has shape .* for 5 samples: .*inside the network's adapter"
    ):
        rows_of(given, 5, slice(2))


class Cube(torch.autograd.Function):
    """x^3 with a backward, and no forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Closed(torch.autograd.Function):
    """x^3 whose backward raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise ValueError("no derivative here")


def without_gradients(x: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        return Cube.apply(x)


def half_detached(x: Tensor, t: Tensor) -> Tensor:
    return x.detach() ** 3 / 2 + x**3 / 2


def detached(x: Tensor, t: Tensor) -> Tensor:
    return x.detach() ** 3


def half_without_gradients(x: Tensor, t: Tensor) -> Tensor:
    return without_gradients(x, t) / 2 + Cube.apply(x) / 2


HARD = [
    (lambda x, t: Cube.apply(x), "double_vjp"),
    (lambda x, t: Closed.apply(x), "finite_difference"),
    (without_gradients, "finite_difference"),
    (detached, "finite_difference"),
    (half_detached, "finite_difference"),
    (half_without_gradients, "finite_difference"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("velocity", "way"), HARD, ids=["cube", "raises", "no_grad", "detached", "half", "half_no_grad"]
)
def test_what_autograd_cannot_do_or_does_wrongly_goes_another_way(velocity: Any, way: Mode, dtype: torch.dtype) -> None:
    """All are v = x^3."""
    x, dx, t = noise(6, 3, dtype=dtype), noise(6, 3, seed=1, dtype=dtype), times(6, dtype=dtype)
    derivative = Derivative(velocity)
    _, dv = derivative(x, t, dx)
    assert derivative.used == way
    tolerance = 1e-8 if dtype == torch.float64 else 2e-3
    torch.testing.assert_close(dv, 3 * x**2 * dx, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [1.0, 30.0, 300.0, 3000.0])
def test_steep_and_coarse_networks_keep_their_exact_derivative(rate: float, dtype: torch.dtype) -> None:
    """Time features such as cos(1000 t), steps in space, and rounding say nothing against a derivative."""
    x, dx, t = (noise(6, 4, dtype=torch.float32, seed=i) for i in range(3))
    x, dx, t = x.to(dtype), dx.to(dtype), t[:, 0].sigmoid().to(dtype)
    for velocity in (
        lambda x, t: x * torch.cos(rate * t)[:, None],
        lambda x, t: torch.sin(rate * x) + t[:, None],
        lambda x, t: torch.tanh(rate * (x - 0.3)) + x,
        lambda x, t: F.relu(rate * (x - 0.1)) - x + 1000.0,
    ):
        derivative = Derivative(velocity)
        derivative(x, t, dx, torch.ones_like(t))
        assert derivative.used == "forward"


def test_a_velocity_that_does_not_depend_on_the_direction_has_derivative_zero() -> None:
    x, dx, t = noise(4, 3, dtype=torch.float32), torch.ones(4, 3), times(4, dtype=torch.float32)
    derivative = Derivative(lambda x, t: x - x.mean(1, keepdim=True))
    _, dv = derivative(x, t, dx)
    assert derivative.used == "forward"
    torch.testing.assert_close(dv, torch.zeros_like(dv), rtol=0, atol=1e-6)


def test_double_reverse_of_a_constant_velocity_is_zero() -> None:
    weight = torch.ones(3, requires_grad=True)
    _, dv = Derivative(lambda x, t: weight.expand_as(x) * 1, "double_vjp")(
        torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3)
    )
    assert not dv.any()


@pytest.mark.parametrize("velocity", [mixture(5).velocity, mlp(5), Attention()], ids=["mixture", "mlp", "attention"])
def test_pullback_is_the_transpose_of_the_derivative(velocity: Any) -> None:
    """w^T (J dx) = (w^T J) dx, row by row."""
    x, dx, w, t = noise(6, 5), noise(6, 5, seed=1), noise(6, 5, seed=2), times(6)
    v, dv = Derivative(velocity, "forward")(x, t, dx)
    again, pulled = pullback(velocity, x, t, w)
    torch.testing.assert_close((w * dv).sum(1), (pulled * dx).sum(1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(again, v, rtol=1e-10, atol=1e-10)
    assert not pulled.requires_grad


def test_pullback_of_a_gaussian_flow_is_its_rate_times_w() -> None:
    """J = (t s^2 - (1 - t)) / q I."""
    s, x, w, t = 0.6, noise(5, 3), noise(5, 3, seed=1), times(5)
    rate = (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2)
    _, pulled = pullback(closed_form.gaussian(0.0, s, shape=(3,)).velocity, x, t, w)
    torch.testing.assert_close(pulled, rate[:, None] * w, rtol=1e-12, atol=1e-12)


def test_pullback_says_that_it_needs_gradients() -> None:
    with pytest.raises(UserError, match="no_grad"):
        pullback(without_gradients, noise(2, 3), times(2), noise(2, 3))


def squared_root(x: Tensor, t: Tensor) -> Tensor:
    """(1 - t) x, written so that autograd gives 0 times infinity at t = 1."""
    return (1 - t).sqrt().square()[:, None] * x


def test_a_derivative_that_is_not_a_number_is_not_taken() -> None:
    """d/dt (1 - t) x = -x at t = 1, where automatic differentiation of the squared root gives NaN."""
    x, t, one = noise(4, 3), torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for mode in ("forward", "double_vjp"):
        assert not torch.isfinite(Derivative(squared_root, mode)(x, t, 0 * x, one)[1]).any()
    derivative = Derivative(squared_root)
    _, dv = derivative(x, t, 0 * x, one)
    assert derivative.used == "finite_difference"
    torch.testing.assert_close(dv, -x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("velocity", "message"),
    [
        (
            lambda x, t: (1 - t).sqrt()[:, None] * x,
            r"no mode .* gives a finite derivative at t = 1, although the velocity is finite",
        ),
        (lambda x, t: torch.where(t[:, None] < 1, x, torch.nan), "velocity is NaN or infinite at t = 1"),
    ],
    ids=["slope", "velocity"],
)
def test_where_no_way_is_finite_an_error_says_what_is_not(velocity: Any, message: str, dtype: torch.dtype) -> None:
    x, one = noise(4, 3, dtype=dtype), torch.ones(4, dtype=dtype)
    with pytest.raises(UserError, match=message):
        Derivative(velocity)(x, one, 0 * x, one)
    derivative = Derivative(velocity)
    derivative(x, one / 2, x, one)
    assert derivative.used == "forward"


class Dropping(nn.Module):
    """Dropout around x^3; ``opaque`` without derivatives. Starts at zero until ``scale`` is set, as networks do."""

    def __init__(self, opaque: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.cube = Closed.apply if opaque else lambda x: x**3
        self.drop, self.scale = nn.Dropout(0.2), scale

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * self.drop(self.cube(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_finite_differences_of_a_network_that_drops_are_refused(dtype: torch.dtype) -> None:
    x, dx, t = noise(64, 9, dtype=dtype), noise(64, 9, seed=1, dtype=dtype), times(64, dtype=dtype)
    for net, mode in ((Dropping(opaque=True), "auto"), (Dropping(opaque=False), "finite_difference")):
        derivative = Derivative(net, mode)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"two values for one input.*dropout to 0.*eval.*forward"):
            derivative(x, t, dx)
        net.eval()
        derivative(x, t, dx)
        assert derivative.used == "finite_difference"


def test_a_network_that_drops_is_differentiated_within_one_call() -> None:
    """3 x^2 dx / (1 - p) where a value is kept and 0 where it is dropped: v says which."""
    x, dx, t = noise(64, 9), noise(64, 9, seed=1), times(64)
    derivative = Derivative(Dropping(opaque=False))
    v, dv = derivative(x, t, dx)
    assert derivative.used == "forward"
    assert 0.1 < float((v == 0).double().mean()) < 0.3
    torch.testing.assert_close(dv, (v != 0) * 3 * x**2 * dx / 0.8)


def test_dropout_is_found_at_the_first_call_that_is_not_zero() -> None:
    """A network whose last layer starts at zero gives 0 twice."""
    x, dx, t, net = noise(64, 9), noise(64, 9, seed=1), times(64), Dropping(opaque=True, scale=0.0)
    derivative = Derivative(net, "finite_difference")
    assert not derivative(x, t, dx)[1].any()
    net.scale = 1.0
    with pytest.raises(UserError, match="two values"):
        derivative(x, t, dx)


def test_the_tries_leave_the_random_state_to_the_call() -> None:
    """The first call drops what a later call from the same state drops: a resumed run equals an uninterrupted one."""
    x, dx, t, derivative = noise(64, 9), noise(64, 9, seed=1), times(64), Derivative(Dropping(opaque=False))
    before = torch.get_rng_state()
    first = derivative(x, t, dx)[0]
    torch.set_rng_state(before)
    assert torch.equal(derivative(x, t, dx)[0], first)
    torch.set_rng_state(before)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="forward"):
        Derivative(mlp(), "forwards")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="tangent"):
        Derivative(mlp())(noise(2, 3), times(2), noise(3, 3))
