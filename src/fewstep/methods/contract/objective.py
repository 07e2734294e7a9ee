"""What a method trains: modules by role, whose turn it is, and the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, final

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.flow.couplings import Facts, Pair
from fewstep.flow.noise import Draws


@final
@dataclass(frozen=True)
class Learning:
    """How one role learns, where it differs from the stage's options.

    Attributes:
        lr: peak learning rate; None is the stage's. Warm-up and cosine are the stage's too.
        betas: of AdamW.
        begins: optimiser steps of the phase before the role's first turn; its warm-up begins there.
    """

    lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    begins: int = 0


@final
class Collapse(UserError):
    """Training goes so badly that going on is a waste."""


class Objective(ABC):
    """The loss of a phase and the modules it trains.

    Attributes:
        modules: the trained modules by role; ``student`` is the one that is kept. In a role's turn its own module
            has gradients (averaged over the processes), all others are frozen.
        learning: how roles learn that differ from the stage's options.
        state: tensors beside the modules' that later steps depend on, changed in place; checkpoints keep them.
        checks: how often in the phase :meth:`check` is called, evenly.
    """

    modules: dict[str, nn.Module]
    learning: Mapping[str, Learning] = MappingProxyType({})
    state: Mapping[str, Tensor] = MappingProxyType({})
    checks: int = 0

    def turns(self, step: int) -> tuple[str, ...]:
        """The roles that learn at optimiser step ``step`` of the phase, in order."""
        return ("student",)

    @abstractmethod
    def loss(self, role: str, batch: Pair, draws: Draws) -> dict[str, Tensor]:
        """Named scalar terms; ``"loss"`` is the one that is minimised for ``role``."""

    def check(self, ema: Mapping[str, Tensor]) -> dict[str, float]:
        """Named numbers that tell how training goes, from the student's averaged weights.

        Raises:
            Collapse: it goes so badly that going on is a waste; says what to change.
        """
        return {}

    def best(self) -> Mapping[str, Tensor] | None:
        """The student's averaged weights at the best of the checks, where they are kept."""
        return None


class Batches(Protocol):
    """Where a phase's training pairs come from."""

    facts: Facts

    def batch(self, start: int, count: int, generator: torch.Generator) -> Pair:
        """The global batch of samples ``start … start + count`` of the phase; a function of its arguments alone."""
        ...
