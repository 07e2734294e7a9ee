"""Samples of every model at every step count, from the same seeds: strips of images, or panels of points.

All images of a column have the same base noise, and the same class and conditions where models take them. Vectors of
more than two entries are shown in the plane of the first two principal components of the training data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from fewstep.data.dataset import DataSet
from fewstep.data.scaling import Scaling
from fewstep.flow.noise import generator_for
from fewstep.generator import Generator
from fewstep.report.drawing import DATA, FAINT, SOFT, WIDE, Array, Picture, bare, panels, picture, png_bytes
from fewstep.report.sheets import bins_of, channels_last, dot_size, principal_directions, tile, to_bytes
from fewstep.report.words import Row, calls, energy_of, model_rows, number

COLUMNS = 16  # images in a strip
POINTS = 1500  # samples in a panel
MAX_STRIP_SIDE = 96  # pixels; larger images are reduced to this
REAL = "training data"


@final
@dataclass(frozen=True)
class Strip:
    """A row of images of one model and step count, or of real data.

    Attributes:
        name: the model, or ``training data``.
        detail: number of calls and energy.
        picture: the images.
    """

    name: str
    detail: str
    picture: Picture


@final
@dataclass(frozen=True)
class Samples:
    """The section of samples: strips of images, or one figure of points.

    Attributes:
        strips: the strips; empty for points.
        labels: the class of every column, where models take labels.
        figure: the figure of points; None for images.
        caption: the caption of the strips.
    """

    strips: list[Strip]
    labels: list[str]
    figure: Picture | None
    caption: str


def is_image(shape: Sequence[int]) -> bool:
    """Whether rows are grey or colour images with more than one pixel in both directions."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 1


def samples(
    result: Mapping[str, Any],
    models: Mapping[str, Generator],
    data: DataSet,
    colours: Mapping[str, str],
    seed: int,
) -> Samples:
    """Draw samples of every row of the comparison.

    Args:
        result: the comparison.
        models: the models by name.
        data: the data of the comparison.
        colours: colour of every model.
        seed: seed of the samples.
    """
    if is_image(data.shape):
        return image_strips(result, models, data, seed)
    return Samples([], [], point_panels(result, models, data, colours, seed), "")


def class_columns(models: Mapping[str, Generator], count: int) -> Tensor | None:
    """Class numbers ``(count,)`` of the columns, in turn; None if no model takes labels."""
    classes = max((len(model.config.class_weights) for model in models.values()), default=0)
    return torch.arange(count) % classes if classes else None


def label_argument(model: Generator, classes: Tensor | None) -> list[int] | None:
    """Labels for ``Generator.sample``: the data's own numbers where it has them, else class numbers."""
    if classes is None or not model.conditional:
        return None
    names = model.config.label_names
    if names is None or any(isinstance(name, str) for name in names):
        return [int(k) for k in classes]
    return [int(names[int(k)]) for k in classes]


def shared_rows(models: Mapping[str, Generator], data: DataSet, count: int, seed: int) -> Array | None:
    """Numbers of the training rows ``(count,)`` whose conditions the columns have; None if no model takes conditions
    beside labels, or the data do not have them.
    """
    names = {name for model in models.values() for name in model.config.conditions}
    if not names or not names <= set(data.conditions):
        return None
    rows = pick_rows(data, count, seed)
    return rows[np.arange(count) % len(rows)]


def classes_of(models: Mapping[str, Generator], data: DataSet, rows: Array) -> Tensor | None:
    """The classes of training rows; None if no model takes labels."""
    return data.label_rows(rows) if any(model.conditional for model in models.values()) else None


def column_arguments(model: Generator, data: DataSet, classes: Tensor | None, rows: Array | None) -> dict[str, Any]:
    """Label and conditions of the columns, for ``Generator.draw``.

    Args:
        model: the model.
        data: the data of the comparison.
        classes: class numbers of the columns, or None.
        rows: the training rows whose conditions the columns have, or None.
    """
    cond = {} if rows is None else data.cond_rows(rows, model.config.conditions)
    return {"label": label_argument(model, classes), "cond": cond or None}


def label_words(data: DataSet, classes: Tensor | None) -> list[str]:
    """The names of the columns' classes in the data."""
    if classes is None:
        return []
    return [str(data.label_names[int(k)] if data.label_names else int(k)) for k in classes]


