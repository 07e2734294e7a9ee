"""One-step distillation with up to three terms: the teacher's endpoint, its features, and a discriminator.

    L(theta) = r d(G(z), x_T) + lambda_p d_features(G(z), x_T) + lambda_adv L_adv(D(G(z))),    G(z) = z + v_theta(z, 0)

with ``x_T`` the teacher's endpoint of the noise z. In every step the discriminator D is updated first, on samples of
the student's present weights, and then the student. The penalties R1 and R2 bound the gradient of D
(arXiv:1801.04406, eq. 9; 2501.05441, eq. 5); without them its scores grow without bound. ``lambda_adv`` is set from the
gradients of the terms (:mod:`fewstep.methods.families.gradient_balance`). It rises from zero over the first part of
the phase, because the scores of an untrained discriminator carry no information.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from fewstep.flow.couplings import Pair
from fewstep.flow.noise import Draws
from fewstep.methods.contract.objective import Learning, Networks, Objective, Terms
from fewstep.methods.contract.stage import World
from fewstep.methods.families.adversarial import AdversarialLoss, slope
from fewstep.methods.families.distances import Distance
from fewstep.methods.families.flow_map import where_rows
from fewstep.methods.families.gradient_balance import (
    combine_terms,
    last_layer,
    ratio_state,
    running_ratio,
    term_gradients,
)
from fewstep.methods.families.straight_line import one_step
from fewstep.methods.guards.coverage import CoverageGuard

Real = Literal["teacher", "data", "both"]


@final
@dataclass(frozen=True)
class Adversary:
    """The adversarial term.

    Attributes:
        discriminator: scores (B,) of samples (B, ...), called ``D(x, cond)``.
        loss: the losses of discriminator and generator.
        share: the norm of the term's gradient, as a share of that of the other terms together.
        gamma: the penalties R1 + R2 have the weight ``gamma / 2``.
        every: the penalties are computed in one of so many steps, and then multiplied by that number.
        turns: updates of the discriminator per update of the student.
        real: the real samples: the teacher's endpoints, data rows, or each row one of the two with probability 1/2.
        ramp: share of the phase over which ``share`` rises linearly from zero.
        steps: optimiser steps of the phase.
        learning: optimisation of student and discriminator.
    """

    discriminator: nn.Module
    loss: AdversarialLoss
    share: float
    gamma: float
    every: int
    turns: int
    real: Real
    ramp: float
    steps: float
    learning: dict[str, Learning]

    def share_at(self, done: float) -> float:
        """The adversarial term's share after the part ``done`` of the phase, both in [0, 1] or above."""
        return self.share * (min(1.0, done / self.ramp) if self.ramp > 0 else 1.0)

    def penalised(self, done: float) -> bool:
        """Whether the discriminator's loss has the penalty in the step that begins after the part ``done``."""
        return self.gamma > 0 and round(done * self.steps) % self.every == 0


