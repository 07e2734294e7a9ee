"""Exponential moving average of a module's weights and buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn


@final
class EMA:
    """``theta_ema <- d theta_ema + (1 - d) theta`` with ``d = min(decay, (1 + n) / (10 + n))`` after ``n`` updates.

    Floating-point weights are averaged, integer buffers copied. The average shares no storage with the module.

    Args:
        module: whose weights are averaged.
        decay: the largest decay, per update.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._live = dict(module.state_dict(keep_vars=False))
        self.state: dict[str, Tensor] = {name: value.detach().clone() for name, value in self._live.items()}
        floating = [name for name, value in self._live.items() if value.is_floating_point()]
        self._sources = [self._live[name] for name in floating]
        self._averages = [self.state[name] for name in floating]
        self._copied = [name for name in self._live if name not in set(floating)]

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights into the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averages, self._sources, 1.0 - decay)
        for name in self._copied:
            self.state[name].copy_(self._live[name])

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Restore the average and its count of updates."""
        for name, value in self.state.items():
            value.copy_(state[name])
        self.updates = updates
