"""How the derivatives of a student are computed: chosen once, before training.

Forward-mode differentiation is exact and cheap. A network may contain an operation that does not support it; then
finite differences of two calls are used. They are refused for a network with dropout, because every call would drop
different values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.flow.couplings import Pair
from fewstep.flow.derivatives import Derivative, Mode
from fewstep.flow.noise import generator_for
from fewstep.flow.precision import full_precision
from fewstep.methods.contract.stage import Stage
from fewstep.methods.families.end_derivative import EndDerivative
from fewstep.methods.families.flow_map import Times
from fewstep.methods.families.velocity_source import VelocitySource

TRIED_ROWS = 4  # rows on which a mode is tried; whether it works does not depend on their number
DIFFERENCES = "finite_difference"

Choice = Callable[[nn.Module, Tensor, Times, Pair], Mode]  # the mode that works at (x_t, times) of a few pairs


def total_derivative(student: nn.Module, x: Tensor, times: Times, pair: Pair) -> Mode:
    """The first mode that works for ``du/dt`` along the flow, as in :class:`~fewstep.flow.derivatives.Derivative`.

    Args:
        student: ``u(x, t, r=r, **cond)``.
        x: x_t, (B, ...).
        times: t and r, (B,).
        pair: the pairs of x.
    """
    derivative = Derivative(student, "auto")
    derivative(x, times.t, pair.x1 - pair.x0, torch.ones_like(times.t), r=times.r, **pair.cond)
    assert derivative.used is not None
    return derivative.used


def end_derivative(student: nn.Module, x: Tensor, times: Times, pair: Pair) -> Mode:
    """The first mode that works for ``∂_r X``, as in :class:`~fewstep.methods.families.end_derivative.EndDerivative`.

    The arguments are those of :func:`total_derivative`.
    """
    return EndDerivative(student, "auto").mode_at(x, times, pair.cond)


def settle_derivative(
    stage: Stage, student: nn.Module, source: VelocitySource, mode: Mode, choose: Choice = total_derivative
) -> Mode:
    """``mode`` itself, or for ``auto`` the first mode that works on a few rows; a note is printed if it is not forward.

    Args:
        stage: gives network configuration, device and seed.
        student: the two-time network.
        source: makes the pairs on which the modes are tried.
        mode: the option ``derivative``.
        choose: tries the modes, for the derivative that the method needs.

    Raises:
        UserError: finite differences are needed, and the network has dropout.
    """
    if mode == "auto":
        mode = _first_that_works(stage, student, source, choose)
        if mode != "forward":
            stage.world.say(f"  note: this network has no forward-mode derivative: {mode} is taken instead.")
    if mode == DIFFERENCES and stage.network.get("dropout"):
        raise UserError(
            "derivative: finite_difference subtracts two calls of the network, and dropout makes every call another "
            "function: set the network's dropout to 0, or use 'derivative: forward' if the network supports it."
        )
    return mode


def _first_that_works(stage: Stage, student: nn.Module, source: VelocitySource, choose: Choice) -> Mode:
    """The first mode that works, tried in eval mode, because that does not depend on dropout."""
    device, generator = stage.world.device, generator_for(stage.seed, stage.name, "derivative")
    pair = source.batches().batch(0, TRIED_ROWS, generator).to(device)
    t = torch.linspace(0.2, 0.7, len(pair.x1), device=device).to(pair.x1)
    times = Times(t, t + 0.2, torch.zeros_like(t, dtype=torch.bool))
    student, training = student.to(device), student.training
    student.eval()
    try:
        with full_precision(pair.x1):
            return choose(student, source.path.interpolate(pair.x0, pair.x1, t), times, pair)
    finally:
        student.train(training)
