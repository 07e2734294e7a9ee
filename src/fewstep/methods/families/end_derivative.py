"""The derivative ``∂_r X(x, t, r)`` of a learned flow map in its end time r."""

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

STEP = {torch.float64: 1e-5}  # half-width h of a difference in r, by dtype; chosen, not tuned
COARSE_STEP = 5e-3  # h in the other dtypes: rounding errors of about 1e-6 in X become 1e-4 in the difference
TRIED_ROWS = 4  # rows on which forward mode is tried


@final
class EndDerivative:
    """The map ``X = x + (r - t) u`` and ``∂_r X = u + (r - t) ∂_r u``, both with their autograd graph.

    Args:
        u: ``u(x, t, r=r, **cond)``.
        mode: ``forward``; ``finite_difference``, of two calls at ``r ± h``, cut to [0, 1]; or ``auto``, forward mode if
            the network supports it and finite differences otherwise.

    Raises:
        UserError: there is no mode of that name.

    >>> derivative = EndDerivative(lambda x, t, r: r[:, None] * x)
    >>> times = Times(torch.zeros(1), torch.full((1,), 0.5), torch.tensor([False]))
    >>> end, slope = derivative(torch.full((1, 1), 2.0), times, {})  # X = x + r^2 x
    >>> end.item(), slope.item()
    (2.5, 2.0)
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
        """The mode that is used: the one of the constructor, or for ``auto`` the first that works at these points."""
        if self.mode != "auto":
            return self.mode
        return "forward" if self._forward_works(x, times, cond) else "finite_difference"

    def _forward_works(self, x: Tensor, times: Times, cond: Mapping[str, Any]) -> bool:
        """Whether forward mode and a gradient through it work on a few rows; the random state is restored."""
        few = slice(TRIED_ROWS)
        some = rows_of(cond, len(x), few)
        try:
            with isolated_rng(x.device), torch.enable_grad():
                point = x[few].detach().requires_grad_()
                part = Times(*(values[few] for values in times))
                _, speed = self._forward(point, part, some)
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
