"""LoRA roles: one frozen base, and a training that equals one with a whole network for every role."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fewstep as fs
from contract_cases import accepts
from fewstep.data.load import from_array
from fewstep.errors import UserError
from fewstep.flow.couplings import GaussianSource
from fewstep.flow.noise import isolated_rng
from fewstep.methods.contract.stage import Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.distribution import PerCall
from fewstep.methods.families.target_average import TargetAverage
from fewstep.methods.registry import METHODS
from fewstep.networks.adapter import Adapter
from fewstep.networks.foreign import trainable_copy
from fewstep.training.checkpoint import Checkpoints
from fewstep.training.trainer import Trainer
from fewstep.training.world import LocalWorld

peft = pytest.importorskip("peft", reason="LoRA roles need peft: pip install 'fewstep[lora]'")
from fewstep.interop.lora import Role, lora_state, merge, merged  # noqa: E402  (after the check that peft is there)

SHAPE = (1, 8, 8)
RANK = 2


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with isolated_rng():
        torch.manual_seed(0)
        yield


def sd3(checkpointing: bool = False) -> nn.Module:
    """A tiny SD3 with random weights, large enough that time, text and noise matter."""
    diffusers = pytest.importorskip("diffusers", reason="this network is diffusers': pip install 'fewstep[diffusers]'")
    net = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, out_channels=1, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
        pos_embed_max_size=8,
    )  # fmt: skip
    stir(net, 0.05)
    if checkpointing:
        net.enable_gradient_checkpointing()
    return net.eval()


def call_sd3(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """SD3's velocity is noise minus data, and its time is 1000 at noise; the text is the same for all."""
    text = torch.linspace(-1, 1, 24, dtype=x.dtype).reshape(1, 3, 8).expand(len(x), 3, 8)
    return -net(x, text, text[:, 0], 1000 * (1 - t), return_dict=False)[0]


def sd3_net(checkpointing: bool = False) -> Adapter:
    return Adapter(sd3(checkpointing), call_sd3, time_embed="time_text_embed")


class Attention(nn.Module):
    """Self-attention of one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(torch.softmax(q @ k.mT, -1) @ v)


class Block(nn.Module):
    """Attention and a linear layer, with dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.drop, self.mlp = Attention(width), nn.Dropout(0.5), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.drop(self.mlp(torch.tanh(x)))


class Policy(nn.Module):
    """A (T, D) network of the library's convention, with activation checkpointing of its own."""

    def __init__(self, width: int = 8, checkpointing: bool = False) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x) + self.time_embed(t[:, None].to(x.dtype))[:, None]
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False) if self.checkpointing else block(h)
        return self.last(h)


def policy(checkpointing: bool = False) -> Adapter:
    return Adapter(Policy(checkpointing=checkpointing), time_embed="time_embed")


