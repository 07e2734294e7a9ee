r"""Time laws: the distributions that training times are drawn from.

Every law is given by its quantile function (inverse distribution function), so one uniform draw u in [0, 1)
makes t = quantile(u), whatever the law: ``law.sample(u)`` is deterministic, increasing in u, and always below 1.

A name with its parameters makes a law: ``make_time_law("logit_normal:0,1")``, ``"ushape:4"``, ``"uniform"``.
Times are ours, t = 0 noise. A paper's law on tau = 1 - t changes sides: logit-normal(mu, s) on tau is
logit-normal(-mu, s) here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import final

import torch
from torch import Tensor

from fewstep.errors import UserError, unknown


class TimeLaw(ABC):
    """A distribution of training times on [0, 1)."""

    def sample(self, u: Tensor) -> Tensor:
        """Times of uniform draws: ``min(quantile(u), 1 - eps / 2)``, the largest number below 1 in u's precision.

        The time 1 itself is no training time: on the ``vp`` and ``interpolant`` paths the velocity target is infinite
        there. A quantile function can round to it: that of ``logit_normal:0,4`` does for u = 1 - 2^-24 in float32.

        Args:
            u: draws of U[0, 1), any shape, floating point.

        Returns:
            Times in [0, 1), shape and dtype of ``u``.

        >>> float(LogitNormal(0.0, 4.0).sample(torch.tensor(1 - 2**-24))) < 1
        True
        """
        return self.quantile(u).clamp(max=1 - torch.finfo(u.dtype).eps / 2)

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Quantile function, the inverse of the distribution function: u in [0, 1] (any shape) to times in [0, 1]."""

    @abstractmethod
    def density(self, t: Tensor) -> Tensor:
        """Probability density at t in [0, 1]."""


@final
@dataclass(frozen=True)
class Uniform(TimeLaw):
    """p(t) = 1."""

    def quantile(self, u: Tensor) -> Tensor:
        """t = u."""
        return u

    def density(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)


@final
@dataclass(frozen=True)
class LogitNormal(TimeLaw):
    """logit t ~ N(mu, s^2): most weight in the middle (arXiv:2403.03206, eq. 19).

    Args:
        mu: centre in logits; positive leans to the data.
        s: spread in logits, positive.
    """

    mu: float = 0.0
    s: float = 1.0

    def __post_init__(self) -> None:
        _finite("logit_normal", self)
        if self.s <= 0:
            raise UserError(f"logit_normal: s = {self.s} is a standard deviation and must be positive.")

    def quantile(self, u: Tensor) -> Tensor:
        """t = sigmoid(mu + s Phi^-1(u))."""
        return torch.sigmoid(self.mu + self.s * torch.special.ndtri(u))

    def density(self, t: Tensor) -> Tensor:
        """exp(-(logit t - mu)^2 / (2 s^2)) / (s sqrt(2 pi) t (1 - t)), and 0 at the ends."""
        inside = (t > 0) & (t < 1)
        safe = torch.where(inside, t, 0.5)
        z = (torch.logit(safe) - self.mu) / self.s
        value = torch.exp(-z * z / 2) / (self.s * math.sqrt(2 * math.pi) * safe * (1 - safe))
        return torch.where(inside, value, 0.0)


@final
@dataclass(frozen=True)
class UShaped(TimeLaw):
    """p(t) = a (e^{a t} + e^{a (1 - t)}) / (2 (e^a - 1)): most weight at both ends (arXiv:2405.20320).

    The sum is 2 e^{a/2} cosh(a (t - 1/2)), so p = a cosh(a (t - 1/2)) / (2 sinh(a/2)), the distribution
    function is 1/2 + sinh(a (t - 1/2)) / (2 sinh(a/2)), and it inverts in closed form.

    Args:
        a: 0 < a <= 100; the density at the ends is cosh(a/2) times that in the middle.
    """

    a: float = 4.0

    def __post_init__(self) -> None:
        _finite("ushape", self)
        if not 0 < self.a <= 100:
            raise UserError(f"ushape: a = {self.a} must be in (0, 100]; a -> 0 is the law 'uniform'.")

    def quantile(self, u: Tensor) -> Tensor:
        """t = 1/2 + asinh((2 u - 1) sinh(a/2)) / a."""
        return (0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a).clamp(0.0, 1.0)

    def density(self, t: Tensor) -> Tensor:
        """a cosh(a (t - 1/2)) / (2 sinh(a/2))."""
        return self.a / (2 * math.sinh(self.a / 2)) * torch.cosh(self.a * (t - 0.5))


@final
@dataclass(frozen=True)
class Exponential(TimeLaw):
    """p(t) = rate e^{-rate t} / (1 - e^{-rate}); the default is 10^{1 - t} up to a constant (arXiv:2410.07815).

    Args:
        rate: positive leans to the noise, negative to the data; not 0.
    """

    rate: float = math.log(10.0)

    def __post_init__(self) -> None:
        _finite("exponential", self)
        if self.rate == 0 or abs(self.rate) > 80:
            raise UserError(
                f"exponential: rate = {self.rate} must be in [-80, 80], not 0; rate 0 is the law 'uniform'."
            )

    def quantile(self, u: Tensor) -> Tensor:
        """t = -log(1 - u (1 - e^{-rate})) / rate, computed from the end of larger density to keep all digits."""
        size = abs(self.rate)
        near = u if self.rate > 0 else 1 - u
        t = (-torch.log1p(near * math.expm1(-size)) / size).clamp(0.0, 1.0)
        return t if self.rate > 0 else 1 - t

    def density(self, t: Tensor) -> Tensor:
        """rate e^{-rate t} / (1 - e^{-rate})."""
        return -self.rate / math.expm1(-self.rate) * torch.exp(-self.rate * t)


TIME_LAWS: dict[str, type[TimeLaw]] = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "ushape": UShaped,
    "exponential": Exponential,
}


def make_time_law(spec: str) -> TimeLaw:
    """Build a law from ``"name"`` or ``"name:number,number"``; missing numbers take their defaults.

    Raises:
        UserError: an unknown name, words that are no numbers, too many numbers, a number out of its range.

    >>> make_time_law("logit_normal:0,1")
    LogitNormal(mu=0.0, s=1.0)
    """
    name, _, rest = spec.partition(":")
    if name not in TIME_LAWS:
        raise unknown("time law", name, TIME_LAWS)
    law = TIME_LAWS[name]
    names = _parameters(law)
    usage = f"{name}:{','.join(names)}" if names else f"{name} (it has no numbers)"
    try:
        numbers = [float(word) for word in rest.split(",")] if rest else []
    except ValueError:
        raise UserError(f"time law {spec!r}: {rest!r} is not a list of numbers; write {usage}.") from None
    if len(numbers) > len(names):
        raise UserError(f"time law {spec!r} has {len(numbers)} numbers, too many: write {usage}.")
    return law(*numbers)


def _parameters(law: type[TimeLaw]) -> list[str]:
    return [f.name for f in fields(law)]  # type: ignore[arg-type]


def _finite(name: str, law: LogitNormal | UShaped | Exponential) -> None:
    for key in _parameters(type(law)):
        value = getattr(law, key)
        if not math.isfinite(value):
            raise UserError(f"{name}: {key} = {value} must be a finite number.")
