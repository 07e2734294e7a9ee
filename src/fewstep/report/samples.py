"""Samples of every model at every step count, from the same seeds: strips of images, or panels of points.

Images share their columns: a column is one base sample (and one class, where models take labels). Vectors of more than
two entries are shown in the plane of the first two principal components of the training data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from fewstep.data.dataset import DataSet
from fewstep.flow.noise import generator_for
from fewstep.generator import Generator
from fewstep.report.drawing import (
    DATA,
    FAINT,
    SOFT,
    Array,
    Picture,
    bare,
    panels,
    picture,
    png_bytes,
)
from fewstep.report.sheets import bins_of, channels_last, dot_size, principal_directions, tile, to_bytes
from fewstep.report.words import Row, calls, energy_of, model_rows, number

COLUMNS = 16
POINTS = 1500
STRIP = 96  # larger images are reduced to this
REAL = "training data"


@final
@dataclass(frozen=True)
class Strip:
    """A row of images of one model and step count; ``model`` is empty for real data."""

    name: str
    detail: str
    picture: Picture


@final
@dataclass(frozen=True)
class Samples:
    """The section: strips with the labels of their columns, or one figure."""

    strips: list[Strip]
    labels: list[str]
    figure: Picture | None
    caption: str


def is_image(shape: Sequence[int]) -> bool:
    """Grey or colour images with more than one pixel."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 1


def samples(
    result: Mapping[str, Any],
    models: Mapping[str, Generator],
    data: DataSet,
    colours: Mapping[str, str],
    seed: int,
) -> Samples:
    """Draw the section's pictures."""
    if is_image(data.shape):
        return image_strips(result, models, data, seed)
    return Samples([], [], point_panels(result, models, data, colours, seed), "")


def class_columns(models: Mapping[str, Generator], count: int) -> Tensor | None:
    """A class for every column, in turn, when any model takes labels."""
    classes = max((len(model.config.class_weights) for model in models.values()), default=0)
    return torch.arange(count) % classes if classes else None


def label_argument(model: Generator, classes: Tensor | None) -> list[int] | None:
    """Class numbers in the words that ``Generator.sample`` takes: the data's own numbers where it has them."""
    if classes is None or not model.conditional:
        return None
    names = model.config.label_names
    if names is None or any(isinstance(name, str) for name in names):
        return [int(k) for k in classes]
    return [int(names[int(k)]) for k in classes]


def label_words(data: DataSet, classes: Tensor | None) -> list[str]:
    """What the data calls the classes of the columns."""
    if classes is None:
        return []
    return [str(data.label_names[int(k)] if data.label_names else int(k)) for k in classes]


def data_units(x: Tensor, data: DataSet) -> Array:
    """Network units to data units, ``(N, *shape)``."""
    return data.scaling.arrange(data.scaling.to_data(x).numpy())


def pick_rows(data: DataSet, count: int, seed: int) -> Array:
    """Indices of ``count`` training rows (fewer when there are fewer), drawn without replacement."""
    order = torch.randperm(len(data.train), generator=generator_for(seed, "report", "rows")).numpy()
    return np.asarray(data.train[order[:count]])


