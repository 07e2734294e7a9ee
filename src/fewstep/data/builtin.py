"""The built-in data: four distributions in the plane, and the scikit-learn digits.

The 2-D sets are drawn by numpy from a PCG64 generator, so a seed gives the same rows on every machine.

- ``eight_gaussians``: equal mixture of ``N(4 (cos k pi/4, sin k pi/4), 0.4^2 I)``, k = 0..7.
- ``moons``: half circles ``(cos a, sin a)`` and ``(1 - cos a, 1/2 - sin a)``, a ~ U(0, pi), plus
  ``N(0, 0.1^2 I)``.
- ``checkerboard``: uniform on the squares of ``[-4, 4]^2``, of side 2, with ``floor(x/2) + floor(y/2)`` even.
- ``pinwheel``: five arms; ``(1 + 0.3 e, 0.1 f)`` with e, f ~ N(0, 1) is turned by
  ``2 pi k/5 + exp(1 + 0.3 e)/4`` and doubled (Johnson et al., arXiv:1603.06277).
- ``digits``: 1797 grey images of 8 x 8 pixels, whole numbers 0 to 16 (UCI optical digits, test part).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = ["DATA", "Builtin"]

Labels = NDArray[np.int64] | None
RowsAndLabels = tuple[NDArray[Any], Labels]


def eight_gaussians(num: int, rng: np.random.Generator) -> RowsAndLabels:
    """Draw rows ``(num, 2)`` of the mixture; the label is the component k."""
    component = rng.integers(8, size=num)
    angle = component * (math.pi / 4)
    centre = 4.0 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return centre + 0.4 * rng.standard_normal((num, 2)), component


def moons(num: int, rng: np.random.Generator) -> RowsAndLabels:
    """Draw rows ``(num, 2)`` of the half circles; the label is 0 for the upper one, 1 for the lower one."""
    moon = rng.integers(2, size=num)
    angle = rng.uniform(0.0, math.pi, num)
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    lower = np.stack([1.0 - np.cos(angle), 0.5 - np.sin(angle)], axis=1)
    return np.where(moon[:, None] == 0, upper, lower) + 0.1 * rng.standard_normal((num, 2)), moon


def checkerboard(num: int, rng: np.random.Generator) -> RowsAndLabels:
    """Draw rows ``(num, 2)`` of the board, without labels."""
    column, half = rng.integers(4, size=num), rng.integers(2, size=num)
    corner = np.stack([column, 2 * half + column % 2], axis=1) - 2
    return 2.0 * (corner + rng.uniform(size=(num, 2))), None


def pinwheel(num: int, rng: np.random.Generator) -> RowsAndLabels:
    """Draw rows ``(num, 2)`` of the pinwheel; the label is the arm k.

    Source: Johnson et al., arXiv:1603.06277.
    """
    arm = rng.integers(5, size=num)
    radial, tangential = 1.0 + 0.3 * rng.standard_normal(num), 0.1 * rng.standard_normal(num)
    angle = arm * (2 * math.pi / 5) + 0.25 * np.exp(radial)
    x = radial * np.cos(angle) - tangential * np.sin(angle)
    y = radial * np.sin(angle) + tangential * np.cos(angle)
    return 2.0 * np.stack([x, y], axis=1), arm


def _digits(num: int, rng: np.random.Generator) -> RowsAndLabels:
    """Load all images as uint8 ``(1797, 8, 8)``; the label is the digit. ``num`` and ``rng`` are not used."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images.astype(np.uint8), found.target.astype(np.int64)


@final
@dataclass(frozen=True)
class Builtin:
    """A built-in data set.

    Args:
        description: the line that ``fewstep list data`` prints.
        make: ``(num, rng) -> rows, labels or None``.
        rows: default number of rows for a set that is drawn; None for a fixed set.
        value_range: smallest and largest possible value of discrete data, which is then scaled to -1..1;
            None for continuous data.
    """

    description: str
    make: Callable[[int, np.random.Generator], RowsAndLabels]
    rows: int | None = 20_000
    value_range: tuple[float, float] | None = None


DATA: dict[str, Builtin] = {
    "eight_gaussians": Builtin("2-D, eight Gaussians on a circle; labels: component", eight_gaussians),
    "moons": Builtin("2-D, two interleaved half circles; labels: upper or lower", moons),
    "checkerboard": Builtin("2-D, uniform on eight squares of a 4 x 4 board; no labels", checkerboard),
    "pinwheel": Builtin("2-D, five curved arms; labels: arm", pinwheel),
    "digits": Builtin("1797 grey images 8 x 8 (scikit-learn); labels: digit", _digits, None, (0.0, 16.0)),
}
"""The built-in data sets by name; ``load_data`` accepts these names."""
