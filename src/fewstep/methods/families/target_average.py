"""An average of a network's weights that computes the targets of its own training.

In consistency and Lagrangian losses the target of a network is computed with the network itself. With its present
weights, training on digits diverged within 60 steps; with an average over the last few steps it did not.
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
    """The average ``w' <- d w' + (1 - d) w``, after every update of w; for ``d = 0`` it is w itself.

    Calling this object calls the averaged network without a graph, in full precision, and with the dropout mask that
    the next call of the network will draw. (Distribution matching calls ``module`` itself, with gradients in x and in
    eval mode.)

    Args:
        module: the network with the weights w, on the device on which it is trained.
        decay: d, per update.

    Attributes:
        module: the network with the weights w', frozen.
        state: the tensors of w' by name, changed in place. A checkpoint must keep them.
    """

    def __init__(self, module: nn.Module, decay: float = 0.0) -> None:
        self.decay = decay
        self._live = module
        self.module = copy.deepcopy(module).train().requires_grad_(False)
        self.state = {f"target.{name}": value for name, value in self.module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the network's present weights into the average; to be called once after every accepted update."""
        for name, value in self._live.state_dict().items():
            kept = self.state[f"target.{name}"]
            if kept.dtype.is_floating_point:
                kept.lerp_(value, 1.0 - self.decay)
            else:
                kept.copy_(value)

    def __call__(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        with full_precision(x), isolated_rng(x.device):  # the network's next call draws the same dropout mask
            out: Tensor = self.module(x, t, **cond).to(x)
        return out