def stir(module: nn.Module, scale: float = 0.3) -> None:
    """Add noise to the weights, so that B is not zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape).to(p))


def student_of(teacher: Role) -> Role:
    """A copy whose adapter has an effect."""
    made = copy.deepcopy(teacher)
    stir(made)
    return made


def base_of(role: Role) -> set[int]:
    """The parameters that its calls use beside its own."""
    return {id(p) for p in role.adapted.parameters()} - {id(p) for p in role.parameters()}


def rows(shape: tuple[int, ...] = (5, 3), count: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(count, *shape).to(dtype), torch.rand(count).to(dtype)


def bytes_of(module: nn.Module) -> dict[str, bytes]:
    return {name: value.float().numpy().tobytes() for name, value in module.state_dict().items()}


class Alone(nn.Module):
    """The reference, in plain peft code: every copy has whole weights of its own, and an adapter in them."""

    def __init__(self, net: nn.Module, call: Callable[..., Tensor], targets: list[str], has_adapter: bool) -> None:
        super().__init__()
        self.net, self.call, self.targets, self.has_adapter = net, call, targets, has_adapter

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.call(self.net, x, t)

    def train(self, mode: bool = True) -> Alone:
        return self  # its networks have no dropout

    def own(self) -> dict[str, nn.Parameter]:
        """The adapter's matrices, under the names that a role's have."""
        names = {n: n.replace(".default", "").replace("net.", "adapter.", 1) for n, _ in self.named_parameters()}
        return {names[n]: p for n, p in self.named_parameters() if "lora_" in n}

    def requires_grad_(self, requires_grad: bool = True) -> Alone:
        for p in self.own().values():
            p.requires_grad_(requires_grad)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Alone:
        net = copy.deepcopy(self.net)
        if not self.has_adapter:
            config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=self.targets)
            peft.inject_adapter_in_model(config, net, "default")
        return Alone(net, self.call, self.targets, True)


def alone(net: Adapter, role: Role) -> Alone:
    """The reference for roles on the same network."""
    return Alone(copy.deepcopy(net.wrapped).requires_grad_(False), net.call, list(role.settings.places), False)


NETS = {"sd3": (sd3_net, SHAPE), "policy": (policy, (5, 3))}


def game(student: nn.Module, online: nn.Module, teacher: nn.Module, through: bool, shape: tuple[int, ...]) -> Tensor:
    """A step of a distribution matching: the loss of the student, which is differentiated through the others or not."""
    z, t = rows(shape, 3, torch.float64)
    eps, _ = rows(shape, 3, torch.float64)
    x1 = z + student(z, torch.zeros_like(t))
    time = t.reshape(-1, *(1,) * len(shape))
    x_t = (1 - time) * eps + time * x1
    with torch.set_grad_enabled(through):
        gap = teacher(x_t, t) - online(x_t, t)
    return (gap * (x1 - eps)).mean() if through else (gap.detach() * x1).mean()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_gradients_equal_those_of_whole_networks(name: str, through: bool, checkpointing: bool) -> None:
    make, shape = NETS[name]
    net = make(checkpointing)
    net.double()
    teacher = fs.lora(net, rank=RANK)
    student, online = student_of(teacher), student_of(teacher)
    single = alone(net, teacher)
    others = [copy.deepcopy(single), copy.deepcopy(single)]
    for role, other in zip([student, online], others, strict=True):
        for key, p in other.own().items():
            p.data = role.state_dict()[key].clone()
    found, expected = ([student, online, teacher], [*others, single])
    for trained in (0, 1):
        for nets in (found, expected):
            torch.manual_seed(3)
            nets[1 - trained].requires_grad_(False)
            if trained == 0:
                game(nets[0], nets[1], nets[2], through, shape).backward()
            else:  # the student's samples, then a pass of the teacher between the online model's forward and backward
                x, t = rows(shape, 3, torch.float64)
                with torch.no_grad():
                    x = x + nets[0](x, torch.zeros_like(t))
                loss = (nets[1](x, t) - x).square().mean()
                nets[2](x, t), nets[0](x, t)
                loss.backward()
            nets[1 - trained].requires_grad_(True)
        for key, p in found[trained].named_parameters():
            grad = expected[trained].own()[key].grad  # type: ignore[union-attr]
            assert grad is not None
            assert p.grad is not None, key
            torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-10 * float(grad.abs().max()))
        assert max(float(p.grad.abs().max()) for p in found[trained].parameters() if p.grad is not None) > 1e-6
        assert all(p.grad is None for p in found[1 - trained].parameters()) or trained == 1
        assert all(p.grad is None for p in [*net.parameters(), *teacher.base.parameters()])


TWO_TIME = {"meanflow", "lagrangian", "shortcut"}
SMALL = {"pairs": 32, "nfe": 4, "tolerance": 1e6}  # of methods that have such options


def train_on(method: str, teacher: nn.Module, folder: Path, steps: int = 16, stop: int | None = None) -> Trainer:
    """A stage, as the pipeline trains it; with ``stop``, it ends after so many samples, to be begun anew."""
    data = np.random.default_rng(0).uniform(-1, 1, (48, *SHAPE)).astype(np.float32)
    small = {name: value for name, value in SMALL.items() if name in METHODS[method].options.model_fields}
    fields = {"samples": steps * 4, "batch_size": 4, "lr": 5e-3, "ema": 0.9, **small}
    options = METHODS[method].options(method=method, teacher="t", **fields)
    world = LocalWorld(quiet=True)

    def build() -> nn.Module:
        if isinstance(teacher, Alone):  # only its adapter is to be trained
            return copy.deepcopy(teacher).requires_grad_(True)
        return trainable_copy(teacher, two_time=method in TWO_TIME)

    torch.manual_seed(1)
    stage = Stage(
        name="stage", folder=folder, data=from_array(data), source=GaussianSource(SHAPE), seed=0, conditions=(),
        network={}, build=build,
        teacher=Teacher(teacher, digest="0"), dequantise=0.0, world=world,
    )  # fmt: skip
    plan = METHODS[method].plan(options, stage)
    checkpoints = Checkpoints(folder / "checkpoints")
    trainer = Trainer(plan.student, options, (0, "stage"), world, checkpoints)
    trainer.resume()
    previous = None
    for number, phase in enumerate(plan.phases):
        torch.manual_seed(2 + number)
        if number >= trainer.position.phase:
            objective, batches = phase.prepare(previous)
            trainer.train(number, min(phase.samples, stop or phase.samples), objective, batches, phase.name)
            if stop is not None:
                trainer.save()
                return trainer
        previous = Teacher(copy.deepcopy(plan.student), digest="1", state=trainer.ema.state)
    return trainer


@pytest.mark.parametrize("method", ["dmd", pytest.param("fgm", marks=pytest.mark.slow), "consistency"])
def test_sixteen_steps_equal_training_with_whole_networks(method: str, tmp_path: Path) -> None:
    net = sd3_net(checkpointing=True)
    before, teacher = bytes_of(net.wrapped), fs.lora(net, rank=RANK)
    single = alone(net, teacher)
    base = bytes_of(teacher.base)
    found, expected = train_on(method, teacher, tmp_path / "role"), train_on(method, single, tmp_path / "alone")
    other = expected.student
    assert isinstance(other, Alone)
    torch.manual_seed(1)
    start = trainable_copy(teacher).state_dict()  # as the stage made its student
    for key, value in other.own().items():
        torch.testing.assert_close(found.student.state_dict()[key], value.detach(), rtol=0, atol=1e-6)
        torch.testing.assert_close(found.ema.state[key], strip_ema(expected)[key], rtol=0, atol=1e-6)
    moved = {key: float((value - start[key]).abs().max()) for key, value in found.student.state_dict().items()}
    idle = "transformer_blocks.1.attn.add_q_proj"  # the last block returns no text, so its queries have no effect
    assert {key for key, change in moved.items() if change < 1e-3} <= {f"adapter.{idle}.lora_{m}.weight" for m in "AB"}
    assert found.ema.state.keys() == {key for key, _ in found.student.named_parameters()}
    assert bytes_of(net.wrapped) == before
    assert bytes_of(teacher.base) == base
    x, t = rows(SHAPE)
    assert torch.equal(teacher(x, t), net.requires_grad_(False)(x, t))


def strip_ema(trainer: Trainer) -> dict[str, Tensor]:
    return {k.replace(".default", "").replace("net.", "adapter.", 1): v for k, v in trainer.ema.state.items()}


@pytest.mark.slow
def test_fs_train_takes_a_role_for_the_teacher(tmp_path: Path) -> None:
    """Equal calls write equal bytes, though the online model's adapter is drawn anew; another base is refused."""
    net, other = sd3_net(), sd3_net()
    data = np.random.default_rng(0).uniform(-1, 1, (48, *SHAPE)).astype(np.float32)
    fields: dict[str, Any] = {"data": data, "samples": 32, "batch_size": 4, "lr": 5e-3, "quiet": True}
    made = []
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        made.append(fs.train("dmd", teacher=fs.lora(net, rank=RANK), out=tmp_path / name / "few", **fields))
    files = [(tmp_path / name / "few/model.safetensors").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]
    few = made[0].module
    assert isinstance(few, Role)
    assert few.has_adapter
    again = fs.load(tmp_path / "first/few", module=fs.lora(net, rank=RANK))
    x0 = torch.randn(4, *SHAPE)
    assert torch.equal(again.sample(noise=x0), made[0].sample(noise=x0))
    whole = made[0].inner
    assert whole.state_dict().keys() == net.wrapped.state_dict().keys()
    torch.testing.assert_close(call_sd3(whole, x0, torch.zeros(4)), few(x0, torch.zeros(4)))
    assert not torch.allclose(few(x0, torch.zeros(4)), few.base(x0, torch.zeros(4)))
    with pytest.raises(UserError, match="_weights"):
        fs.train("dmd", teacher=fs.lora(other, rank=RANK), out=tmp_path / "first/few", **fields)
    later = fs.train("dmd", teacher=fs.lora(net, rank=RANK), init=made[0], out=tmp_path / "later", **fields)
    begun = [p for name, p in later.module.named_parameters() if "lora_A" in name]
    before = [p for name, p in few.named_parameters() if "lora_A" in name]
    assert max(float((p - q).abs().max()) for p, q in zip(begun, before, strict=True)) < 0.1  # A is about 0.3


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if accepts(name, "teacher")])
def test_every_method_with_a_teacher_trains_an_adapter_alone(method: str, tmp_path: Path) -> None:
    teacher = fs.lora(sd3_net(checkpointing=True), rank=RANK)
    base = bytes_of(teacher.base)
    trained = train_on(method, teacher, tmp_path, steps=8).student
    assert isinstance(trained, Role)
    assert any(p.abs().max() > 1e-4 for name, p in trained.named_parameters() if "lora_B" in name)
    assert bytes_of(teacher.base) == base
    assert not teacher.has_adapter


