"""Piecewise rectified flow against closed forms: exact windows, their knots, stationarity, refusals, a trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.errors import UserError
from fewstep.flow.couplings import Pair
from fewstep.flow.noise import Draws, generator_for
from fewstep.flow.paths import Linear
from fewstep.generator import load
from fewstep.methods.piecewise import PiecewiseRegression, Windows, window_start
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.training.world import LocalWorld
from objective_cases import loss_of

MEAN, STD = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([0.3, 2.0], dtype=torch.float64)
GAUSSIAN = fs.closed_form.gaussian(MEAN, STD)


def exact_field(segments: int) -> Any:
    """The velocity whose Euler steps are the exact windows: constant along each window's line.

    The flow of a Gaussian target takes x = tau m + sqrt(q) z to tau' m + sqrt(q') z, so on the line between them
    z is known from x_t, and the velocity is K times the difference.
    """

    def spread(t: Tensor) -> Tensor:
        return ((1 - t).square() + (t * STD).square()).sqrt()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        start = window_start(t, segments)[:, None]
        end, share = start + 1 / segments, (t[:, None] - start) * segments
        z = (x - t[:, None] * MEAN) / ((1 - share) * spread(start) + share * spread(end))
        return MEAN + segments * (spread(end) - spread(start)) * z

    return velocity


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_aligned_euler_steps_on_exact_windows_give_the_target_exactly(segments: int) -> None:
    x0 = torch.randn(500, 2, generator=generator_for("piecewise"), dtype=torch.float64)
    for multiple in (1, 2, 3):
        x = fs.solve(exact_field(segments), x0, solver="euler", steps=multiple * segments).x
        torch.testing.assert_close(x, MEAN + STD * x0, rtol=1e-12, atol=1e-12)
    if segments > 1:  # steps across a knot do not
        x = fs.solve(exact_field(segments), x0, solver="euler", steps=segments + 1).x
        assert (x - MEAN - STD * x0).abs().max() > 0.01


def test_a_window_is_the_teachers_flow_between_its_knots() -> None:
    generator = generator_for("windows")
    t = torch.rand(400, generator=generator, dtype=torch.float64)
    x = torch.randn(400, 2, generator=generator, dtype=torch.float64)
    start = window_start(t, 4)
    end = Windows(GAUSSIAN.velocity, 4, "rk4", 8).end(x, start, {})
    torch.testing.assert_close(end, GAUSSIAN.flow_map(x, start, start + 0.25), rtol=1e-5, atol=1e-5)


def test_a_knot_belongs_to_the_window_that_starts_there() -> None:
    for segments in (1, 3, 4, 7):
        knots = torch.arange(segments) / segments
        assert torch.equal(window_start(knots, segments), knots)
        inner = knots[1:]
        assert torch.equal(window_start(inner - 1e-6, segments), knots[:-1])
        assert torch.equal(window_start(inner + 1e-6, segments), inner)
        assert window_start(torch.ones(1), segments).item() == pytest.approx((segments - 1) / segments)


def test_one_window_is_reflow() -> None:
    """K = 1: the target is the whole flow's displacement, from pure noise."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append((x, t))
            return torch.zeros_like(x)

    generator = generator_for("one")
    x0 = torch.randn(300, 2, generator=generator, dtype=torch.float64)
    batch = Pair(x0, GAUSSIAN.sample(300, generator, dtype=torch.float64))
    objective = PiecewiseRegression(Spy(), Windows(GAUSSIAN.velocity, 1, "rk4", 32), Linear())
    loss = loss_of(objective, "student", batch, Draws(generator, 300))["loss"].item()
    end = MEAN + STD * x0
    assert loss == pytest.approx((end - x0).square().mean().item(), rel=1e-4)
    x_t, t = seen[0]
    torch.testing.assert_close(x_t, (1 - t)[:, None] * x0 + t[:, None] * end, rtol=1e-4, atol=1e-4)


class Fixed(nn.Module):
    """A velocity as a module."""

    def __init__(self, velocity: Any) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.velocity(x, t)
        return out


