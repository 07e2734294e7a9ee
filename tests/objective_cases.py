"""How tests call an objective: as the trainer does, with its own modules in their places; no tests here."""

from __future__ import annotations

from fewstep.flow.couplings import Pair
from fewstep.flow.noise import Draws
from fewstep.methods.contract.objective import Objective, Terms


def loss_of(objective: Objective, role: str, batch: Pair, draws: Draws, done: float = 0.0) -> Terms:
    """The terms of a role's turn after a share ``done`` of the training."""
    return objective.loss(role, objective.modules, batch, draws, done)