@pytest.mark.slow
def test_a_stage_that_is_stopped_and_made_anew_ends_bit_for_bit_alike(tmp_path: Path) -> None:
    """Student, online model and guard are made anew, and filled from the checkpoint, which holds adapters alone."""
    teacher = fs.lora(sd3_net(), rank=RANK)
    method = "realuid"
    whole = train_on(method, teacher, tmp_path / "whole")
    train_on(method, teacher, tmp_path / "parts", stop=4 * 4)
    parts = train_on(method, teacher, tmp_path / "parts")
    assert parts.position.step == whole.position.step == 16
    for role in whole._modules:
        first, second = whole._modules[role].state_dict(), parts._modules[role].state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), role
    (kept, *_) = Checkpoints(tmp_path / "parts/checkpoints").files()
    assert kept.stat().st_size < sum(p.numel() * 4 for p in teacher.base.parameters()) * 2


def test_a_role_without_an_adapter_is_the_base_and_has_no_weights() -> None:
    net = policy()
    teacher = fs.lora(net, rank=RANK)
    x, t = rows()
    assert torch.equal(teacher(x, t), net(x, t))
    assert [*teacher.parameters(), *teacher.buffers(), *teacher.state_dict()] == []
    assert not teacher.has_adapter
    assert type(teacher.inner) is Policy
    assert bytes_of(teacher.inner) == bytes_of(net.wrapped)
    assert not any(p.requires_grad for p in teacher.inner.parameters())


