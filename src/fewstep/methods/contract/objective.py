"""What a method trains: networks by role, the roles that are updated in each step, and a loss that is a pure function.

The trainer owns the networks, the optimisers and the progress, and passes them to the loss. An objective holds what
does not change during training (teacher, path, law of t) and, in ``state``, the tensors that later steps depend on.
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
    """How one role is optimised, where that differs from the stage's options.

    Attributes:
        lr: peak learning rate; None takes the stage's ``lr``. Warm-up and cosine decay are always the stage's.
        betas: of AdamW.
        begins: optimiser steps of the phase before the role's first update. Its warm-up begins there.
        dropout: whether its module is in training mode. False for a network that is compared with a frozen one:
            dropout in only one of the two would make equal networks differ.
    """

    lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    begins: int = 0
    dropout: bool = True


@final
class Collapse(UserError):
    """Training is stopped, because it diverged or because a guard found that the samples became much worse."""


class Objective(ABC):
    """The loss of a phase and the networks that it trains.

    Attributes:
        modules: the trained modules by role. ``student`` is the one that is kept after the stage.
        learning: optimisation of the roles for which it differs from the stage's options.
        state: tensors beside the modules that later steps depend on, by name. Checkpoints keep them. They change in
            two ways only: in :meth:`after_step`, or by a term of the same name, whose value becomes the entry's.
        checks: number of calls of :meth:`check` in the phase, evenly spaced in samples.
        group: number of consecutive rows of a batch that the loss uses together. The rows of a group are always on the
            same process.
    """

    modules: dict[str, nn.Module]
    learning: Mapping[str, Learning] = MappingProxyType({})
    state: Mapping[str, Tensor] = MappingProxyType({})
    checks: int = 0
    group: int = 1

    def turns(self, step: int) -> tuple[str, ...]:
        """The roles that are updated at optimiser step ``step`` of the phase (from 0), in order.

        A role may occur several times; every occurrence is one update with its own random numbers.
        """
        return ("student",)

    @abstractmethod
    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        """The terms of one role's loss: a pure function, which mutates nothing and stores nothing.

        Args:
            role: the role that is updated. The gradient of ``"loss"`` must reach exactly the parameters of
                ``nets[role]``.
            nets: the networks by role. The loss must call these and not ``self.modules``: with several processes
                ``nets[role]`` is the wrapped module, which averages the gradients.
            batch: this process's rows.
            draws: random numbers for those rows, a function of (seed, stage, samples seen).
            done: share of the phase's samples that were seen before this step, in [0, 1).

        Returns:
            Named scalars: ``"loss"`` is minimised, the others are logged. A term named as an entry of ``state`` is not
            logged: it is that entry's next value, stored once the update is accepted.
        """

    def after_step(self, role: str) -> None:  # noqa: B027  (optional)
        """Update averages and other state after an accepted update of ``role``.

        It is not called for a step that was skipped because its loss or gradient was not finite.
        """

    def check(self, ema: Mapping[str, Tensor]) -> dict[str, float]:
        """Measurements of the training by name, most of them of the student with its averaged weights; they are logged.

        Args:
            ema: the averaged weights by parameter name.

        Raises:
            Collapse: the measurements are past their limits; the message says which options to change.
        """
        return {}

    def best(self) -> Mapping[str, Tensor] | None:
        """The student's averaged weights at the best check so far; None if they are not kept."""
        return None


class Batches(Protocol):
    """The training pairs of a phase.

    Attributes:
        facts: what holds for the coupling of the pairs.
    """

    facts: Facts

    def batch(self, start: int, count: int, generator: torch.Generator) -> Pair:
        """The global batch of samples ``start … start + count`` of the phase.

        Args:
            start: samples seen in the phase before this batch.
            count: rows of the batch.
            generator: source of all random numbers of the batch.

        Returns:
            A pair of ``count`` rows, a function of the arguments alone. Its ``beside`` may hold tensors with any number
            of rows; every process gets an equal share of them.
        """
        ...
