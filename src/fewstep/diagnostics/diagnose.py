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

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from fewstep.diagnostics.diagnosis import Diagnosis, require_finite
from fewstep.diagnostics.masks import mask_name, masked_field, valid_entries, without_padding
from fewstep.diagnostics.profiles import (
    Path,
    RowCount,
    at_once,
    follow,
    pieces,
    refuse_infinite,
    repeated,
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
    jump_squares,
    root_mean_square,
    unit_error,
)
from fewstep.diagnostics.stiffness import eigenvalues
from fewstep.errors import UserError
from fewstep.flow.derivatives import Derivative
from fewstep.flow.field import Velocity, check_conditions
from fewstep.solvers.solve import check_start, solve

__all__ = ["Diagnosis", "diagnose"]

NODES = 64  # RK4 steps of the starting grid; chosen, not tuned
CHUNK = 256  # samples measured at a time, fewer where they are large
CHUNK_NUMBERS = 1 << 24  # most velocity components kept at a time
PILOT = 32  # samples that place the nodes
DERIVED, DERIVED_NUMBERS = 64, 1 << 15  # samples for derivatives: the least, and as many as make so many numbers
STIFF, STIFF_NUMBERS, STIFF_MOST = 16, 1 << 12, 256  # samples for eigenvalues: likewise, and the most
STIFF_TIMES = 16  # equal intervals of [0, 1] between whose ends eigenvalues are taken

Rows = dict[str, np.ndarray]


