"""The derivative of a learned map in its end time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fewstep.errors import unknown
from fewstep.flow.derivatives import Mode, plain_attention, rows_of
from fewstep.flow.field import Velocity
from fewstep.flow.noise import isolated_rng
from fewstep.flow.paths import expand_time
from fewstep.methods.families.flow_map import Times

STEP = {torch.float64: 1e-5}  # of differences in r; values in single precision carry errors of 1e-6 or so


COARSE_STEP = 5e-3


TRIED_ROWS = 4


@final
class EndDerivative:
    """The map ``X = x + (r - t) u`` and ``∂_r X = u + (r - t) ∂_r u``, both with their autograd graph.

    Forward mode, or differences of two calls at ``r ± h`` (inside [0, 1]) where the network has none.

    Args:
        u: ``u(x, t, r=r, **cond)``.
        mode: ``forward``, ``finite_difference``, or ``auto``: the first that works.
    """

    def __init__(self, u: Velocity, mode: Mode = "auto") -> None:
        if mode not in ("auto", "forward", "finite_difference"):
            raise unknown("derivative mode", mode, ("auto", "forward", "finite_difference"))
        self.u, self.mode = u, mode

    def __call__(self, x: Tensor, times: Times, cond: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """``X`` and ``∂_r X``, each (B, ...), from x at ``times.t`` to ``times.r``."""
        forward = self.mode_at(x, times, cond) == "forward"
        return self._forward(x, times, cond) if forward else self._differences(x, times, cond)

    def mode_at(self, x: Tensor, times: Times, cond: Mapping[str, Any]) -> Mode:
        """The way that is taken: the one asked for, or with ``auto`` the first that works there."""
        if self.mode != "auto":
            return self.mode
        return "forward" if self._forward_works(x, times, cond) else "finite_difference"

    def _forward_works(self, x: Tensor, times: Times, cond: Mapping[str, Any]) -> bool:
        """Whether it and the gradient through it can be had; tried on a few rows, all random numbers put back."""
        few = slice(TRIED_ROWS)
        try:
            with isolated_rng(x.device), torch.enable_grad():
                point = x[few].detach().requires_grad_()
                part = Times(*(values[few] for values in times))
                _, speed = self._forward(point, part, rows_of(cond, len(x), few))
                torch.autograd.grad(speed.square().sum(), point)
        except Exception:  # what a network raises where it cannot be differentiated may be anything
            return False
        return True

    def _forward(self, x: Tensor, times: Times, cond: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level(), plain_attention():
            end = forward_ad.make_dual(times.r, torch.ones_like(times.r))
            u, slope = forward_ad.unpack_dual(self.u(x, times.t, r=end, **cond))
        length = expand_time(times.r - times.t, x)
        return x + length * u, u if slope is None else u + length * slope

    def _differences(self, x: Tensor, times: Times, cond: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        h = STEP.get(x.dtype, COARSE_STEP)
        ends = (times.r - h).clamp(min=0.0), (times.r + h).clamp(max=1.0)
        low, high = (x + expand_time(end - times.t, x) * self.u(x, times.t, r=end, **cond) for end in ends)
        width = expand_time(ends[1] - ends[0], x)
        share = expand_time(times.r - ends[0], x) / width
        return low + share * (high - low), (high - low) / width