def test_a_copy_equals_the_base_and_holds_one_adapter() -> None:
    net = policy()
    teacher = fs.lora(net, rank=RANK)
    student = copy.deepcopy(teacher)
    x, t = rows()
    assert torch.equal(student(x, t), net(x, t))
    places = [f"blocks.{number}.attn.{layer}" for number in (0, 1) for layer in ("qkv", "proj")]
    names = {f"adapter.{place}.lora_{matrix}.weight" for place in places for matrix in "AB"}
    assert student.state_dict().keys() == names == {name for name, _ in student.named_parameters()}
    assert all(p.requires_grad for p in student.parameters())
    assert all(not p.any() for name, p in student.named_parameters() if "lora_B" in name)
    assert all(p.std() > 0.05 for name, p in student.named_parameters() if "lora_A" in name)
    assert base_of(student) == {id(p) for p in teacher.base.parameters()}
    assert student.adapted.wrapped.first.weight.data_ptr() == net.wrapped.first.weight.data_ptr()


def test_adapters_are_drawn_from_the_global_generator_and_copies_of_them_keep_their_values() -> None:
    teacher = fs.lora(policy(), rank=RANK)
    made = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        made.append(copy.deepcopy(teacher))
    assert all(torch.equal(p, q) for p, q in zip(made[0].parameters(), made[1].parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(made[0].parameters(), made[2].parameters(), strict=True))
    stir(made[0])
    second = copy.deepcopy(made[0])
    assert all(torch.equal(p, q) for p, q in zip(made[0].parameters(), second.parameters(), strict=True))
    assert not {p.data_ptr() for p in second.parameters()} & {p.data_ptr() for p in made[0].parameters()}
    assert base_of(second) == base_of(made[0])
    x, t = rows()
    before = made[0](x, t)
    assert torch.equal(second(x, t), before)
    stir(second)
    assert torch.equal(made[0](x, t), before)
    assert not torch.allclose(second(x, t), before)


def test_fs_lora_leaves_the_network_and_the_random_state_alone() -> None:
    net = policy()
    before, flags = bytes_of(net.wrapped), [p.requires_grad for p in net.parameters()]
    state = torch.get_rng_state()
    teacher = fs.lora(net, rank=RANK)
    assert torch.equal(torch.get_rng_state(), state)
    student = student_of(teacher)
    student.train()
    assert bytes_of(net.wrapped) == before
    assert [p.requires_grad for p in net.parameters()] == flags
    assert {type(m).__module__ for m in net.modules() if type(m).__module__.startswith("peft")} == set()
    assert not any(m.training for m in net.modules())


def test_modes_of_roles_are_their_own() -> None:
    """The student has dropout while teacher and online model have none."""
    teacher = fs.lora(policy(), rank=RANK)
    student, online = copy.deepcopy(teacher), copy.deepcopy(teacher)
    student.train()
    x, t = rows()
    assert not torch.equal(student(x, t), student(x, t))
    assert torch.equal(online(x, t), teacher(x, t))
    assert torch.equal(online(x, t), teacher(x, t))
    again = copy.deepcopy(student)
    assert again.training
    assert not torch.equal(again(x, t), again(x, t))


def test_moving_a_role_moves_the_base_of_all_roles() -> None:
    net = sd3_net()
    teacher = fs.lora(net, rank=RANK)
    student, online = student_of(teacher), student_of(teacher)
    x, t = rows(SHAPE)
    expected = student(x, t)
    student.to(torch.float64)
    assert {p.dtype for p in teacher.base.parameters()} == {torch.float64} == {p.dtype for p in student.parameters()}
    assert base_of(student) == {id(p) for p in teacher.base.parameters()} == base_of(online)
    tables = [role.adapted.wrapped.pos_embed.pos_embed for role in (teacher, student, online)]
    assert len(set(map(id, tables))) == 1
    assert tables[0].dtype == torch.float64
    assert base_of(copy.deepcopy(teacher)) == base_of(student)
    torch.testing.assert_close(student(x.double(), t.double()).float(), expected)
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_a_bfloat16_base_has_float32_adapters_which_small_updates_change() -> None:
    net = policy()
    net.bfloat16()
    teacher = fs.lora(net, rank=RANK)
    student = copy.deepcopy(teacher)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.base.parameters()} == {torch.bfloat16}
    x, t = rows()
    assert torch.equal(student(x, t), teacher(x, t))
    student(x, t).square().mean().backward()
    moved = [p for name, p in student.named_parameters() if "lora_B" in name]
    before = [p.detach().clone() for p in moved]
    torch.optim.SGD(moved, lr=1e-4).step()
    assert all(not torch.equal(p, b) for p, b in zip(moved, before, strict=True))


