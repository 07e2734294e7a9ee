"""Time grids ``0 = t_0 < t_1 < … < t_N = 1`` for solvers, as float64 tuples.

A grid is a name (``uniform``), a name with values (``shift:3``, ``logit_normal:0,1``) or explicit times
(``0,0.2,1`` or a sequence). Explicit times fix the number of steps and may run in either direction; named grids
run from noise to data.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from fewstep.errors import UserError, unknown
from fewstep.flow.time_laws import LogitNormal

GridSpec = str | Sequence[float]
Grid = tuple[float, ...]


def uniform(steps: int) -> np.ndarray:
    """``t_k = k / N``, (N + 1,).

    >>> uniform(4).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    return np.arange(steps + 1) / steps


def shift(steps: int, s: float = 3.0) -> np.ndarray:
    """Shift the noise level ``sigma = 1 - t``: ``sigma' = s sigma / (1 + (s - 1) sigma)``.

    In ``lambda = logit t`` it is a shift by ``-log s``: ``s > 1`` puts more steps near noise, ``s < 1`` near data;
    ``s = 1`` is uniform. Default 3. Source: Stable Diffusion 3, arXiv:2403.03206, eq. 23.

    Raises:
        UserError: ``s`` is not positive.
    """
    if not s > 0:
        raise UserError(f"grid 'shift' needs a positive value, got {s}: write for example 'shift:3'.")
    t = uniform(steps)
    return t / (t + s * (1.0 - t))  # 1 - sigma', written so that both ends are exact


def quadratic(steps: int, p: float = 2.0) -> np.ndarray:
    """``(k/N)^p`` for ``p > 0``, ``1 - (1 - k/N)^|p|`` for ``p < 0``; default 2.

    For ``|p| > 1`` the steps are dense near noise with ``p > 0`` and near data with ``p < 0``.

    Raises:
        UserError: ``p`` is 0.
    """
    if p == 0:
        raise UserError("grid 'quadratic' needs a non-zero power: 'quadratic:2' or 'quadratic:-2'.")
    u = uniform(steps)
    return u**p if p > 0 else 1.0 - (1.0 - u) ** (-p)


def karras(steps: int, rho: float = 7.0, largest: float = 80.0, smallest: float = 0.002) -> np.ndarray:
    """``1 / (1 + s_k)``, ``s_k^(1/rho)`` evenly spaced from 80 down to .002; first 0, and 1 appended.

    Values: rho, largest and smallest ``s``; defaults 7, 80, .002. Dense near data. Source: Karras et al.,
    arXiv:2206.00364, eq. 5 with ``k = 0, …, N - 1``; ``s = sigma / alpha = (1 - t) / t`` on the linear path.

    Raises:
        UserError: rho is not positive, or largest > smallest > 0 does not hold.
    """
    if not (rho > 0 and largest > smallest > 0):
        raise UserError(
            f"grid 'karras' needs rho > 0 and largest > smallest > 0, got {rho:g},{largest:g},{smallest:g}: "
            "write for example 'karras:7,80,0.002'."
        )
    ratio = np.linspace(largest ** (1.0 / rho), smallest ** (1.0 / rho), max(steps, 2))[:steps] ** rho
    return _between(1.0 / (1.0 + ratio[1:]))


def logit_normal(steps: int, mu: float = 0.0, s: float = 1.0) -> np.ndarray:
    """Quantiles of the logit-normal law: ``sigmoid(mu + s Phi^-1(k/N))``; ``mu, s`` default 0, 1.

    Dense where the law is: in the middle for ``mu = 0``, near noise for ``mu < 0``, near data for ``mu > 0``. Source:
    the law of arXiv:2403.03206, eq. 19, as a grid; the ends are 0 and 1.

    Raises:
        UserError: ``s`` is not positive.
    """
    law = LogitNormal(mu, s)
    return _between(law.quantile(torch.from_numpy(uniform(steps)[1:-1])).numpy())


def uniform_lambda(steps: int, low: float = 5.0, high: float | None = None) -> np.ndarray:
    """``sigmoid(lambda_k)``, ``lambda_k`` even between ``-L`` and ``L``, ends moved to 0 and 1; ``L = 5``.

    One value is ``L``, two are the first and the last lambda. Source: the uniform log-signal-to-noise steps of
    DPM-Solver, arXiv:2206.00927, sec. 3.4; ``lambda = logit t`` on the linear path.

    Raises:
        UserError: the first lambda is not below the last.
    """
    if high is None:
        low, high = -low, low
    if not low < high:
        raise UserError(
            f"grid 'uniform_lambda' needs lambda to grow, got {low:g} to {high:g}: write for example "
            "'uniform_lambda:5' or 'uniform_lambda:-5,7'."
        )
    return _between(1.0 / (1.0 + np.exp(-np.linspace(low, high, steps + 1)[1:-1])))


