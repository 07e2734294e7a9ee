"""The straight-line family against closed forms: stationarity, exact pairs, and what mixed ReFlow converges to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.errors import UserError
from fewstep.flow.couplings import GaussianSource, Independent, Pair, block_average
from fewstep.flow.noise import Draws, generator_for
from fewstep.flow.paths import make_path
from fewstep.flow.time_laws import make_time_law
from fewstep.generator import load
from fewstep.methods.families.distances import l1, l2, pseudo_huber
from fewstep.methods.families.straight_line import EndpointRegression, VelocityRegression, drop_conditions
from fewstep.methods.reflow import ReflowOptions, share_law
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.training.world import LocalWorld
from objective_cases import loss_of


class Perturbed(nn.Module):
    """``v + epsilon psi`` around an exact velocity, with ``epsilon`` the only parameter."""

    def __init__(self, velocity: Any, psi: Any) -> None:
        super().__init__()
        self.velocity, self.psi = velocity, psi
        self.epsilon = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.velocity(x, t) + self.epsilon * self.psi(x, t)


TARGETS = {
    "gaussian": lambda path: fs.closed_form.gaussian(torch.tensor([0.5, -1.0]), torch.tensor([0.3, 2.0]), path),
    "mixture": lambda path: fs.closed_form.mixture(
        torch.tensor([0.3, 0.7]), torch.tensor([[1.0, 0.0], [-1.0, 2.0]]), torch.tensor([0.2, 0.5]), path
    ),
}
DIRECTIONS = {
    "one": lambda x, t: torch.ones_like(x),
    "x": lambda x, t: x,
    "x squared": lambda x, t: x**2,
    "wave": lambda x, t: torch.sin(3 * x + 5 * t[:, None]),
}


def gradient_score(target: Any, path: str, psi: Any, sign: float = 1.0) -> float:
    """z-score of the loss's derivative in the direction ``psi`` at the (possibly wrong) velocity."""
    student = Perturbed(lambda x, t: sign * target.velocity(x, t), psi)
    objective = VelocityRegression(student, make_path(path), make_time_law("uniform"))
    gradients = []
    for block in range(40):
        generator = generator_for("stationary", block)
        x1 = target.sample(2000, generator, dtype=torch.float64)
        batch = Independent(GaussianSource((2,))).pair(x1, {}, generator)
        loss = loss_of(objective, "student", batch, Draws(generator, 2000))["loss"]
        gradients.append(torch.autograd.grad(loss, student.epsilon)[0].item())
    return float(np.mean(gradients) / (np.std(gradients, ddof=1) / math.sqrt(len(gradients))))


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_exact_velocity_is_a_stationary_point_of_the_loss(target: str, path: str) -> None:
    exact = TARGETS[target](make_path(path))
    scores = {name: gradient_score(exact, path, psi) for name, psi in DIRECTIONS.items()}
    assert max(map(abs, scores.values())) < 4, scores


def test_a_velocity_of_the_wrong_sign_is_not_stationary() -> None:
    exact = TARGETS["gaussian"](make_path("linear"))
    assert abs(gradient_score(exact, "linear", DIRECTIONS["x"], sign=-1.0)) > 20


def test_loss_at_the_exact_velocity_is_the_closed_form_floor() -> None:
    target = fs.closed_form.gaussian(torch.zeros(3), torch.tensor([0.5, 1.0, 2.0]))
    objective = VelocityRegression(
        Perturbed(target.velocity, DIRECTIONS["one"]), make_path("linear"), make_time_law("uniform")
    )
    generator = generator_for("floor")
    x1 = target.sample(200_000, generator, dtype=torch.float64)
    batch = Independent(GaussianSource((3,))).pair(x1, {}, generator)
    loss = loss_of(objective, "student", batch, Draws(generator, 200_000))["loss"].item()
    # (pi / 2) sum of s over dimensions; the loss is a mean over the three dimensions
    assert loss == pytest.approx(math.pi / 2 * 3.5 / 3, rel=0.01)


