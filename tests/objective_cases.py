"""How tests call an objective: as the trainer does, with its own modules in their places; no tests here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fewstep.flow.couplings import Pair
from fewstep.flow.noise import Draws, generator_for
from fewstep.methods.contract.objective import Objective, Terms
from fewstep.networks import build, resolve


def train_on_a_line(
    make: Callable[[nn.Module], Objective], law: Any, key: str, steps: int, rows: int = 256, two_time: bool = False
) -> nn.Module:
    """A small network in one dimension, trained on a law and independent noise; the draws are functions of ``key``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {"name": "mlp", "width": 64, "blocks": 2, "embedding": 16, "two_time": two_time}
        net = build(resolve(config, (1,), 0))
    objective = make(net)
    optimiser = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for number in range(steps):
        generator = generator_for(key, number)
        batch = Pair(torch.randn(rows, 1, generator=generator), law.sample(rows, generator))
        optimiser.zero_grad()
        loss_of(objective, "student", batch, Draws(generator, rows), number / steps)["loss"].backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        objective.after_step("student")
        schedule.step()
    return net


def loss_of(objective: Objective, role: str, batch: Pair, draws: Draws, done: float = 0.0) -> Terms:
    """The terms of a role's turn after a share ``done`` of the training."""
    return objective.loss(role, objective.modules, batch, draws, done)
