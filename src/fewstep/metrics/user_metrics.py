"""Metrics of the user's own: a function of samples and their conditions, with the standard error of its mean."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.metrics.evaluate import Scores

__all__ = ["ERROR", "UserMetric", "user_metrics"]

ERROR = "_error"  # ends the name under which a metric's standard error stands
OF_ROWS = (
    "model", "method", "steps", "nfe", "samples", "solver", "grid", "parameters", "scores", "relative_time", "control",
)  # fmt: skip

Metric = Callable[..., Any]


@final
class UserMetric:
    """A function that scores samples.

    It is called ``function(samples, **conditions)`` under ``torch.no_grad()``:

    - The first parameter is given the samples by position: float32 ``(num, *data_shape)`` on the CPU, in the data's own
      units. Padded entries have the value that zero in network units has.
    - Every further parameter is given the condition of its name, ``(num, ...)``: labels as class numbers int64, flags
      as bool, other whole numbers as int64, other numbers as float32. ``**kwargs`` is given all conditions that remain.
      A parameter with a default keeps it where there is no such condition.
    - A function whose parameters cannot be read (some built-in ones) is given the samples alone. Of a
      ``torch.nn.Module`` the parameters of ``forward`` count.

    It must not change its arguments. It returns one value per sample, ``(num,)``, whose mean and standard error
    ``sd / sqrt(num)`` (sd with num - 1) are reported, or one number, which has no standard error.

    Args:
        name: under which it is reported.
        function: the metric.

    Raises:
        UserError: ``function`` cannot be called with the samples.
    """

    def __init__(self, name: str, function: Metric) -> None:
        self.name, self.function = name, function
        if not callable(function):
            raise UserError(
                f"the metric {name!r} is a {type(function).__name__}: give a function that takes the samples "
                "(num, ...) and returns one value per sample."
            )
        self._parameters, self._takes_all = _parameters(name, function)

    def names(self, available: Collection[str], whose: str) -> tuple[str, ...]:
        """The conditions that it is given, of those that are available.

        Args:
            available: names of the conditions that the samples have.
            whose: which samples, for messages.

        Raises:
            UserError: it needs a condition that the samples do not have.
        """
        for name, parameter in self._parameters.items():
            if parameter.default is parameter.empty and name not in available:
                has = f"the conditions {', '.join(available)} alone" if available else "no conditions"
                raise UserError(
                    f"the metric {self.name!r} takes {name!r}, and {whose} have {has}. Name its parameters as the "
                    "conditions, or give them defaults."
                )
        return tuple(name for name in available if self._takes_all or name in self._parameters)

    def score(self, samples: Tensor, conditions: Mapping[str, Tensor], whose: str) -> dict[str, float]:
        """Mean and standard error by name, ``{"success": …, "success_error": …}``.

        Args:
            samples: ``(num, *data_shape)``.
            conditions: those of :meth:`names`, each ``(num, ...)``.
            whose: which samples, for messages.

        Raises:
            UserError: the function raised an error, or returned values of another shape or that are not finite.
        """
        try:
            with torch.no_grad():
                found = self.function(samples, **conditions)
        except Exception as error:
            given = ", ".join(["samples", *conditions])
            raise UserError(
                f"the metric {self.name!r} raised {type(error).__name__} for {whose}: {error}. It was called with "
                f"({given}); the samples have shape {tuple(samples.shape)}."
            ) from error
        values = self._values(found, len(samples), whose)
        scores = {self.name: float(values.mean())}
        if values.ndim:
            scores[self.name + ERROR] = float(values.std()) / math.sqrt(len(values))
        return scores

    def _values(self, found: Any, num: int, whose: str) -> Tensor:
        """What the function returned as float64, ``(num,)`` or ``()``."""
        wanted = f"one value per sample, ({num},), or one number"
        if not isinstance(found, Tensor):
            try:
                array = np.asarray(found)
            except ValueError:
                array = np.asarray(None)
            if array.dtype.kind not in "biuf":
                raise UserError(f"the metric {self.name!r} must return {wanted}, and returned {found!r:.80}.")
            found = torch.from_numpy(array.astype(np.float64))
        if tuple(found.shape) not in ((), (num,)) or found.is_complex():
            raise UserError(
                f"the metric {self.name!r} must return {wanted}, and for {whose} it returned {found.dtype} of shape "
                f"{tuple(found.shape)}."
            )
        values = found.detach().cpu().double()
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise UserError(
                f"the metric {self.name!r} returned NaN or infinity for {bad} of {values.numel()} of {whose}, and such "
                "values have no mean: give them a finite value."
            )
        return values


def _parameters(name: str, function: Metric) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters after the samples, by name, and whether there is a ``**kwargs``."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        return {}, False
    kinds = inspect.Parameter
    by_position = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    listed = list(signature.parameters.values())
    if not listed or listed[0].kind not in (*by_position, kinds.VAR_POSITIONAL):
        raise UserError(f"the metric {name!r} has no first parameter that takes the samples: write def f(x, ...).")
    rest = [p for p in listed[1:] if p.kind is not kinds.VAR_POSITIONAL]
    unnamed = [p.name for p in rest if p.kind is kinds.POSITIONAL_ONLY and p.default is p.empty]
    if unnamed:
        raise UserError(f"the metric {name!r} takes {unnamed[0]!r} by position only; conditions are passed by name.")
    named = {p.name: p for p in rest if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
    return named, any(p.kind is kinds.VAR_KEYWORD for p in rest)


def user_metrics(metrics: Mapping[str, Metric] | None) -> list[UserMetric]:
    """The user's metrics, checked.

    Raises:
        UserError: no mapping of names to functions; a name that the comparison itself uses.
    """
    if metrics is None:
        return []
    if not isinstance(metrics, Mapping):
        raise UserError(f"metrics is a {type(metrics).__name__}: give a mapping, metrics={{'success': f}}.")
    for name in metrics:
        _check_name(name, metrics)
    return [UserMetric(name, function) for name, function in metrics.items()]


def _check_name(name: Any, all_names: Iterable[str]) -> None:
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"a metric is called {name!r}: give it a name, metrics={{'success': f}}.")
    taken = {*OF_ROWS, *(entry.name for entry in fields(Scores))}
    if name in taken or name.startswith("FD-"):
        raise UserError(f"a metric is called {name!r}, which is the name of a score that every comparison has: rename.")
    if name + ERROR in all_names:
        raise UserError(
            f"a metric is called {name + ERROR!r}, and the standard error of the metric {name!r} stands under this "
            "name: rename it."
        )
