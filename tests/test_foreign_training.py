"""What training does with a network that fewstep did not build: its weights, dtypes, flags, nulls and conditions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.flow.couplings import Pair
from fewstep.generator import read_tensors
from fewstep.methods.dmd import DMD
from fewstep.methods.families.distribution import DistributionMatching, Point
from fewstep.methods.families.velocity_source import VelocitySource
from fewstep.methods.guards.best_weights import StudentSnapshot
from fewstep.networks.adapter import Adapter
from fewstep.networks.discriminator import Discriminator
from fewstep.networks.foreign import held_parameters
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.training.checkpoint import Checkpoints, read_checkpoint
from fewstep.training.world import LocalWorld
from foreign_cases import (
    BATCH,
    LENGTH,
    POOLED,
    TEXT,
    Policy,
    call_policy,
    images,
    policy,
    policy_data,
    sd3,
    sd3_data,
)

SHORT: dict[str, Any] = {"samples": 4 * BATCH, "batch_size": BATCH, "quiet": True, "check": False}
PAIRS: dict[str, Any] = {"pairs": 40, "nfe": 4, "tolerance": 10.0}


def learn(method: str, out: Path, teacher: nn.Module | None = None, **options: Any) -> fs.Generator:
    """A few steps on the policy's data, unless other data are given."""
    told = {**SHORT, **({"teacher": teacher} if teacher is not None else {}), **options}
    return fs.train(method, out=out, **{"data": policy_data(), **told})


def newest(folder: Path) -> dict[str, Tensor]:
    return read_checkpoint(Checkpoints(folder / "checkpoints").files()[-1])[0]


class Labelled(nn.Module):
    """A velocity of images that depends on a label in a table of ``rows`` entries, and notes the labels it is given."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.time, self.table, self.last = nn.Linear(1, 16), nn.Embedding(rows, 16), nn.Linear(16, 16)
        self.first = nn.Linear(16, 16)
        self.seen: set[int] = set()

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.seen.update(label.tolist())
        hidden = self.first(x.flatten(1)) + self.time(t[:, None]) + self.table(label)
        return self.last(torch.tanh(hidden)).view_as(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> Labelled:
        made = type(self)(self.table.num_embeddings)
        made.load_state_dict(self.state_dict())
        made.seen = self.seen  # copies note in the same set
        return made


class Redrawing(Labelled):
    """Replaces labels at random in training mode, as DiT does."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        if self.training:
            label = torch.where(torch.rand(len(label)) < 0.5, self.table.num_embeddings - 1, label)
        return super().forward(x, t, label)


def labelled(rows: int = 6, null: int | None = 5, kind: type[Labelled] = Labelled) -> Adapter:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Adapter(kind(rows), time_embed="time", null={} if null is None else {"label": null})


# --- the user's module ------------------------------------------------------------------------------------------


def test_a_teacher_is_left_as_it_was(tmp_path: Path) -> None:
    net = policy()
    net.inner.time.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flags = [parameter.requires_grad for parameter in net.parameters()]
    for method in ("dmd", "meanflow", "distill"):
        learn(method, tmp_path / method, net, **(PAIRS if method == "distill" else {}))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [parameter.requires_grad for parameter in net.parameters()] == flags
    assert all(parameter.grad is None for parameter in net.parameters())


