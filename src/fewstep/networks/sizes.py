"""Smaller networks: ``size`` is the share of another network's parameters that a network is to have.

Widths and the embedding shrink by one factor ``f``, depth stays: most parameters are in square matrices, so the count
falls about as ``f^2``. A U-Net's widths are those that divide into groups of normalisation and heads of attention no
more than twice as large as usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch

from fewstep.errors import UserError
from fewstep.networks.registry import build, parameter_count

LEAST = 8  # the smallest width
FACTORS = 512  # between none and the whole of the widths

Scaled = Callable[[Mapping[str, Any], float], dict[str, Any]]


def read_size(value: object) -> float:
    """The share of parameters: a number in (0, 1], or a fraction in words such as ``1/4``.

    Raises:
        UserError: anything else.
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
    """The resolved configuration whose parameter count is nearest to ``size`` times that of ``config``.

    Args:
        config: a resolved configuration (see :func:`fewstep.networks.resolve`).
        size: as :func:`read_size` takes it; 1 returns the configuration unchanged.

    Returns:
        A resolved configuration of the same kind and depth, no wider anywhere.

    Raises:
        UserError: a size outside (0, 1], or a kind of network without sizes.
    """
    share = read_size(size)
    if config["name"] not in SCALED:
        raise UserError(
            f"network {config['name']!r} has no sizes (only {', '.join(SCALED)} have): give the student's network its "
            "own options instead of 'size'."
        )
    if share == 1.0:
        return dict(config)
    scaled = SCALED[config["name"]]
    wanted = share * _count(config)
    low, high = 1, FACTORS  # counts rise with the factor: the wanted one lies between
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _count(scaled(config, middle / FACTORS)) <= wanted else (low, middle)
    nearest = (scaled(config, number / FACTORS) for number in (low, high))
    return min(nearest, key=lambda one: abs(_count(one) - wanted))


def _mlp(config: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Widths in steps of 4, which vector units like; of 2 below 64, where 4 would be coarse."""
    width = factor * config["width"]
    return {
        **config,
        "width": _rounded(width, 4 if width >= 64 else 2, config["width"]),
        "embedding": _rounded(factor * config["embedding"], 2, config["embedding"]),
    }


def _unet(config: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {
        **config,
        "widths": [_divisible(factor * width, width) for width in config["widths"]],
        "embedding": _rounded(factor * config["embedding"], 2, config["embedding"]),
    }


SCALED: dict[str, Scaled] = {"mlp": _mlp, "unet": _unet}


def _rounded(value: float, step: int, most: int) -> int:
    """The multiple of ``step`` nearest to ``value``, at least :data:`LEAST` and at most ``most``."""
    return min(most, max(LEAST, step * round(value / step)))


def _divisible(value: float, most: int) -> int:
    """The even width nearest to ``value`` that divides well."""
    fitting = (width for width in range(LEAST, max(most, LEAST) + 1, 2) if _divides(width))
    return min(most, min(fitting, key=lambda width: abs(width - value)))


def _divides(width: int) -> bool:
    """Whether the U-Net finds at least half of ``width // 16`` groups and ``width // 32`` heads that divide it."""
    return all(2 * math.gcd(width, max(1, width // part)) >= width // part for part in (16, 32))


def _count(config: Mapping[str, Any]) -> int:
    """Parameters of a network, built without memory or random numbers."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return parameter_count(build(config))
