"""Adversarial losses, their penalties, and the weights of terms, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.methods.families.adversarial import LOSSES, find_adversarial, slope
from fewstep.methods.families.gradient_balance import (
    combine_terms,
    last_layer,
    ratio_state,
    running_ratio,
    term_gradients,
)
from fewstep.networks import build, resolve
from fewstep.networks.discriminator import Discriminator
from fewstep.training.world import LocalWorld

WORLD = LocalWorld(quiet=True)


@pytest.mark.parametrize(
    ("name", "value"), [("non_saturating", 2 * math.log(2)), ("hinge", 2.0), ("relativistic", math.log(2))]
)
def test_equal_laws_cannot_be_told_apart(name: str, value: float) -> None:
    """With equal samples on both sides the best scores are constant, and the loss has its known value there."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope_, shift = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    weights = [slope_.requires_grad_(), shift.requires_grad_()]
    optimiser = torch.optim.LBFGS(weights, max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        scores = weights[0] * x.square() + weights[1]
        return LOSSES[name].discriminator(scores, scores)

    with torch.no_grad():
        weights[0].fill_(0.7)
        weights[1].fill_(-0.4)
    before = loss().item()

    def closure() -> Tensor:
        optimiser.zero_grad()
        value_ = loss()
        if value_.requires_grad:
            value_.backward()
        return value_

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    assert before >= value - 1e-12
    assert loss().item() == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_each_player_pushes_its_own_way(name: str) -> None:
    real, fake = torch.tensor([0.3, -0.2]).requires_grad_(), torch.tensor([0.1, 0.4]).requires_grad_()
    loss = find_adversarial(name)
    up, down = torch.autograd.grad(loss.discriminator(real, fake), [real, fake])
    assert (up < 0).all()
    assert (down > 0).all()
    (deceive,) = torch.autograd.grad(loss.generator(real.detach(), fake), fake)
    assert (deceive < 0).all()


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(UserError, match=r"'relativstic'.*relativistic"):
        find_adversarial("relativstic")


def test_the_penalty_of_a_linear_discriminator_is_its_squared_weight() -> None:
    weight = torch.tensor([0.5, -2.0, 1.5], dtype=torch.float64)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert slope(x @ weight, x).item() == pytest.approx(weight.square().sum().item(), rel=1e-12)


def test_the_penalty_of_a_quadratic_discriminator_and_its_gradient() -> None:
    """``D = a |x|^2``: ``E|2 a x|^2``, and its derivative in ``a`` is twice that over ``a``."""
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    found = slope(a * x.square().sum(1), x)
    truth = 4 * 0.3**2 * x.square().sum(1).mean()
    assert found.item() == pytest.approx(truth.item(), rel=1e-12)
    (by_a,) = torch.autograd.grad(found, a)
    assert by_a.item() == pytest.approx(2 * truth.item() / 0.3, rel=1e-12)


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 20, 20), (1, 28, 28)])
def test_a_discriminator_scores_every_sample_on_its_own(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    judge = Discriminator(shape, classes=3, conditions={"text": (7, 4), "obs": (3,), "angle": ()}).double()
    nn.init.normal_(judge.table.weight)  # type: ignore[union-attr]
    for layer in judge.others.values():
        nn.init.normal_(layer.weight)  # type: ignore[arg-type]
    x, label = torch.randn(5, *shape, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    cond = {"label": label, "text": torch.randn(5, 7, 4), "obs": torch.randn(5, 3), "angle": torch.randn(5)}
    together = judge(x, cond)
    alone = torch.cat([judge(x[k : k + 1], {name: rows[k : k + 1] for name, rows in cond.items()}) for k in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    for name, rows in cond.items():
        assert not torch.allclose(together, judge(x, {**cond, name: rows.roll(1, 0)})), name


class Quadratics(nn.Module):
    """``G(z) = W z``, one weight matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(3, 2, bias=False, dtype=torch.float64)


def test_pulls_and_the_joint_gradient_are_those_of_the_plain_sum() -> None:
    torch.manual_seed(1)
    module = Quadratics()
    weight = module.output.weight
    assert [id(p) for p in last_layer(module)] == [id(weight)]
    z, a, b = (torch.randn(6, n, dtype=torch.float64) for n in (3, 2, 2))
    terms = {"near a": (module.output(z) - a).square().mean(), "near b": 5 * (module.output(z) - b).square().mean()}
    gradients = {name: torch.autograd.grad(term, weight, retain_graph=True)[0] for name, term in terms.items()}

    output = module.output(z)
    terms = {"near a": (output - a).square().mean(), "near b": 5 * (output - b).square().mean()}
    found = term_gradients(output, [weight], terms, WORLD)
    for name, gradient in gradients.items():
        assert found.norms[name] == pytest.approx(gradient.norm().item(), rel=1e-12)
    assert found.rest == pytest.approx(gradients["near a"].norm().item(), rel=1e-12)
    loss = combine_terms(output, found, {"near b": 0.25})
    assert loss["loss"].item() == pytest.approx((terms["near a"] + 0.25 * terms["near b"]).item(), rel=1e-12)
    loss["loss"].backward()
    torch.testing.assert_close(weight.grad, gradients["near a"] + 0.25 * gradients["near b"])
    shares = [loss[f"pull/{name}"].item() for name in terms]
    truth = [gradients["near a"].norm().item(), 0.25 * gradients["near b"].norm().item()]
    assert shares == pytest.approx([part / sum(truth) for part in truth], rel=1e-12)


def test_the_running_ratio_is_that_of_means_and_then_of_moving_ones() -> None:
    state = ratio_state()

    def update(rest: float, own: float) -> float:
        kept = {name: value.clone() for name, value in state.items()}
        ratio, following = running_ratio(state, rest, own)
        assert all(torch.equal(state[name], value) for name, value in kept.items())  # it mutates nothing
        state.update(following)
        return ratio

    steps = [(2.0, 1.0), (4.0, 1.0), (0.0, 4.0)]
    assert [update(*norms) for norms in steps] == pytest.approx([2.0, 3.0, 1.0])
    before = update(1.0, 1.0)
    assert update(math.nan, 1.0) == before
    assert update(1.0, math.inf) == before
    assert running_ratio(ratio_state(), 1.0, 0.0)[0] == 20.0  # bounded
    for _ in range(400):
        last = update(3.0, 2.0)
    assert last == pytest.approx(1.5, abs=1e-4)


def test_the_last_layer_of_our_networks_is_their_output() -> None:
    for name, shape in (("mlp", (2,)), ("unet", (1, 16, 16))):
        module = build(resolve({"name": name}, shape))
        assert [id(p) for p in last_layer(module)] == [id(module.output.weight), id(module.output.bias)]
    other = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    assert [id(p) for p in last_layer(other)] == [id(p) for p in other[2].parameters()]