@pytest.mark.parametrize("name", NETS)
def test_merged_weights_give_the_same_velocity_under_the_names_of_the_user(name: str) -> None:
    make, shape = NETS[name]
    net = make()
    net.double()
    teacher = fs.lora(net, rank=RANK, alpha=3.0)
    student = student_of(teacher)
    base, x, t = bytes_of(teacher.base), *rows(shape, dtype=torch.float64)
    whole = merge(student)
    assert type(whole) is type(net.wrapped)
    assert whole.state_dict().keys() == net.wrapped.state_dict().keys()
    torch.testing.assert_close(net.call(whole, x, t), student(x, t), rtol=1e-10, atol=1e-10)
    assert (net.call(whole, x, t) - net(x, t)).abs().max() > 1e-3
    assert all(p.requires_grad for p in whole.parameters())
    torch.testing.assert_close(merged(student)(x, t), student(x, t), rtol=1e-10, atol=1e-10)
    stir(whole)
    assert bytes_of(teacher.base) == base
    assert bytes_of(merge(teacher)) == bytes_of(net.wrapped)


def test_the_exported_state_is_read_by_peft_and_by_diffusers() -> None:
    net = sd3_net()
    student = student_of(fs.lora(net, rank=RANK, targets=["to_q", "to_out.0"], alpha=2.0 * RANK))
    x, t = rows(SHAPE)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["to_q", "to_out.0"])
    theirs = peft.get_peft_model(copy.deepcopy(net.wrapped), config)
    read = peft.set_peft_model_state_dict(theirs, lora_state(student))
    assert not read.unexpected_keys
    torch.testing.assert_close(call_sd3(theirs, x, t), student(x, t))
    plain = student_of(fs.lora(net, rank=RANK))  # alpha is the rank
    model: Any = copy.deepcopy(net.wrapped)
    model.load_lora_adapter(lora_state(plain, "transformer"), prefix="transformer")
    torch.testing.assert_close(call_sd3(model, x, t), plain(x, t))
    with pytest.raises(UserError, match="no adapter"):
        lora_state(fs.lora(net))


