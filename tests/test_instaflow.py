"""Distillation with several objectives against truths: warm start, exact maps, turns, ramp, collapse, resumption."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import fewstep as fs
from fewstep.errors import UserError
from fewstep.flow.couplings import Pair
from fewstep.flow.noise import Draws, generator_for
from fewstep.generator import read_tensors
from fewstep.methods.contract.objective import Collapse, Learning, Networks, Terms
from fewstep.methods.families.adversarial import find_adversarial
from fewstep.methods.families.adversarial_distillation import AdversarialDistillation, Adversary, Real, real_rows
from fewstep.methods.families.distances import find_distance
from fewstep.methods.guards.coverage import CoverageGuard
from fewstep.methods.instaflow import InstaflowOptions, phase_samples
from fewstep.networks import build, resolve
from fewstep.networks.discriminator import Discriminator
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.solvers.solve import solve
from fewstep.store.pairs import PairRows
from fewstep.training.world import LocalWorld
from objective_cases import loss_of
from training_cases import start

WORLD = LocalWorld(quiet=True)
TINY = {"name": "mlp", "width": 16, "blocks": 1, "embedding": 8}


def network(seed: int = 0, **fields: Any) -> nn.Module:
    torch.manual_seed(seed)
    module = build(resolve({**TINY, **fields}, (2,)))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def adversary(**fields: Any) -> Adversary:
    torch.manual_seed(5)
    usual: dict[str, Any] = {
        "discriminator": Discriminator((2,)),
        "loss": find_adversarial("relativistic"),
        "share": 0.5,
        "gamma": 0.1,
        "every": 1,
        "turns": 1,
        "real": "teacher",
        "ramp": 0.0,
        "steps": 100.0,
        "learning": {"student": Learning(2e-4, (0.5, 0.99)), "discriminator": Learning(5e-4, (0.5, 0.99))},
    }
    return Adversary(**{**usual, **fields})


def objective(
    student: nn.Module, rival: Adversary | None = None, monitor: CoverageGuard | None = None
) -> AdversarialDistillation:
    return AdversarialDistillation(student, find_distance("l2"), None, rival, monitor, WORLD)


def draws(rows: int) -> Draws:
    return Draws(generator_for("instaflow", "draws"), rows)


def batch(rows: int = 64) -> Pair:
    generator = generator_for("instaflow", "batch")
    x = torch.randn(3, rows, 2, generator=generator)
    return Pair(x[0], 0.5 * x[1] + 1.0, {}, {"real": x[2]})


def test_the_student_starts_as_its_teachers_euler_step() -> None:
    student = network()
    pair = batch()
    ends = solve(student, pair.x0, solver="euler", steps=1).x
    exact = Pair(pair.x0, ends)
    assert loss_of(objective(student), "student", exact, draws(64))["loss"].item() == 0.0


def test_the_term_against_a_rival_comes_in_from_zero() -> None:
    student = network()
    judge = Discriminator((2,))
    for parameter in judge.parameters():
        nn.init.normal_(parameter, std=0.2)  # it pulls hard enough for the bound on its weight not to bind
    alone, against = objective(student), objective(student, adversary(discriminator=judge, ramp=0.1))
    pair = batch()
    plain = torch.autograd.grad(loss_of(alone, "student", pair, draws(64))["loss"], student.output.weight)[0]
    terms = loss_of(against, "student", pair, draws(64))
    assert terms["weight/adversarial"].item() == 0.0
    torch.testing.assert_close(torch.autograd.grad(terms["loss"], student.output.weight)[0], plain)
    later = [loss_of(against, "student", pair, draws(64), step / 100) for step in range(1, 21)]
    weights = [float(term["weight/adversarial"]) for term in later]
    assert weights[:9] == pytest.approx([0.1 * k * weights[9] for k in range(1, 10)], rel=1e-4)
    assert weights[10:] == pytest.approx([weights[9]] * 10, rel=1e-4)
    # the weighted pull of the rival is half of the reconstruction's
    assert later[-1]["pull/adversarial"].item() == pytest.approx(1 / 3, rel=1e-4)


def test_in_a_players_turn_the_other_one_neither_moves_nor_has_gradients() -> None:
    student = network()
    game = objective(student, adversary())
    seen: list[tuple[str, bool, bool]] = []
    inner = game.loss

    def loss(role: str, nets: Networks, pair: Pair, random: Draws, done: float) -> Terms:
        rival = nets["discriminator"]
        seen.append((role, *(any(p.requires_grad for p in module.parameters()) for module in (student, rival))))
        return inner(role, nets, pair, random, done)

    game.loss = loss  # type: ignore[method-assign]
    before = copy.deepcopy(
        {"student": student.state_dict(), "discriminator": game.modules["discriminator"].state_dict()}
    )

    class Same:
        facts = fs_facts()

        def batch(self, first: int, count: int, generator: torch.Generator) -> Pair:
            return batch(count)

    run = start(student, batch_size=64, lr=1e-3)
    run.trainer.train(0, 64, game, Same(), "test")
    assert seen == [("discriminator", False, True), ("student", True, False)]
    moved = {
        role: any(not torch.equal(value, before[role][name]) for name, value in module.state_dict().items())
        for role, module in (("student", student), ("discriminator", game.modules["discriminator"]))
    }
    assert moved == {"student": True, "discriminator": True}
    assert all(p.requires_grad for module in game.modules.values() for p in module.parameters())


def fs_facts() -> Any:
    from fewstep.flow.couplings import Facts

    return Facts(independent=False, deterministic=True)


@pytest.mark.parametrize("real", ["teacher", "data", "both"])
def test_what_counts_as_real(real: Real) -> None:
    pair = batch(2000)
    rows, cond = real_rows(real, pair, draws(2000))
    assert cond == {}
    data = (rows == pair.beside["real"]).all(1)
    assert (data | (rows == pair.x1).all(1)).all()
    assert data.double().mean().item() == pytest.approx({"teacher": 0.0, "data": 1.0, "both": 0.5}[real], abs=0.04)


def test_labels_of_real_rows_go_with_their_rows() -> None:
    pair = batch(500)
    pair.cond["label"], pair.beside["real_label"] = torch.zeros(500).long(), torch.ones(500).long()
    rows, cond = real_rows("both", pair, draws(500))
    assert torch.equal(cond["label"] == 1, (rows == pair.beside["real"]).all(1))


def test_shares_of_phases_that_are_off_go_to_the_others() -> None:
    def phases(**fields: Any) -> dict[str, int]:
        return phase_samples(InstaflowOptions(method="instaflow", teacher="t", samples=1000, **fields))

    assert phases(shares=[0.5, 0.1, 0.4], features="f") == {"regression": 500, "perceptual": 100, "adversarial": 400}
    assert phases(shares=[0.5, 0.1, 0.4]) == {"regression": 556, "adversarial": 444}
    assert phases(adversarial=0) == {"regression": 1000}
    assert phases(shares=[0, 0, 1], adversarial=0) == {"regression": 1000}
    with pytest.raises(ValueError, match="three parts"):
        phases(shares=[0, 0, 0])


class Affine(nn.Module):
    """``v(x, t) = A x + b``: its one Euler step is any affine map."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.output(x)


