"""What a method trains: networks by role, whose turn it is, and a loss that is a pure function.

The trainer owns the networks, the optimisers and the progress, and passes them in. An objective holds what never
changes (teacher, path, law of the times) and, in ``state``, the tensors that later steps depend on.
"""

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

Networks = Mapping[str, nn.Module]  # by role; in a role's turn its own network has gradients, all others are frozen
Terms = dict[str, Tensor]  # named scalars; "loss" is minimised


@final
@dataclass(frozen=True)
class Learning:
    """How one role learns, where it differs from the stage's options.

    Attributes:
        lr: peak learning rate; None takes the stage's. Warm-up and cosine decay are the stage's too.
        betas: of AdamW.
        begins: optimiser steps of the phase before the role's first turn. Its warm-up begins there.
        dropout: whether its module is in training mode. A network that is compared with a frozen one must not drop
            what the other keeps.
    """

    lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    begins: int = 0
    dropout: bool = True


@final
class Collapse(UserError):
    """Training has become so much worse that going on is a waste."""


class Objective(ABC):
    """The loss of a phase and the networks that it trains.

    Attributes:
        modules: the trained modules by role. ``student`` is the one that is kept.
        learning: the roles that learn otherwise than the stage's options say.
        state: tensors beside the modules that later steps depend on, by name. Checkpoints keep them. They change in
            two ways only: in :meth:`after_step`, or by a term of the same name, which is the entry's next value.
        checks: how often in the phase :meth:`check` is called, evenly spaced.
        group: consecutive rows of a batch that belong together, and are never split between processes.
    """

    modules: dict[str, nn.Module]
    learning: Mapping[str, Learning] = MappingProxyType({})
    state: Mapping[str, Tensor] = MappingProxyType({})
    checks: int = 0
    group: int = 1

    def turns(self, step: int) -> tuple[str, ...]:
        """The roles that learn at optimiser step ``step`` of the phase, in order."""
        return ("student",)

    @abstractmethod
    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        """The terms of one role's loss: a pure function, which mutates nothing and stores nothing.

        Args:
            role: whose turn it is. The gradient of ``"loss"`` must reach exactly the parameters of ``nets[role]``.
            nets: the networks by role, as they are to be called. For several processes ``nets[role]`` is the wrapped
                module, which averages gradients.
            batch: this process's rows.
            draws: random numbers for those rows, a function of (seed, stage, samples seen).
            done: share of the phase's samples that were seen before this step, in [0, 1).

        Returns:
            Named scalars: ``"loss"`` is minimised, the others are logged. A term named as an entry of ``state`` is not
            logged: it is that entry's next value, stored once the update is accepted.
        """

    def after_step(self, role: str) -> None:  # noqa: B027  (optional)
        """Move averages and other state after an accepted update of ``role``; not called for a skipped step."""

    def check(self, ema: Mapping[str, Tensor]) -> dict[str, float]:
        """Named numbers that tell how training goes, from the student's averaged weights.

        Raises:
            Collapse: the numbers have become so much worse that going on is a waste; says what to change.
        """
        return {}

    def best(self) -> Mapping[str, Tensor] | None:
        """The student's averaged weights at the best of the checks; None where they are not kept."""
        return None


class Batches(Protocol):
    """Where a phase's training pairs come from."""

    facts: Facts

    def batch(self, start: int, count: int, generator: torch.Generator) -> Pair:
        """The global batch of samples ``start … start + count`` of the phase; a function of its arguments alone.

        ``beside`` of the pair may hold rows of any length; every process gets an equal share of them.
        """
        ...