def sigmoid(steps: int, kappa: float = 4.0) -> np.ndarray:
    """``(g(kappa (k/N - 1/2)) - g(-kappa/2)) / (g(kappa/2) - g(-kappa/2))``, ``g`` logistic; ``kappa`` default 4.

    With ``g(z) = (1 + tanh(z/2)) / 2`` it is ``1/2 + tanh(kappa (k/N - 1/2) / 2) / (2 tanh(kappa/4))``: symmetric,
    dense at both ends, and uniform as ``kappa -> 0``. Source: the grid of arXiv:2410.07815 for straightened flows.

    Raises:
        UserError: ``kappa`` is not positive.
    """
    if not kappa > 0:
        raise UserError(
            f"grid 'sigmoid' needs a positive value, got {kappa}: write for example 'sigmoid:4', or 'uniform', which "
            "is its limit at 0."
        )
    return _between(0.5 + np.tanh(kappa * (uniform(steps)[1:-1] - 0.5) / 2) / (2 * math.tanh(kappa / 4)))


def _between(inner: np.ndarray) -> np.ndarray:
    """Times strictly inside, with exact ends."""
    return np.array([0.0, *inner, 1.0])


GRIDS: dict[str, Callable[..., np.ndarray]] = {
    "uniform": uniform,
    "shift": shift,
    "quadratic": quadratic,
    "karras": karras,
    "logit_normal": logit_normal,
    "uniform_lambda": uniform_lambda,
    "sigmoid": sigmoid,
}


# grids that :mod:`fewstep.diagnostics.model_grids` computes from a model, with one line on each
FROM_MODEL = {
    "error": "Equal shares of Euler's endpoint error in every step, from the model's own profile of it.",
    "dp": "Least sum of the steps' errors along the model's own trajectories, by dynamic programming.",
}


def explicit_times(spec: GridSpec) -> Grid | None:
    """Return the times of an explicit grid, or None when ``spec`` names one.

    Raises:
        UserError: neither a name nor a list of times; times that :func:`check_times` refuses.

    >>> explicit_times("0,0.2,1"), explicit_times("shift:3")
    ((0.0, 0.2, 1.0), None)
    """
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
    """Refuse times that are fewer than two, outside [0, 1], not finite, or not strictly monotone.

    Raises:
        UserError: which of these, with the offending time.
    """
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
    """Return ``steps`` as an int.

    Raises:
        UserError: not a whole number of at least 1.
    """
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
        UserError: unknown name, steps below 1, steps and explicit times in conflict, times that are not monotone.

    >>> make_grid("quadratic:2", steps=2)
    (0.0, 0.25, 1.0)
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
    if name in FROM_MODEL:
        raise UserError(
            f"grid {name!r} is made from a model, and none is given here: call model.sample(…, grid={name!r}), or take "
            f"the times of fewstep.diagnostics.model_grids.model_grid({name!r}, v, x0, steps)."
        )
    if name not in GRIDS:
        raise unknown("grid", name, [*GRIDS, *FROM_MODEL])
    if steps is None:
        raise UserError(f"grid {name!r} needs the number of steps: pass steps=N.")
    with np.errstate(over="ignore", under="ignore"):  # times that overflow coincide and are refused below
        times = tuple(GRIDS[name](steps, *_values(name, spec, value)).tolist())
    if not all(t < s for t, s in itertools.pairwise(times)):
        raise UserError(
            f"grid {spec!r} with {steps} steps squeezes times together until they are equal: take a less extreme "
            "value, or fewer steps."
        )
    return times


def _values(name: str, spec: str, words: str) -> list[float]:
    """The numbers after the colon."""
    values = [_number(spec, word.strip()) for word in words.split(",")] if words else []
    most = len(inspect.signature(GRIDS[name]).parameters) - 1
    if len(values) > most:
        takes = f"at most {most} value{'s' if most > 1 else ''}" if most else "no value"
        raise UserError(f"grid {name!r} takes {takes}, got {spec!r}: write for example {name!r}.")
    return values


def _number(spec: str, word: str) -> float:
    try:
        number = float(word)
    except ValueError as error:
        raise UserError(f"grid {spec!r}: {word!r} is not a number. Write for example 'shift:3'.") from error
    if not math.isfinite(number):
        raise UserError(f"grid {spec!r}: the value must be finite.")
    return number
