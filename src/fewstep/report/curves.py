"""Figures with curves: quality against network calls, straightness and errors along t, training losses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.errors import UserError
from fewstep.report.drawing import (
    DATA,
    HALF,
    INK,
    SOFT,
    WIDE,
    Picture,
    call_axis,
    escape_formulas,
    halo,
    label_ends,
    log_height,
    panels,
    picture,
    tidy,
)
from fewstep.report.html_tables import value_of
from fewstep.report.words import Row, control_rows, diagnoses, model_rows

MARKERS = "osD^vP"
CALLS = "network calls per sample (NFE)"
Mark = tuple[float, str, str]  # height, text, colour


def energy_curve(result: Mapping[str, Any], colours: Mapping[str, str]) -> Picture:
    """Draw energy against network calls, both logarithmic, with standard errors and the floor.

    Args:
        result: a comparison.
        colours: colour of every model.
    """
    figure, axes = panels(1, 1, HALF, 3.8)
    ax = axes[0, 0]
    ends = [_curve(ax, name, rows, "energy", colours[name], k) for k, (name, rows) in _by_model(result)]
    tidy(ax, x=CALLS, y="energy distance")
    call_axis(ax, [row["nfe"] for row in model_rows(result)])
    marks = _gaussian_line(ax, result, "energy")
    floor = value_of(model_rows(result)[0], "energy_floor")
    if floor is not None and floor > 0:
        ax.axhline(floor, color=SOFT, linewidth=1.1, zorder=1)
        marks.append((floor, "data–data floor", SOFT))
    heights = [height for height, _, _ in marks]
    heights += [y for row in model_rows(result) if (y := value_of(row, "energy")) is not None]
    positive = [height for height in heights if height > 0]
    log_height(ax, min(positive, default=0.1), max(positive, default=1.0))
    _name_lines(ax, ends, marks)
    caption = (
        "Energy distance to the training data against network calls (both logarithmic; bars are one "
        "standard error). A point further left at the same height has the same quality with fewer calls. The "
        "grey line is the mean energy of data of the same law at this sample size; a value below it is not "
        "an improvement."
    )
    return picture(figure, "energy distance against network calls", caption)


def fidelity_curves(result: Mapping[str, Any], colours: Mapping[str, str]) -> Picture:
    """Draw precision and recall against network calls, one panel each.

    Args:
        result: a comparison.
        colours: colour of every model.
    """
    figure, axes = panels(2, 1, HALF, 3.8, sharex=True)
    for ax, key in zip(axes[:, 0], ("precision", "recall"), strict=True):
        ends = [_curve(ax, name, rows, key, colours[name], k) for k, (name, rows) in _by_model(result)]
        tidy(ax, y=key, x=CALLS if key == "recall" else "")
        call_axis(ax, [row["nfe"] for row in model_rows(result)])
        ax.set_ylim(-0.05, 1.06)
        ax.set_yticks([0, 0.5, 1])
        _name_lines(ax, ends, _gaussian_line(ax, result, key), gap=0.14)
    caption = (
        "Precision (share of samples that are near to data) and recall (share of data that are near to "
        "samples), by five nearest neighbours. They show errors that energy does not: the Gaussian has the "
        "mean and covariance of the data and a low energy, but few of its samples are near to data. A good "
        "model is high in both."
    )
    return picture(figure, "precision and recall against network calls", caption)


def _by_model(result: Mapping[str, Any]) -> list[tuple[int, tuple[str, list[Row]]]]:
    """Return number, name and rows of every model, the rows in order of network calls."""
    rows = model_rows(result)
    names = dict.fromkeys(row["model"] for row in rows)
    ordered = {n: sorted((r for r in rows if r["model"] == n), key=lambda r: r["nfe"]) for n in names}
    return list(enumerate(ordered.items()))


def _curve(ax: Any, name: str, rows: Sequence[Row], key: str, colour: str, number: int) -> tuple[float, Mark] | None:
    """Draw one model's line; return its last x and its label, or None if it has no values."""
    kept = [(row, float(y)) for row in rows if (y := value_of(row, key)) is not None]
    if key == "energy":  # its axis is logarithmic
        kept = [(row, y) for row, y in kept if y > 0]
    if not kept:
        return None
    x, heights = [row["nfe"] for row, _ in kept], np.array([value for _, value in kept])
    style = {"color": colour, "marker": MARKERS[number % len(MARKERS)], "markersize": 5, "linewidth": 1.7}
    ax.plot(x, heights, zorder=3, **style)
    if key == "energy":
        errors = np.array([value_of(row, "energy_se") or 0.0 for row, _ in kept])
        ax.vlines(
            x,
            np.maximum(heights - errors, 0.1 * heights),
            heights + errors,
            color=colour,
            linewidth=1.2,
            zorder=3,
        )
    return x[-1], (float(heights[-1]), name, colour)


