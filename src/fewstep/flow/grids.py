"""Time grids ``0 = t_0 < t_1 < … < t_N = 1`` for solvers, as float64 tuples.

A grid is a name (``uniform``), a name with a value (``shift:3``) or explicit times (``0,0.2,1`` or a
sequence). Explicit times fix the number of steps and may run in either direction; named grids run from noise
to data.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fewstep.errors import UserError, unknown

GridSpec = str | Sequence[float]
Grid = tuple[float, ...]


def uniform(steps: int, value: float | None = None) -> np.ndarray:
    """``t_k = k / N``."""
    if value is not None:
        raise UserError("grid 'uniform' takes no value: write 'uniform'.")
    return np.arange(steps + 1) / steps


def shift(steps: int, value: float | None = None) -> np.ndarray:
    """Shift the noise level ``sigma = 1 - t``: ``sigma' = s sigma / (1 + (s - 1) sigma)``.

    (Stable Diffusion 3, arXiv:2403.03206, eq. 23.) In ``lambda = logit t`` it is a shift by ``-log s``:
    ``s > 1`` puts more steps near noise, ``s < 1`` near data; ``s = 1`` is uniform. Default 3.
    """
    s = 3.0 if value is None else value
    if not s > 0:
        raise UserError(f"grid 'shift' needs a positive value, got {s}: write for example 'shift:3'.")
    t = uniform(steps)
    return t / (t + s * (1.0 - t))  # 1 - sigma', written so that both ends are exact


def quadratic(steps: int, value: float | None = None) -> np.ndarray:
    """``(k/N)^p`` for ``p > 0``, ``1 - (1 - k/N)^|p|`` for ``p < 0``; default 2.

    For ``|p| > 1`` the steps are dense near noise with ``p > 0`` and near data with ``p < 0``.
    """
    p = 2.0 if value is None else value
    if p == 0:
        raise UserError("grid 'quadratic' needs a non-zero power: 'quadratic:2' or 'quadratic:-2'.")
    u = uniform(steps)
    return u**p if p > 0 else 1.0 - (1.0 - u) ** (-p)


GRIDS: dict[str, Callable[[int, float | None], np.ndarray]] = {
    "uniform": uniform,
    "shift": shift,
    "quadratic": quadratic,
}


def explicit_times(spec: GridSpec) -> Grid | None:
    """Return the times of an explicit grid, or None when ``spec`` names one."""
    if isinstance(spec, str):
        if not any(c.isdigit() for c in spec.split(",")[0]) or ":" in spec:
            return None
        words: Sequence[str | float] = [w for w in spec.split(",") if w.strip()]
    elif isinstance(spec, Iterable):
        words = list(spec)
    else:
        raise UserError(f"grid {spec!r} is neither a name ('uniform', 'shift:3') nor a list of times ('0,0.2,1').")
    try:
        times = tuple(float(w) for w in words)
    except (TypeError, ValueError) as error:
        raise UserError(f"grid {spec!r} is not a list of times: {error}. Write for example '0,0.2,1'.") from error
    check_times(times)
    return times


def check_times(times: Grid) -> None:
    """Refuse a grid that is too short, leaves [0, 1], is not finite, or turns round."""
    if len(times) < 2:
        raise UserError(f"a grid needs at least two times, got {list(times)}: write for example '0,0.5,1'.")
    bad = [t for t in times if not (math.isfinite(t) and 0.0 <= t <= 1.0)]
    if bad:
        raise UserError(f"grid times must lie in [0, 1] (0 is noise, 1 is data), got {bad[0]}.")
    steps = np.diff(times)
    if not (np.all(steps > 0) or np.all(steps < 0)):
        raise UserError(
            f"grid {list(times)} turns round or repeats a time: give strictly increasing times (noise to "
            "data) or strictly decreasing ones (data to noise)."
        )


def check_steps(steps: float) -> int:
    """Refuse a number of steps that is not a whole number of at least 1."""
    if isinstance(steps, float):
        number = int(steps) if steps.is_integer() else 0
    else:
        try:
            number = operator.index(steps)
        except TypeError:
            number = 0
    if isinstance(steps, bool) or number < 1:
        raise UserError(f"steps must be a whole number of at least 1, got {steps!r}.")
    return number


def make_grid(spec: GridSpec = "uniform", steps: int | None = None) -> Grid:
    """Turn a grid specification into times.

    Args:
        spec: a name, ``name:value``, explicit times as ``"0,0.2,1"`` or as a sequence.
        steps: number of solver steps; with explicit times it may be left out, and must agree when given.

    Returns:
        ``steps + 1`` strictly monotone times in [0, 1].

    Raises:
        UserError: unknown name, steps below 1, steps and explicit times in conflict, times that turn round.
    """
    if steps is not None:
        steps = check_steps(steps)
    times = explicit_times(spec)
    if times is not None:
        if steps is not None and steps != len(times) - 1:
            raise UserError(
                f"steps={steps} and the explicit grid of {len(times) - 1} steps contradict each other: "
                "leave steps out, or name a grid ('uniform')."
            )
        return times
    assert isinstance(spec, str)
    name, _, value = spec.partition(":")
    if name not in GRIDS:
        raise unknown("grid", name, GRIDS)
    if steps is None:
        raise UserError(f"grid {name!r} needs the number of steps: pass steps=N.")
    times = tuple(GRIDS[name](steps, _number(spec, value)).tolist())
    if not all(t < s for t, s in itertools.pairwise(times)):
        raise UserError(
            f"grid {spec!r} with {steps} steps squeezes times together until they coincide: take a milder "
            "value, or fewer steps."
        )
    return times


def _number(spec: str, value: str) -> float | None:
    if not value:
        return None
    try:
        number = float(value)
    except ValueError as error:
        raise UserError(f"grid {spec!r}: {value!r} is not a number. Write for example 'shift:3'.") from error
    if not math.isfinite(number):
        raise UserError(f"grid {spec!r}: the value must be finite.")
    return number