class Line:
    """Pairs of a linear-Gaussian teacher: ``x_T = m + S^(1/2) z``."""

    facts = fs_facts()
    mean, root = torch.tensor([1.0, -0.5]), torch.tensor([[0.7, 0.2], [0.2, 0.4]])

    def batch(self, first: int, count: int, generator: torch.Generator) -> Pair:
        z = torch.randn(count, 2, generator=generator)
        return Pair(z, self.mean + z @ self.root)


@pytest.mark.parametrize("rival", [False, True])
def test_a_linear_gaussian_teacher_is_recovered(rival: bool) -> None:
    """One endpoint per noise: the loss goes to zero, and a rival on the teacher's endpoints leaves the optimum."""
    student = Affine()
    game = objective(student, adversary(learning={"discriminator": Learning(2e-3, (0.5, 0.99))}) if rival else None)
    run = start(student, batch_size=128, lr=0.02, clip=10.0)
    run.trainer.train(0, 128 * 400, game, Line(), "test")
    weights = run.trainer.ema.state
    found = torch.eye(2) + weights["output.weight"].T
    torch.testing.assert_close(found.T @ found, Line.root @ Line.root, rtol=0.02, atol=0.004)
    torch.testing.assert_close(weights["output.bias"], Line.mean, rtol=0.02, atol=0.01)


def rows_of(x0: Tensor, x1: Tensor) -> PairRows:
    return PairRows([{"x0": x0, "x1": x1}], torch.arange(len(x0)))