def test_flags_are_put_back_when_training_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = policy()

    def fail(*_: Any) -> None:
        raise RuntimeError("a full disk")

    monkeypatch.setattr(VelocitySource, "velocity_at", fail)
    with pytest.raises(RuntimeError, match="full disk"):
        learn("consistency", tmp_path / "s", net)
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("method", ["flow_matching", "dmd", "meanflow"])
def test_frozen_parameters_stay_frozen_in_student_and_online_model(tmp_path: Path, method: str) -> None:
    net = policy()
    net.inner.body[0].requires_grad_(False)
    who = {"network": net} if method == "flow_matching" else {"teacher": net}
    generator = learn(method, tmp_path / "s", **who)
    start = net.inner.state_dict()
    moved = {name for name, value in generator.inner.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == {"time.weight", "time.bias", "body.2.weight", "body.2.bias"}  # the spare layer has no gradient
    if method == "dmd":
        tensors = newest(tmp_path / "s")
        assert torch.equal(tensors["online.wrapped.body.0.weight"], start["body.0.weight"])
        assert not torch.equal(tensors["online.wrapped.body.2.weight"], start["body.2.weight"])


def test_a_saved_model_remembers_nothing_and_the_network_it_is_put_into_says_what_is_frozen(tmp_path: Path) -> None:
    net = policy()
    learn("flow_matching", tmp_path / "flow", network=net)
    net.inner.body[0].requires_grad_(False)
    flow = fs.load(tmp_path / "flow", module=net)
    assert held_parameters(flow.module) == {"wrapped.body.0.weight", "wrapped.body.0.bias"}
    student = learn("consistency", tmp_path / "s", flow)
    assert torch.equal(student.inner.body[0].weight, flow.inner.body[0].weight)
    assert not torch.equal(student.inner.body[2].weight, flow.inner.body[2].weight)


def test_a_wholly_frozen_teacher_has_a_student_that_learns(tmp_path: Path) -> None:
    net = policy()
    net.requires_grad_(False)
    generator = learn("consistency", tmp_path / "s", net)
    start = net.inner.state_dict()
    moved = {name for name, value in generator.inner.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == set(start) - {"spare.weight", "spare.bias"}
    assert not any(parameter.requires_grad for parameter in net.parameters())


# --- half precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["consistency", "slimflow", "dmd", "meanflow"])
def test_a_bf16_teacher_trains_a_student_in_float32_and_gets_bf16_back(tmp_path: Path, method: str) -> None:
    net = policy()
    net.inner.to(torch.bfloat16)
    told = PAIRS if method == "slimflow" else {}
    generator = learn(method, tmp_path / "s", net, ema=0.998, lr=1e-4, **told)
    saved, kept = read_tensors(tmp_path / "s" / "model.safetensors"), newest(tmp_path / "s")
    own = {name for name in saved if not name.startswith("intervals.")}
    assert {saved[name].dtype for name in own} == {torch.bfloat16}
    assert {saved[name].dtype for name in saved.keys() - own} <= {torch.float32}
    assert {value.dtype for value in generator.inner.state_dict().values()} == {torch.bfloat16}
    assert {value.dtype for value in net.inner.state_dict().values()} == {torch.bfloat16}
    for prefix in ("student", "ema", *(["online"] if method == "dmd" else [])):
        weight = kept[f"{prefix}.wrapped.body.2.weight"]
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, net.inner.body[2].weight.float()), f"{prefix} did not move"
    assert torch.equal(saved["body.2.weight"], kept["ema.wrapped.body.2.weight"].bfloat16())
    x = generator.sample(3)
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    if method == "slimflow":
        between = read_tensors(tmp_path / "s" / "rounds" / "anneal" / "model.safetensors")
        assert {value.dtype for value in between.values()} == {torch.float32}


def test_steps_too_small_for_bf16_add_up(tmp_path: Path) -> None:
    """64 steps of 1e-6: each is lost in bf16 weights near .1, whose neighbours are 5e-4 apart."""
    net = policy()
    net.inner.to(torch.bfloat16)
    learn("consistency", tmp_path / "s", net, lr=1e-6, warmup=0.0, samples=64 * BATCH)
    moved = newest(tmp_path / "s")["student.wrapped.body.2.weight"] - net.inner.body[2].weight.float()
    assert 1e-5 < moved.abs().max() < 1e-4


# --- modes ------------------------------------------------------------------------------------------------------


def test_a_network_that_redraws_labels_in_training_mode_trains_as_one_that_does_not(tmp_path: Path) -> None:
    data = images()
    weights = []
    for name, kind in (("first", Redrawing), ("again", Redrawing), ("plain", Labelled)):
        learn("dmd", tmp_path / name / "s", labelled(kind=kind), data=data, conditional=True)
        weights.append((tmp_path / name / "s" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]


# --- recipes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["moons", "digits"])
def test_a_call_and_a_recipes_stage_write_equal_bytes(tmp_path: Path, data: str) -> None:
    network = {"name": "mlp", "width": 16, "blocks": 1, "embedding": 8}
    common = {"samples": 512, "batch_size": 64}
    stages = {
        "teacher": {"method": "flow_matching", **common},
        "straight": {"method": "reflow", "teacher": "teacher", **common, **PAIRS, "real": "independent"},
        "few": {"method": "dmd", "teacher": "teacher", **common},
    }
    recipe = {"data": data, "network": network, "seed": 3, "stages": stages}
    run_recipe(make_recipe(recipe, "recipe"), tmp_path / "recipe", LocalWorld(quiet=True))
    made = tmp_path / "calls"
    for name, stage in stages.items():
        told = {key: value for key, value in stage.items() if key not in ("method", "teacher")}
        told |= {"teacher": made / "teacher"} if "teacher" in stage else {}
        fs.train(stage["method"], data=data, out=made / name, network=network, seed=3, quiet=True, **told)
    for name in stages:
        for file in ("model.safetensors", "config.json"):
            assert (made / name / file).read_bytes() == (tmp_path / "recipe" / name / file).read_bytes(), (name, file)


# --- conditions -------------------------------------------------------------------------------------------------


class Blind(Policy):
    """A policy that ignores its observation."""

    def forward(self, timestep: Tensor, sample: Tensor, obs: Tensor) -> Tensor:
        return super().forward(timestep, sample, torch.zeros_like(obs))


@pytest.mark.parametrize("kind", [Policy, Blind])
def test_an_observation_reaches_the_networks_samples(tmp_path: Path, kind: type[Policy]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Adapter(kind(), call_policy, time_embed="time", mask="mask")
    generator = learn("consistency", tmp_path / "s", net)
    drawn = generator.draw(8)
    other = drawn.cond | {"obs": drawn.cond["obs"] + torch.tensor([0.0, 1.0, -1.0])}
    one, two = (generator.sample(noise=drawn.x0, cond=cond) for cond in (drawn.cond, other))
    valid = drawn.cond["mask"]
    assert bool(((one - two)[valid].abs() > 1e-4).all()) == (kind is Policy)
    assert torch.equal(one, two) == (kind is Blind)


def test_pairs_of_texts_hold_row_numbers_in_their_place(tmp_path: Path) -> None:
    learn("distill", tmp_path / "s", sd3(), data=sd3_data(), **PAIRS)
    folder = tmp_path / "s" / "pairs" / "distill" / "generated"
    shard = read_tensors(folder / "00000.safetensors")
    assert sorted(shard) == ["row", "x0", "x1"]
    assert shard["row"].dtype == torch.int64
    values = 40 * (6 * 16 + 16) * 4  # of the texts and pooled texts as numbers
    assert sum(path.stat().st_size for path in folder.iterdir()) < 40 * (2 * 64 * 4 + 8) + 4096 < values + 40 * 64 * 8


def test_the_pairs_of_a_row_number_were_solved_with_that_rows_conditions(tmp_path: Path) -> None:
    net, data = sd3(), sd3_data()
    learn("distill", tmp_path / "s", net, data=data, **PAIRS)
    shard = read_tensors(tmp_path / "s" / "pairs" / "distill" / "generated" / "00000.safetensors")
    right = {name: torch.from_numpy(np.asarray(data.conditions[name]))[shard["row"]] for name in (TEXT, POOLED)}
    wrong = {name: rows.roll(1, 0) for name, rows in right.items()}
    ends = [fs.solve(net, shard["x0"], solver="rk4", steps=1, cond=cond).x for cond in (right, wrong)]
    assert (ends[0] - shard["x1"]).abs().max() < 1e-4
    assert (ends[1] - shard["x1"]).abs().max() > 1e-2


def test_guards_and_discriminator_see_the_conditions_of_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy's own call refuses an observation with another row's mask; the discriminator's calls are checked."""
    seen: list[int] = []
    looked: list[set[str]] = []
    forward, one_step = Discriminator.forward, StudentSnapshot.one_step

    def judged(module: Discriminator, x: Tensor, cond: Any) -> Tensor:
        lengths = (cond["obs"][:, 0] * LENGTH).round().long()
        assert torch.equal(cond["mask"].sum(1), lengths)
        assert x.detach()[~cond["mask"]].abs().max() == 0.0
        seen.append(len(x))
        return forward(module, x, cond)

    def stepped(snapshot: StudentSnapshot, weights: Any, x0: Tensor, cond: Any) -> Tensor:
        looked.append(set(cond))
        return one_step(snapshot, weights, x0, cond)

    monkeypatch.setattr(Discriminator, "forward", judged)
    monkeypatch.setattr(StudentSnapshot, "one_step", stepped)
    told = {"pairs": 1200, "nfe": 4, "tolerance": 10.0, "shares": (0.5, 0.0, 0.5), "discriminator_real": "both"}
    learn("instaflow", tmp_path / "coverage", policy(), **told)
    assert len(seen) >= 4
    assert looked == [{"obs", "mask"}] * len(looked) != []
    looked.clear()
    learn("dmd", tmp_path / "divergence", policy())
    assert looked == [{"obs", "mask"}] * len(looked) != []


# --- nulls ------------------------------------------------------------------------------------------------------


def guided(net: Adapter, x: Tensor, t: Tensor, cond: dict[str, Tensor], weight: float = 2.0) -> Tensor:
    """``v_0 + w (v_c - v_0)`` by two plain calls; the null of the observation is 0, and the mask stays."""
    without = net(x, t, **{**cond, "obs": torch.zeros_like(cond["obs"])})
    return without + weight * (net(x, t, **cond) - without)


def test_guided_pairs_are_the_plain_eulers(tmp_path: Path) -> None:
    net, data = policy(), policy_data()
    learn("distill", tmp_path / "s", net, guidance=2.0, solver="euler", **PAIRS)
    shard = read_tensors(tmp_path / "s" / "pairs" / "distill" / "generated" / "00000.safetensors")
    cond = data.cond_rows(shard["row"], ("obs", "mask"))
    ends = []
    for weight in (2.0, 1.0):
        x = shard["x0"]
        for step in range(4):
            x = x + guided(net, x, torch.full((len(x),), step / 4), cond, weight) / 4
        ends.append((x - shard["x1"]).abs().max())
    assert ends[0] < 1e-5
    assert ends[1] > 1e-2


def watch_steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, dict[str, Tensor], Tensor]]:
    """Points, times, conditions and velocities of the teacher, as the losses of maps get them."""
    found: list[tuple[Tensor, Tensor, dict[str, Tensor], Tensor]] = []
    velocity_at = VelocitySource.velocity_at

    def watched(source: VelocitySource, batch: Pair, x: Tensor, t: Tensor) -> Tensor:
        v = velocity_at(source, batch, x, t)
        found.append((x, t, batch.cond, v))
        return v

    monkeypatch.setattr(VelocitySource, "velocity_at", watched)
    return found


def test_a_guided_consistency_step_is_the_plain_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step: the gap is 1, so the target is Heun's step with the guided velocity from t to 1, for every row."""
    net, found = policy(), watch_steps(monkeypatch)
    learn("consistency", tmp_path / "s", net, guidance=2.0, samples=BATCH)
    net.requires_grad_(False)
    x, t, cond, _ = found[0]
    assert len(found) == 2
    losses = []
    for weight in (2.0, 1.0):
        first = guided(net, x, t, cond, weight)
        second = guided(net, x + (1 - t)[:, None, None] * first, torch.ones_like(t), cond, weight)
        losses.append(float((net(x, t, **cond) - 0.5 * (first + second)).square().mean()))
    (line,) = [json.loads(text) for text in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert line["terms"]["loss"] == pytest.approx(losses[0], rel=1e-5)
    assert line["terms"]["loss"] != pytest.approx(losses[1], rel=1e-2)


def test_a_guided_dmd_step_is_the_plain_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = policy()
    points: list[Point] = []
    conds: list[dict[str, Tensor]] = []
    call, loss = DMD.__call__, DistributionMatching.loss

    def measured(divergence: DMD, point: Point) -> Tensor:
        points.append(point)
        return call(divergence, point)

    def stepped(objective: Any, role: str, nets: Any, batch: Pair, *rest: Any) -> Any:
        if role == "student":
            conds.append(batch.cond)
        return loss(objective, role, nets, batch, *rest)

    monkeypatch.setattr(DMD, "__call__", measured)
    monkeypatch.setattr(DistributionMatching, "loss", stepped)
    learn("dmd", tmp_path / "s", net, guidance=2.0, start=0.0, head_start=0.0, samples=BATCH)
    (point,), (cond,) = points, conds
    plain = [guided(net, point.x_t, point.t, cond, weight).detach() for weight in (2.0, 1.0)]
    assert (point.teacher - plain[0]).abs().max() < 1e-5
    assert (point.teacher - plain[1]).abs().max() > 1e-3
    # the loss is |g|^2 / 2 per row, g the difference of the data predictions over m
    g = point.kappa[:, None, None] * (point.online - plain[0]) / point.mean_error[:, None, None]
    lines = [json.loads(text) for text in (tmp_path / "stats.jsonl").read_text().splitlines()]
    (found,) = [line["terms"]["loss"] for line in lines if "loss" in line.get("terms", {})]
    assert found == pytest.approx(float(0.5 * g.square().mean()), rel=1e-4)


def test_label_dropout_uses_the_declared_null(tmp_path: Path) -> None:
    net = labelled(rows=6, null=5)
    generator = learn(
        "flow_matching", tmp_path / "s", network=net, data=images(), conditional=True, label_dropout=0.3, samples=64
    )
    assert net.inner.seen == {0, 1, 2, 5}
    assert generator.config.guidable
    generator.sample(2, guidance=2.0)


def test_label_dropout_leaves_labels_alone_where_no_null_is_declared(tmp_path: Path) -> None:
    """The number of classes, 3, is no row of this table."""
    net = labelled(rows=3, null=None)
    generator = learn(
        "flow_matching", tmp_path / "s", network=net, data=images(), conditional=True, label_dropout=0.9, samples=64
    )
    assert net.inner.seen == {0, 1, 2}
    assert not generator.config.guidable