def test_exact_pairs_of_a_line_give_no_loss_and_no_straightness() -> None:
    pairs = fs.closed_form.coupled_gaussian(1.5, 0.4, 1.0)
    x0, x1 = pairs.sample_pairs(512, generator_for("pairs"))
    velocity = Perturbed(pairs.velocity, DIRECTIONS["one"])
    objective = VelocityRegression(velocity, make_path("linear"), make_time_law("uniform"))
    batch = Pair(x0.double().reshape(-1, 1), x1.double().reshape(-1, 1))
    assert loss_of(objective, "student", batch, Draws(generator_for(0), 512))["loss"].item() < 1e-12
    endpoint = EndpointRegression(velocity)
    assert loss_of(endpoint, "student", batch, Draws(generator_for(0), 512))["loss"].item() < 1e-12
    d = fs.diagnose(pairs.velocity, batch.x0)
    assert d.straightness < 1e-12
    assert d.one_step_gap < 1e-6


def test_distances_have_their_closed_forms() -> None:
    x, y = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    c = 0.03 * math.sqrt(2)
    assert l2(x, y).item() == pytest.approx(12.5)
    assert l1(x, y).item() == pytest.approx(3.5)
    assert pseudo_huber(x, y).item() == pytest.approx((math.sqrt(25 + c * c) - c) / 2)


def test_conditions_with_a_null_are_dropped_together_at_the_stated_rate() -> None:
    label = torch.arange(10).repeat(2000)
    cond = {"label": label, "text": torch.ones(20000, 2, 3), "context": torch.ones(20000)}
    nulls = {"label": 10, "text": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), "absent": 0}
    kept, dropped = drop_conditions(cond, nulls, share=0.1, draws=Draws(generator_for("drop"), 20000))
    assert dropped is not None
    assert torch.equal(kept["label"] == 10, dropped)
    assert torch.equal(kept["text"][dropped], nulls["text"].expand(int(dropped.sum()), 2, 3))  # type: ignore[attr-defined]
    assert bool((kept["text"][~dropped] == 1).all())
    assert drop_conditions(cond, {}, 0.1, Draws(generator_for("drop"), 20000))[1] is None
    assert dropped.double().mean().item() == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 20000))
    assert torch.equal(kept["label"][~dropped], label[~dropped])
    assert kept["context"] is cond["context"]


def test_mix_rises_over_rounds_and_one_round_uses_the_last() -> None:
    options = {"method": "reflow", "teacher": "t"}
    assert ReflowOptions(**options, rounds=3, mix=(0.4, 0.9)).shares() == pytest.approx([0.4, 0.65, 0.9])
    assert ReflowOptions(**options, rounds=1, mix=(0.4, 0.9)).shares() == [0.9]
    assert ReflowOptions(**options, rounds=2, mix=1.0).shares() == [1.0, 1.0]
    law = share_law(0.9, 1000, anneal=True)
    assert [law(0), law(600)] == [0.9, 0.9]
    assert law(700) == pytest.approx(0.95)
    assert [law(800), law(999)] == [1.0, 1.0]


