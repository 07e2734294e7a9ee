"""Curves: quality against network calls, straightness and curvature along t, losses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.errors import UserError
from fewstep.report.drawing import (
    DATA,
    INK,
    SOFT,
    Picture,
    call_axis,
    halo,
    label_ends,
    panels,
    picture,
    plain,
    tidy,
)
from fewstep.report.tables import value_of
from fewstep.report.words import Row, control_rows, model_rows

MARKERS = "osD^vP"
TINY = 1e-12


def by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of every model, by network calls."""
    names = dict.fromkeys(row["model"] for row in rows)
    return {name: sorted((r for r in rows if r["model"] == name), key=lambda r: r["nfe"]) for name in names}


def energy_curve(result: Mapping[str, Any], colours: Mapping[str, str]) -> Picture:
    """Energy against network calls, both logarithmic, with standard errors and the floor."""
    rows = model_rows(result)
    figure, axes = panels(1, 1, 5.3, 3.7)
    ax = axes[0, 0]
    ax.set_yscale("log")
    ends = []
    for number, (name, found) in enumerate(by_model(rows).items()):
        kept = [row for row in found if (value_of(row, "energy") or 0.0) > 0]
        if not kept:
            continue
        x = [row["nfe"] for row in kept]
        y = np.array([value_of(row, "energy") for row in kept], dtype=float)
        errors = np.array([value_of(row, "energy_se") or 0.0 for row in kept])
        bars = np.stack([np.minimum(errors, 0.9 * y), errors])
        ax.errorbar(
            x, y, bars, color=colours[name], marker=MARKERS[number % len(MARKERS)], markersize=5, linewidth=1.6,
            elinewidth=1.1, capsize=2, zorder=3,
        )  # fmt: skip
        ends.append((name, x[-1], y[-1]))
    tidy(ax, x="network calls per sample (NFE)", y="energy distance")
    call_axis(ax, [row["nfe"] for row in rows])
    marks = _references(ax, result)
    low, high = ax.get_ylim()
    ax.set_ylim(low / 1.25, high * 1.15)
    _name_lines(ax, ends, colours, marks)
    caption = (
        "Energy distance to the training data against network calls (both logarithmic; bars are one standard error). "
        "Further left at the same height is the same quality for less. The grey line is what data of the same law score "
        "at this sample size: nothing below it is an improvement."
    )
    return picture(figure, "energy distance against network calls", caption)