def test_the_exact_piecewise_field_has_no_loss_and_the_teachers_own_field_has() -> None:
    """The pairs are deterministic within a window: the loss is zero, not only stationary, at the exact field."""

    def loss(velocity: Any) -> float:
        generator = generator_for("piecewise", "loss")
        x1 = GAUSSIAN.sample(4000, generator, dtype=torch.float64)
        batch = Pair(torch.randn(4000, 2, generator=generator, dtype=torch.float64), x1)
        student = Fixed(velocity)
        objective = PiecewiseRegression(student, Windows(GAUSSIAN.velocity, 4, "rk4", 16), Linear())
        return loss_of(objective, "student", batch, Draws(generator, 4000))["loss"].item()

    assert loss(exact_field(4)) < 1e-9
    assert loss(GAUSSIAN.velocity) > 0.01


DATA = {"name": "eight_gaussians", "rows": 4000}
NETWORK = {"name": "mlp", "width": 64, "blocks": 2, "embedding": 16}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("piecewise")
    stages = {
        "teacher": {"method": "flow_matching", "samples": 150_000},
        "four": {"method": "piecewise", "teacher": "teacher", "samples": 100_000, "nfe": 4, "inner": 2},
    }
    run_recipe(make_recipe({"data": DATA, "network": NETWORK, "stages": stages}, "x"), out, LocalWorld(quiet=True))
    return out


def test_four_windows_end_nearer_to_the_teachers_endpoints_than_its_own_four_steps(trained: Path) -> None:
    teacher, four = load(trained / "teacher"), load(trained / "four")
    truth = teacher.draw(3000, solver="rk4", steps=32).x

    def error(x: Tensor) -> float:
        return float((x - truth).flatten(1).norm(dim=1).median())

    assert error(four.draw(3000, steps=4).x) < 0.6 * error(teacher.draw(3000, steps=4).x)
    assert four.draw(10).nfe == 4
    assert four.draw(10, steps=8).nfe == 8


def test_steps_that_miss_a_knot_are_refused(trained: Path) -> None:
    for steps in (1, 3, 6, 16):
        with pytest.raises(UserError, match=rf"made for 4, 8 step\(s\), not {steps}"):
            load(trained / "four").sample(4, steps=steps)
    with pytest.raises(UserError, match="a map with its own sampler"):
        load(trained / "four").sample(4, grid="0,0.3,0.6,0.8,1")


def test_a_teacher_with_other_marginals_is_refused(trained: Path, tmp_path: Path) -> None:
    stages = {
        "straight": {
            "method": "reflow",
            "teacher": str(trained / "teacher"),
            "samples": 256,
            "pairs": 256,
            "tolerance": 1,
        },
        "four": {"method": "piecewise", "teacher": "straight", "samples": 256},
    }
    recipe = make_recipe({"data": DATA, "network": NETWORK, "stages": stages}, "x")
    with pytest.raises(UserError, match="'straight' does not pass through those: it was trained on dependent pairs"):
        run_recipe(recipe, tmp_path, LocalWorld(quiet=True))


def test_times_are_drawn_where_samples_are_made() -> None:
    seen: list[Tensor] = []
    student = Fixed(lambda x, t: seen.append(t) or torch.zeros_like(x))
    x = torch.randn(4000, 2, generator=generator_for("times"))
    for inner in (1, 2, 0):
        windows = Windows(lambda x, t: torch.zeros_like(x), 4, "euler", 1)
        loss_of(
            PiecewiseRegression(student, windows, Linear(), inner),
            "student",
            Pair(x, x),
            Draws(generator_for("times", 1), 4000),
        )
    assert seen[0].unique().tolist() == [0.0, 0.25, 0.5, 0.75]
    assert seen[1].unique().tolist() == [k / 8 for k in range(8)]
    assert len(seen[2].unique()) > 3900


def test_calls_that_are_no_whole_steps_are_refused() -> None:
    stage = {"method": "piecewise", "teacher": "t", "nfe": 6}
    with pytest.raises(UserError, match="nfe = 6 is no multiple of the 4 calls"):
        make_recipe({"data": DATA, "stages": {"t": {"method": "flow_matching"}, "four": stage}}, "x")