def reference_units(x: Tensor, model: Generator, data: DataSet) -> Tensor:
    """Convert a model's network units to those of the data; a model without a scaling uses data units.

    Args:
        x: rows ``(N, *shape)`` in the model's network units.
        model: the model.
        data: the data of the comparison.
    """
    if model.config.scaling == data.scaling.as_dict():
        return x
    rows = x.float().cpu().numpy()
    if model.config.scaling is not None:
        # not clipped: intermediate states may lie outside the range of the data
        own = replace(Scaling.from_dict(model.config.scaling), clip=None)
        rows = own.arrange(own.to_data(x).numpy())
    return data.scaling.normalise(rows)


def data_units(x: Tensor, data: DataSet) -> Array:
    """Convert network units to data units, ``(N, *shape)``."""
    return data.scaling.arrange(data.scaling.to_data(x).numpy())


def pick_rows(data: DataSet, count: int, seed: int) -> Array:
    """Draw the numbers of ``count`` training rows (all, if there are fewer) without replacement."""
    order = torch.randperm(len(data.train), generator=generator_for(seed, "report", "rows")).numpy()
    return np.asarray(data.train[order[:count]])


def real_columns(data: DataSet, classes: Tensor | None, seed: int) -> Array:
    """The number of a training row for every column, of the column's class where there are classes.

    Args:
        data: the data.
        classes: class numbers of the columns, or None.
        seed: seed of the choice.
    """
    rows = pick_rows(data, len(data.train), seed)
    if classes is None or data.labels is None:
        return rows[:COLUMNS]
    labels, chosen, seen = data.labels[rows], [], [0] * (int(classes.max()) + 1)
    for k in classes.tolist():
        found = rows[labels == k]
        chosen.append(found[seen[k] % len(found)] if len(found) else rows[0])
        seen[k] += 1
    return np.array(chosen)


def image_strips(result: Mapping[str, Any], models: Mapping[str, Generator], data: DataSet, seed: int) -> Samples:
    """Draw one strip of training images, and one strip per model and step count with the same classes.

    Arguments as in :func:`samples`.
    """
    shown = shared_rows(models, data, COLUMNS, seed)
    classes = class_columns(models, COLUMNS) if shown is None else classes_of(models, data, shown)
    limits = grey_limits(data)
    rows = real_columns(data, classes, seed) if shown is None else shown
    real = data_units(data.network_rows(rows), data)
    strips = [Strip(REAL, "", _strip(real, limits, "images of the training data"))]
    for row in model_rows(result):
        model = models[row["model"]]
        draw = model.draw(COLUMNS, steps=row["steps"], seed=seed, **column_arguments(model, data, classes, shown))
        images = data_units(reference_units(draw.x, model, data), data)
        alt = f"samples of {row['model']} with {calls(row['nfe'])}"
        detail = f"{calls(row['nfe'])} · energy {number(energy_of(row))}"
        strips.append(Strip(row["model"], detail, _strip(images, limits, alt)))
    caption = (
        "Every column starts from the same noise"
        + (" and has the same conditions" if shown is not None else "")
        + (" and has the same class" if shown is None and classes is not None else "")
        + f" (seed {seed}, samples 0 to {COLUMNS - 1}, not selected). Within a column only the model and the number "
        "of calls differ: with few calls a curved flow gives blurred images near the mean of the data, a straight "
        "one gives nearly the same images. The first row is training data, for comparison"
        + (", and its conditions are those of the column." if shown is not None else ".")
    )
    return Samples(strips, label_words(data, classes), None, caption)


def grey_limits(data: DataSet) -> tuple[float, float]:
    """The values shown as black and white: the scaling's range, or the extremes of the training rows."""
    if data.scaling.clip is not None:
        return data.scaling.clip
    rows = data.rows[data.train[:2000]]
    return float(rows.min()), float(rows.max())


def _strip(images: Array, limits: tuple[float, float], alt: str) -> Picture:
    """Draw images side by side."""
    image = tile(to_bytes(channels_last(images), limits), len(images), largest=MAX_STRIP_SIDE)
    return Picture(png_bytes(image), image.width, alt, pixelated=True)


@final
class Plane:
    """The coordinates in which rows are shown.

    Rows of one or two entries keep their own coordinates, in data units. Longer rows are projected on the first two
    principal components of the training data, in network units.

    Args:
        data: the data of the comparison.
    """

    def __init__(self, data: DataSet) -> None:
        self.data = data
        self.size = int(np.prod(data.shape))
        if self.size > 2:
            rows = pick_rows(data, 4000 if self.size <= 256 else 1000, 0)
            train = data.network_rows(rows).flatten(1).double().numpy()
            self.mean, self.basis = train.mean(0), principal_directions(train)

    @property
    def principal(self) -> bool:
        """Whether it is a plane of principal components."""
        return self.size > 2

    def __call__(self, x: Tensor) -> Array:
        """Project rows in network units ``(N, *shape)`` to points ``(N, 2)``, or ``(N, 1)`` for one entry."""
        if self.principal:
            return (x.flatten(1).double().numpy() - self.mean) @ self.basis
        return data_units(x, self.data).reshape(len(x), self.size)


