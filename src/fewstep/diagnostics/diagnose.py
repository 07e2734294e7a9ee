"""Straightness, curvature, error and stiffness of a flow, measured along its own trajectories.

From fine RK4 trajectories ``Z_t``, one per noise, on panels as short as the flow needs (:mod:`.profiles`):

- straightness ``S = int_0^1 E|(Z_1 - Z_0) - v(Z_t, t)|^2 dt`` (arXiv:2209.03003, sec. 2.2): zero exactly when
  every trajectory is a straight line run at constant speed, and then one Euler step is exact;
- acceleration ``Z'' = ∂_t v + (∂_x v) v`` and its part normal to the velocity: the first counts changes of
  speed, the second only changes of direction;
- local error of an Euler step of length h: ``h^2/2 |Z''|``, and a second time from halved steps, without derivatives;
- endpoint error of Euler's method, and where along t it is made (:mod:`.sensitivity`);
- stiffness: the largest ``|λ|`` of ``∂v/∂x`` (:mod:`.stiffness`);
- one-step gap: the distance between one Euler step and the trajectory's end.

Sums run over dimensions; relative values are divided by ``E|Z_1 - Z_0|^2`` (or its root), which is
scale-free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from fewstep.diagnostics.cost import (
    TRIES,
    Allowance,
    Cost,
    RowCount,
    Watch,
    check_shape,
    most_that_fits,
    sensitivities,
    trajectories,
    tried_rows,
)
from fewstep.diagnostics.diagnosis import Diagnosis, require_finite
from fewstep.diagnostics.masks import mask_name, masked_field, valid_entries, without_padding
from fewstep.diagnostics.measures import (
    STIFF_TIMES,
    Rows,
    acceleration_rows,
    sensitivity_fields,
    spectrum,
    stiffness_fields,
    stiffness_nodes,
    velocity_rows,
)
from fewstep.diagnostics.profiles import (
    at,
    at_once,
    follow,
    pieces,
    resolved_times,
    root_mean,
    rows,
    simpson_weights,
    standard_error,
    with_middles,
)
from fewstep.diagnostics.sensitivity import (
    AGREED,
    EULER_STEPS,
    MAX_EULER_STEPS,
    adjoint_weights,
    endpoint_errors,
    root_mean_square,
    unit_error,
)
from fewstep.diagnostics.stiffness import VECTORS
from fewstep.errors import UserError
from fewstep.flow.derivatives import TRIED_ROWS, Derivative
from fewstep.flow.field import Velocity, check_conditions
from fewstep.solvers.solve import check_start, solve

__all__ = ["Diagnosis", "diagnose", "diagnosis_cost"]

NODES = 64  # RK4 steps of the starting grid; chosen, not tuned
CHUNK = 256  # samples measured at a time, fewer where they are large
CHUNK_NUMBERS = 1 << 24  # most velocity components kept at a time
PILOT = 32  # samples that place the nodes
DERIVED, DERIVED_NUMBERS = 64, 1 << 15  # samples for derivatives: the least, and as many as make so many numbers
LEAST_NOISES, LEAST_NODES = 32, 16  # a limited diagnosis gets by with so many before it takes fewer noises still
STIFF, STIFF_NUMBERS, STIFF_MOST = 16, 1 << 12, 256  # samples for eigenvalues: likewise, and the most


def diagnose(
    v: Velocity,
    x0: Tensor,
    *,
    cond: Mapping[str, Any] | None = None,
    nodes: int = NODES,
    adaptive: bool = True,
    sensitivity: bool = True,
    stiffness: bool = True,
    max_rows: int | None = None,
    progress: Watch | None = None,
) -> Diagnosis:
    """Measure a velocity field along the trajectories that start at ``x0``.

    The formulas are in the module's docstring. Derivatives are taken for as many samples as make 32 768 numbers, at
    least 64, and eigenvalues for fewer: the result says for how many. A smooth flow keeps its ``nodes``; data of width
    s need a few more per halving of s. Exact fields of data of width 0 are singular at t = 1: their trajectories end
    there with infinite acceleration, and the closed forms refuse that time.

    Args:
        v: ``v(x, t, **cond)``.
        x0: base samples, (M, ...); a few hundred give S to a few per cent.
        cond: conditions, tensors with one row per sample; what is no tensor is handed on as it is. Where an adapted
            network declares a mask among them, padded entries of ``x0`` are set to zero and contribute nothing.
        nodes: RK4 steps and quadrature nodes of the starting grid, even.
        adaptive: put more nodes where 32 pilot trajectories need them, at most four times as many.
        sensitivity: also measure the effect of local errors at t = 1, and Euler's endpoint errors.
        stiffness: also measure eigenvalues.
        max_rows: most network rows (calls times samples, see :func:`diagnosis_cost`) to spend. Where it needs be, fewer
            noises are measured, from a coarser starting grid, and panels are halved less; the result's ``notes`` say
            what was reduced. None for no limit.
        progress: called as ``progress(done, total)`` after every network call, in network rows. The total is known when
            the nodes are placed, and is estimated as for a smooth flow until then.

    Returns:
        A :class:`Diagnosis`.

    Raises:
        UserError: a start that :func:`fewstep.solve` refuses, conditions of another length, an odd number of
            nodes, a callable that returns no velocity, ``max_rows`` below what the smallest diagnosis takes; a
            velocity, a derivative or a measure that is not finite, with its name and the time.

    >>> round(diagnose(lambda x, t: 0 * x + 2, torch.zeros(4, 1), nodes=8).displacement, 6)
    4.0
    """
    mask = mask_name(v)
    x0 = without_padding(x0, cond or {}, mask)
    check_start(x0)
    if not isinstance(nodes, int) or nodes < 4 or nodes % 2:
        raise UserError(f"nodes must be an even number of at least 4, got {nodes}.")
    cond = dict(cond or {})
    check_conditions(cond, len(x0))
    field = RowCount(masked_field(v, mask))
    allowance = Allowance(field, max_rows, progress)
    return _Measurement(field, x0, cond, mask, allowance, sensitivity, stiffness).run(nodes, adaptive)


def diagnosis_cost(
    shape: Sequence[int],
    *,
    nodes: int = NODES,
    adaptive: bool = True,
    sensitivity: bool = True,
    stiffness: bool = True,
    evaluations: int = 1,
) -> Cost:
    """The network rows that :func:`diagnose` takes for a smooth flow, counted before it runs.

    This many, where the network is differentiated in forward mode, no panel needs halving and Euler's errors with 16
    steps are of first order. Other flows take more: up to four times as many nodes, three rows for a derivative by
    finite differences, and Euler runs of up to 128 steps.

    Args:
        shape: of the noises, (M, ...).
        nodes, adaptive, sensitivity, stiffness: as for :func:`diagnose`.
        evaluations: network calls of one evaluation: 2 with guidance.

    Returns:
        A :class:`~fewstep.diagnostics.cost.Cost`; its ``rows`` is the number that a diagnosis is limited by.

    Raises:
        UserError: a shape of fewer than two sizes.

    >>> diagnosis_cost((256, 2)).rows // 256
    640
    """
    noises, *sample = check_shape(shape)
    size = math.prod(sample)
    even = with_middles(np.linspace(0.0, 1.0, nodes // 2 + 1))
    found = _measured(noises, size, nodes, len(stiffness_nodes(even)) if stiffness else 0, sensitivity)
    few = min(PILOT, noises)
    found += trajectories(nodes, few, few) if adaptive else Cost()
    first = few if adaptive else _derived(noises, size)
    tried = tried_rows(first * min(nodes + 1, at_once(first * size)))
    return (found + Cost(1 + (TRIES - 1) * tried, tried)) * evaluations


def _measured(noises: int, size: int, nodes: int, spectra: int, sensitivity: bool) -> Cost:
    """The cost of measuring once the nodes are placed; eigenvalues are taken at ``spectra`` of them."""
    derived = _derived(noises, size)
    found = trajectories(nodes, noises, derived) + Cost(0, _stiff(derived, size) * spectra * min(VECTORS, size))
    return found + sensitivities(nodes, derived) + Cost(noises * sum(EULER_STEPS)) if sensitivity else found


def _derived(noises: int, size: int) -> int:
    """For how many samples of so many numbers derivatives are taken."""
    return min(noises, max(DERIVED, DERIVED_NUMBERS // size))


def _stiff(derived: int, size: int) -> int:
    """For how many of them eigenvalues are taken."""
    return min(derived, max(STIFF, min(STIFF_NUMBERS // size, STIFF_MOST)))


@final
class _Measurement:
    """The state of one diagnosis: the field, its derivative, and how many samples are used for which measure."""

    def __init__(
        self,
        field: RowCount,
        x0: Tensor,
        cond: dict[str, Any],
        mask: str | None,
        allowance: Allowance,
        sensitivity: bool,
        stiffness: bool,
    ) -> None:
        self.field, self.allowance = field, allowance
        self.derivative = Derivative(self.field)
        self.given, self.x0, self.cond = len(x0), x0, cond
        self.sensitivity, self.stiffness, self.mask = sensitivity, stiffness, mask
        self.evaluations = 1  # network calls of one evaluation
        self.take(len(x0))

    def take(self, count: int) -> None:
        """Measure the first ``count`` noises."""
        self.x0, self.cond = self.x0[:count], rows(self.cond, slice(count))
        size = self.x0[0].numel()
        self.derived = _derived(count, size)
        self.stiff = _stiff(self.derived, size) if self.stiffness else 0
        generator = torch.Generator().manual_seed(0)
        few = (self.derived, *self.x0.shape[1:])
        # drawn for all samples at once, so that they do not depend on how samples are cut
        self.signs = (torch.randint(0, 2, few, generator=generator) * 2 - 1).to(self.x0)
        self.directions = torch.randn((self.stiff, *self.x0.shape[1:]), generator=generator).to(self.x0)

    def run(self, nodes: int, adaptive: bool) -> Diagnosis:
        """Place the nodes, measure piece by piece, and sum up."""
        solve(self.field, self.x0[:1], steps=1, cond=rows(self.cond, slice(0, 1)))  # refuses a callable of another kind
        self.evaluations = self.field.rows
        asked, nodes = nodes, self.reduced(nodes, adaptive) if self.allowance.limited else nodes
        self.allowance.expect(self.placing(len(self.x0), nodes, adaptive) + self.measuring(len(self.x0), nodes))
        times = self.nodes(nodes) if adaptive else with_middles(np.linspace(0.0, 1.0, nodes // 2 + 1))
        self.fit(times, nodes, asked)
        size = max(1, min(CHUNK, CHUNK_NUMBERS // (len(times) * self.x0[0].numel())))
        parts = pieces(len(self.x0), size)
        ends, tables = zip(*(self.measure(part, times) for part in parts), strict=True)
        table = {name: np.concatenate([one[name] for one in tables if name in one]) for name in tables[0]}
        euler = self.euler(torch.cat(ends), parts, table["unit"]) if self.sensitivity else {}
        diagnosis = self.summary(table, times, nodes, euler)
        require_finite(diagnosis)
        self.allowance.finish()
        return diagnosis

    def rows_of(self, cost: Cost) -> int:
        """Network rows of a cost in evaluations, a derivative by finite differences counted as the three it takes."""
        each = 3 if self.derivative.used == "finite_difference" else 1
        return self.evaluations * (cost.velocities + each * cost.derivatives)

    def measuring(self, noises: int, nodes: int, spectra: int = STIFF_TIMES + 1) -> int:
        """Network rows of measuring so many noises on placed nodes, with eigenvalues at ``spectra`` of them."""
        cost = _measured(noises, self.x0[0].numel(), nodes, spectra if self.stiffness else 0, self.sensitivity)
        return self.rows_of(cost)

    def placing(self, noises: int, nodes: int, adaptive: bool) -> int:
        """Network rows of one pass of the pilot over the starting nodes."""
        few = min(PILOT, noises)
        return self.rows_of(trajectories(nodes, few, few)) if adaptive else 0

    def reduced(self, nodes: int, adaptive: bool) -> int:
        """Take as many noises as the limit allows, on as many nodes: the number of nodes to start with."""
        few = self.x0[:TRIED_ROWS]
        t, some = at(0.0, few), rows(self.cond, slice(TRIED_ROWS))
        # rows of a derivative depend on how it is taken
        self.derivative(few, t, self.field(few, t, **some).detach(), torch.ones_like(t), **some)

        def cost(noises: int, nodes: int) -> int:
            return self.placing(noises, nodes, adaptive) + self.measuring(noises, nodes)

        choices = [nodes]
        while choices[-1] % 4 == 0 and choices[-1] // 2 >= LEAST_NODES:
            choices.append(choices[-1] // 2)
        fewest = min(2, self.given)
        for tried, least in [*((n, min(LEAST_NOISES, self.given)) for n in choices), (choices[-1], fewest)]:
            fits = most_that_fits(least, self.given, partial(cost, nodes=tried), self.allowance.left)
            if fits is not None:
                self.take(fits)
                return tried
        needed = self.field.rows + cost(fewest, choices[-1])
        raise UserError(
            f"max_rows={self.allowance.limit} is less than the {needed} network rows that a diagnosis of {fewest} "
            "noises takes: give more, or leave out sensitivity and stiffness."
        )

    def nodes(self, nodes: int) -> np.ndarray:
        """Times that resolve a few of the trajectories."""
        few, some = self.x0[:PILOT], rows(self.cond, slice(PILOT))
        least = min(LEAST_NOISES, len(self.x0))

        def affordable(again: int, panels: int) -> bool:
            follow_up = self.rows_of(trajectories(2 * again, len(few), len(few)))
            return follow_up + self.measuring(least, 2 * panels, 2 * STIFF_TIMES + 1) <= self.allowance.left

        found, resolved = resolved_times(self.field, self.derivative, few, some, nodes // 2, affordable)
        if not resolved:
            self.allowance.note("panels were not halved any further")
        return found

    def fit(self, times: np.ndarray, nodes: int, asked: int) -> None:
        """Leave out noises that the limit no longer allows on these times, and note the number of rows to come."""
        number, spectra = len(times) - 1, len(stiffness_nodes(times))
        if self.allowance.limited:
            cost = partial(self.measuring, nodes=number, spectra=spectra)
            self.take(most_that_fits(1, len(self.x0), cost, self.allowance.left) or 1)
            if (len(self.x0), nodes) != (self.given, asked):
                grid = "" if nodes == asked else f" from a grid of {nodes} instead of {asked} nodes"
                self.allowance.note(f"{len(self.x0)} of {self.given} noises were measured{grid}")
        self.allowance.expect(self.measuring(len(self.x0), number, spectra))

    def measure(self, part: slice, times: np.ndarray) -> tuple[Tensor, Rows]:
        """End points, and per-sample quantities, (B,) or (B, N + 1); fewer rows where derivatives are needed."""
        derived = max(0, min(self.derived - part.start, part.stop - part.start))
        path = follow(self.field, self.derivative, self.x0[part], times, rows(self.cond, part), derived)
        found = velocity_rows(path)
        if derived:
            found |= acceleration_rows(path, derived)
            own = rows(self.cond, slice(part.start, part.start + derived))
            if self.sensitivity:
                e = unit_error(self.derivative, path, own)
                found["unit"] = e.flatten(1).cpu().double().norm(dim=1).numpy()
                signs = self.signs[part.start : part.start + derived]
                weights = adjoint_weights(self.field, self.derivative, path, signs, own)
                if weights is not None:
                    found["weighted"] = weights
            if part.start < self.stiff:
                few = slice(part.start, min(self.stiff, part.stop))
                own, start = rows(self.cond, few), self.directions[few]
                valid = None if self.mask is None else valid_entries(start, own, self.mask)
                found |= spectrum(self.derivative, path, start, times, own, valid)
        return path.states[-1], found

    def euler(self, x1: Tensor, parts: list[slice], unit: np.ndarray) -> Rows:
        """Norms of Euler's endpoint errors by number of steps, (M, K), and those numbers."""
        steps, norms = list(EULER_STEPS), []
        for number in steps:
            norms.append(endpoint_errors(self.field, self.x0, x1, self.cond, number, parts))
            if number == steps[-1] < MAX_EULER_STEPS:
                here = number * root_mean_square(norms[-1][: len(unit)], trimmed=True)
                first = root_mean_square(unit, trimmed=True)
                if max(here, first) <= AGREED * min(here, first):
                    continue
                further = 2 * number * len(self.x0) * self.evaluations
                if further <= self.allowance.left:
                    steps.append(2 * number)
                    self.allowance.add(further)
                else:
                    self.allowance.note(f"Euler's method, of no clear order at {number} steps, was run with no more")
        return {"steps": np.array(steps), "norms": np.stack(norms, 1)}

    def summary(self, table: Rows, times: np.ndarray, nodes: int, euler: Rows) -> Diagnosis:
        """Means over samples and their standard errors."""
        weights = simpson_weights(times)
        samples = table["deviation"] @ weights
        displacement = float(table["displacement"].mean())
        gap = float(np.sqrt(table["gap"].mean()))
        lengths = table["speed"] @ weights
        curvature, curvature_error = root_mean(table["total"])
        normal, normal_error = root_mean(table["normal"])
        panels = "equal panels" if len(times) == nodes + 1 else "panels"
        assert self.derivative.used is not None
        return Diagnosis(
            straightness=float(samples.mean()),
            straightness_error=float(standard_error(samples)),
            relative_straightness=float(samples.mean()) / max(displacement, 1e-30),
            displacement=displacement,
            one_step_gap=gap,
            relative_gap=gap / max(np.sqrt(displacement), 1e-30),
            path_length_ratio=float(lengths.mean() / max(np.sqrt(table["displacement"]).mean(), 1e-30)),
            times=times,
            deviation=table["deviation"].mean(0),
            deviation_error=standard_error(table["deviation"]),
            curvature=curvature,
            curvature_error=curvature_error,
            normal_curvature=normal,
            normal_curvature_error=normal_error,
            local_error=curvature / 2,
            doubling_error=root_mean(table["doubled"])[0],
            **sensitivity_fields(table, euler, len(self.x0)),
            **stiffness_fields(table, times),
            derivatives=self.derivative.used,
            samples=len(self.x0),
            derivative_samples=self.derived,
            stiffness_samples=self.stiff,
            dimensions=self.x0[0].numel(),
            nfe=round(self.field.rows / len(self.x0)),
            solver=f"rk4, {len(times) - 1} steps on {panels}, Simpson quadrature",
            notes=tuple(self.allowance.notes),
        )
