"""What sampling gives: samples with the base samples and conditions that they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fewstep.data.dataset import LABEL


@final
@dataclass(frozen=True)
class Draw:
    """Samples in network units.

    Attributes:
        x: samples, ``(num, *shape)`` float32 on the CPU.
        x0: the base samples they come from, ``(num, *shape)``.
        cond: the conditions by name, each ``(num, ...)``.
        nfe: network evaluations per sample, counted.
    """

    x: Tensor
    x0: Tensor
    cond: dict[str, Tensor]
    nfe: int

    @property
    def label(self) -> Tensor | None:
        """Class numbers, ``(num,)`` int64; None for a model without labels."""
        return self.cond.get(LABEL)

    @property
    def context(self) -> Tensor | None:
        """What the network was shown of the data, ``(num, ...)``; None for a model that takes no context."""
        return self.cond.get("context")

    def conditions(self, device: torch.device) -> dict[str, Tensor]:
        """The keyword arguments that the network was called with."""
        return {name: value.to(device) for name, value in self.cond.items()}
