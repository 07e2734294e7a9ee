from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.networks import NETWORKS, build, default_network, parameter_count, resolve
from fewstep.networks.conditioning import TIME_FEATURES, time_features

MLP = {"name": "mlp", "width": 24, "blocks": 2, "embedding": 16}
UNET = {"name": "unet", "widths": [16, 32], "blocks": 1, "middle": 2, "patch": 1, "embedding": 16}
PATCHED = {"name": "unet", "widths": [16, 32], "blocks": 1, "middle": 2, "patch": 2, "embedding": 16}
CASES = [
    pytest.param(MLP, (5,), id="mlp"),
    pytest.param(MLP, (1,), id="mlp-one-value"),
    pytest.param(UNET, (2, 8, 8), id="unet"),
    pytest.param(PATCHED, (1, 16, 20), id="unet-patched"),
]


def inputs(shape: tuple[int, ...], batch: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *shape, generator=generator), torch.rand(batch, generator=generator)


def alive(config: dict[str, Any], shape: tuple[int, ...], classes: int = 0, context: int = 0) -> nn.Module:
    """A network whose output layer is no longer zero, as after a training step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(resolve(config, shape, classes, context))
        for parameter in net.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.3)
    return net.eval()


@pytest.mark.parametrize(("config", "shape"), CASES)
def test_a_new_network_is_exactly_the_zero_field(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    x, t = inputs(shape)
    out = build(resolve(config, shape, classes=3))(x, t, torch.tensor([0, 1, 2, 3]))
    assert out.shape == x.shape
    assert not out.any()


@pytest.mark.parametrize(("config", "shape"), CASES)
def test_every_parameter_receives_a_gradient(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    x, t = inputs(shape)
    net = alive(config, shape, classes=3)
    net(x, t, torch.tensor([0, 1, 2, 3])).square().sum().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize(("config", "shape"), CASES)
def test_the_output_keeps_shape_and_dtype(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    x, t = inputs(shape)
    for dtype in (torch.float64, torch.bfloat16):
        out = alive(config, shape).to(dtype)(x.to(dtype), t.to(dtype))
        assert (out.shape, out.dtype, out.is_contiguous()) == (x.shape, dtype, True)


@pytest.mark.parametrize(
    ("name", "preset", "shape", "low", "high"),
    [
        ("mlp", "tiny", (2,), 0.02, 0.04),
        ("mlp", "compact", (2,), 0.07, 0.13),
        ("mlp", "small", (64,), 0.40, 0.50),
        ("mlp", "medium", (64,), 1.7, 2.3),
        ("mlp", "large", (64,), 8.5, 11.5),
        ("unet", "nano", (1, 28, 28), 0.02, 0.04),
        ("unet", "tiny", (1, 28, 28), 0.08, 0.13),
        ("unet", "small", (1, 28, 28), 0.35, 0.50),
        ("unet", "base", (3, 32, 32), 3.5, 5.0),
        ("unet", "large", (3, 32, 32), 34, 44),
    ],
)
def test_presets_have_the_promised_number_of_parameters(
    name: str, preset: str, shape: tuple[int, ...], low: float, high: float
) -> None:
    with torch.device("meta"):
        net = build(resolve({"name": name, "preset": preset}, shape))
    assert low <= parameter_count(net) / 1e6 <= high


def test_parameters_are_counted_as_in_a_layer_counted_by_hand() -> None:
    assert parameter_count(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False))) == 3 * 5 + 5 + 5 * 2


@pytest.mark.parametrize(("config", "shape"), CASES)
def test_labels_condition_and_none_is_the_null_label(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    x, t = inputs(shape)
    net = alive(config, shape, classes=3)
    outs = [net(x, t, torch.full((4,), label)) for label in range(4)]
    for first in range(4):
        for second in range(first):
            assert (outs[first] - outs[second]).abs().max() > 1e-3
    torch.testing.assert_close(net(x, t), outs[3], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "shape", "context_shape"),
    [
        (MLP, (5,), (3,)),
        (MLP, (1, 2, 2), (3, 2, 2)),
        (UNET, (1, 8, 8), (3, 8, 8)),
        (PATCHED, (1, 16, 16), (3, 16, 16)),
    ],
)
def test_context_changes_the_output_of_its_own_row_only(
    config: dict[str, Any], shape: tuple[int, ...], context_shape: tuple[int, ...]
) -> None:
    x, t = inputs(shape)
    context, _ = inputs(context_shape, seed=2)
    net = alive(config, shape, context=3)
    changed = context.clone()
    changed[1] += 1
    difference = (net(x, t, context=context) - net(x, t, context=changed)).flatten(1).abs().amax(1)
    assert difference[1] > 1e-3
    assert difference[[0, 2, 3]].max() < 1e-6


def test_time_features_are_smooth_and_tell_times_apart() -> None:
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    phi = time_features(t)
    assert phi.shape == (1001, TIME_FEATURES)
    speed = (phi[1:] - phi[:-1]).abs() / 1e-3
    assert speed.max() <= 2 * math.pi  # the highest frequency: |d sin(wt)/dt| <= w
    assert (phi[1:] - phi[:-1]).norm(dim=1).min() > 1e-3
    assert torch.pdist(phi[::50]).min() > 0.05  # no two times are confused, t = 0 and t = 1 included


def test_times_that_bfloat16_confuses_stay_apart_under_autocast() -> None:
    net = alive(MLP, (5,))
    t = torch.tensor([0.9000, 0.9003])
    assert t.bfloat16()[0] == t.bfloat16()[1]
    with torch.autocast("cpu", torch.bfloat16):
        c = net.conditioning(t, None)
    torch.testing.assert_close(c, net.conditioning(t, None), rtol=0, atol=0)
    assert not torch.equal(c[0], c[1])


@pytest.mark.parametrize(("config", "shape"), CASES)
def test_rows_do_not_depend_on_each_other(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    x, t = inputs(shape)
    net = alive({**config, "dropout": 0.3}, shape, classes=2).double()
    x, t, label = x.double(), t.double(), torch.tensor([0, 1, 2, 0])
    whole = net(x, t, label)
    single = torch.cat([net(x[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(whole, single, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("config", "shape"), CASES)
def test_a_stored_configuration_and_state_restore_the_network(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    x, t = inputs(shape)
    first = resolve({**config, "dropout": 0.1}, shape, classes=2)
    net = alive(first, shape, classes=2)
    stored = json.loads(json.dumps(first))
    assert resolve(stored, shape, classes=2) == first
    other = build(stored).eval()
    assert not torch.equal(other(x, t), net(x, t))
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    torch.testing.assert_close(other(x, t), net(x, t), rtol=0, atol=0)
    assert all(p.is_contiguous() for p in net.parameters())  # weight files store contiguous tensors only


@pytest.mark.parametrize(("config", "shape"), CASES)
def test_the_jvp_is_the_finite_difference(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    net = alive(config, shape).double()
    x, t = (value.double() for value in inputs(shape, batch=2))
    dx, dt = (value.double() for value in inputs(shape, batch=2, seed=5))
    h = 1e-5
    _, forward = torch.func.jvp(lambda x, t: net(x, t), (x, t), (dx, dt))
    central = (net(x + h * dx, t + h * dt) - net(x - h * dx, t - h * dt)) / (2 * h)
    torch.testing.assert_close(forward, central, rtol=1e-6, atol=1e-7)
    assert forward.abs().max() > 1e-2


@pytest.mark.parametrize(("config", "shape"), CASES)
def test_autocast_stays_close_to_full_precision(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    x, t = inputs(shape, batch=8)
    net = alive(config, shape)
    full = net(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, t).float()
    assert (half - full).norm() < 0.03 * full.norm()


def test_dropout_acts_in_training_only() -> None:
    x, t = inputs((5,))
    net = alive({**MLP, "dropout": 0.5}, (5,))
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


@pytest.mark.parametrize("config", [MLP, UNET])
def test_a_network_fits_a_function_of_x_t_and_label(config: dict[str, Any]) -> None:
    shape = (1, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(resolve(config, shape, classes=2))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(120):
        pattern = torch.randn(32, 1, 1, 1, generator=generator).expand(32, *shape)
        t, label = torch.rand(32, generator=generator), torch.randint(2, (32,), generator=generator)
        sign = (2.0 * label - 1)[:, None, None, None]
        target = sign * t[:, None, None, None] * pattern
        loss = (net(pattern, t, label) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # without t the least error is var(t) / E[t^2] = 1/4 of the start, without the label all of it
    assert sum(losses[-20:]) / 20 < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1,), "mlp compact"),
        ((8,), "mlp compact"),
        ((9,), "mlp small"),
        ((1, 8, 8), "mlp small"),
        ((3, 8, 8), "mlp small"),
        ((1, 28, 28), "unet small"),
        ((1000,), "mlp medium"),
    ],
)
def test_the_default_network_follows_the_shape(shape: tuple[int, ...], expected: str) -> None:
    name, preset = expected.split()
    assert default_network(shape) == {"name": name, "preset": preset}
    assert resolve({}, shape) == resolve({"name": name, "preset": preset}, shape)


@pytest.mark.parametrize(
    ("size", "patch", "widths"),
    [
        ((8, 8), 1, 2),
        ((12, 12), 1, 2),
        ((15, 15), 1, 1),
        ((28, 28), 2, 2),
        ((32, 64), 2, 3),
        ((17, 16), 1, 1),
    ],
)
def test_a_preset_gives_way_to_the_image_size(size: tuple[int, int], patch: int, widths: int) -> None:
    shape = (1, *size)
    config = resolve({"name": "unet", "preset": "small"}, shape)
    assert (config["patch"], len(config["widths"])) == (patch, widths)
    x, t = inputs(shape, batch=1)
    assert build(config)(x, t).shape == x.shape


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        ({"name": "mpl"}, (2,), "unknown network 'mpl': did you mean 'mlp'"),
        ({"name": "mlp", "preset": "smal"}, (2,), "did you mean 'small'"),
        ({"name": "mlp", "widht": 3}, (2,), "'widht': did you mean 'width'"),
        ({"name": "mlp", "widths": [3]}, (2,), "unknown key for network 'mlp'"),
        ({"name": "mlp", "width": "64"}, (2,), r"network.width is '64' \(str\)"),
        ({"name": "mlp", "width": 0}, (2,), "network.width is 0"),
        ({"name": "mlp", "blocks": True}, (2,), "network.blocks is True"),
        ({"name": "mlp", "dropout": 1.0}, (2,), "network.dropout is 1.0"),
        ({"name": "unet", "attention": 1}, (1, 8, 8), "network.attention is 1"),
        ({"name": "unet", "widths": 32}, (1, 8, 8), "network.widths is 32"),
        ({"name": "unet", "widths": []}, (1, 8, 8), r"network.widths is \[\]"),
        ({"name": "unet", "widths": [8, 8, 8]}, (1, 8, 8), "at most 2 widths"),
        ({"name": "unet", "patch": 3}, (1, 8, 8), "network.patch is 3, which does not divide"),
        ({"name": "unet"}, (64,), "use network 'mlp'"),
        ({"name": "mlp", "shape": [3]}, (2,), r"network.shape is \[3\], but the data has \[2\]"),
        ({"name": "mlp"}, (), "network shape"),
        ({"name": ["mlp"]}, (2,), "unknown network"),
    ],
)
def test_a_wrong_configuration_is_refused(config: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(config, shape)


def test_a_configuration_must_be_keys_and_values_and_resolved_before_building() -> None:
    with pytest.raises(UserError, match="keys and values"):
        resolve("mlp", (2,))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="lacks shape, classes, context"):
        build({"name": "mlp"})


@pytest.mark.parametrize("config", [MLP, UNET])
def test_a_call_that_does_not_fit_is_refused(config: dict[str, Any]) -> None:
    shape = (1, 8, 8)
    x, t = inputs(shape)
    label = torch.zeros(4, dtype=torch.long)
    net, plain = build(resolve(config, shape, 2, context=3)), build(resolve(config, shape))
    context = torch.zeros(4, 3, *shape[1:])
    refused: list[tuple[nn.Module, tuple[Any, ...], str]] = [
        (plain, (x[:, :, :4], t), "x has shape"),
        (plain, (x, t[:3]), "t has shape"),
        (plain, (x, torch.tensor(0.5)), "t has shape"),
        (plain, (x, t, label), "classes=0"),
        (plain, (x, t, None, context), "context=0"),
        (net, (x, t, label), "pass context="),
        (net, (x, t, label[:2], context), "label has shape"),
        (net, (x, t, label, context[:, :2]), "context has shape"),
    ]
    for module, arguments, message in refused:
        with pytest.raises(UserError, match=message):
            module(*arguments)


def test_every_preset_names_every_option() -> None:
    for kind in NETWORKS.values():
        for preset in kind.presets.values():
            assert preset.keys() == kind.checkers.keys()