def _gaussian_line(ax: Any, result: Mapping[str, Any], key: str) -> list[Mark]:
    """Draw a dashed line at the Gaussian control's score; return its label, if there is one."""
    for row in control_rows(result):
        value = value_of(row, key)
        if "Gaussian" in row["model"] and value is not None and (value > 0 or key != "energy"):
            ax.axhline(value, color=DATA, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
            return [(float(value), "Gaussian, no model", DATA)]
    return []


def _name_lines(ax: Any, ends: Sequence[tuple[float, Mark] | None], marks: Sequence[Mark], gap: float = 0.075) -> None:
    """Write the name of each line at the right border, or beside its last marker if it ends before."""
    known = [end for end in ends if end is not None]
    furthest = max((x for x, _ in known), default=1)
    for x, (y, name, colour) in known:
        if x < furthest:
            ax.annotate(
                escape_formulas(name), (x, y), xytext=(6, -10), textcoords="offset points", va="center", fontsize=8.5,
                color=colour, path_effects=halo(), zorder=5,
            )  # fmt: skip
    label_ends(ax, [*marks, *(mark for x, mark in known if x == furthest)], gap)


STRAIGHTNESS = (
    ("deviation", "deviation  E |Δ − v(Zₜ, t)|²"),
    ("curvature", "acceleration  |Z″|, RMS"),
    ("normal_curvature", "its part normal to the velocity"),
)
ERRORS = (("local_error", "-"), ("weighted_error", (0, (4, 2))))


def straightness_curves(result: Mapping[str, Any], colours: Mapping[str, str]) -> Picture | None:
    """Draw deviation from the chord and acceleration along t for every velocity model; None without one."""
    diagnosis = diagnoses(result)
    if not diagnosis:
        return None
    figure, axes = panels(1, 3, WIDE, 3.1)
    for ax, (key, title) in zip(axes[0], STRAIGHTNESS, strict=True):
        top = max(float(np.max(d[key])) for d in diagnosis.values()) or 1.0
        ends, heights = [], [top]
        for name, values in diagnosis.items():
            y = np.maximum(np.asarray(values[key], dtype=float), 1e-6 * top)
            ax.plot(values["times"], y, color=colours[name], linewidth=1.7)
            _band(ax, values, y, f"{key}_error", colours[name])
            ends.append((float(y[-1]), name, colours[name]))
            heights.append(float(y.min()))
        log_height(ax, min(heights), top)
        ax.set_xlim(0, 1)
        tidy(ax, title=title, x="t   (0 noise, 1 data)")
        if ax is axes[0, -1]:
            label_ends(ax, ends)
    caption = (
        "Along time, from noise (0) to data (1), in network units: the squared difference between the velocity "
        "and the chord of its trajectory (the integral is S), the acceleration of trajectories, and the part "
        "of it that changes their direction; bands are two standard errors to either side. "
        "Where a curve is high, a solver needs more steps. If all are zero, one Euler step is exact."
    )
    return picture(figure, "deviation, acceleration and normal acceleration along time", caption)


def _band(ax: Any, values: Mapping[str, Any], y: np.ndarray, key: str, colour: str) -> None:
    """Draw a band of two standard errors about a curve, if they are known."""
    error = 2 * np.array([value or 0.0 for value in values.get(key) or [0.0]])
    if np.isfinite(error).all() and error.any():
        ax.fill_between(values["times"], np.maximum(y - error, 0.05 * y), y + error, color=colour, alpha=0.18, lw=0)


def error_curves(result: Mapping[str, Any], colours: Mapping[str, str]) -> Picture | None:
    """Draw local error, its effect at t = 1, and stiffness along t; None if no model has them."""
    diagnosis = {name: d for name, d in diagnoses(result).items() if d.get("weighted_error") or d.get("stiffness")}
    if not diagnosis:
        return None
    figure, axes = panels(1, 2, WIDE, 3.1)
    errors, stiffness = axes[0]
    heights = [_error_lines(errors, d, colours[name]) for name, d in diagnosis.items()]
    log_height(errors, min(low for low, _ in heights), max(high for _, high in heights))
    tidy(errors, title="error of a step per h²: local (solid), at t = 1 (dashed)", x="t   (0 noise, 1 data)")
    ends, tops = [], [8.0]
    for name, d in diagnosis.items():
        if d.get("stiffness"):
            y = np.asarray(d["stiffness"], dtype=float)
            stiffness.plot(d["stiffness_times"], y, color=colours[name], linewidth=1.7, marker="o", markersize=3)
            ends.append((float(y[-1]), name, colours[name]))
            tops.append(float(y.max()))
    if max(tops) > 80:
        log_height(stiffness, 0.5, max(tops))
    else:
        stiffness.set_ylim(0, 1.08 * max(tops))
    stiffness.axhline(8, color=DATA, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    tidy(stiffness, title="stiffness: largest |λ| of ∂v/∂x, mean over samples", x="t   (0 noise, 1 data)")
    label_ends(stiffness, [*ends, (8.0, "8 steps", DATA)])
    for ax in axes[0]:
        ax.set_xlim(0, 1)
    caption = (
        "Left: the error of one Euler step of length h at t, over h², RMS (solid), and the error at t = 1 that it "
        "causes (dashed): a grid should have its steps where the dashed line is high. Right: the rate at which "
        "neighbouring trajectories approach or separate. Above the dashed line (|λ| = 8) each of eight equal "
        "Euler steps overshoots."
    )
    return picture(figure, "local error and stiffness along time", caption)


def _error_lines(ax: Any, values: Mapping[str, Any], colour: str) -> tuple[float, float]:
    """Draw the local error solid and the weighted error dashed; return their lowest and highest value."""
    lines = [(np.asarray(values[key], dtype=float), style) for key, style in ERRORS if values.get(key)]
    top = max(float(y.max()) for y, _ in lines) or 1.0
    lines = [(np.maximum(y, 1e-4 * top), style) for y, style in lines]
    for y, style in lines:
        ax.plot(values["times"], y, color=colour, linewidth=1.7, linestyle=style)
    return min(float(y.min()) for y, _ in lines), top


def read_statistics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read ``stats.jsonl``; a truncated last line is ignored.

    Returns:
        The lines that have a loss, by stage, in the order of the file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the statistics {str(path)!r} cannot be read: {error}.") from error
    stages: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(fields, dict) and "stage" in fields and "loss" in fields.get("terms", {}):
            stages.setdefault(str(fields["stage"]), []).append(fields)
    return stages


def loss_curves(path: Path, colours: Mapping[str, str]) -> Picture | None:
    """Draw loss against samples seen, one panel per stage; None if the file has no stage of ``colours``."""
    stages = {name: lines for name, lines in read_statistics(path).items() if name in colours}
    if not stages:
        return None
    across = min(3, len(stages))
    down = -(-len(stages) // across)
    figure, axes = panels(down, across, WIDE / 3 * across, 2.6 * down)
    for ax, (name, lines) in zip(axes.flat, stages.items(), strict=False):
        _loss_panel(ax, name, lines, colours[name])
    for ax in list(axes.flat)[len(stages) :]:
        ax.set_axis_off()
    caption = (
        "Training loss of every stage (thin: as logged; thick: running median). Dashed lines separate "
        "rounds. A flow-matching loss does not go to zero: its minimum is the variance of x1 - x0 given x_t, "
        "since lines of different pairs cross. After ReFlow few lines cross, and the minimum is near zero."
    )
    return picture(figure, "training loss of every stage", caption)


def _loss_panel(ax: Any, name: str, lines: Sequence[Mapping[str, Any]], colour: str) -> None:
    """Draw the logged loss of a stage, its running median, and the limits of its rounds."""
    x = np.array([line["samples"] for line in lines]) / 1000
    y = np.array([line["terms"]["loss"] for line in lines], dtype=float)  # null, which stands for NaN, becomes NaN
    y[~np.isfinite(y)] = np.nan
    middle = smoothed(y)
    ax.plot(x, y, color=colour, linewidth=0.9, alpha=0.35)
    ax.plot(x, middle, color=colour, linewidth=1.7)
    for k in np.flatnonzero(np.diff([line.get("phase", 0) for line in lines])):
        ax.axvline((x[k] + x[k + 1]) / 2, color=DATA, linewidth=0.9, linestyle=(0, (3, 3)))
    known, trend = y[np.isfinite(y)], middle[np.isfinite(middle)]
    if known.size and known.min() > 0 and trend.max() > 5 * trend.min():
        log_height(ax, float(known.min()), float(known.max()))
    tidy(ax, title=name, x="thousand samples seen", y="loss")
    ax.title.set_color(colour)
    ax.set_title(escape_formulas(name), fontsize=9.5, color=colour or INK, loc="left")


def smoothed(values: np.ndarray, share: float = 0.06) -> np.ndarray:
    """Running median over a share of the points; what is not finite is left out.

    >>> smoothed(np.array([1.0, 9.0, 2.0, 3.0]), share=0.5)
    array([5. , 2. , 3. , 2.5])
    """
    half = max(1, int(share * len(values) / 2))
    windows = [values[max(0, k - half) : k + half + 1] for k in range(len(values))]
    return np.array([np.median(w[np.isfinite(w)]) if np.isfinite(w).any() else np.nan for w in windows])