def _references(ax: Any, result: Mapping[str, Any]) -> list[tuple[float, str, str]]:
    """Lines of the floor and of the Gaussian control."""
    marks = []
    floor = value_of(model_rows(result)[0], "energy_floor")
    if floor is not None and floor > 0:
        ax.axhline(floor, color=SOFT, linewidth=1.1, zorder=1)
        marks.append((floor, "data–data floor", SOFT))
    for row in control_rows(result):
        value = value_of(row, "energy")
        if "Gaussian" in row["model"] and value is not None and value > 0:
            ax.axhline(value, color=DATA, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
            marks.append((value, "Gaussian, no model", DATA))
    return marks


def _name_lines(
    ax: Any,
    ends: Sequence[tuple[str, float, float]],
    colours: Mapping[str, str],
    marks: Sequence[tuple[float, str, str]] = (),
) -> None:
    """Names at the right border for lines that reach it, beside the marker for those that end before."""
    furthest = max((x for _, x, _ in ends), default=1)
    labels = list(marks)
    for name, x, y in ends:
        if x == furthest:
            labels.append((y, name, colours[name]))
        else:
            ax.annotate(
                plain(name), (x, y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8.5,
                color=colours[name], path_effects=halo(), zorder=5,
            )  # fmt: skip
    label_ends(ax, labels)


def fidelity_curves(result: Mapping[str, Any], colours: Mapping[str, str]) -> Picture:
    """Precision and recall against network calls."""
    rows = model_rows(result)
    figure, axes = panels(2, 1, 5.3, 3.7, sharex=True)
    for ax, key in zip(axes[:, 0], ("precision", "recall"), strict=True):
        ends = []
        for number, (name, found) in enumerate(by_model(rows).items()):
            kept = [row for row in found if value_of(row, key) is not None]
            if kept:
                x, y = [row["nfe"] for row in kept], [float(value_of(row, key) or 0.0) for row in kept]
                ax.plot(
                    x,
                    y,
                    color=colours[name],
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=4.5,
                    linewidth=1.6,
                )
                ends.append((name, x[-1], y[-1]))
        tidy(ax, y=key, x="network calls per sample (NFE)" if key == "recall" else "")
        call_axis(ax, [row["nfe"] for row in rows])
        ax.set_ylim(-0.04, 1.04)
        marks = []
        for row in control_rows(result):
            value = value_of(row, key)
            if "Gaussian" in row["model"] and value is not None:
                ax.axhline(value, color=DATA, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
                marks.append((float(value), "Gaussian, no model", DATA))
        furthest = max((x for _, x, _ in ends), default=1)
        label_ends(
            ax, [*marks, *((y, name, colours[name]) for name, x, y in ends if x == furthest)], gap=0.13
        )
    caption = (
        "Precision (share of samples that look like data) and recall (share of the data the samples cover), by five "
        "nearest neighbours. They catch what energy misses: the Gaussian has about the right energy on some data, and "
        "hardly a sample that could be one of them."
    )
    return picture(figure, "precision and recall against network calls", caption)


def straightness_curves(result: Mapping[str, Any], colours: Mapping[str, str]) -> Picture | None:
    """Deviation from the chord and acceleration along t, for every velocity model."""
    diagnosis = result.get("diagnosis") or {}
    if not diagnosis:
        return None
    figure, axes = panels(1, 3, 10.6, 3.0)
    shown = (
        ("deviation", "deviation  E |Δ − v(Zₜ, t)|²"),
        ("curvature", "acceleration  |Z″|, RMS"),
        ("normal_curvature", "its part normal to the velocity"),
    )
    for k, (ax, (key, title)) in enumerate(zip(axes[0], shown, strict=True)):
        ends = []
        top = max(max(np.asarray(d[key], dtype=float)) for d in diagnosis.values())
        for name, values in diagnosis.items():
            y = np.maximum(np.asarray(values[key], dtype=float), max(top * 1e-5, TINY))
            ax.plot(values["times"], y, color=colours.get(name, INK), linewidth=1.7)
            ends.append((float(y[-1]), name, colours.get(name, INK)))
        ax.set_yscale("log")
        ax.set_xlim(0, 1)
        tidy(ax, title=title, x="t   (0 noise, 1 data)")
        if k == 2:
            label_ends(ax, ends)
    caption = (
        "Along time, from noise (0) to data (1), in network units: how far the velocity is from the trajectory's own "
        "chord (its integral is S), and how much trajectories accelerate and bend. Where a curve is high, few steps lose "
        "accuracy; a solver needs its steps there. Zero everywhere means that one Euler step is exact."
    )
    return picture(figure, "deviation, acceleration and bending along time", caption)


def read_statistics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of ``stats.jsonl`` by stage, in the order of the file; a line cut off at the end is left out.

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
    """One small panel per stage: loss against samples seen."""
    stages = read_statistics(path)
    if not stages:
        return None
    across = min(3, len(stages))
    down = -(-len(stages) // across)
    figure, axes = panels(down, across, 10.6 if across == 3 else 4.2 * across, 2.5 * down)
    for ax, (name, lines) in zip(axes.flat, stages.items(), strict=False):
        x = np.array([line["samples"] for line in lines]) / 1000
        y = np.array([line["terms"]["loss"] for line in lines], dtype=float)
        colour = colours.get(name, INK)
        ax.plot(x, y, color=colour, linewidth=0.9, alpha=0.35)
        ax.plot(x, smoothed(y), color=colour, linewidth=1.7)
        phases = [line.get("phase", 0) for line in lines]
        for k in np.flatnonzero(np.diff(phases)):
            ax.axvline((x[k] + x[k + 1]) / 2, color=DATA, linewidth=0.9, linestyle=(0, (3, 3)))
        if np.isfinite(y).all() and (y > 0).all() and y.max() > 20 * y.min():
            ax.set_yscale("log")
        tidy(ax, title=name, x="thousand samples seen", y="loss")
        ax.title.set_color(colour)
    for ax in list(axes.flat)[len(stages) :]:
        ax.set_axis_off()
    caption = (
        "Training loss of every stage (faint: as logged; strong: running median). Dashed lines separate rounds. A "
        "flow-matching loss does not go to zero: it keeps the spread of the pairs that cross at a point; after ReFlow "
        "the pairs hardly cross, and little is left."
    )
    return picture(figure, "training loss of every stage", caption)


def smoothed(values: np.ndarray, share: float = 0.06) -> np.ndarray:
    """Running median over a share of the points."""
    half = max(1, int(share * len(values) / 2))
    return np.array([np.median(values[max(0, k - half) : k + half + 1]) for k in range(len(values))])
