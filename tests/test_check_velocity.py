"""The check of a velocity network: every fault is found on networks that are trained here, and right ones pass."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.data.dataset import DataSet
from fewstep.data.load import from_array, load_data
from fewstep.diagnostics.check_rows import linear_velocity, setting_of, source_of
from fewstep.diagnostics.check_velocity import Check, check_velocity, quick_check
from fewstep.errors import UserError
from fewstep.flow.closed_form import mixture
from fewstep.flow.paths import Linear, make_path
from fewstep.networks.adapter import Adapter
from fewstep.networks.registry import build, resolve

Net = Callable[..., Tensor]

TRAINED = {
    "moons": {"data": "moons", "steps": 300},
    "pinwheel": {"data": "pinwheel", "steps": 300, "labels": True},
    "brief": {"data": "moons", "steps": 60},
    "vp": {"data": "moons", "steps": 450, "path": "vp", "labels": True},
    "cosine": {"data": "moons", "steps": 300, "path": "cosine", "labels": True},
    "digits": {"data": "digits", "steps": 200, "labels": True},
    "noise": {"data": "moons", "steps": 300, "target": "noise"},
    "data": {"data": "moons", "steps": 300, "target": "data"},
    "digits noise": {"data": "digits", "steps": 200, "target": "noise"},
    "digits data": {"data": "digits", "steps": 200, "target": "data"},
}


@functools.cache
def data_of(name: str) -> DataSet:
    return load_data(name)


@functools.cache
def teacher(name: str, seed: int = 0) -> nn.Module:
    """A network trained by a plain loop; kept for all tests. Do not change it."""
    given: dict[str, Any] = {"path": "linear", "target": "velocity", "labels": False, **TRAINED[name]}
    data = data_of(given["data"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        size = {"width": 128} if given["data"] == "digits" else {"width": 96}
        config = {"name": "mlp", "preset": "tiny", **size}
        net = build(resolve(config, data.shape, data.classes if given["labels"] else 0))
        fit(net, data, given["steps"], given["path"], given["target"], given["labels"], seed)
    return net


def fit(net: nn.Module, data: DataSet, steps: int, path: str, target: str, labels: bool, seed: int) -> None:
    curve, generator = make_path(path), torch.Generator().manual_seed(seed)
    rows, label = data.train_rows(), data.label_rows(data.train)
    rate = 3e-3
    adam = torch.optim.Adam(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(len(rows), (256,), generator=generator)
        x1, x0 = rows[index], torch.randn(256, *data.shape, generator=generator)
        t = 0.002 + 0.996 * torch.rand(256, generator=generator)
        cond = {"label": label[index]} if labels and label is not None else {}
        wanted = {"velocity": curve.target(x0, x1, t), "noise": x0, "data": x1}[target]
        scale = (curve.alpha_dot(t).square() + curve.sigma_dot(t).square()) if target == "velocity" else torch.ones(256)
        errors = (net(curve.interpolate(x0, x1, t), t, **cond) - wanted).square().flatten(1).mean(1)
        loss = (errors / scale).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    net.eval().requires_grad_(False)


def checked(net: Net, name: str, seed: int = 0, data: Any = None, **options: Any) -> Check:
    """The check of a network on the data of ``TRAINED[name]``, with labels where it was trained with them."""
    given = TRAINED[name]
    own = None if given.get("labels") else {}
    options = {"conditions": own, "path": given.get("path", "linear"), **options}
    return check_velocity(net, data_of(given["data"]) if data is None else data, seed=seed, **options)


def names(check: Check) -> set[str]:
    return {fault.name for fault in check.faults}


WRONG: dict[str, tuple[set[str], Callable[[nn.Module], Net]]] = {
    "flipped": ({"flipped_time"}, lambda net: lambda x, t, **c: net(x, 1 - t, **c)),
    "sign": ({"wrong_sign"}, lambda net: lambda x, t, **c: -net(x, t, **c)),
    "both": ({"flipped_time", "wrong_sign"}, lambda net: lambda x, t, **c: -net(x, 1 - t, **c)),
    "missing": ({"time_factor_missing"}, lambda net: lambda x, t, **c: net(x, t / 1000, **c)),
    "too much": ({"time_factor_too_much"}, lambda net: lambda x, t, **c: net(x, t * 1000, **c)),
    "diffusers": (
        {"flipped_time", "wrong_sign", "time_factor_missing"},
        lambda net: lambda x, t, **c: -net(x, 1 - t / 1000, **c),
    ),
    "truncated": ({"truncated_time"}, lambda net: lambda x, t, **c: net(x, t.long().float(), **c)),
    "rounded": ({"truncated_time"}, lambda net: lambda x, t, **c: net(x, (20 * t).round() / 20, **c)),
    "blind": ({"blind_to_time"}, lambda net: lambda x, t, **c: net(x, torch.full_like(t, 0.5), **c)),
}


@pytest.mark.parametrize("name", ["moons", "pinwheel", "vp", "cosine", "digits", "brief"])
def test_a_right_network_raises_no_alarm(name: str) -> None:
    for seed in range(2):
        for short in (False, True):
            check = checked(teacher(name), name, seed, short=short)
            assert check.ok, check
            assert check.rows <= (280 if short else 15_000)


@pytest.mark.parametrize("name", ["moons", "pinwheel", "vp", "cosine", "digits"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_fault_of_convention_is_named_and_no_other(name: str, wrong: str) -> None:
    expected, change = WRONG[wrong]
    check = checked(change(teacher(name)), name)
    assert names(check) == expected, check
    assert not check.ok
    assert all(fault.fix for fault in check.faults)


@pytest.mark.parametrize("wrong", ["flipped", "sign", "missing", "truncated", "blind"])
@pytest.mark.parametrize("name", ["moons", "pinwheel", "digits"])
def test_the_short_form_finds_the_common_faults(name: str, wrong: str) -> None:
    expected, change = WRONG[wrong]
    check = checked(change(teacher(name)), name, short=True)
    assert names(check) == expected, check
    assert check.rows <= 280


@pytest.mark.parametrize("name", ["noise", "data", "digits noise", "digits data"])
def test_another_prediction_is_named(name: str) -> None:
    wanted = TRAINED[name]["target"]
    check = checked(teacher(name), name)
    assert names(check) == {f"{wanted}_prediction"}, check
    fix = check.faults[0].fix
    assert ("(x - m(x, t, **cond)) / t" if wanted == "noise" else "(m(x, t, **cond) - x) / (1 - t)") in fix
    code = fix.partition(" Near t")[0].rstrip(".")  # the declaration runs as it stands, and mends the fault
    mended = eval(code, {"fs": fewstep, "net": teacher(name)})
    again = checked(mended, name)
    assert again.ok, again
    shape = data_of(TRAINED[name]["data"]).shape
    conditions = {"label": torch.zeros(2, dtype=torch.long)} if TRAINED[name].get("labels") else {}
    assert mended(torch.randn(2, *shape), torch.tensor([0.0, 1.0]), **conditions).isfinite().all()
    if name.startswith("digits"):
        assert names(checked(teacher(name), name, short=True)) == names(check)


@pytest.mark.parametrize(("a", "b"), [(8.0, 8.0), (127.5, 127.5), (0.5, 0.5), (2.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("name", ["moons", "pinwheel", "digits"])
def test_other_units_are_named_with_the_map_back(name: str, a: float, b: float) -> None:
    data = data_of(TRAINED[name]["data"])
    conditions = {"label": data.label_rows(slice(None))} if TRAINED[name].get("labels") else {}
    check = checked(teacher(name), name, data=a * data.network_rows(slice(None)) + b, conditions=conditions)
    assert names(check) == {"data_units"}, check
    found = check.faults[0].evidence
    assert found["a"] * a == pytest.approx(1.0, rel=0.3)
    assert found["a"] * b + found["b"] == pytest.approx(0.0, abs=0.3)
    if name == "digits" and a > 4:  # pixels of 0 to 16, or of 0 to 255, for a network of -1 to 1
        assert f"x / {a:g} - 1." in check.faults[0].fix


@pytest.mark.parametrize("name", ["pinwheel", "digits", "cosine"])
def test_labels_that_do_not_belong_and_labels_that_are_not_seen(name: str) -> None:
    data, net = data_of(TRAINED[name]["data"]), teacher(name)
    rows, label = data.network_rows(slice(None)), data.label_rows(slice(None))
    assert label is not None
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(5))
    shuffled = checked(net, name, data=rows, conditions={"label": label[order]})
    assert names(shuffled) == {"shuffled_condition"}, shuffled
    assert shuffled.faults[0].about == "label"
    renumbered = checked(net, name, data=rows, conditions={"label": (label + 1) % data.classes})
    assert names(renumbered) == {"shuffled_condition"}, renumbered
    for short in (False, True):
        ignored = checked(lambda x, t, label: net(x, t, label=0 * label), name, short=short)
        assert names(ignored) == {"blind_to_condition"}, ignored
        assert checked(net, name, short=short).sensitivity["label"] > 0.05


def exact(path: str = "linear", width: float = 0.3) -> tuple[Net, Tensor]:
    """The exact velocity towards three narrow modes, and rows of that law."""
    weights, means = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, -2.0]])
    law = mixture(weights, means, torch.full((3,), width), path=make_path(path))
    kind = torch.multinomial(weights, 2000, replacement=True, generator=torch.Generator().manual_seed(0))
    rows = means[kind] + width * torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    return law.velocity, rows


@pytest.mark.parametrize("path", ["linear", "cosine", "vp"])
def test_exact_velocities_pass_and_have_the_least_loss_of_all_repairs(path: str) -> None:
    v, rows = exact(path)
    check = check_velocity(v, rows, path=path)
    assert check.ok, check
    assert min(check.losses, key=lambda words: check.losses[words]) == "v(x, t)"
    assert check_velocity(lambda x, t: -v(x, t), rows, path=path).faults[0].name == "wrong_sign"


def test_q_is_one_for_an_exact_velocity() -> None:
    """E|v_a - u|^2 - E|v_b - u|^2 = E|v_a - v_b|^2 where v_b is the conditional expectation."""
    v, rows = exact()
    for change in (lambda x, t: v(x, 1 - t), lambda x, t: -v(x, t), lambda x, t: x - t[:, None] * v(x, t)):
        check = check_velocity(change, rows, rows=512)
        assert check.faults[0].evidence["q"] == pytest.approx(1.0, abs=0.1)


def test_the_target_mean_is_the_conditional_expectation_under_the_rows() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1.0, 2.0], [0.5, 0.5]])
    setting = setting_of(source_of(rows, {}), Linear(), 64, 3, few=False)
    made = setting.rows()
    known = torch.cat([setting.x1, setting.others]).double()
    for index in range(8):
        x, t = made.x[index].double(), float(made.t[index])
        weight = torch.softmax(-(x - t * known).square().sum(1) / (2 * (1 - t) ** 2), 0)
        mean = ((known - x) / (1 - t) * weight[:, None]).sum(0)
        torch.testing.assert_close(made.mean[index].double(), mean, rtol=1e-3, atol=1e-3)


def test_the_linear_velocity_is_exact_for_gaussian_data() -> None:
    turn = torch.tensor([[1.0, 0.4], [0.0, 0.5]])
    data = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)) @ turn + 1
    x, t = torch.tensor([[0.3, -0.2]]), torch.tensor([0.6])
    covariance, mean = torch.cov(data.T), data.mean(0)
    whole = 0.36 * covariance + 0.16 * torch.eye(2)
    expected = mean + (0.6 * covariance - 0.4 * torch.eye(2)) @ torch.linalg.solve(whole, (x[0] - 0.6 * mean))
    torch.testing.assert_close(linear_velocity(Linear(), data, x, t)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["moons", "pinwheel"])
def test_straightened_and_one_step_networks_raise_no_alarm(name: str) -> None:
    """Their loss on independent pairs is higher than a teacher's, which is no fault."""
    base, labels = teacher(name), bool(TRAINED[name].get("labels"))
    data = data_of(TRAINED[name]["data"])
    x0 = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    label = data.label_rows(data.train[:2000])
    cond = {"label": label} if labels else {}
    x1 = fewstep.solve(base, x0, steps=30, cond=cond).x
    for times in ("all", "zero"):
        net, generator = copy.deepcopy(base).requires_grad_(True), torch.Generator().manual_seed(1)
        adam = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(150):
            index = torch.randint(2000, (256,), generator=generator)
            t = torch.rand(256, generator=generator) * (times == "all")
            x = t[:, None] * x1[index] + (1 - t[:, None]) * x0[index]
            part = {name: value[index] for name, value in cond.items() if value is not None}
            loss = (net(x, t, **part) - (x1 - x0)[index]).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        net.requires_grad_(False)
        for seed in range(2):
            assert checked(net, name, seed).ok, checked(net, name, seed)
            assert checked(net, name, seed, short=True).ok


