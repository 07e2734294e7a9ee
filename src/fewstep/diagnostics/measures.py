"""Quantities per sample of a diagnosis, at the nodes of its trajectories, and their means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.diagnostics.profiles import Path, at_once, pieces, refuse_infinite, repeated, standard_error
from fewstep.diagnostics.sensitivity import jump_squares, root_mean_square
from fewstep.diagnostics.stiffness import eigenvalues
from fewstep.flow.derivatives import Derivative

STIFF_TIMES = 16  # equal intervals of [0, 1] between whose ends eigenvalues are taken

Rows = dict[str, np.ndarray]


def velocity_rows(path: Path) -> Rows:
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


def acceleration_rows(path: Path, derived: int) -> Rows:
    """Squares of the acceleration and of its part normal to the velocity."""
    total, normal = [], []
    for v, a in zip(path.velocities, path.accelerations, strict=True):
        speed, bend = v[:derived].flatten(1).cpu().double(), a.flatten(1).cpu().double()
        along = (bend * speed).sum(1, keepdim=True) / speed.square().sum(1, keepdim=True).clamp_min(1e-30)
        total.append(bend.square().sum(1))
        normal.append((bend - along * speed).square().sum(1))
    return {"total": torch.stack(total, 1).numpy(), "normal": torch.stack(normal, 1).numpy()}


def spectrum(
    derivative: Derivative,
    path: Path,
    start: Tensor,
    times: np.ndarray,
    cond: Mapping[str, Any],
    valid: Tensor | None,
) -> Rows:
    """Largest modulus, smallest and largest real part of the eigenvalues of ``∂v/∂x``, (B, K) each.

    Args:
        derivative: Jacobian-vector products of the field.
        path: trajectories on ``times``.
        start: random directions for its first rows, (B, ...).
        times: nodes, (N + 1,); eigenvalues are taken at K of them, :func:`stiffness_nodes`.
        cond: conditions of those rows.
        valid: their valid entries, bool (B, ...); None for all.
    """
    few, nodes, values = len(start), stiffness_nodes(times), []
    for some in pieces(len(nodes), at_once(start.numel())):
        chosen = nodes[some]
        x = torch.cat([path.states[k][:few] for k in chosen])
        t = torch.as_tensor(times[chosen], dtype=x.dtype, device=x.device).repeat_interleave(few)
        conditions = repeated(cond, len(chosen))

        def product(q: Tensor, x: Tensor = x, t: Tensor = t, given: dict[str, Any] = conditions) -> Tensor:
            along = derivative(x, t, q, **given)[1].to(x.dtype)
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


def stiffness_nodes(times: np.ndarray) -> list[int]:
    """Nodes nearest to multiples of 1/16, and as many more where panels were halved."""
    even = [int(np.abs(times - k / STIFF_TIMES).argmin()) for k in range(STIFF_TIMES + 1)]
    inner = np.flatnonzero(np.diff(times)[1:] < 0.75 * np.diff(times).max()) + 1
    more = inner[:: max(1, -(-len(inner) // STIFF_TIMES))]
    return sorted({*even, *map(int, more)})


def sensitivity_fields(table: Rows, euler: Rows, samples: int) -> dict[str, Any]:
    """The fields of a diagnosis on Euler's error, by name; None where they were not measured.

    Args:
        table: quantities per sample.
        euler: numbers of steps and norms of the errors; empty without sensitivity.
        samples: number of samples that Euler's method was run on.
    """
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


def stiffness_fields(table: Rows, times: np.ndarray) -> dict[str, Any]:
    """The fields of a diagnosis on eigenvalues, by name; None where they were not measured."""
    names = ("stiffness_times", "stiffness", "stiffness_error", "contraction", "expansion")
    if "modulus" not in table:
        return dict.fromkeys(names)
    modulus = table["modulus"]
    values = (times[stiffness_nodes(times)], modulus.mean(0), standard_error(modulus))
    return dict(zip(names, (*values, table["lowest"].mean(0), table["highest"].mean(0)), strict=True))
