"""A copy of the student that is called with averaged weights and stores the best of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from fewstep.methods.families.straight_line import one_step


@final
class StudentSnapshot:
    """A copy of the student that is called with averaged weights and stores the best of them.

    Args:
        student: the network ``v(x, t, **cond)`` that is copied.

    Attributes:
        state: the stored weights, and whether any were stored; a checkpoint must keep it.
    """

    def __init__(self, student: nn.Module) -> None:
        self._module = copy.deepcopy(student).eval().requires_grad_(False)
        good = {f"good.{name}": value.detach().cpu().clone() for name, value in student.state_dict().items()}
        self.state = {"kept": torch.zeros((), dtype=torch.bool), **good}

    @torch.no_grad()
    def one_step(self, weights: Mapping[str, Tensor], x0: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """``x0 + v(x0, 0)`` with the given weights, (B, ...), on the weights' device.

        Args:
            weights: by parameter name.
            x0: noise (B, ...), on any device.
            cond: conditions of the rows, on any device.
        """
        self._module.load_state_dict(weights)
        device = next(iter(weights.values())).device
        moved = {name: value.to(device) for name, value in cond.items()}
        return one_step(self._module.to(device), x0.to(device), moved)

    def keep(self, weights: Mapping[str, Tensor]) -> None:
        """Store these weights as the best so far."""
        for name, value in weights.items():
            self.state[f"good.{name}"].copy_(value)
        self.state["kept"].fill_(True)

    def best(self) -> dict[str, Tensor] | None:
        """The weights that were stored last; None if none were."""
        if not self.state["kept"]:
            return None
        return {name.removeprefix("good."): value for name, value in self.state.items() if name != "kept"}
