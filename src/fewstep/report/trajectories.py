"""Figure of the trajectories of the velocity models, with the straight lines between their ends.

As in arXiv:2209.03003, fig. 2: the lines between independent pairs of noise and data cross. Trajectories of the flow
trained on them cannot cross, so they bend. The lines between the ends of these trajectories hardly cross, and a
flow trained on those pairs is straight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from fewstep.data.dataset import LABEL, DataSet
from fewstep.flow.noise import integer_rows
from fewstep.generator import Generator
from fewstep.report.drawing import FAINT, SOFT, WIDE, Array, Picture, bare, panels, picture
from fewstep.report.samples import Frame, Plane, frame, pick_rows, reference_units
from fewstep.report.words import diagnoses
from fewstep.solvers.solve import solve
from fewstep.store.files import read_json
from fewstep.store.pairs import PairStore, Resolve

LINES = 40  # trajectories per panel
STEPS = 48  # RK4 steps of a trajectory
REAL_POINTS = 1200  # data points in the background
CHORD_COLOUR = "#aab4c0"


@final
@dataclass(frozen=True)
class Paths:
    """The content of a panel, in the plane.

    Attributes:
        name: title of the panel.
        colour: colour of the title and the trajectories.
        chord: ends of the straight lines ``(2, N, 2)``.
        curve: the trajectories ``(T, N, 2)``.
        note: second title.
    """

    name: str
    colour: str
    chord: Array
    curve: Array
    note: str = ""


def open_pairs(folder: Path, resolve: Resolve | None = None) -> PairStore:
    """Open a pair store with the request of its own manifest.

    Args:
        folder: the store.
        resolve: gives the conditions of data rows, for pairs that hold row numbers in their place.
    """
    request = dict(read_json(Path(folder) / "manifest.json")["request"])
    rows = int(request.pop("rows"))
    return PairStore(Path(folder), request, rows, resolve)


def trajectories(
    models: Mapping[str, Generator],
    data: DataSet,
    colours: Mapping[str, str],
    seed: int,
    result: Mapping[str, Any],
    pairs: Mapping[str, Path],
) -> Picture | None:
    """Draw a panel of independent pairs and one panel per velocity model; None without a velocity model.

    Args:
        models: the models by name.
        data: the data of the comparison.
        colours: colour of every model.
        seed: seed of the noise and of the data shown.
        result: the comparison.
        pairs: folder of the pairs that a model was trained on, by model name.
    """
    flows = {name: model for name, model in models.items() if model.config.rule.kind == "velocity"}
    if not flows:
        return None
    plane = Plane(data)
    real = data.network_rows(pick_rows(data, REAL_POINTS, seed))
    first = next(iter(flows.values()))
    shown = [_independent(reference_units(_noise(first, seed), first, data), real, plane, seed)]
    for name, model in flows.items():
        states, chord = follow(model, seed, pairs.get(name), data)
        curve, line = (_to_points([reference_units(x, model, data) for x in part], plane) for part in (states, chord))
        ratio = diagnoses(result).get(name, {}).get("path_length_ratio")
        note = f"length / chord {ratio:.3f}" if ratio else ""
        shown.append(Paths(name, colours[name], line, curve, note))
    background = plane(real)
    if plane.size == 1:
        background = np.column_stack([np.full(len(background), 1.03), background[:, 0]])
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    side = min(3.75, WIDE / columns)
    figure, axes = panels(rows, columns, side * columns, (side + 0.25) * rows)
    limits = _limits(shown, background, plane)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, paths in zip(axes.flat, shown, strict=False):
        _panel(ax, paths, background, limits)
        if plane.size > 1:
            ax.set_aspect("equal")
    caption = _caption(plane, [name for name in flows if name in pairs], len(flows) > 1)
    return picture(figure, "trajectories of the velocity models beside their chords", caption)


def _independent(noise: Tensor, real: Tensor, plane: Plane, seed: int) -> Paths:
    """Straight lines from noise to independently drawn data."""
    line = _to_points([noise, real[integer_rows(len(noise), len(real), seed=seed)]], plane)
    return Paths("independent pairs", SOFT, line, line)


def _noise(model: Generator, seed: int) -> Tensor:
    """The base noise from which the trajectories of a model start."""
    return model.draw(LINES, steps=1, solver="euler", grid="uniform", seed=seed).x0


def follow(model: Generator, seed: int, pairs: Path | None, data: DataSet | None = None) -> tuple[Tensor, Tensor]:
    """Solve the trajectories of a model.

    Args:
        model: a velocity model.
        seed: seed of the base noise.
        pairs: folder of the pairs that the model was trained on. If given, trajectories start at their noise and the
            chords are the pairs.
        data: the data that the pairs were made with; needed where the model takes conditions beside labels.

    Returns:
        The states ``(STEPS + 1, N, *shape)``, and the ends of the chords ``(2, N, *shape)``.
    """
    draw = model.draw(LINES, steps=1, solver="euler", grid="uniform", seed=seed)
    x0, cond, ends = draw.x0, draw.conditions(model.device), None
    if pairs is not None:
        names = (*((LABEL,) if model.conditional else ()), *model.config.conditions)
        resolve = None if data is None else partial(data.cond_rows, names=names)
        stored = open_pairs(pairs, resolve).training_rows()
        columns = stored.columns(torch.arange(min(LINES, len(stored))))
        x0, ends = columns["x0"], columns["x1"]
        cond = {name: columns[name].to(model.device) for name in names}
    solution = solve(model.module, x0.to(model.device), solver="rk4", steps=STEPS, cond=cond, trajectory=True)
    assert solution.trajectory is not None
    states = solution.trajectory.float().cpu()
    return states, torch.stack([states[0], states[-1] if ends is None else ends])


def _to_points(states: Sequence[Tensor], plane: Plane) -> Array:
    """Project T states ``(N, *shape)`` to points ``(T, N, 2)``; for one entry the first coordinate is time."""
    points = np.stack([plane(state) for state in states])
    if plane.size > 1:
        return points
    times = np.linspace(0.0, 1.0, len(points))[:, None, None]
    return np.concatenate([np.broadcast_to(times, points.shape), points], axis=-1)


def _limits(shown: list[Paths], background: Array, plane: Plane) -> Frame:
    """The common frame of all panels, which contains every path."""
    points = np.concatenate([background, *(p.chord.reshape(-1, 2) for p in shown)])
    points = np.concatenate([points, *(p.curve.reshape(-1, 2) for p in shown)])
    if plane.size == 1:
        low, high = points[:, 1].min(), points[:, 1].max()
        return (-0.05, 1.07), (low - 0.05 * (high - low), high + 0.05 * (high - low))
    return frame(points, share=1.0)


def _panel(ax: Any, paths: Paths, background: Array, limits: Frame) -> None:
    """Draw chords in grey, trajectories in colour, and dots at both ends."""
    from matplotlib.collections import LineCollection

    ax.set_axis_on()
    ax.scatter(*background.T, s=2.5, color=FAINT, linewidths=0, zorder=0)
    ax.add_collection(LineCollection(list(paths.chord.swapaxes(0, 1)), colors=CHORD_COLOUR, linewidths=0.9, zorder=1))
    if paths.curve is not paths.chord:
        lines = list(paths.curve.swapaxes(0, 1))
        ax.add_collection(LineCollection(lines, colors=paths.colour, linewidths=1.2, alpha=0.85, zorder=2))
    ax.scatter(*paths.curve[0].T, s=10, facecolors="white", edgecolors=SOFT, linewidths=0.7, zorder=3)
    ax.scatter(*paths.curve[-1].T, s=10, color=paths.colour, linewidths=0, zorder=4)
    ax.set_xlim(limits[0])
    ax.set_ylim(limits[1])
    bare(ax, title=paths.name, colour=paths.colour, second=paths.note)


def _caption(plane: Plane, with_pairs: list[str], several: bool) -> str:
    """The caption of the figure."""
    words = [
        f"{LINES} paths from noise (open dots) to their ends (full dots); data in light grey. Left: noise "
        "and data paired at random, the pairs that flow matching is trained on. Their paths are straight "
        "lines that cross. Trajectories of a flow cannot cross, so those of the trained flow bend (coloured "
        "curves). The straight lines between the ends of its trajectories (grey) hardly cross; ReFlow is "
        "trained on these pairs."
    ]
    if several:
        words.append("Where the curves lie on the grey lines, the flow is straight and one step is enough.")
    if with_pairs:
        words.append(f"For {' and '.join(with_pairs)} the grey lines are pairs it was trained on.")
    if plane.principal:
        words.append("Shown in the plane of the data's first two principal components.")
    if plane.size == 1:
        words.append("The horizontal axis is time, the vertical axis is the value.")
    return " ".join(words)
