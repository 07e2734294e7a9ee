"""Exponential moving average of a module's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


@final
class EMA:
    """``theta_ema <- d theta_ema + (1 - d) theta``, with ``d = min(decay, (1 + n) / (10 + n))`` at update n.

    Weights are averaged; buffers (counts, running statistics, masks, which may have infinite values) are copied. The
    average shares no storage with the module. The average of weights of half precision is kept in float32: at d = .998
    an update adds 1/500 of the distance to theta, which bfloat16, with 8 significant bits, rounds away.

    Args:
        module: the module with the weights theta.
        decay: the largest d, per update.

    Attributes:
        state: the average by name, as the module's ``state_dict``; float32 for weights of half precision.
        updates: the number n of updates so far.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        live = module.state_dict()
        parameters = dict(module.named_parameters(remove_duplicate=False))
        averaged = [name for name, value in parameters.items() if value.is_floating_point()]
        self._dtypes = {name: value.dtype for name, value in live.items()}
        self.state: dict[str, Tensor] = {name: value.detach().clone() for name, value in live.items()}
        for name in averaged:
            if self._dtypes[name] in HALF:
                self.state[name] = self.state[name].float()
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
        sources = [live.to(kept.dtype) for live, kept in zip(self._sources, self._averages, strict=True)]
        torch._foreach_lerp_(self._averages, sources, 1.0 - decay)
        for name, owner, key in self._copied:
            self.state[name].copy_(getattr(owner, key).detach())

    def weights(self) -> dict[str, Tensor]:
        """The average by name in the dtypes that the weights had at first: what a model folder holds."""
        return {name: value.to(self._dtypes[name]) for name, value in self.state.items()}

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