@pytest.mark.parametrize("name", NETS)
def test_the_two_time_form_equals_the_base_at_first_and_trains_its_own_intervals(name: str) -> None:
    make, shape = NETS[name]
    net = make().requires_grad_(False)  # torch rounds products with trainable weights otherwise, by one unit
    teacher = fs.lora(net, rank=RANK)
    student = trainable_copy(teacher, two_time=True)
    assert isinstance(student, Role)
    x, t = rows(shape)
    assert torch.equal(student(x, t, r=t + 0.5), net(x, t))
    student(x, t, r=t + 0.5).square().mean().backward()
    assert {n for n, _ in student.named_parameters() if n.startswith("intervals.")}
    assert all(p.grad is not None for p in student.parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    other = copy.deepcopy(student)
    assert torch.equal(other(x, t, r=t + 0.5), student(x, t, r=t + 0.5))
    assert not torch.allclose(student(x, t, r=t), student(x, t, r=t + 0.5))
    torch.testing.assert_close(merged(student)(x, t, r=t + 0.5), student(x, t, r=t + 0.5))
    with pytest.raises(UserError, match="no end time"):
        teacher(x, t, r=t)


def test_a_two_time_network_keeps_its_intervals() -> None:
    net = policy().with_interval()
    stir(net)
    teacher = fs.lora(net, rank=RANK)
    x, t = rows()
    assert torch.equal(teacher(x, t, r=t + 0.3), net(x, t, r=t + 0.3))
    assert teacher.describe()["two_time"] is True


def test_forward_mode_derivatives_pass_through_an_adapter() -> None:
    student = student_of(fs.lora(policy(), rank=RANK)).double()
    x, t = rows(dtype=torch.float64)
    _, slope = torch.func.jvp(lambda s: student(x, s), (t,), (torch.ones_like(t),))
    with torch.no_grad():
        numeric = (student(x, t + 1e-5) - student(x, t - 1e-5)) / 2e-5
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-6)