@pytest.fixture(scope="module")
def gaussian_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 1-D Gaussian of mean 3 and standard deviation 2, its teacher, and ReFlow with either kind of real pair."""
    out = tmp_path_factory.mktemp("gaussian")
    x = 3.0 + 2.0 * torch.randn(20_000, 1, generator=generator_for("gaussian data"))
    np.save(out / "x.npy", x.numpy())
    reflow = {"method": "reflow", "teacher": "teacher", "rounds": 2, "mix": [0.4, 0.8], "samples": 400_000}
    recipe = make_recipe(
        {
            "data": str(out / "x.npy"),
            "network": {"name": "mlp", "preset": "tiny"},
            "stages": {
                "teacher": {"method": "flow_matching", "samples": 300_000},
                "independent": {**reflow, "real": "independent"},
                "inverted": {**reflow, "real": "inverted"},
            },
        },
        "test",
    )
    run_recipe(recipe, out / "run", LocalWorld(quiet=True))
    return out / "run"


@pytest.mark.parametrize(("stage", "share"), [("independent", 0.8), ("inverted", 1.0)])
def test_mixed_reflow_has_the_predicted_one_step_spread(gaussian_run: Path, stage: str, share: float) -> None:
    x = load(gaussian_run / stage).sample(20_000, steps=1, seed=5)
    # one Euler step returns (1 - p) E[x1] + p T(x0) when the real half is independent
    assert x.std().item() == pytest.approx(2.0 * share, rel=0.05)
    assert x.mean().item() == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("stage", ["independent", "inverted"])
def test_reflow_keeps_the_many_step_law(gaussian_run: Path, stage: str) -> None:
    x = load(gaussian_run / stage).sample(20_000, steps=100, seed=5)
    assert x.std().item() == pytest.approx(2.0, rel=0.03)


def test_guidance_is_not_baked_in_twice() -> None:
    from fewstep.methods.contract.teacher import Teacher

    teacher = Teacher(velocity=lambda x, t: x, digest="d", guidance=2.0, name="straight")
    with pytest.raises(UserError, match=r"already has guidance 2.0 baked in.*Leave guidance out"):
        teacher.guided(1.5)
    assert teacher.guided(1.0) is teacher.velocity


@pytest.fixture(scope="module")
def restoring_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gaussian with correlated coordinates, in-painted and sharpened."""
    out = tmp_path_factory.mktemp("restore")
    z = torch.randn(8000, 2, generator=generator_for("restore"))
    np.save(out / "x.npy", torch.stack([z[:, 0], 0.8 * z[:, 0] + 0.6 * z[:, 1]], 1).numpy())
    common = {"method": "flow_matching", "samples": 250_000, "network": {"name": "mlp", "preset": "tiny"}}
    recipe = make_recipe({"data": str(out / "x.npy"), "stages": {"fill": {**common, "coupling": "inpainting"}}}, "test")
    run_recipe(recipe, out / "run", LocalWorld(quiet=True))
    return out / "run"


def test_inpainting_draws_the_unknown_given_the_known(restoring_run: Path) -> None:
    model = load(restoring_run / "fill")
    noise = torch.randn(4000, 2, generator=generator_for("fill"))
    known = torch.tensor([1.0, 0.0])  # the first coordinate is known to be 1
    mask = torch.tensor([1.0, 0.0]).expand(4000, 2)
    context = torch.cat([mask, mask * known], 1)
    x = model.draw(noise=mask * known + (1 - mask) * noise, context=context, steps=50).x
    # standardised data with correlation .8: x2 | x1 = 1 is N(.8, .36)
    assert x[:, 0].mean().item() == pytest.approx(1.0, abs=0.05)
    assert x[:, 0].std().item() < 0.1
    assert x[:, 1].mean().item() == pytest.approx(0.8, abs=0.08)
    assert x[:, 1].std().item() == pytest.approx(0.6, rel=0.12)


def test_a_model_that_starts_from_data_samples_its_examples_and_is_no_teacher(restoring_run: Path) -> None:
    model = load(restoring_run / "fill")
    x, other = (model.sample(2000, steps=4, seed=seed) for seed in (0, 1))
    assert len(x.unique(dim=0)) == 2000  # of 800 kept examples, with fresh noise where one is used again
    assert not bool((x[:, None] == other[None]).all(2).any())
    with pytest.raises(UserError, match="takes a context"):
        model.sample(noise=torch.zeros(3, 2))
    stages = {"straight": {"method": "reflow", "teacher": str(restoring_run / "fill")}}
    recipe = make_recipe({"data": str(restoring_run.parent / "x.npy"), "stages": stages}, "test")
    with pytest.raises(UserError, match="starts from damaged data"):
        run_recipe(recipe, restoring_run.parent / "other", LocalWorld(quiet=True))


SIDE = 4  # of the Gaussian images, whose pixels are mixed from three factors


def observed(coupling: str, context: Tensor) -> tuple[Tensor, Tensor]:
    """(H, y): what the context says of the pixels x of an image, y = H x; (B, D, D) and (B, D) float64."""
    if coupling == "inpainting":
        mask, known = context.double().flatten(2).unbind(1)
        return torch.diag_embed(mask), known
    means = block_average(torch.eye(SIDE * SIDE).reshape(-1, 1, SIDE, SIDE), 2).flatten(1).T.double()
    return means.expand(len(context), -1, -1), context.double().flatten(1)


