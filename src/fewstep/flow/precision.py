"""Calls of networks in float32 whatever the precision of the stage.

bfloat16 keeps eight bits. The difference of two networks that nearly agree has fewer right digits than either, and a
derivative by differences fewer still: those calls are made here.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from fewstep.flow.field import Velocity


@final
class full_precision:
    """A context without autograd graph and without autocast, for targets and their derivatives.

    Targets need no gradient, and derivatives lose too many digits in half precision.

    Args:
        like: a tensor on the device whose autocast is switched off.
    """

    def __init__(self, like: Tensor) -> None:
        self._contexts = (torch.no_grad(), torch.autocast(like.device.type, enabled=False))

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *failed: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*failed)


def in_full(network: Velocity, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
    """``network(x, t, **cond)`` with its autograd graph and without autocast.

    Args:
        network: ``v(x, t, **cond)``.
        x: (B, ...).
        t: (B,).
        cond: handed to the network.

    Returns:
        (B, ...), in the precision of the network's weights.

    >>> in_full(lambda x, t: -x, torch.ones(2, 1), torch.zeros(2)).tolist()
    [[-1.0], [-1.0]]
    """
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = network(x, t, **cond)
    return out