Frame = tuple[tuple[float, float], tuple[float, float]]


def frame(points: Array, share: float = 0.99) -> Frame:
    """Limits of a square that contains a share of the points ``(N, 2)`` along each axis, with a margin."""
    low, high = np.quantile(points, [(1 - share) / 2, (1 + share) / 2], axis=0)
    (x, y), half = (low + high) / 2, 0.5 * max(float((high - low).max()), 1e-6)
    half *= 1.2 if share < 1 else 1.06
    return (x - half, x + half), (y - half, y + half)


def point_panels(
    result: Mapping[str, Any],
    models: Mapping[str, Generator],
    data: DataSet,
    colours: Mapping[str, str],
    seed: int,
) -> Picture:
    """Draw one panel per model and step count, a row of panels for each model.

    Arguments as in :func:`samples`.
    """
    plane = Plane(data)
    real = plane(data.network_rows(pick_rows(data, POINTS, seed)))
    conditions = shared_rows(models, data, POINTS, seed)
    classes = None if conditions is None else classes_of(models, data, conditions)
    across: dict[str, list[Row]] = {}
    for row in model_rows(result):
        across.setdefault(row["model"], []).append(row)
    longest = max(map(len, across.values()))
    width = max(3, longest if len(across) > 1 and len(list(across.values())[-1]) < longest else longest + 1)
    side = min(2.8, WIDE / width)
    figure, axes = panels(len(across), width, side * width, (side * 0.75 + 0.2) * len(across))
    limits = bins_of(real[:, 0]) if plane.size == 1 else _flat_frame(real, side)
    for ax in axes.flat:
        ax.set_axis_off()
    for i, (name, rows) in enumerate(across.items()):
        for ax, row in zip(axes[i], rows, strict=False):
            given = column_arguments(models[name], data, classes, conditions)
            draw = models[name].draw(POINTS, steps=row["steps"], seed=seed, **given)
            points = plane(reference_units(draw.x, models[name], data))
            _show(ax, real, points, colours[name], limits)
            first = row is rows[0]
            energy = f"E {number(energy_of(row))}"
            bare(ax, title=calls(row["nfe"]), second=energy, side=name if first else "", colour=colours[name])
    _show(axes[-1, -1], real, None, SOFT, limits)
    bare(axes[-1, -1], title=REAL, colour=SOFT)
    return picture(figure, "samples of every model at every number of calls", _points_caption(plane))


def _points_caption(plane: Plane) -> str:
    """The caption of the panels."""
    what = "Histograms of the samples over those" if plane.size == 1 else "Samples over those"
    where = ", in the plane of the data's first two principal components" if plane.principal else ""
    return (
        f"{what} of the data (grey){where}; {POINTS} samples from the same noise in every panel. "
        "One panel per model and number of network calls; E is the energy distance. With few calls a curved "
        "flow leaves samples between the modes of the data; a straight flow does not."
    )


def _flat_frame(points: Array, side: float) -> Frame:
    """A frame with the panels' ratio of height to width, 3 : 4, that contains the points."""
    (left, right), (bottom, top) = frame(points)
    low, high = np.quantile(points[:, 1], [0.005, 0.995])
    least = 1.2 * float(high - low) / 0.75  # the width at which the height contains the points
    half = max(right - left, least) / 2
    x, y = (left + right) / 2, (bottom + top) / 2
    return (x - half, x + half), (y - 0.75 * half, y + 0.75 * half)


def _show(ax: Any, real: Array, points: Array | None, colour: str, limits: Any) -> None:
    """Draw samples over the data: a scatter, or histograms of one entry with ``limits`` as the edges of bins."""
    ax.set_axis_on()
    data_colour = DATA if points is None else FAINT
    if real.shape[1] == 1:
        ax.hist(real[:, 0], bins=limits, density=True, color=data_colour)
        if points is not None:
            ax.hist(points[:, 0], bins=limits, density=True, histtype="step", color=colour, linewidth=1.4)
        ax.set_xlim(limits[0], limits[-1])
        return
    ax.scatter(real[:, 0], real[:, 1], s=2.5, color=data_colour, linewidths=0)
    if points is not None:
        size = 0.6 * dot_size(len(points))
        ax.scatter(points[:, 0], points[:, 1], s=size, color=colour, alpha=0.55, linewidths=0)
    ax.set_xlim(limits[0])
    ax.set_ylim(limits[1])
    ax.set_aspect("equal")