def test_the_monitor_measures_and_stops_a_collapse() -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(400, 2, generator=generator)
    student = Affine()
    weights = {"output.weight": torch.zeros(2, 2), "output.bias": torch.zeros(2)}
    monitor = CoverageGuard(student, rows_of(x0, x0 + 0.1), "onestep", "Raise gamma.")
    found = monitor.look(weights, None)
    assert found["rmse"] == pytest.approx(0.1, rel=1e-5)
    assert found["recall"] > 0.95
    weights["output.bias"] = torch.tensor([0.1, 0.15])
    assert monitor.look(weights, None)["rmse"] == pytest.approx(0.05 / 2**0.5, rel=1e-4)
    weights["output.weight"] = -0.9 * torch.eye(2)  # everything near one point
    with pytest.raises(Collapse, match=r"'onestep' is collapsing: recall .* fell from .* Raise gamma"):
        monitor.look(weights, None)
    best = monitor.best()  # the last that passed
    assert best is not None
    assert best["output.bias"].tolist() == pytest.approx([0.1, 0.15])
    assert not best["output.weight"].any()
    assert CoverageGuard(student, rows_of(x0, x0), "onestep", "").best() is None
    restored = CoverageGuard(student, rows_of(x0, x0 + 0.1), "onestep", "Raise gamma.")
    restored.state["first"].copy_(monitor.state["first"])
    weights = {"output.weight": torch.zeros(2, 2), "output.bias": torch.tensor([0.1, 0.4])}
    with pytest.raises(UserError, match=r"distance to the teacher's endpoints rose from 0\.1 to 0\.2"):
        restored.look(weights, None)


def ring() -> tuple[Any, Tensor]:
    """Eight narrow modes on a circle, and their means."""
    angle = torch.arange(8) * math.pi / 4
    means = 2.0 * torch.stack([angle.cos(), angle.sin()], 1)
    return fs.closed_form.mixture(torch.full((8,), 1 / 8), means, torch.full((8,), 0.1)), means


class RingPairs:
    """Noises and their endpoints under the exact flow."""

    facts = fs_facts()

    def __init__(self) -> None:
        self.x0 = torch.randn(8000, 2, generator=generator_for("ring"))
        self.x1 = solve(ring()[0].velocity, self.x0, solver="rk4", steps=25).x

    def batch(self, first: int, count: int, generator: torch.Generator) -> Pair:
        rows = torch.randint(len(self.x0), (count,), generator=generator)
        return Pair(self.x0[rows], self.x1[rows])


@pytest.mark.slow
def test_a_rival_keeps_a_weak_student_off_the_empty_space_between_modes() -> None:
    """Against the same schedule without it: fewer samples between the modes, and none of the modes is dropped."""
    pairs, means = RingPairs(), ring()[1]
    noise = torch.randn(8000, 2, generator=generator_for("ring", "fresh"))
    off, least = {}, {}
    for rival in (False, True):
        torch.manual_seed(0)
        student = build(resolve({**TINY, "width": 12}, (2,)))
        run = start(student, batch_size=256, lr=2e-3, ema=0.99)
        run.trainer.train(0, 256 * 600, objective(student), pairs, "regression")
        learning = {role: Learning(1e-3, (0.5, 0.99)) for role in ("student", "discriminator")}
        game = objective(
            student, adversary(share=1.0, gamma=0.02, ramp=1 / 6, steps=600.0, learning=learning) if rival else None
        )
        game.learning = learning
        run.trainer.train(1, 256 * 600, game, pairs, "adversarial")
        student.load_state_dict(run.trainer.ema.state)
        with torch.no_grad():
            distance, mode = torch.cdist(noise + student(noise, torch.zeros(8000)), means).min(1)
        off[rival] = (distance > 0.3).double().mean().item()
        least[rival] = torch.bincount(mode, minlength=8).min().item() / 8000
    assert off[True] < 0.93 * off[False]
    assert least[True] > 0.5 / 8


STAGES: dict[str, Any] = {
    "teacher": {"method": "flow_matching", "samples": 20_000},
    "onestep": {
        "method": "instaflow",
        "teacher": "teacher",
        "pairs": 2000,
        "samples": 12_800,
        "discriminator_real": "both",
    },
}


def run(out: Path, **fields: Any) -> None:
    stages = {**STAGES, "onestep": {**STAGES["onestep"], **fields}}
    recipe = make_recipe(
        {"data": {"name": "moons", "rows": 1500}, "network": TINY, "seed": 2, "stages": stages}, "test"
    )
    run_recipe(recipe, out, WORLD)