def image_strips(
    result: Mapping[str, Any], models: Mapping[str, Generator], data: DataSet, seed: int
) -> Samples:
    """One strip per model and step count, and one of training images (of the same classes)."""
    classes = class_columns(models, COLUMNS)
    rows = pick_rows(data, len(data.train), seed)
    if classes is not None and data.labels is not None:
        found = [np.flatnonzero(data.labels[rows] == int(k)) for k in classes]
        turns = [k // len(set(classes.tolist())) for k in range(COLUMNS)]
        chosen = [rows[f[turn % len(f)] if len(f) else 0] for f, turn in zip(found, turns, strict=True)]
    else:
        chosen = list(rows[:COLUMNS])
    limits = grey_limits(data)
    real = data_units(data.network_rows(chosen), data)
    strips = [Strip(REAL, "", _strip(real, limits, "images of the training data"))]
    for row in model_rows(result):
        model = models[row["model"]]
        draw = model.draw(COLUMNS, steps=row["steps"], label=label_argument(model, classes), seed=seed)
        alt = f"samples of {row['model']} with {calls(row['nfe'])}"
        detail = f"{calls(row['nfe'])} · energy {number(energy_of(row))}"
        strips.append(Strip(row["model"], detail, _strip(data_units(draw.x, data), limits, alt)))
    caption = (
        "Every column starts from the same noise"
        + (" and has the same class" if classes is not None else "")
        + f" (seed {seed}, samples 0 to {COLUMNS - 1}, not chosen). Down a column one sees what fewer calls change: "
        "a curved flow blurs towards the mean of the data when it is cut short, a straight one keeps its picture. The "
        "first row is real data, for comparison."
    )
    return Samples(strips, label_words(data, classes), None, caption)


def grey_limits(data: DataSet) -> tuple[float, float]:
    """The values shown as black and white: the scaling's range, or the extremes of the training rows."""
    if data.scaling.clip is not None:
        return data.scaling.clip
    rows = data.rows[data.train[:2000]]
    return float(rows.min()), float(rows.max())


def _strip(images: Array, limits: tuple[float, float], alt: str) -> Picture:
    image = tile(to_bytes(channels_last(images), limits), len(images), largest=STRIP)
    return Picture(png_bytes(image), image.width, alt, pixelated=True)


Projection = Callable[[Tensor], Array]


def projection(data: DataSet) -> tuple[Projection, tuple[str, str]]:
    """The plane in which points are shown, and the names of its axes; takes rows in network units.

    One or two entries are shown in the data's own units.
    """
    size = int(np.prod(data.shape))
    if size <= 2:
        names = ("x₁", "x₂") if size == 2 else ("x", "")
        return (lambda x: data_units(x, data).reshape(len(x), size)), names
    train = data.network_rows(pick_rows(data, 4000, 0)).flatten(1).double().numpy()
    mean, basis = train.mean(0), principal_directions(train)
    names = ("1st principal component of the data", "2nd principal component")
    return (lambda x: (x.flatten(1).double().numpy() - mean) @ basis), names


def frame(points: Array) -> tuple[tuple[float, float], tuple[float, float]]:
    """Limits that hold the bulk of the points ``(N, 2)`` with a margin, equal in scale on both axes."""
    low, high = np.quantile(points, [0.005, 0.995], axis=0)
    centre, half = (low + high) / 2, 0.62 * max(float((high - low).max()), 1e-6)
    return (centre[0] - half, centre[0] + half), (centre[1] - half, centre[1] + half)


def point_panels(
    result: Mapping[str, Any],
    models: Mapping[str, Generator],
    data: DataSet,
    colours: Mapping[str, str],
    seed: int,
) -> Picture:
    """One panel per model and step count, models below each other, step counts side by side."""
    rows, (project, names) = model_rows(result), projection(data)
    real = project(data.network_rows(pick_rows(data, POINTS, seed)))
    order = list(dict.fromkeys(row["model"] for row in rows))
    across = {name: [row for row in rows if row["model"] == name] for name in order}
    width = max(3, *(len(found) for found in across.values()))
    width = width if any(len(found) < width for found in across.values()) else width + 1
    side = min(2.3, 10.6 / width)
    flat = real.shape[1] == 1
    figure, axes = panels(len(order), width, side * width, (side * 0.8 if flat else side + 0.22) * len(order))
    show = _histogram if flat else _scatter
    limits = bins_of(real[:, 0]) if flat else frame(real)
    spare = [(i, j) for i, name in enumerate(order) for j in range(len(across[name]), width)]
    for i, name in enumerate(order):
        for j, row in enumerate(across[name]):
            points = project(models[name].draw(POINTS, steps=row["steps"], seed=seed).x)
            show(axes[i, j], real, points, colours[name], limits)
            bare(axes[i, j], title=name if j == 0 else "", colour=colours[name], second=_panel_detail(row, j))
    for i, j in spare[:-1]:
        axes[i, j].set_axis_off()
    last = axes[spare[-1]]
    show(last, real, None, SOFT, limits)
    bare(last, title=REAL, colour=SOFT)
    what = (
        "Histograms of the samples over those of the data"
        if flat
        else "Samples over a faint scatter of the data"
    )
    where = (
        ""
        if len(names) < 2 or "principal" not in names[0]
        else (", in the plane of the data's first two principal components (chosen from the data alone)")
    )
    caption = (
        f"{what} (grey){where}; {POINTS} samples from the same seed in every panel, so equal noise. One panel per "
        "model and number of network calls; E is the energy distance. A curved flow cut short leaves mass between the "
        "modes; a straight one puts it where the data are from the first call on."
    )
    return picture(figure, "samples of every model at every number of calls", caption)


def _panel_detail(row: Row, column: int) -> str:
    return f"{calls(row['nfe'])}, E {number(energy_of(row))}" if column else calls(row["nfe"])


def _scatter(ax: Any, real: Array, points: Array | None, colour: str, limits: Any) -> None:
    ax.scatter(real[:, 0], real[:, 1], s=2.5, color=FAINT if points is not None else DATA, linewidths=0)
    if points is not None:
        ax.scatter(
            points[:, 0], points[:, 1], s=dot_size(len(points)) * 0.6, color=colour, alpha=0.55, linewidths=0
        )
    ax.set_xlim(limits[0])
    ax.set_ylim(limits[1])
    ax.set_aspect("equal")


def _histogram(ax: Any, real: Array, points: Array | None, colour: str, limits: Array) -> None:
    ax.hist(real[:, 0], bins=limits, density=True, color=FAINT)
    if points is not None:
        ax.hist(points[:, 0], bins=limits, density=True, histtype="step", color=colour, linewidth=1.3)
    ax.set_xlim(limits[0], limits[-1])
