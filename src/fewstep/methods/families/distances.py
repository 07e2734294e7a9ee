r"""Distances between a prediction and its target, and the losses of a velocity that use them.

A :data:`Distance` compares two batches; it does not depend on t. A :data:`Loss` gets a :class:`Residual`, with t and
x_t, because on the linear path a velocity is also a prediction of the endpoint,

    x1_hat = x_t + (1 - t) v,      x1_hat - x1 = (1 - t) (v - (x1 - x0)).

The squared distance has its minimum at the mean ``E[target | x_t]``, and so has ``|phi(e)|^2`` for every linear
invertible ``phi``. The other losses here (absolute, pseudo-Huber, features, errors divided by their own size) have
their minimum elsewhere, unless the pairs are deterministic, so that there is one target per x_t.
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

STRENGTH = 10.0  # default strength of the high-pass filter (arXiv:2410.07815)
MIN_REMAINING_TIME = 1e-5  # lower bound of the divisor 1 - t of a distance of endpoints, so that t = 1 is finite
# Least number of values per sample with which a robust loss is accepted for noisy targets; chosen, not tuned. With one
# value, 'l1' makes a mode of 20 % one of 12 %.
FEW_VALUES = 50


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error over all entries of x and y (B, ...), a scalar.

    >>> l2(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)).item()
    5.0
    """
    return (x - y).square().mean()


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error over all entries of x and y (B, ...), a scalar.

    >>> l1(torch.tensor([[1.0, -3.0]]), torch.zeros(1, 2)).item()
    2.0
    """
    return (x - y).abs().mean()


def pseudo_huber(x: Tensor, y: Tensor, share: float = 0.03) -> Tensor:
    """The mean over rows of :func:`pseudo_huber_rows`, a scalar."""
    return pseudo_huber_rows(x, y, share).mean()


def pseudo_huber_rows(x: Tensor, y: Tensor, share: float = 0.03) -> Tensor:
    """``(sqrt(|e|^2 + c^2) - c) / D`` per row, (B,), with ``e = x - y`` and ``c = share sqrt(D)``.

    It is about ``|e|^2 / (2 c D)`` for errors well below ``share`` per entry and about ``|e| / D`` for larger ones. The
    norm of its gradient ``e / (D sqrt(|e|^2 + c^2))`` is below 1/D.

    Args:
        x, y: (B, ...) with D entries per row.
        share: c per square root of D. For 3x32x32 the default gives c = 1.66, as does the 0.00054 D of 2-RF++'s code.

    Source: arXiv:2310.14189, sec. 3.3.

    >>> round(pseudo_huber_rows(torch.tensor([[4.0]]), torch.zeros(1, 1), share=3.0).item(), 6)
    2.0
    """
    e = (x - y).flatten(1)
    size = e.shape[1]
    c = share * math.sqrt(size)
    return ((e.square().sum(1) + c * c).sqrt() - c) / size


def identity(x: Tensor) -> Tensor:
    """The operator ``phi(x) = x``."""
    return x


def high_pass(x: Tensor, strength: float = STRENGTH) -> Tensor:
    """``phi(x) = x + strength (x - blur(x))`` of images (B, C, H, W), with the 3x3 Gaussian blur (1 2 1)(1 2 1)^T / 16.

    Edges are repeated. Along a side of length n the blur is then a symmetric operator, with the cosines of the DCT-II
    as eigenvectors and the eigenvalues ``cos(pi k / 2n)^2``, ``k = 0, …, n - 1``, in (0, 1]. So the eigenvalues of
    ``phi`` lie in ``[1, 1 + strength)``: phi is invertible, does not change constant images, and amplifies the highest
    frequencies most.

    Args:
        x: images (B, C, H, W).
        strength: 0 is the identity.

    Source: arXiv:2410.07815; eigenvalues derived.

    >>> high_pass(torch.ones(1, 1, 4, 4)).unique()
    tensor([1.])
    """
    return x + strength * (x - _smooth(_smooth(x, -1), -2))


def _smooth(x: Tensor, side: int) -> Tensor:
    """(1 2 1) / 4 along one side, the edges repeated."""
    size = x.shape[side]
    padded = torch.cat([x.narrow(side, 0, 1), x, x.narrow(side, size - 1, 1)], side)
    return (padded.narrow(side, 0, size) + 2 * x + padded.narrow(side, 2, size)) / 4


def high_passed_l2(x: Tensor, y: Tensor, strength: float = STRENGTH) -> Tensor:
    """Mean of ``phi(x - y)^2`` over all entries, a scalar, with phi the :func:`high_pass` (arXiv:2410.07815)."""
    return high_pass(x - y, strength).square().mean()


DISTANCES: dict[str, Distance] = {"l2": l2, "l1": l1, "huber": pseudo_huber, "highpass": high_passed_l2}
VALUED = ("huber", "highpass")  # distances that take a positive number, written ``name:value``
ROBUST = ("l1", "huber")  # distances whose minimum over several targets is not their mean, but a median or near one


def require_many_values(what: str, robust: bool, shape: Sequence[int], fix: str) -> None:
    """Refuse a robust loss on noisy targets if samples have few values.

    In flow matching one x_t has many targets, and the solution is their mean; a robust loss has its minimum near their
    median. ``huber`` depends on the norm of a row's error. That norm hardly varies if a row has many values, so huber
    then acts as a constant weight. ``l1`` is a sum over the values, so its bias per value does not shrink.

    Args:
        what: the option, for the message.
        robust: whether the loss is robust and the targets are noisy.
        shape: of one sample.
        fix: what to do instead, for the message.

    Raises:
        UserError: ``robust``, and samples have fewer than 50 values.
    """
    if robust and math.prod(shape) < FEW_VALUES:
        raise UserError(
            f"'{what}' has its minimum at a median of the targets, and the flow's velocity is their mean. With "
            f"{math.prod(shape)} value(s) per sample another map would be learned (measured in one dimension: a mode "
            f"of 20 % becomes one of 12 %): {fix}."
        )


def robust_note(name: str) -> str:
    """The note that is printed for a robust loss on noisy targets which :func:`require_many_values` accepts.

    Args:
        name: ``l1`` or ``huber``.
    """
    effect = {
        "l1": "learns the median of each value's targets and not their mean, which differ if the targets are skewed",
        "huber": "weights rows by their error, which moves the solution slightly from the targets' mean to their mode",
    }
    return f"note: 'loss: {name}' on noisy targets {effect[name]}. 'l2' is exact."


def find_distance(spec: str) -> Distance:
    """The distance of a name.

    Args:
        spec: ``l2``, ``l1``, ``huber``, ``huber:share``, ``highpass`` or ``highpass:strength``.

    Raises:
        UserError: there is no such distance, the value is not a positive number, or the distance takes no value.

    >>> find_distance("huber:3")(torch.tensor([[4.0]]), torch.zeros(1, 1)).item()
    2.0
    """
    name, value = distance_words(spec, DISTANCES)
    return DISTANCES[name] if value is None else partial(_with_value, DISTANCES[name], value)


def _with_value(distance: Callable[..., Tensor], value: float, x: Tensor, y: Tensor) -> Tensor:
    return distance(x, y, value)


def distance_words(spec: str, known: Collection[str], valued: Collection[str] = VALUED) -> tuple[str, float | None]:
    """Split ``name`` or ``name:value`` and check both.

    Args:
        spec: the option.
        known: names of distances.
        valued: the names that take a value.

    Returns:
        The name, and the value or None.

    Raises:
        UserError: as :func:`find_distance`.

    >>> distance_words("huber:0.1", DISTANCES)
    ('huber', 0.1)
    """
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
    """A network's velocity and its target at the same points.

    Attributes:
        v: the network's velocity at (x_t, t), (B, ...).
        target: of v, (B, ...).
        x_t: the points (B, ...).
        x1: the pairs' endpoints (B, ...).
        t: the times (B,).
    """

    v: Tensor
    target: Tensor
    x_t: Tensor
    x1: Tensor
    t: Tensor


Loss = Callable[[Residual], dict[str, Tensor]]  # named scalar terms, of which "loss" is minimised


@final
@dataclass(frozen=True)
class Plain:
    """The loss ``d(v, target)``.

    Attributes:
        distance: d.
    """

    distance: Distance

    def __call__(self, at: Residual) -> dict[str, Tensor]:
        return {"loss": self.distance(at.v, at.target)}


def endpoint_errors(at: Residual, operator: Operator) -> Tensor:
    """``|phi(x1_hat - x1)|^2 / D`` per row, (B,), on the linear path: ``(1 - t)^2`` times the velocity's error.

    Args:
        at: velocities and targets.
        operator: ``phi``, linear.
    """
    error = expand_time(1 - at.t, at.v) * (at.v - at.target)
    return operator(error).flatten(1).square().mean(1)


@final
@dataclass(frozen=True)
class Normalised:
    """The mean over rows of ``l / (sg[l] + c)``, with l the :func:`endpoint_errors` and sg: without gradient.

    Its gradient is that of ``log(l + c)``, so rows whose errors differ by orders of magnitude contribute equally. It is
    for deterministic pairs only. With several targets for one x_t its minimum is not their mean but near the most
    probable one. Example: for the targets 0 (probability .8) and 1, whose mean is .2, the minimum is at 0.00, 0.02,
    0.19 for c = .001, .1, 10.

    Attributes:
        c: for errors l well below c, the loss is the squared error divided by c.
        operator: ``phi``, linear and invertible.

    Source: arXiv:2410.07815.
    """

    c: float
    operator: Operator = identity

    def __call__(self, at: Residual) -> dict[str, Tensor]:
        each = endpoint_errors(at, self.operator)
        return {"loss": (each / (each.detach() + self.c)).mean(), "endpoint": each.detach().mean()}


@final
@dataclass(frozen=True)
class Perceptual:
    """``max(t, floor) H(v, target) + d(x1_hat, x1)``, with H the pseudo-Huber distance (LPIPS-Huber).

    With ``floor = 0`` only the features' distance is left at t = 0, so the velocity there is not that of flow matching.
    Set a small floor if the flow is to be inverted or its likelihood computed. Gradients pass through the features to
    ``x1_hat``.

    Attributes:
        features: ``d(x, y)`` per row, (B,).
        floor: least weight of the pseudo-Huber distance.
        divided: whether d is divided by ``1 - t`` (the paper's 1/t, used there for CIFAR-10).

    Source: arXiv:2405.20320.
    """

    features: Distance
    floor: float = 0.0
    divided: bool = False

    def __call__(self, at: Residual) -> dict[str, Tensor]:
        x1_hat = at.x_t + expand_time(1 - at.t, at.v) * at.v
        features = self.features(x1_hat, at.x1)
        if self.divided:
            features = features / (1 - at.t).clamp_min(MIN_REMAINING_TIME)
        huber = at.t.clamp_min(self.floor) * pseudo_huber_rows(at.v, at.target)
        return {
            "loss": (huber + features).mean(),
            "huber": huber.detach().mean(),
            "features": features.detach().mean(),
        }