def test_a_game_cut_in_the_middle_ends_as_the_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.training import trainer as training

    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", (0.0, 0.0))
    run(tmp_path / "whole")
    step, left = training.Trainer._step, [40]

    def cut(self: Any, *args: Any) -> None:
        if self.position.phase == 1:
            left[0] -= 1
            if left[0] == 20:
                raise KeyboardInterrupt
        step(self, *args)

    monkeypatch.setattr(training.Trainer, "_step", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    run(tmp_path / "cut")
    assert (tmp_path / "cut/stats.jsonl").read_bytes() == (tmp_path / "whole/stats.jsonl").read_bytes()
    for name in (
        "onestep/model.safetensors",
        *(f"onestep/checkpoints/{p.name}" for p in sorted((tmp_path / "whole/onestep/checkpoints").iterdir())),
    ):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    checks = [
        json.loads(line) for line in (tmp_path / "whole/stats.jsonl").read_text().splitlines() if '"check"' in line
    ]
    assert len(checks) == 20
    assert {"rmse", "recall", "precision"} <= set(checks[0]["check"])
    assert "gap" in checks[-1]["check"]


def test_a_discriminator_without_a_leash_is_stopped_with_advice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage 'onestep' is collapsing: .*Raise gamma \(now 0\)"):
        run(
            tmp_path, adversarial=60.0, gamma=0.0, adversarial_lr=0.05, discriminator_lr=0.05, shares=[0.3, 0, 0.7],
            samples=40_000, gan="hinge", discriminator_real="data",
        )  # fmt: skip
    assert list((tmp_path / "onestep/checkpoints").iterdir())
    assert not (tmp_path / "onestep/config.json").exists()
    assert fs.load(tmp_path / "onestep/best").draw(10).nfe == 1


def test_the_student_is_a_map_of_one_step_and_its_card_says_what_it_is(tmp_path: Path) -> None:
    run(tmp_path)
    model = fs.load(tmp_path / "onestep")
    assert (model.config.rule.kind, model.config.rule.steps, model.config.method) == ("map", (1,), "instaflow")
    assert model.draw(10).nfe == 1
    kept = read_tensors(tmp_path / "onestep/model.safetensors")
    assert not any("discriminator" in name for name in kept)


def test_guidance_is_baked_in_once_and_only_its_endpoints_count_as_real(
    labelled_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = yaml.safe_load((labelled_run.parent / "labelled.yaml").read_text(encoding="utf-8"))
    stage = {
        "method": "instaflow",
        "teacher": str(labelled_run / "teacher"),
        "guidance": 2,
        "discriminator_real": "data",
    }
    fields["stages"] = {"onestep": {**stage, "samples": 4000, "pairs": 300, "nfe": 8, "tolerance": 2}}
    capsys.readouterr()
    run_recipe(make_recipe(fields, "test"), tmp_path, LocalWorld())
    assert "only they count as real" in capsys.readouterr().out
    model = fs.load(tmp_path / "onestep")
    assert model.config.guidance == 2
    guided = fs.load(labelled_run / "teacher").sample(200, label=9, steps=16, solver="heun", guidance=2.0)
    plain = fs.load(labelled_run / "teacher").sample(200, label=9, steps=16, solver="heun")
    middle = model.sample(200, label=9)[:, 0].median()
    assert abs(middle - guided[:, 0].median()) < 0.5 * abs(plain[:, 0].median() - guided[:, 0].median())
    with pytest.raises(UserError, match="guiding it again"):
        model.sample(4, guidance=2.0)


def test_a_discriminator_looks_through_frozen_features(tmp_path: Path) -> None:
    """Its score moves with the features, whose weights are neither trained nor kept with it."""
    torch.manual_seed(0)
    frozen = nn.Conv2d(1, 5, 3).requires_grad_(False)
    judge = Discriminator((1, 8, 8), features=lambda x: [frozen(x)])
    x = torch.randn(3, 1, 8, 8, requires_grad=True)
    before = judge(x)
    assert not any("features" in name for name in judge.state_dict())
    before.sum().backward()
    assert frozen.weight.grad is None
    with torch.no_grad():
        frozen.weight.mul_(2.0)
    assert not torch.allclose(judge(x), before)
    with pytest.raises(ValueError, match="no features are named"):
        InstaflowOptions(method="instaflow", teacher="t", sees="features")