def test_a_state_is_loaded_by_any_role_on_the_base() -> None:
    teacher = fs.lora(policy(), rank=RANK)
    student = student_of(teacher)
    fresh = fs.lora(policy(), rank=RANK)
    fresh.base.load_state_dict(teacher.base.state_dict())
    state = torch.get_rng_state()
    fresh.load_state_dict(student.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    x, t = rows()
    assert torch.equal(fresh(x, t), student(x, t))
    assert fresh.has_adapter
    assert fresh.describe() == student.describe() == teacher.describe()
    assert fs.lora(policy(), rank=RANK + 1).describe() != teacher.describe()
    with pytest.raises(RuntimeError, match="size mismatch"):
        fs.lora(policy(), rank=RANK + 1).load_state_dict(student.state_dict())


def test_a_saved_generator_holds_the_adapter_and_is_loaded_on_the_base(tmp_path: Path) -> None:
    net = policy()
    student = student_of(fs.lora(net, rank=RANK))
    fs.Generator(student, shape=(5, 3)).save(tmp_path)
    again = fs.load(tmp_path, module=fs.lora(net, rank=RANK))
    x0 = torch.randn(4, 5, 3)
    assert torch.equal(again.sample(noise=x0, steps=2), fs.Generator(student, shape=(5, 3)).sample(noise=x0, steps=2))
    plain = fs.Generator(net, shape=(5, 3)).sample(noise=x0, steps=2)
    assert not torch.allclose(again.sample(noise=x0, steps=2), plain, atol=1e-2)


def test_averages_and_several_copies_hold_adapters_alone() -> None:
    student = student_of(fs.lora(policy(), rank=RANK))
    average, several = TargetAverage(student, 0.5), PerCall(student, 2)
    average.module.eval()  # without dropout
    assert {f"target.{key}" for key in student.state_dict()} == average.state.keys()
    assert len([*several.parameters()]) == 2 * len([*student.parameters()])
    before = copy.deepcopy(student)
    stir(student)
    average.update()
    expected = {k: 0.5 * (v + before.state_dict()[k]) for k, v in student.state_dict().items()}
    before.load_state_dict(expected)
    x, t = rows()
    torch.testing.assert_close(average(x, t), before(x, t))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.depth = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.last, self.time = nn.Conv2d(4, 1, 3, padding=1), nn.Linear(1, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.tanh(self.depth(self.first(x)) + self.time(t[:, None])[:, :, None, None]))


class Encoder(nn.Module):
    """torch's own transformer, which has a fused form that calls no layer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.first(torch.cat([x, t[:, None, None].expand(*x.shape[:2], 1)], -1))
        return self.last(self.encoder(h, src_key_padding_mask=None if mask is None else ~mask))


def layers_of(net: nn.Module, **fields: Any) -> set[str]:
    return set(fs.lora(net, **fields).settings.places)


def test_the_usual_layers() -> None:
    assert layers_of(Policy()) == {f"blocks.{n}.attn.{layer}" for n in (0, 1) for layer in ("qkv", "proj")}
    assert layers_of(Attention(4)) == {"qkv", "proj"}
    assert layers_of(ConvNet()) == {"first", "last", "time"}
    attention = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    assert {name.partition(".attn.")[2] for name in layers_of(sd3())} == attention
    assert layers_of(Encoder()) == {"first", "last"} | {f"encoder.layers.{n}.linear{m}" for n in (0, 1) for m in (1, 2)}


def test_layers_are_named_by_their_ends_or_by_a_pattern() -> None:
    assert layers_of(Policy(), targets=["mlp", "first"]) == {"blocks.0.mlp", "blocks.1.mlp", "first"}
    assert layers_of(Policy(), targets=r"blocks\.0\..*(qkv|mlp)") == {"blocks.0.attn.qkv", "blocks.0.mlp"}


def test_an_adapter_works_in_a_convolution() -> None:
    student = student_of(fs.lora(ConvNet(), rank=RANK))
    x, t = rows(SHAPE)
    torch.testing.assert_close(merge(student)(x, t), student(x, t))
    assert not torch.allclose(student(x, t), student.base(x, t))


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")  # the base's own call
@pytest.mark.parametrize("masked", [False, True])
def test_the_adapter_is_not_omitted_by_the_fused_encoder(masked: bool) -> None:
    student = student_of(fs.lora(Encoder(), rank=RANK))
    x, t = rows()
    mask = torch.arange(5)[None] < torch.tensor([5, 4, 3, 2])[:, None]
    cond = {"mask": mask} if masked else {}
    with_graph = student(x.requires_grad_(), t, **cond).detach()
    with torch.no_grad():
        found, base = student(x, t, **cond), student.base(x, t, **cond)
    torch.testing.assert_close(found, with_graph)  # at the masked entries too
    assert not torch.allclose(found[:, :2], base[:, :2], atol=1e-2)


def with_peft_layers() -> nn.Module:
    net = Policy()
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["mlp"]), net)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    ("make", "fields", "words"),
    [
        (Policy, {"rank": 0}, "rank is 0"),
        (Policy, {"rank": 2.0}, "positive integer"),
        (Policy, {"alpha": -1.0}, "alpha is -1"),
        (Policy, {"targets": ["mpl"]}, "did you mean 'mlp'"),
        (Policy, {"targets": ["mlp", "nowhere"]}, "unknown layer in targets 'nowhere'"),
        (Policy, {"targets": "no.*thing"}, "no.*thing"),
        (Encoder, {"targets": ["out_proj"]}, "MultiheadAttention"),
        (Encoder, {"targets": ["self_attn"]}, "MultiheadAttention"),
        (Table, {"targets": ["table"]}, "embeddings"),
        (lambda: nn.Linear(2, 2), {}, "no linear or convolution layer"),
        (with_peft_layers, {}, "merge them first"),
        (lambda: fs.lora(Policy()), {}, "copy.deepcopy"),
        (lambda: lambda x, t: x, {}, "torch.nn.Module"),
    ],
)
def test_what_cannot_be_a_role_is_refused_with_the_reason(
    make: Callable[[], Any], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        fs.lora(make(), **fields)


def test_a_network_without_a_time_embedding_has_no_two_time_form() -> None:
    teacher = fs.lora(Policy(), rank=RANK)
    with pytest.raises(UserError, match="time_embed"):
        teacher.with_interval()


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"fewstep\[lora\]"):
        fs.lora(Policy())


def test_a_role_keeps_what_the_adapter_declares() -> None:
    net = Adapter(Encoder(), null={"mask": 1}, mask="mask", combine=lambda v0, v, w: v)
    teacher = fs.lora(net)
    for role in (teacher, copy.deepcopy(teacher)):
        assert (role.null, role.mask, role.combine) == (net.null, "mask", net.combine)
        assert role.describe()["lora"]["rank"] == 16
