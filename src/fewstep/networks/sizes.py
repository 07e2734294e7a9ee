"""Smaller networks: ``size`` is the number of parameters as a share of another network's.

Widths and the embedding are multiplied by one factor ``f``, and the depth is kept. Most parameters are in square
matrices, so their number is about proportional to ``f^2``. A width of a U-Net must divide into normalisation groups
and attention heads that are at most twice as large as usual (16 and 32 channels).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch

from fewstep.errors import UserError
from fewstep.networks.registry import build, parameter_count

MIN_WIDTH = 8  # chosen, not tuned
FACTOR_STEPS = 512  # the factor is searched among 1/512, 2/512, ..., 1; chosen, not tuned

Scaled = Callable[[Mapping[str, Any], float], dict[str, Any]]


def read_size(value: object) -> float:
    """Read a share of parameters: a number in (0, 1], or a fraction such as ``"1/4"``.

    Raises:
        UserError: the value is anything else.

    >>> read_size("1/4")
    0.25
    """
    try:
        share = float(Fraction(value)) if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        share = math.nan
    if isinstance(value, bool) or not 0.0 < share <= 1.0:
        raise UserError(
            f"network.size is {value!r}, but it must be the share of the teacher's parameters, in (0, 1], such as "
            "0.25 or 1/4."
        )
    return share


def shrink(config: Mapping[str, Any], size: object) -> dict[str, Any]:
    """Find the configuration whose number of parameters is nearest to ``size`` times that of ``config``.

    Args:
        config: a resolved configuration (see :func:`fewstep.networks.resolve`).
        size: a value that :func:`read_size` accepts; 1 returns the configuration unchanged.

    Returns:
        A resolved configuration of the same kind and depth, with no width larger than in ``config``.

    Raises:
        UserError: a size outside (0, 1], or a kind of network that cannot be scaled.
    """
    share = read_size(size)
    if config["name"] not in SCALED:
        raise UserError(
            f"network {config['name']!r} has no sizes (only {', '.join(SCALED)} have): give the options of the "
            "student's network instead of 'size'."
        )
    if share == 1.0:
        return dict(config)
    scaled = SCALED[config["name"]]
    wanted = share * _count(config)
    low, high = 1, FACTOR_STEPS  # bisection: the number of parameters rises with the factor
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _count(scaled(config, middle / FACTOR_STEPS)) <= wanted else (low, middle)
    nearest = (scaled(config, number / FACTOR_STEPS) for number in (low, high))
    return min(nearest, key=lambda one: abs(_count(one) - wanted))


def _mlp(config: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Scale the widths to multiples of 4, for vector units, or of 2 below 64, where steps of 4 are over 6 %."""
    width = factor * config["width"]
    return {
        **config,
        "width": _rounded(width, 4 if width >= 64 else 2, config["width"]),
        "embedding": _rounded(factor * config["embedding"], 2, config["embedding"]),
    }


def _unet(config: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Scale the widths to even numbers that divide into groups and heads."""
    return {
        **config,
        "widths": [_divisible(factor * width, width) for width in config["widths"]],
        "embedding": _rounded(factor * config["embedding"], 2, config["embedding"]),
    }


SCALED: dict[str, Scaled] = {"mlp": _mlp, "unet": _unet}


def _rounded(value: float, step: int, most: int) -> int:
    """The multiple of ``step`` nearest to ``value``, at least :data:`MIN_WIDTH` and at most ``most``."""
    return min(most, max(MIN_WIDTH, step * round(value / step)))


def _divisible(value: float, most: int) -> int:
    """The even width nearest to ``value`` that divides into groups and heads."""
    fitting = (width for width in range(MIN_WIDTH, max(most, MIN_WIDTH) + 1, 2) if _divides(width))
    return min(most, min(fitting, key=lambda width: abs(width - value)))


def _divides(width: int) -> bool:
    """Whether the U-Net gets at least half of ``width // 16`` groups and of ``width // 32`` heads.

    Their numbers are the greatest common divisors with the width.
    """
    return all(2 * math.gcd(width, max(1, width // part)) >= width // part for part in (16, 32))


def _count(config: Mapping[str, Any]) -> int:
    """Number of parameters of a network, built on the meta device: no memory, no random numbers."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return parameter_count(build(config))