def diagnose(
    v: Velocity,
    x0: Tensor,
    *,
    cond: Mapping[str, Any] | None = None,
    nodes: int = NODES,
    adaptive: bool = True,
    sensitivity: bool = True,
    stiffness: bool = True,
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

    Returns:
        A :class:`Diagnosis`.

    Raises:
        UserError: a start that :func:`fewstep.solve` refuses, conditions of another length, an odd number of
            nodes, a callable that returns no velocity; a velocity, a derivative or a measure that is not finite, with
            its name and the time.

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
    measurement = _Measurement(v, x0, cond, sensitivity, stiffness, mask)
    return measurement.run(nodes, adaptive)


@final
class _Measurement:
    """The state of one diagnosis: the field, its derivative, and how many samples are used for which measure."""

    def __init__(
        self, v: Velocity, x0: Tensor, cond: dict[str, Any], sensitivity: bool, stiffness: bool, mask: str | None
    ) -> None:
        self.field = RowCount(masked_field(v, mask))
        self.mask = mask
        self.derivative = Derivative(self.field)
        self.x0, self.cond = x0, cond
        self.sensitivity, self.stiffness = sensitivity, stiffness
        size = x0[0].numel()
        self.derived = min(len(x0), max(DERIVED, DERIVED_NUMBERS // size))
        self.stiff = min(self.derived, max(STIFF, min(STIFF_NUMBERS // size, STIFF_MOST))) if stiffness else 0
        generator = torch.Generator().manual_seed(0)
        few = (self.derived, *x0.shape[1:])
        # drawn for all samples at once, so that they do not depend on how samples are cut
        self.signs = (torch.randint(0, 2, few, generator=generator) * 2 - 1).to(x0)
        self.directions = torch.randn((self.stiff, *x0.shape[1:]), generator=generator).to(x0)

    def run(self, nodes: int, adaptive: bool) -> Diagnosis:
        """Place the nodes, measure piece by piece, and sum up."""
        solve(self.field, self.x0[:1], steps=1, cond=rows(self.cond, slice(0, 1)))  # refuses a callable of another kind
        times = self.nodes(nodes) if adaptive else with_middles(np.linspace(0.0, 1.0, nodes // 2 + 1))
        size = max(1, min(CHUNK, CHUNK_NUMBERS // (len(times) * self.x0[0].numel())))
        parts = pieces(len(self.x0), size)
        ends, tables = zip(*(self.measure(part, times) for part in parts), strict=True)
        table = {name: np.concatenate([one[name] for one in tables if name in one]) for name in tables[0]}
        euler = self.euler(torch.cat(ends), parts, table["unit"]) if self.sensitivity else {}
        diagnosis = self.summary(table, times, nodes, euler)
        require_finite(diagnosis)
        return diagnosis

    def nodes(self, nodes: int) -> np.ndarray:
        """Times that resolve a few of the trajectories."""
        pilot = slice(0, PILOT)
        return resolved_times(self.field, self.derivative, self.x0[pilot], rows(self.cond, pilot), nodes // 2)

    def measure(self, part: slice, times: np.ndarray) -> tuple[Tensor, Rows]:
        """End points, and per-sample quantities, (B,) or (B, N + 1); fewer rows where derivatives are needed."""
        derived = max(0, min(self.derived - part.start, part.stop - part.start))
        path = follow(self.field, self.derivative, self.x0[part], times, rows(self.cond, part), derived)
        found = _velocity_rows(path)
        if derived:
            found |= _acceleration_rows(path, derived)
            own = rows(self.cond, slice(part.start, part.start + derived))
            if self.sensitivity:
                e = unit_error(self.derivative, path, own)
                found["unit"] = e.flatten(1).cpu().double().norm(dim=1).numpy()
                signs = self.signs[part.start : part.start + derived]
                weights = adjoint_weights(self.field, self.derivative, path, signs, own)
                if weights is not None:
                    found["weighted"] = weights
            if part.start < self.stiff:
                found |= self.spectrum(path, part, times)
        return path.states[-1], found

    def spectrum(self, path: Path, part: slice, times: np.ndarray) -> Rows:
        """Largest modulus, smallest and largest real part of the eigenvalues, (B, K) each."""
        few = min(self.stiff, part.stop) - part.start
        own = rows(self.cond, slice(part.start, part.start + few))
        start = self.directions[part.start : part.start + few]
        valid = None if self.mask is None else valid_entries(start, own, self.mask)
        nodes, values = stiffness_nodes(times), []
        for some in pieces(len(nodes), at_once(start.numel())):
            chosen = nodes[some]
            x = torch.cat([path.states[k][:few] for k in chosen])
            t = torch.as_tensor(times[chosen], dtype=x.dtype, device=x.device).repeat_interleave(few)
            conditions = repeated(own, len(chosen))

            def product(q: Tensor, x: Tensor = x, t: Tensor = t, given: dict[str, Any] = conditions) -> Tensor:
                along = self.derivative(x, t, q, **given)[1].to(x.dtype)
                for values, k in zip(along.split(few), t[::few].tolist(), strict=True):
                    refuse_infinite(values, "derivative in a random direction", k)
                return along

            inside = None if valid is None else torch.cat([valid] * len(chosen))
            values.extend(eigenvalues(product, torch.cat([start] * len(chosen)), valid=inside).split(few))
        ritz = torch.stack(values, 1)
        return {
            "modulus": ritz.abs().amax(-1).numpy(),
            "lowest": ritz.real.amin(-1).numpy(),
            "highest": ritz.real.amax(-1).numpy(),
        }

    def euler(self, x1: Tensor, parts: list[slice], unit: np.ndarray) -> Rows:
        """Norms of Euler's endpoint errors by number of steps, (M, K), and those numbers."""
        steps, norms = list(EULER_STEPS), []
        for number in steps:
            norms.append(endpoint_errors(self.field, self.x0, x1, self.cond, number, parts))
            if number == steps[-1] < MAX_EULER_STEPS:
                here = number * root_mean_square(norms[-1][: len(unit)], trimmed=True)
                first = root_mean_square(unit, trimmed=True)
                if max(here, first) > AGREED * min(here, first):
                    steps.append(2 * number)
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
            **_sensitivity_fields(table, euler, len(self.x0)),
            **_stiffness_fields(table, times),
            derivatives=self.derivative.used,
            samples=len(self.x0),
            derivative_samples=self.derived,
            stiffness_samples=self.stiff,
            dimensions=self.x0[0].numel(),
            nfe=round(self.field.rows / len(self.x0)),
            solver=f"rk4, {len(times) - 1} steps on {panels}, Simpson quadrature",
        )


def _velocity_rows(path: Path) -> Rows:
    """The measures that need velocities alone; the chord is known only after the whole trajectory."""
    chord = (path.states[-1] - path.states[0]).flatten(1).cpu().double()
    deviation, speed, doubled = [], [], []
    for v, d in zip(path.velocities, path.doubled, strict=True):
        flat = v.flatten(1).cpu().double()
        deviation.append((chord - flat).square().sum(1))
        speed.append(flat.norm(dim=1))
        doubled.append(d.flatten(1).cpu().double().square().sum(1))
    return {
        "deviation": torch.stack(deviation, 1).numpy(),
        "speed": torch.stack(speed, 1).numpy(),
        "doubled": torch.stack(doubled, 1).numpy(),
        "displacement": chord.square().sum(1).numpy(),
        "gap": deviation[0].numpy(),
    }


def _acceleration_rows(path: Path, derived: int) -> Rows:
    """Squares of the acceleration and of its part normal to the velocity."""
    total, normal = [], []
    for v, a in zip(path.velocities, path.accelerations, strict=True):
        speed, bend = v[:derived].flatten(1).cpu().double(), a.flatten(1).cpu().double()
        along = (bend * speed).sum(1, keepdim=True) / speed.square().sum(1, keepdim=True).clamp_min(1e-30)
        total.append(bend.square().sum(1))
        normal.append((bend - along * speed).square().sum(1))
    return {"total": torch.stack(total, 1).numpy(), "normal": torch.stack(normal, 1).numpy()}


def stiffness_nodes(times: np.ndarray) -> list[int]:
    """Nodes nearest to multiples of 1/16, and as many more where panels were halved."""
    even = [int(np.abs(times - k / STIFF_TIMES).argmin()) for k in range(STIFF_TIMES + 1)]
    inner = np.flatnonzero(np.diff(times)[1:] < 0.75 * np.diff(times).max()) + 1
    more = inner[:: max(1, -(-len(inner) // STIFF_TIMES))]
    return sorted({*even, *map(int, more)})


def _sensitivity_fields(table: Rows, euler: Rows, samples: int) -> dict[str, Any]:
    names = ("weighted_error", "unit_error", "unit_error_trimmed", "euler_steps", "euler_error", "euler_error_trimmed")
    if not euler:
        return dict.fromkeys((*names, "euler_jumps"))
    weighted = np.sqrt(table["weighted"].mean(0)) / 2 if "weighted" in table else None
    few = len(table["unit"])
    found: list[Any] = []
    for trimmed in (False, True):
        errors = np.array([root_mean_square(column, trimmed=trimmed) for column in euler["norms"].T])
        unit = root_mean_square(table["unit"], trimmed=trimmed)
        if few < samples:  # the ratio to a run of the same few samples is less uncertain than the value itself
            run = root_mean_square(euler["norms"][:few, -1], trimmed=trimmed)
            unit *= float(errors[-1]) / max(run, 1e-30)
        found += [unit, errors]
    unit, errors, unit_trimmed, errors_trimmed = found
    jumps = jump_squares(euler["norms"][:few], table["unit"], euler["steps"])
    values = (weighted, unit, unit_trimmed, euler["steps"], errors, errors_trimmed)
    return {**dict(zip(names, values, strict=True)), "euler_jumps": jumps}


def _stiffness_fields(table: Rows, times: np.ndarray) -> dict[str, Any]:
    names = ("stiffness_times", "stiffness", "stiffness_error", "contraction", "expansion")
    if "modulus" not in table:
        return dict.fromkeys(names)
    modulus = table["modulus"]
    values = (times[stiffness_nodes(times)], modulus.mean(0), standard_error(modulus))
    return dict(zip(names, (*values, table["lowest"].mean(0), table["highest"].mean(0)), strict=True))
