r"""How far a guess is from its target: distances of batches, and the losses of a velocity made from them.

A :data:`Distance` compares two batches and knows nothing of time. A :data:`Loss` sees a whole :class:`Residual`: on the
linear path a velocity is a guess of the endpoint too,

    x1_hat = x_t + (1 - t) v,      x1_hat - x1 = (1 - t) (v - (x1 - x0)).

The squared distance has its minimum at the mean ``E[target | x_t]``, and so has ``|phi(e)|^2`` for every linear
invertible ``phi``. Everything else here (absolute, pseudo-Huber, features, errors divided by themselves) has it
elsewhere, unless the pairs are deterministic and there is but one target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, final

import torch
from torch import Tensor

from fewstep.errors import UserError, unknown
from fewstep.flow.paths import expand_time

Distance = Callable[[Tensor, Tensor], Tensor]
Operator = Callable[[Tensor], Tensor]

STRENGTH = 10.0  # default strength of the high-pass filter, the paper's
MIN_REMAINING_TIME = 1e-5  # of 1 - t, which a distance of endpoints is divided by: keeps the quotient finite at t = 1
FEW_VALUES = 50  # per sample; chosen, not tuned. In one dimension 'l1' turns a mode of 20 % into one of 12 %


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error over all entries."""
    return (x - y).square().mean()


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error over all entries."""
    return (x - y).abs().mean()


def pseudo_huber(x: Tensor, y: Tensor, share: float = 0.03) -> Tensor:
    """The mean over rows of :func:`pseudo_huber_rows`."""
    return pseudo_huber_rows(x, y, share).mean()


def pseudo_huber_rows(x: Tensor, y: Tensor, share: float = 0.03) -> Tensor:
    """``(sqrt(|e|^2 + c^2) - c) / D`` per row, (B,), with ``c = share sqrt(D)`` (arXiv:2310.14189, sec. 3.3).

    Its gradient ``e / (D sqrt(|e|^2 + c^2))`` is shorter than 1/D. Squared for errors well below ``share`` per entry,
    absolute for larger ones. The 0.00054 D of 2-RF++'s code is the same 1.66 for 3x32x32.
    """
    e = (x - y).flatten(1)
    size = e.shape[1]
    c = share * math.sqrt(size)
    return ((e.square().sum(1) + c * c).sqrt() - c) / size


def identity(x: Tensor) -> Tensor:
    """The operator that leaves all as it is."""
    return x


def high_pass(x: Tensor, strength: float = STRENGTH) -> Tensor:
    """``phi(x) = x + strength (x - blur(x))`` of images (B, C, H, W), with the 3x3 Gaussian blur (1 2 1)(1 2 1)^T / 16.

    Edges are repeated. The blur is then symmetric along each side, with the cosines of the DCT-II as eigenvectors and
    the eigenvalues ``cos(pi k / 2n)^2``, ``k = 0, …, n - 1``, in (0, 1]. So the eigenvalues of ``phi`` lie in
    ``[1, 1 + strength)``: it is invertible, leaves flat images alone and weighs the finest grain most.
    """
    return x + strength * (x - _smooth(_smooth(x, -1), -2))


def _smooth(x: Tensor, side: int) -> Tensor:
    """(1 2 1) / 4 along one side, the edges repeated."""
    size = x.shape[side]
    padded = torch.cat([x.narrow(side, 0, 1), x, x.narrow(side, size - 1, 1)], side)
    return (padded.narrow(side, 0, size) + 2 * x + padded.narrow(side, 2, size)) / 4


def high_passed_l2(x: Tensor, y: Tensor, strength: float = STRENGTH) -> Tensor:
    """Mean of ``phi(x - y)^2`` over all entries, ``phi`` the :func:`high_pass` (arXiv:2410.07815)."""
    return high_pass(x - y, strength).square().mean()


DISTANCES: dict[str, Distance] = {"l2": l2, "l1": l1, "huber": pseudo_huber, "highpass": high_passed_l2}
VALUED = ("huber", "highpass")  # with a positive number, as ``name:value``
ROBUST = ("l1", "huber")  # distances whose minimum over noisy targets is a median, or near one, and not the mean


def require_many_values(what: str, robust: bool, shape: Sequence[int], fix: str) -> None:
    """Refuse a robust loss on noisy targets of few values.

    One state of flow matching has many targets, and the solution is their mean. A robust loss is smallest elsewhere,
    near the median. ``huber`` is a function of a whole row's error, which hardly varies where a row has many values:
    there it acts as a constant weight. ``l1`` is a sum over the values, so its bias per value stays.

    Raises:
        UserError: fewer than 50 values per sample.
    """
    if robust and math.prod(shape) < FEW_VALUES:
        raise UserError(
            f"'{what}' is smallest at a median of the targets, and here one state has many targets, whose mean is "
            f"wanted. With {math.prod(shape)} value(s) per sample another map would be learned (a mode of 20 % comes "
            f"out as 12 %): {fix}."
        )


def robust_note(name: str) -> str:
    """What is said of a robust loss on noisy targets that :func:`require_many_values` lets pass."""
    effect = {
        "l1": "learns the median of every value's targets, not their mean: skewed values move to their commoner side",
        "huber": "weighs rows by their error, which moves the mean of the targets slightly towards their mode",
    }
    return f"note: 'loss: {name}' on noisy targets {effect[name]}. 'l2' is exact."


def find_distance(spec: str) -> Distance:
    """A distance by its name or ``name:value``: ``l2``, ``l1``, ``huber:share``, ``highpass:strength``.

    Raises:
        UserError: unknown name, a value that is no positive number, or given to a distance that takes none.
    """
    name, value = distance_words(spec, DISTANCES)
    return DISTANCES[name] if value is None else partial(_with_value, DISTANCES[name], value)


def _with_value(distance: Callable[..., Tensor], value: float, x: Tensor, y: Tensor) -> Tensor:
    return distance(x, y, value)


def distance_words(spec: str, known: Collection[str], valued: Collection[str] = VALUED) -> tuple[str, float | None]:
    """Split ``name`` or ``name:value`` and check both."""
    name, colon, text = spec.partition(":")
    if name not in known:
        raise unknown("distance", name, known)
    if not colon:
        return name, None
    if name not in valued:
        raise UserError(f"distance {name!r} takes no value, got {spec!r}: write {name!r}.")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise UserError(f"distance {spec!r}: {text!r} is not a positive number. Write for example {name + ':0.1'!r}.")
    return name, value


class Residual(NamedTuple):
    """A network's velocity beside its target, and where they were taken: all (B, ...), and ``t`` (B,)."""

    v: Tensor
    target: Tensor
    x_t: Tensor
    x1: Tensor
    t: Tensor


