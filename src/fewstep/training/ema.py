"""Exponential moving average of a module's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn


@final
class EMA:
    """``theta_ema <- d theta_ema + (1 - d) theta``, with ``d = min(decay, (1 + n) / (10 + n))`` at update n.

    Weights are averaged; buffers (counts, running statistics, masks, which may have infinite values) are copied. The
    average shares no storage with the module.

    Args:
        module: the module with the weights theta.
        decay: the largest d, per update.

    Attributes:
        state: the average by name, as the module's ``state_dict``.
        updates: the number n of updates so far.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        live = module.state_dict()
        self.state: dict[str, Tensor] = {name: value.detach().clone() for name, value in live.items()}
        parameters = dict(module.named_parameters(remove_duplicate=False))
        averaged = [name for name, value in parameters.items() if value.is_floating_point()]
        # the parameters themselves: a detached view would keep the old storage when their data is replaced
        self._sources: list[Tensor] = [parameters[name] for name in averaged]
        self._averages = [self.state[name] for name in averaged]
        # a module may replace a buffer by a new tensor, so buffers are looked up at every update
        self._copied = [_locate(module, name) for name in live if name not in set(averaged)]

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights into the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averages, self._sources, 1.0 - decay)
        for name, owner, key in self._copied:
            self.state[name].copy_(getattr(owner, key).detach())

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Restore the average and its number of updates.

        Args:
            state: the average by name.
            updates: the number of updates.
        """
        for name, value in self.state.items():
            value.copy_(state[name])
        self.updates = updates


def _locate(module: nn.Module, name: str) -> tuple[str, nn.Module, str]:
    """The sub-module that owns an entry of the state, and the entry's name there."""
    path, _, key = name.rpartition(".")
    return name, module.get_submodule(path), key
