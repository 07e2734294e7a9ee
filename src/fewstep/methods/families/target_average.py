"""An average of a network's weights, which makes the targets of its own training.

Consistency and Lagrangian losses regress a network on values of the network itself. With the present weights in the
target, training on digits diverged within 60 steps; a short average of the weights did not.
"""

from __future__ import annotations

import copy
from typing import final

import torch
from torch import Tensor, nn

from fewstep.flow.noise import isolated_rng
from fewstep.flow.precision import full_precision


@final
class TargetAverage:
    """``w' <- d w' + (1 - d) w`` after every update of ``w``; with ``d = 0`` it is the network as it is.

    It is called without a graph, in full precision, and with the dropout mask that the network draws next.

    Args:
        module: whose weights are averaged; on the device it is trained on.
        decay: d.

    Attributes:
        module: the averaged network, frozen.
        state: its tensors, changed in place. A checkpoint must keep them.
    """

    def __init__(self, module: nn.Module, decay: float = 0.0) -> None:
        self.decay = decay
        self._live = module
        self.module = copy.deepcopy(module).train().requires_grad_(False)
        self.state = {f"target.{name}": value for name, value in self.module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network's weights; to be called once per accepted update."""
        for name, value in self._live.state_dict().items():
            kept = self.state[f"target.{name}"]
            if kept.dtype.is_floating_point:
                kept.lerp_(value, 1.0 - self.decay)
            else:
                kept.copy_(value)

    def __call__(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        with full_precision(x), isolated_rng(x.device):  # so that the network called next draws the same dropout mask
            out: Tensor = self.module(x, t, **cond).to(x)
        return out