Loss = Callable[[Residual], dict[str, Tensor]]  # named scalar terms, of which "loss" is minimised


@final
@dataclass(frozen=True)
class Plain:
    """The distance of the velocities."""

    distance: Distance

    def __call__(self, at: Residual) -> dict[str, Tensor]:
        return {"loss": self.distance(at.v, at.target)}


def endpoint_errors(at: Residual, operator: Operator) -> Tensor:
    """``|phi(x1_hat - x1)|^2 / D`` per row, (B,): ``(1 - t)^2`` times that of the velocity. Linear path."""
    error = expand_time(1 - at.t, at.v) * (at.v - at.target)
    return operator(error).flatten(1).square().mean(1)


@final
@dataclass(frozen=True)
class Normalised:
    """The mean of ``l / (sg[l] + c)``, ``l`` the :func:`endpoint_errors` (arXiv:2410.07815).

    Its gradient is that of ``log(l + c)``: rows and times whose errors differ by orders of magnitude pull alike. For
    deterministic pairs only. Where a state has several targets it prefers the likeliest one to their mean: between 0
    (probability .8) and 1 its minimum is at 0.00, 0.02, 0.19 for ``c`` = .001, .1, 10, and the mean is .2.

    Attributes:
        c: below errors of this size it is the squared error again.
        operator: ``phi``, linear and invertible.
    """

    c: float
    operator: Operator = identity

    def __call__(self, at: Residual) -> dict[str, Tensor]:
        each = endpoint_errors(at, self.operator)
        return {"loss": (each / (each.detach() + self.c)).mean(), "endpoint": each.detach().mean()}


@final
@dataclass(frozen=True)
class Perceptual:
    """``max(t, floor) H(v, target) + d(x1_hat, x1)``, H the pseudo-Huber distance (LPIPS-Huber, arXiv:2405.20320).

    With ``floor = 0`` the noise end is learned through the features alone, and the velocity there is no flow-matching
    velocity: give a small floor where the flow is to be inverted or its likelihood taken. Gradients flow through the
    features to ``x1_hat``.

    Attributes:
        features: ``d(x, y)`` per row, (B,).
        floor: least weight of the pseudo-Huber distance.
        divided: divide the features' distance by ``1 - t`` (the paper's 1/t, for CIFAR-10).
    """

    features: Distance
    floor: float = 0.0
    divided: bool = False

    def __call__(self, at: Residual) -> dict[str, Tensor]:
        guess = at.x_t + expand_time(1 - at.t, at.v) * at.v
        far = self.features(guess, at.x1)
        if self.divided:
            far = far / (1 - at.t).clamp_min(MIN_REMAINING_TIME)
        near = at.t.clamp_min(self.floor) * pseudo_huber_rows(at.v, at.target)
        return {"loss": (near + far).mean(), "huber": near.detach().mean(), "features": far.detach().mean()}
