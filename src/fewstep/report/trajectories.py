"""Trajectories of the velocity models, beside the straight lines between their ends.

ReFlow's picture (arXiv:2209.03003, fig. 2): independent pairs of noise and data are joined by lines that cross; the flow
learned from them cannot cross, so it turns; lines between the ends of *its* trajectories hardly cross, and the flow
learned from those is straight.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.dataset import DataSet
from fewstep.flow.noise import integer_rows
from fewstep.generator import Generator
from fewstep.report.drawing import FAINT, SOFT, Array, Picture, bare, panels, picture
from fewstep.report.samples import Projection, frame, pick_rows, projection
from fewstep.solvers.solve import solve
from fewstep.store.files import read_json
from fewstep.store.pairs import PairStore

LINES = 48
STEPS = 48
REAL_POINTS = 1200
PAIR_LINE = "#b6bfca"


def open_pairs(folder: Path) -> PairStore:
    """A pair store as it lies on disk."""
    request = dict(read_json(folder / "manifest.json")["request"])
    rows = int(request.pop("rows"))
    return PairStore(folder, request, rows)


def trajectories(
    models: Mapping[str, Generator],
    data: DataSet,
    colours: Mapping[str, str],
    seed: int,
    result: Mapping[str, Any],
    pairs: Mapping[str, Path],
) -> Picture | None:
    """One panel per velocity model, after a panel of independent pairs; None without a velocity model."""
    flows = {name: model for name, model in models.items() if model.config.kind == "velocity"}
    if not flows:
        return None
    project, names = projection(data)
    real = data.network_rows(pick_rows(data, REAL_POINTS, seed))
    across = len(flows) + 1
    side = min(3.5, 10.6 / across)
    figure, axes = panels(1, across, side * across, side + 0.3)
    background = project(real)
    first = next(iter(flows.values()))
    noise = _starts(first, seed)[0]
    _panel(axes[0, 0], torch.stack([noise, real[integer_rows(len(noise), len(real), seed=seed)]]), None, SOFT, project,
           background)  # fmt: skip
    bare(axes[0, 0], title="independent pairs", colour=SOFT)
    for ax, (name, model) in zip(axes[0, 1:], flows.items(), strict=True):
        states, chord = follow(model, seed, pairs.get(name))
        _panel(ax, chord, states, colours[name], project, background)
        ratio = (result.get("diagnosis") or {}).get(name, {}).get("path_length_ratio")
        bare(ax, title=name, colour=colours[name], second=f"length / chord {ratio:.3f}" if ratio else "")
    where = f" Shown in the plane of the {names[0]} and the second." if "principal" in names[0] else ""
    if not names[1]:
        where = " Time runs to the right, the value upwards."
    caption = (
        f"{LINES} paths from noise (open dots) to their ends (full dots); data in grey. Left: pairs of noise and data "
        "as a first flow sees them. Each is a straight line by construction, and they cross. A flow cannot cross "
        "itself, so the field that averages over the lines bends (coloured curves); its own ends, joined by straight "
        "lines (grey), are the pairs that ReFlow learns from. After ReFlow curves and lines agree, and one step is "
        "enough." + where
    )
    return picture(figure, "trajectories of the velocity models beside their chords", caption)


def _starts(model: Generator, seed: int) -> tuple[Tensor, Tensor | None]:
    draw = model.draw(LINES, steps=1, solver="euler", grid="uniform", seed=seed)
    return draw.x0, draw.label


def follow(model: Generator, seed: int, pairs: Path | None) -> tuple[Tensor, Tensor]:
    """States ``(STEPS + 1, LINES, *shape)`` of a model's trajectories, and the chords' ends ``(2, LINES, *shape)``.

    With the model's training pairs, trajectories start at the pairs' noise and the chords are the pairs.
    """
    x0, label = _starts(model, seed)
    ends = None
    if pairs is not None:
        stored = open_pairs(pairs).training_rows()
        columns = stored.columns(torch.arange(min(LINES, len(stored))))
        x0, ends, label = columns["x0"], columns["x1"], columns.get("label")
    cond = {} if label is None or not model.conditional else {"label": label.to(model.device)}
    solution = solve(model.module, x0.to(model.device), solver="rk4", steps=STEPS, cond=cond, trajectory=True)
    assert solution.trajectory is not None
    states = solution.trajectory.float().cpu()
    return states, torch.stack([states[0], states[-1] if ends is None else ends])


def _panel(
    ax: Any, chord: Tensor, states: Tensor | None, colour: str, project: Projection, background: Array
) -> None:
    """Chords in grey, trajectories in colour, dots at both ends."""
    from matplotlib.collections import LineCollection

    line = _project_all(chord, project)
    curve = line if states is None else _project_all(states, project)
    flat = line.shape[-1] == 1
    if flat:
        line, curve = _with_time(line), _with_time(curve)
        ax.scatter(np.full(len(background), 1.03), background[:, 0], s=2, color=FAINT, linewidths=0)
    else:
        ax.scatter(background[:, 0], background[:, 1], s=2.5, color=FAINT, linewidths=0, zorder=0)
    ax.add_collection(LineCollection(list(line.swapaxes(0, 1)), colors=PAIR_LINE, linewidths=0.9, zorder=1))
    if states is not None:
        ax.add_collection(
            LineCollection(list(curve.swapaxes(0, 1)), colors=colour, linewidths=1.1, alpha=0.85, zorder=2)
        )
    ax.scatter(*curve[0].T, s=9, facecolors="white", edgecolors=SOFT, linewidths=0.7, zorder=3)
    ax.scatter(*curve[-1].T, s=9, color=colour, linewidths=0, zorder=4)
    if flat:
        low, high = np.quantile(np.concatenate([background[:, 0], curve[..., 1].ravel()]), [0.0, 1.0])
        ax.set_xlim(-0.05, 1.07)
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        return
    (left, right), (bottom, top) = frame(np.concatenate([background, line.reshape(-1, 2)]))
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    ax.set_aspect("equal")


def _project_all(states: Tensor, project: Projection) -> Array:
    """``(T, N, *shape)`` to ``(T, N, 2)`` (or 1)."""
    return np.stack([project(state) for state in states])


def _with_time(values: Array) -> Array:
    """``(T, N, 1)`` to ``(T, N, 2)`` with the time as the first coordinate."""
    times = np.linspace(0.0, 1.0, len(values))[:, None, None]
    return np.concatenate([np.broadcast_to(times, values.shape), values], axis=-1)
