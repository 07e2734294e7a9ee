"""Checkpoints and resumption bit for bit, and the weight average."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.methods.contract.objective import Objective
from fewstep.training import trainer as training
from fewstep.training.checkpoint import Checkpoints, read_checkpoint
from fewstep.training.ema import EMA
from training_cases import BATCH, Net, Noise, Regression, TwoPlayers, linear, start

STEPS = 20  # of each of two phases


class Killed(Exception):
    pass


def raising_at(step: int) -> Callable[..., None]:
    def hook(now: int, role: str = "student") -> None:
        if now == step and role == "student":
            raise Killed

    return hook


def regression(student: nn.Module, kill: int) -> Objective:
    return Regression(student, raising_at(kill))


def players(student: nn.Module, kill: int) -> Objective:
    return TwoPlayers(student, raising_at(kill))


Make = Callable[[nn.Module, int], Objective]


def two_phases(make: Make, folder: Path, lines: list[dict[str, Any]], kill: int = -1) -> int:
    """Train two phases from wherever ``folder`` stands, to step ``kill`` of both; return how many steps that took."""
    student = Net()
    run = start(student, folder, lines)
    before = run.trainer.position.step
    for number in range(run.trainer.position.phase, 2):
        run.trainer.train(number, STEPS * BATCH, make(student, kill - number * STEPS), Noise(), "test")
        run.trainer.save(keep=2 - number)
    return run.trainer.position.step - before


@pytest.fixture
def save_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", (0.0, 0.0))
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # a power cut is not what is tested


@pytest.mark.usefixtures("save_every_step")
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("kill", [4, 20, 33])
@pytest.mark.parametrize("make", [regression, players])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, make: Make, kill: int, lost: int
) -> None:
    kill += kill % 2 if make is players else 0  # a step at which the student learns
    truth: list[dict[str, Any]] = []
    two_phases(make, tmp_path / "whole", truth)
    lines: list[dict[str, Any]] = []
    with pytest.raises(Killed):
        two_phases(make, tmp_path / "cut", lines, kill)
    if lost:
        Checkpoints(tmp_path / "cut").files()[-1].unlink()
    taken = two_phases(make, tmp_path / "cut", lines)
    assert taken == 2 * STEPS - kill + lost
    assert lines == truth
    whole, cut = (sorted((tmp_path / name).iterdir()) for name in ("whole", "cut"))
    assert [path.name for path in whole] == [path.name for path in cut] == [f"samples-{320:015d}.safetensors"]
    assert whole[0].read_bytes() == cut[0].read_bytes()


def test_a_run_killed_between_phases_does_not_repeat_the_first(tmp_path: Path) -> None:
    student = Net()
    run = start(student, tmp_path)
    run.trainer.train(0, STEPS * BATCH, Regression(student), Noise(), "test")
    run.trainer.save()
    again = Net()
    resumed = start(again, tmp_path)
    resumed.trainer.train(0, STEPS * BATCH, Regression(again, lambda step: math.nan), Noise(), "test")
    assert resumed.trainer.position == run.trainer.position
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.usefixtures("save_every_step")
def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    student = Net()
    start(student, tmp_path).trainer.train(0, 9 * BATCH, Regression(student), Noise(), "test")
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        f"samples-{n * BATCH:015d}.safetensors" for n in (8, 9)
    ]


@pytest.mark.usefixtures("save_every_step")
def test_a_truncated_checkpoint_is_refused_and_the_one_before_it_serves(tmp_path: Path) -> None:
    truth: list[dict[str, Any]] = []
    two_phases(regression, tmp_path / "whole", truth)
    folder, lines = tmp_path / "cut", []
    with pytest.raises(Killed):
        two_phases(regression, folder, lines, 30)
    newest = Checkpoints(folder).files()[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{newest.name} is truncated.*delete that file.*the one before it"):
        two_phases(regression, folder, lines)
    newest.unlink()
    assert two_phases(regression, folder, lines) == 11
    assert lines == truth


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for content in (b"", b"not a checkpoint at all"):
        (tmp_path / "samples-1.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="truncated or no checkpoint"):
            read_checkpoint(tmp_path / "samples-1.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "samples-1.safetensors")  # someone's weights
    with pytest.raises(UserError, match="truncated or no checkpoint"):
        read_checkpoint(tmp_path / "samples-1.safetensors")


def test_a_checkpoint_of_another_network_or_version_is_refused(tmp_path: Path) -> None:
    student = Net()
    run = start(student, tmp_path)
    run.trainer.train(0, BATCH, Regression(student), Noise(), "test")
    run.trainer.save()
    with pytest.raises(UserError, match="another network than the recipe describes"):
        start(linear(), tmp_path)
    tensors, state = read_checkpoint(Checkpoints(tmp_path).files()[-1])
    state["position"]["epoch"] = 3
    Checkpoints(tmp_path).save(tensors, state)
    with pytest.raises(UserError, match=r"another version of fewstep .*epoch"):
        start(Net(), tmp_path)


def test_tied_weights_are_saved_and_resumed(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(2, 2)
            self.two = nn.Linear(2, 2)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x)))

    student = Tied()
    run = start(student, tmp_path)
    run.trainer.train(0, 5 * BATCH, Regression(student), Noise(), "test")
    run.trainer.save()
    again = Tied()
    resumed = start(again, tmp_path)
    assert again.one.weight is again.two.weight
    assert torch.equal(again.one.weight, student.one.weight)
    assert torch.equal(resumed.trainer.ema.state["two.weight"], run.trainer.ema.state["one.weight"])


@pytest.mark.parametrize(("cost", "expected"), [(0.0, 2.0), (0.1, 5.0), (3.0, 20.0)])
def test_checkpoints_cost_a_fiftieth_of_the_time_at_most_and_are_never_far_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cost: float, expected: float
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock.now))
    saved: list[float] = []

    def save(self: Checkpoints, *_: object, keep: int = 2) -> None:
        saved.append(clock.now)
        clock.now += cost

    monkeypatch.setattr(Checkpoints, "save", save)
    student = Net()

    def hook(step: int) -> None:
        clock.now += 0.5

    start(student, tmp_path).trainer.train(0, 400 * BATCH, Regression(student, hook), Noise(), "test")
    assert saved[0] == pytest.approx(2.0, abs=0.5)
    gaps = [later - earlier - cost for earlier, later in pairwise(saved)]
    assert len(gaps) > 5
    assert all(expected - 1e-6 <= gap <= expected + 0.5 + 1e-6 for gap in gaps)


class Odd(nn.Module):
    """Weights, a tied weight, and buffers of all kinds."""

    mask: Tensor
    count: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()
        self.b.weight = self.a.weight
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_the_average_of_constant_weights_is_those_weights() -> None:
    module = Odd()
    ema = EMA(module, 0.9)
    for _ in range(50):
        ema.update()
    assert set(ema.state) == set(module.state_dict())
    assert all(torch.equal(ema.state[name], value) for name, value in module.state_dict().items())


def test_the_average_follows_its_formula_and_buffers_are_copied() -> None:
    module = Odd()
    ema = EMA(module, 0.5)
    expected = module.a.weight.detach().double().clone()
    for n in range(1, 20):
        with torch.no_grad():
            module.a.weight.add_(1.0)
        module.mean = torch.full((2,), float(n))  # a new tensor in the buffer's place
        module.count += 1
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * module.a.weight.detach().double()
    torch.testing.assert_close(ema.state["a.weight"].double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(ema.state["b.weight"], ema.state["a.weight"])
    assert ema.state["mean"].tolist() == [19.0, 19.0]
    assert ema.state["count"].item() == 19
    assert ema.state["mask"].tolist() == [0.0, -math.inf]


def test_the_average_follows_weights_that_were_put_elsewhere() -> None:
    module = linear()
    ema = EMA(module, 0.0)
    module.weight.data = module.weight.data + 1.0  # as wrappers that move a module do
    ema.update()
    assert torch.equal(ema.state["weight"], module.weight)


def test_the_average_shares_no_storage() -> None:
    module = Odd()
    ema = EMA(module, 0.9)
    live = {value.untyped_storage().data_ptr() for value in module.state_dict().values()}
    kept = [value.untyped_storage().data_ptr() for value in ema.state.values()]
    assert live.isdisjoint(kept)
    assert len(set(kept)) == len(kept)
    before = {name: value.clone() for name, value in ema.state.items()}
    with torch.no_grad():
        module.a.weight.zero_()
    module.count += 5
    assert all(torch.equal(ema.state[name], value) for name, value in before.items())


def bf16_moved() -> tuple[nn.Module, EMA, Tensor, Tensor]:
    """A bfloat16 layer that is moved by a tenth after 10,000 updates, where d = .998; its weights before and after."""
    module = linear().to(torch.bfloat16)
    ema = EMA(module, 0.998)
    ema.updates = 10_000
    before = module.weight.detach().float()
    with torch.no_grad():
        module.weight.mul_(1.1)
    return module, ema, before, module.weight.detach().float()


def test_the_average_of_bfloat16_weights_follows_them() -> None:
    module, ema, before, after = bf16_moved()
    in_bf16 = before.bfloat16()
    for _ in range(2000):
        ema.update()
        in_bf16.lerp_(module.weight.detach(), 0.002)
    share = (ema.state["weight"] - before) / (after - before)
    torch.testing.assert_close(share, torch.full_like(share, 1 - 0.998**2000), atol=1e-3, rtol=0)  # 98 %
    assert torch.equal(in_bf16.float(), before)  # the same formula in bfloat16 stands still
    assert ema.weights()["weight"].dtype == torch.bfloat16
    torch.testing.assert_close(ema.weights()["weight"].float(), ema.state["weight"], atol=0, rtol=2**-8)


def test_a_float32_average_is_stored_and_loaded_in_float32() -> None:
    _, ema, before, _ = bf16_moved()
    for _ in range(10):
        ema.update()
    other = EMA(linear().to(torch.bfloat16), 0.998)
    other.load(ema.state, ema.updates)
    assert other.state["weight"].dtype == torch.float32
    assert torch.equal(other.state["weight"], ema.state["weight"])
    assert not torch.equal(other.state["weight"], before)  # ten updates are there: 2 % of the way


def test_bfloat16_weights_train_resume_and_write_their_own_dtype(tmp_path: Path) -> None:
    """The checkpoint holds the average in float32; a check and a model folder get the dtype of the weights."""
    seen: list[dict[str, torch.dtype]] = []

    class Checked(Regression):
        checks = 1

        def check(self, ema: Mapping[str, Tensor]) -> dict[str, float]:
            seen.append({name: value.dtype for name, value in ema.items()})
            linear().to(torch.bfloat16).load_state_dict(dict(ema))
            return {}

    class Flat(nn.Linear):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(torch.cat([x, t[:, None]], 1).to(self.weight.dtype)).to(x.dtype)

    student = Flat(3, 2, dtype=torch.bfloat16)
    run = start(student, tmp_path, [])
    run.trainer.train(0, STEPS * BATCH, Checked(student), Noise(), "test")
    run.trainer.save()
    tensors, _ = read_checkpoint(run.trainer.checkpoints.files()[-1])
    assert tensors["ema.weight"].dtype == torch.float32
    assert tensors["student.weight"].dtype == torch.bfloat16
    assert seen == [{"weight": torch.bfloat16, "bias": torch.bfloat16}]
    again = start(Flat(3, 2, dtype=torch.bfloat16), tmp_path, [])
    assert torch.equal(again.trainer.ema.state["weight"], run.trainer.ema.state["weight"])