class Plain(nn.Module):
    """A random network ``v(x, t, label)`` whose label and time pass a layer each."""

    def __init__(self, size: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.time, self.table = nn.Linear(1, 32), nn.Embedding(10, 32)
        self.first, self.last = nn.Linear(size, 32), nn.Linear(32, size)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        c = self.time(t[:, None]) + (0 if label is None else self.table(label))
        return self.scale * self.last(torch.tanh(self.first(x.flatten(1)) + c)).reshape(x.shape)


def test_untrained_networks_raise_no_alarm_in_the_form_for_them() -> None:
    for name in ("moons", "digits"):
        data = data_of(name)
        for seed in range(10):
            torch.manual_seed(seed)
            zero = build(resolve({"name": "mlp", "preset": "tiny"}, data.shape, data.classes))
            two_time = build(resolve({"name": "mlp", "preset": "tiny", "two_time": True}, data.shape, data.classes))
            random = Plain(math.prod(data.shape), scale=10.0 ** (seed % 3 - 1))
            for net in (zero, two_time, random):
                assert quick_check(net, data, seed=seed, trained=False).ok
            assert quick_check(zero, data, seed=seed).ok


def test_a_structure_that_hides_an_input_is_found_before_training() -> None:
    class Hiding(Plain):
        def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            return super().forward(x, torch.zeros_like(t), None)

    net = Hiding(2)
    before = copy.deepcopy(net.state_dict())
    check = quick_check(net, data_of("moons"), trained=False)
    assert {(fault.name, fault.about) for fault in check.faults} == {
        ("blind_to_time", ""),
        ("blind_to_condition", "label"),
    }
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_end_time_of_a_two_time_network() -> None:
    base = teacher("moons")
    seen = checked(lambda x, t, r: base(x, t) + (r - t)[:, None] ** 2, "moons", two_time=True)
    assert seen.ok, seen
    assert seen.sensitivity["r"] > 0.1
    blind = checked(lambda x, t, r: base(x, t), "moons", two_time=True)
    assert names(blind) == {"blind_to_r"}
    fresh = Adapter(base, time_embed="conditioning.second").with_interval()
    check = checked(fresh, "moons")
    assert check.ok
    assert [finding.name for finding in check.findings] == ["blind_to_r"]  # a note: its interval is zero initially
    assert fresh.intervals is not None
    for layer in fresh.intervals.layers:
        nn.init.normal_(layer.second.weight)
    assert checked(fresh, "moons").findings == ()


class Order(nn.Module):
    """torchcfm's order of arguments, with the label by position."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        assert t.ndim == 1
        return self.net(x, t, label=y)


def test_the_order_of_arguments() -> None:
    check = checked(Order(teacher("digits")), "digits")
    assert names(check) == {"argument_order"}, check
    assert "m(t, x" in check.faults[0].fix
    assert names(checked(lambda t, x: teacher("moons")(x, t), "moons")) == {"argument_order"}
    both = checked(lambda t, x: -teacher("moons")(x, t), "moons")
    assert names(both) == {"argument_order", "wrong_sign"}
    renamed = checked(lambda x, t, y: teacher("pinwheel")(x, t, label=y), "pinwheel")
    assert names(renamed) == {"condition_names"}


def test_what_the_call_returns() -> None:
    net = teacher("moons")
    assert names(checked(lambda x, t: (net(x, t),), "moons")) == {"output_type"}
    assert names(checked(lambda x, t: {"sample": net(x, t)}, "moons")) == {"output_type"}
    assert names(checked(lambda x, t: None, "moons")) == {"output_type"}
    assert names(checked(lambda x, t: net(x, t)[:, :1], "moons")) == {"output_shape"}
    assert names(checked(lambda x, t: net(x, t[:, 0]), "moons")) == {"time_shape"}

    def fails(x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    check = checked(fails, "moons")
    assert names(check) == {"call_fails"}
    assert "mat1 and mat2" in check.faults[0].text
    assert "(x: Tensor" in check.faults[0].text or "x:" in check.faults[0].text


def test_half_precision_weights_are_told_of_and_the_adapter_mends_it() -> None:
    class Half(Plain):
        def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            return super().forward(x, t.to(torch.bfloat16), label)

    half = Half(2).to(torch.bfloat16)
    assert "dtype" in names(quick_check(half, data_of("moons"), conditions={}, trained=False))
    assert quick_check(Adapter(half), data_of("moons"), conditions={}, trained=False).ok


def test_values_that_are_not_finite() -> None:
    net = teacher("moons")
    check = checked(lambda x, t: net(x, t) + 0 / (1 - t)[:, None], "moons")
    assert names(check) == {"not_finite"}
    assert "t = 1" in check.faults[0].text
    assert set(check.faults[0].evidence) == {"t = 1"}


class Redraws(nn.Module):
    """Replaces one label in ten at random in training mode, and counts its calls in a buffer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.dropout = copy.deepcopy(net), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            label = torch.where(torch.rand(len(label)) < 0.1, 0, label)
        return self.net(x, t, label=label)


def test_random_numbers_drawn_inside() -> None:
    net = Redraws(teacher("pinwheel")).train()
    state = torch.get_rng_state()
    check = checked(net, "pinwheel")
    assert names(check) == {"redraws"}, check
    assert "training mode" in check.faults[0].text
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert net.dropout.training
    assert float(net.calls) == 0
    assert checked(Adapter(net), "pinwheel").ok
    noisy = checked(lambda x, t: teacher("moons")(x, t) + 0.1 * torch.randn_like(x), "moons")
    assert "redraws" in names(noisy)
    dropping = nn.Sequential(nn.Dropout(0.5))
    assert checked(lambda x, t: dropping.eval()(teacher("moons")(x, t)), "moons").ok


def test_a_mask_leaves_padding_out_of_the_judgement() -> None:
    """A flow on sequences of 2 to 6 valid entries: right and with the wrong sign; padding tells nothing."""
    generator = torch.Generator().manual_seed(0)
    rows = 0.5 * torch.randn(1000, 6, 1, generator=generator) + 1
    mask = torch.arange(6) < torch.randint(2, 7, (1000, 1), generator=generator)

    class Exact(nn.Module):
        def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
            s = t.reshape(-1, 1, 1)
            return 1 + (s / 4 - (1 - s)) / (s**2 / 4 + (1 - s) ** 2) * (x - s)

    padded = rows * mask[:, :, None]
    assert check_velocity(Adapter(Exact(), mask="mask"), padded, conditions={"mask": mask}).ok
    turned = Adapter(Exact(), lambda m, x, t, mask: -m(x, t, mask), mask="mask")
    assert names(check_velocity(turned, padded, conditions={"mask": mask})) == {"wrong_sign"}
    with pytest.raises(UserError, match="mask"):
        check_velocity(turned, padded)
    data = from_array(rows.numpy(), conditions={"mask": mask.numpy()}, mask="mask", layout="sequence", scale="none")
    assert check_velocity(Exact(), data).ok
    assert names(check_velocity(lambda x, t, mask: -Exact()(x, t, mask), data)) == {"wrong_sign"}


def test_a_network_of_other_data_is_no_velocity_of_these() -> None:
    _, rows = exact()
    check = check_velocity(lambda x, t: 6 * torch.sin(5 * x.flip(1)) * t[:, None], rows)
    assert names(check) == {"not_a_velocity"}, check


def test_conditions_are_left_out_only_where_the_user_did_not_give_them() -> None:
    data, net = data_of("moons"), teacher("moons")
    check = check_velocity(net, data)
    assert check.ok
    assert [finding.name for finding in check.findings] == ["unused_condition"]
    assert names(check_velocity(net, data, conditions={"label": data.labels})) == {"call_fails"}


def test_rounding_to_many_levels_is_a_note() -> None:
    net = teacher("moons")
    check = checked(lambda x, t: net(x, (1000 * t).floor() / 1000), "moons")
    assert check.ok
    assert [finding.name for finding in check.findings] == ["truncated_time"]
    assert 700 < check.findings[0].evidence["levels"] < 1400


def test_the_result_as_text_and_as_json(tmp_path: Path) -> None:
    check = checked(WRONG["flipped"][1](teacher("moons")), "moons")
    text = str(check)
    assert "1 fault(s): flipped_time" in text
    assert "m(x, 1 - t, **cond)" in text
    assert max(map(len, text.splitlines())) <= 120
    again = json.loads(json.dumps(check.as_dict()))
    assert again["ok"] is False
    assert again["findings"][0]["name"] == "flipped_time"
    assert again["rows"] == check.rows
    assert check == checked(WRONG["flipped"][1](teacher("moons")), "moons")  # the same seed, the same result


def test_arrays_lists_and_files_are_read(tmp_path: Path) -> None:
    v, rows = exact()
    np.save(tmp_path / "rows.npy", rows.numpy().astype(np.float16))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for data in (mapped, rows.double(), rows[:300].tolist(), rows[:20]):
        assert check_velocity(v, data).ok


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": torch.zeros(5)}, "rows"),
        ({"data": [[1.0], [1.0, 2.0]]}, "rows"),
        ({"data": np.array([["a"], ["b"]])}, "real numbers"),
        ({"data": torch.full((30, 2), torch.nan)}, "not finite"),
        ({"conditions": {"label": torch.zeros(3)}}, "label"),
        ({"path": "linaer"}, "linear"),
        ({"rows": 4}, "16"),
        ({"net": 3}, "callable"),
    ],
)
def test_mistakes_are_refused(change: dict[str, Any], words: str) -> None:
    v, rows = exact()
    given = {"net": v, "data": rows, **change}
    with pytest.raises(UserError, match=words):
        check_velocity(given.pop("net"), given.pop("data"), **given)


