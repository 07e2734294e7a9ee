"""By which way the derivatives of a student are taken, settled once before the training.

Forward mode is the exact and cheap way. A network may contain an operation without it; then differences of calls
are taken, which a network with dropout does not allow: two calls drop different values.
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

TRIED_ROWS = 4  # rows on which a way is tried: enough to see whether it works
DIFFERENCES = "finite_difference"

Choice = Callable[[nn.Module, Tensor, Times, Pair], Mode]  # the way that works at (x_t, times) of a few pairs


def total_derivative(student: nn.Module, x: Tensor, times: Times, pair: Pair) -> Mode:
    """The first way that works for ``du/dt`` along the flow, :class:`~fewstep.flow.derivatives.Derivative`."""
    derivative = Derivative(student, "auto")
    derivative(x, times.t, pair.x1 - pair.x0, torch.ones_like(times.t), r=times.r, **pair.cond)
    assert derivative.used is not None
    return derivative.used


def end_derivative(student: nn.Module, x: Tensor, times: Times, pair: Pair) -> Mode:
    """The first way that works for ``∂_r X``, :class:`~fewstep.methods.families.end_derivative.EndDerivative`."""
    return EndDerivative(student, "auto").mode_at(x, times, pair.cond)


def settle_derivative(
    stage: Stage, student: nn.Module, source: VelocitySource, mode: Mode, choose: Choice = total_derivative
) -> Mode:
    """``mode``, or where it is ``auto`` the first way that works on a few rows; says so if it is not forward mode.

    Args:
        stage: data, network and device.
        student: the two-time network.
        source: makes the pairs that the ways are tried on.
        mode: what the options say.
        choose: tries the ways.

    Raises:
        UserError: differences of a network that drops values.
    """
    if mode == "auto":
        mode = _first_that_works(stage, student, source, choose)
        if mode != "forward":
            stage.world.say(f"  note: this network has no forward-mode derivative: {mode} is taken instead")
    if mode == DIFFERENCES and stage.network.get("dropout"):
        raise UserError(
            "derivative: finite_difference subtracts two calls of the network, and dropout makes every call another "
            "function: set the network's dropout to 0, or take 'derivative: forward' where the network has one."
        )
    return mode


def _first_that_works(stage: Stage, student: nn.Module, source: VelocitySource, choose: Choice) -> Mode:
    """In eval mode: whether a way works does not depend on dropout."""
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