@pytest.mark.parametrize("coupling", ["inpainting", "super_resolution"])
def test_one_step_of_a_restoring_model_is_the_conditional_mean_of_gaussian_images(
    tmp_path: Path, coupling: str
) -> None:
    factors = torch.randn(SIDE * SIDE, 3, generator=generator_for("factors"))
    z, noise = (torch.randn(4000, n, generator=generator_for("images", n)) for n in (3, SIDE * SIDE))
    np.save(tmp_path / "x.npy", (z @ factors.T + 0.2 * noise).reshape(-1, 1, SIDE, SIDE).numpy())
    options = {"samples": 20_000, "batch_size": 64, "lr": 5e-3, "ema": 0.98}
    stages = {"restore": {"method": "flow_matching", "coupling": coupling, **options}}
    recipe = make_recipe({"data": str(tmp_path / "x.npy"), "stages": stages}, "test")
    run_recipe(recipe, tmp_path / "run", LocalWorld(quiet=True))
    model = load(tmp_path / "run" / "restore")
    scaling = model.config.scaling
    assert scaling is not None
    draw = model.draw(500, steps=1, seed=1)
    assert draw.context is not None
    # x ~ N(m, S) given y = H x has the mean m + S H' (H S H')^-1 (y - H m); at t = 0 it is where one step leads,
    # because the noise of the start says nothing more of x
    s = ((factors @ factors.T + 0.04 * torch.eye(SIDE * SIDE)) / scaling["scale"] ** 2).double()
    m = torch.full((SIDE * SIDE, 1), -scaling["shift"] / scaling["scale"], dtype=torch.float64)
    h, y = observed(coupling, draw.context)
    gain = s @ h.mT @ torch.linalg.pinv(h @ s @ h.mT, rtol=1e-9, hermitian=True)
    mean = (m + gain @ (y[:, :, None] - h @ m))[:, :, 0]
    of_model, of_start = ((x.flatten(1) - mean).square().mean() for x in (draw.x, draw.x0))
    # measured: .013 (in-painting) and .015 (super-resolution) of the error of the start; 1.000 with lr 1e-12
    assert of_model < 0.05 * of_start


def test_guidance_is_refused_where_nothing_was_learned_without_labels(tmp_path: Path) -> None:
    stages = {"teacher": {"method": "flow_matching", "samples": 512, "label_dropout": 0.0}}
    recipe = make_recipe({"data": "digits", "conditional": True, "stages": stages}, "test")
    run_recipe(recipe, tmp_path / "run", LocalWorld(quiet=True))
    with pytest.raises(UserError, match="never learned without conditions"):
        load(tmp_path / "run" / "teacher").sample(3, guidance=2.0)


def test_a_model_keeps_its_path_and_data_form_solvers_use_it(tmp_path: Path) -> None:
    stages = {"teacher": {"method": "flow_matching", "samples": 512, "path": "cosine"}}
    run_recipe(make_recipe({"data": "moons", "stages": stages}, "test"), tmp_path / "run", LocalWorld(quiet=True))
    model = load(tmp_path / "run" / "teacher")
    noise = torch.randn(50, 2, generator=generator_for("path"))
    x = model.draw(noise=noise, solver="dpm++2m", steps=4).x
    cosine = fs.solve(model.module, noise, solver="dpm++2m", steps=4, path="cosine").x
    linear = fs.solve(model.module, noise, solver="dpm++2m", steps=4).x
    assert torch.allclose(x, cosine, atol=1e-6)
    assert (x - linear).abs().max() > 1e-3


def test_a_teacher_from_outside_must_speak_of_the_same_units(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", 5.0 + torch.randn(300, 2, generator=generator_for("units")).numpy())
    data = str(tmp_path / "x.npy")
    stages = {"teacher": {"method": "flow_matching", "samples": 512}}
    run_recipe(make_recipe({"data": data, "stages": stages}, "test"), tmp_path / "run", LocalWorld(quiet=True))
    learning = {"straight": {"method": "reflow", "teacher": str(tmp_path / "run" / "teacher")}}
    other = make_recipe({"data": {"path": data, "scale": "range"}, "stages": learning}, "test")
    with pytest.raises(UserError, match="scaled otherwise"):
        run_recipe(other, tmp_path / "other", LocalWorld(quiet=True))