def test_it_is_public() -> None:
    assert fewstep.check_velocity is check_velocity


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 8])
@pytest.mark.parametrize("name", ["moons", "pinwheel", "vp", "cosine", "digits"])
def test_every_fault_with_other_trainings(name: str, seed: int) -> None:
    net = teacher(name, seed)
    assert checked(net, name, seed).ok
    for expected, change in WRONG.values():
        check = checked(change(net), name, seed)
        assert names(check) == expected, check


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    """torchcfm's U-Net, trained briefly on digits with labels."""
    models = pytest.importorskip("torchcfm.models.unet", reason="torchcfm is not installed: pip install torchcfm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = models.UNetModel(
            dim=(1, 8, 8), num_channels=32, num_res_blocks=1, channel_mult=(1,), class_cond=True, num_classes=11,
            use_scale_shift_norm=True,
        )  # fmt: skip
        adapted = Adapter(net, lambda m, x, t, label: m(t, x, label))
        data = data_of("digits")
        rows, label, adam = data.train_rows(), data.label_rows(data.train), torch.optim.Adam(net.parameters(), 2e-3)
        assert label is not None
        generator = torch.Generator().manual_seed(0)
        for _ in range(250):
            index = torch.randint(len(rows), (64,), generator=generator)
            x0, t = torch.randn(64, 1, 8, 8, generator=generator), torch.rand(64, generator=generator)
            s = t.reshape(-1, 1, 1, 1)
            v = adapted(s * rows[index] + (1 - s) * x0, t, label=label[index])
            adam.zero_grad()
            (v - (rows[index] - x0)).square().mean().backward()
            adam.step()
    return net.eval().requires_grad_(False)


@pytest.mark.slow
def test_a_torchcfm_network(unet: nn.Module) -> None:
    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return unet(t, x, label)

    assert names(checked(unet, "digits")) == {"argument_order"}
    assert checked(net, "digits").ok
    assert checked(net, "digits", short=True).ok
    for expected, change in WRONG.values():
        check = checked(change(net), "digits")  # type: ignore[arg-type]
        assert names(check) == expected, check


def test_a_torchcfm_network_that_cannot_see_is_found_before_training() -> None:
    models = pytest.importorskip("torchcfm.models.unet", reason="torchcfm is not installed: pip install torchcfm")
    for channels, expected in ((32, {"blind_to_time", "blind_to_condition"}), (64, set())):
        torch.manual_seed(0)
        net = models.UNetModel(
            dim=(1, 8, 8), num_channels=channels, num_res_blocks=1, channel_mult=(1, 1), class_cond=True, num_classes=11
        )
        adapted = Adapter(net, lambda m, x, t, label: m(t, x, label))
        assert names(quick_check(adapted, data_of("digits"), trained=False)) == expected