@final
class AdversarialDistillation(Objective):
    """The loss of the module's docstring; a term whose argument is None is left out.

    Args:
        student: ``v(x, t, **cond)``, called at t = 0.
        reconstruction: ``r d(x, y)``, a scalar distance of endpoints that contains its weight r.
        perceptual: ``lambda_p d_features(x, y)`` per sample, (B,), which contains its weight.
        adversary: the adversarial term.
        guard: measures how much of the teacher's endpoints the student covers.
        world: the processes that train together.
    """

    def __init__(
        self,
        student: nn.Module,
        reconstruction: Distance | None,
        perceptual: Distance | None,
        adversary: Adversary | None,
        guard: CoverageGuard | None,
        world: World,
    ) -> None:
        self.modules = {"student": student}
        self.reconstruction, self.perceptual, self.adversary = reconstruction, perceptual, adversary
        self.guard, self.world = guard, world
        if adversary is not None:
            self.modules["discriminator"] = adversary.discriminator
            self.learning = adversary.learning
            self.state = ratio_state()
        if guard is not None:
            self.checks = guard.checks
            self.state = {**self.state, **guard.state}

    def turns(self, step: int) -> tuple[str, ...]:
        if self.adversary is None:
            return ("student",)
        return (*["discriminator"] * self.adversary.turns, "student")

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        if role == "student":
            fake = one_step(nets["student"], batch.x0, batch.cond)
            with torch.autocast(fake.device.type, enabled=False):  # losses and feature networks in float32
                fake = fake.float() if fake.dtype == torch.bfloat16 else fake
                return self._generator_loss(fake, nets, batch, draws, done)
        assert self.adversary is not None, "only an adversary has another role"
        return self._discriminator_loss(self.adversary, nets, batch, draws, done)

    def check(self, ema: Mapping[str, Tensor]) -> dict[str, float]:
        assert self.guard is not None, "checks are the guard's"
        discriminator = None if self.adversary is None else self.adversary.discriminator
        return self.guard.look(ema, discriminator)

    def best(self) -> Mapping[str, Tensor] | None:
        return None if self.guard is None else self.guard.best()

    def _generator_loss(self, fake: Tensor, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        terms: Terms = {}
        if self.reconstruction is not None:
            terms["reconstruction"] = self.reconstruction(fake, batch.x1)
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(fake, batch.x1).mean()
        adversary = self.adversary
        if adversary is None and len(terms) == 1:
            return {"loss": next(iter(terms.values()))}
        if adversary is not None:
            terms["adversarial"] = self._adversarial_term(adversary, nets["discriminator"], fake, batch, draws)
        last = last_layer(self.modules["student"], fake)  # the parameters themselves, also where nets are wrapped
        found = term_gradients(fake, last, terms, self.world)
        if adversary is None:
            return combine_terms(fake, found, {})
        ratio, following = running_ratio(self.state, found.rest, found.norms["adversarial"])
        scale = adversary.share_at(done) * ratio
        combined = combine_terms(fake, found, {"adversarial": scale})
        return {**combined, "weight/adversarial": fake.new_tensor(scale), **following}

    def _adversarial_term(
        self, adversary: Adversary, discriminator: nn.Module, fake: Tensor, batch: Pair, draws: Draws
    ) -> Tensor:
        """The generator's adversarial loss, a scalar."""
        real, cond = real_rows(adversary.real, batch, draws)
        with torch.no_grad():
            on_real = discriminator(real, cond)
        return adversary.loss.generator(on_real, discriminator(fake, batch.cond))

    def _discriminator_loss(
        self, adversary: Adversary, nets: Networks, batch: Pair, draws: Draws, done: float
    ) -> Terms:
        """The discriminator's loss and, in the steps that have it, the penalty; ``gap`` is E D(real) - E D(fake)."""
        with torch.no_grad():
            fake = one_step(nets["student"], batch.x0, batch.cond).to(batch.x0.dtype)
        real, cond = real_rows(adversary.real, batch, draws)
        x = torch.cat([real, fake]).detach().requires_grad_(adversary.gamma > 0)
        both = {name: torch.cat([rows, batch.cond[name]]) for name, rows in cond.items()}
        with torch.autocast(x.device.type, enabled=False):
            scores = nets["discriminator"](x, both)
            on_real, on_fake = scores.chunk(2)
            terms = {"game": adversary.loss.discriminator(on_real, on_fake)}
            total = terms["game"]
            if adversary.penalised(done):
                terms["penalty"] = slope(scores, x)  # the mean over real and fake rows is (R1 + R2) / 2
                total = total + adversary.every * adversary.gamma * terms["penalty"]
        gap = (on_real - on_fake).mean()
        return {"loss": total, "gap": gap.detach(), **{name: term.detach() for name, term in terms.items()}}


def real_rows(real: Real, batch: Pair, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
    """The real samples of a step (B, ...), and their conditions.

    Args:
        real: ``teacher`` for the endpoints ``batch.x1``, ``data`` for the data rows ``batch.beside["real"]``, ``both``
            for one of the two with probability 1/2, row by row.
        batch: the pairs.
        draws: the random numbers of ``both``.
    """
    if real == "teacher":
        return batch.x1, batch.cond
    data, cond = batch.beside["real"], {name: batch.beside[f"real_{name}"] for name in batch.cond}
    if real == "data":
        return data, cond
    half = draws.uniform().to(data.device) < 0.5
    mixed = {name: where_rows(half, rows, batch.cond[name]) for name, rows in cond.items()}
    return where_rows(half, data, batch.x1), mixed
