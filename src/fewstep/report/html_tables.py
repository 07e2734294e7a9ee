"""The tables of a report, as cells of text with marks for the template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from fewstep.report.words import Row, control_rows, diagnoses, model_rows, number

# title, key, whether the lowest or the highest value is best ("low", "high" or ""), key of the floor, explanation
COLUMNS: tuple[tuple[str, str, str, str | None, str], ...] = (
    ("steps", "steps", "", None, "solver steps"),
    ("NFE", "nfe", "", None, "network calls per sample, counted"),
    ("energy", "energy", "low", "energy_floor", "energy distance to the training split ± standard error"),
    ("held-out", "energy_held_out", "low", "energy_held_out_floor", "energy distance to the held-out split"),
    ("sliced W₂", "sliced_w2", "low", "sliced_w2_floor", "sliced 2-Wasserstein distance, 256 directions"),
    ("FD", "_percent", "low", None, "squared Fréchet distance, in percent of the data's trace"),
    ("precision", "precision", "high", None, "share of samples that are near to data (5 nearest neighbours)"),
    ("recall", "recall", "high", None, "share of data that are near to samples (5 nearest neighbours)"),
    (
        "coverage",
        "coverage",
        "high",
        "coverage_floor",
        "share of data points with a sample nearer than the 5th data point",
    ),
    ("memorised", "memorised", "", None, "share of samples nearer to training data than 5 % of held-out data are"),
    ("time", "relative_time", "", None, "median wall time of a batch, relative to the slowest row"),
)


@final
@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: the value.
        small: the standard error, in small type.
        best: whether it is the best value of its column.
        alarm: whether it is flagged for memorisation.
    """

    text: str
    small: str = ""
    best: bool = False
    alarm: bool = False


@final
@dataclass(frozen=True)
class Line:
    """One line of the comparison.

    Attributes:
        name: name of the model or the control.
        kind: ``model``, ``control`` or ``floor``.
        cells: one per column.
        first: whether it is the first line of its model or group.
    """

    name: str
    kind: str
    cells: list[Cell]
    first: bool = False


def value_of(row: Row, key: str) -> float | int | None:
    """A number of a row or of its scores; ``_percent`` stands for ``FD-<features>_percent``. None if undefined."""
    if key == "_percent":
        found = [value for name, value in row["scores"].items() if _of_frechet(name)]
        return found[0] if found else None
    value = row.get(key, row["scores"].get(key))
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _of_frechet(name: str) -> bool:
    """Whether a score is the Fréchet distance in per cent."""
    return name.startswith("FD-") and name.endswith("_percent")


def _columns(result: Mapping[str, Any]) -> list[tuple[str, str, str, str | None, str]]:
    """The columns, those of the user's own metrics before the time."""
    names = (result.get("protocol") or {}).get("metrics", [])
    own = [(name, name, "", None, "a metric of your own: mean ± standard error") for name in names]
    return [*COLUMNS[:-1], *own, COLUMNS[-1]]


def comparison(result: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[Line]]:
    """The comparison table.

    Args:
        result: a comparison.

    Returns:
        The columns' ``(title, explanation)``, and the lines: models, controls, floors.
    """
    rows, controls = model_rows(result), control_rows(result)
    columns = [column for column in _columns(result) if any(value_of(row, column[1]) is not None for row in rows)]
    best = {key: _best([value_of(row, key) for row in rows], end) for _, key, end, _, _ in columns}
    lines = []
    for k, row in enumerate(rows):
        cells = [_cell(row, key, best[key]) for _, key, _, _, _ in columns]
        lines.append(Line(row["model"], "model", cells, k == 0 or rows[k - 1]["model"] != row["model"]))
    for k, row in enumerate(controls):
        lines.append(Line(row["model"], "control", [_cell(row, c[1], None) for c in columns], k == 0))
    floors = [Cell(number(rows[0]["scores"].get(floor)) if floor else "") for _, _, _, floor, _ in columns]
    lines.append(Line("data against data (floor)", "floor", floors, True))
    heads = [(_fd_title(rows[0]) if key == "_percent" else title, text) for title, key, _, _, text in columns]
    return heads, lines


def _fd_title(row: Row) -> str:
    """``FD-<features> %``."""
    names = [name.removesuffix("_percent") for name in row["scores"] if _of_frechet(name)]
    return f"{names[0]} %"


def _best(values: Sequence[float | int | None], end: str) -> str | None:
    """The best value as it is printed, so that all values printed alike are marked; None for a single row."""
    known = [float(value) for value in values if value is not None]
    if not end or len(known) < 2:
        return None
    return number(min(known) if end == "low" else max(known))


def _cell(row: Row, key: str, best: str | None) -> Cell:
    """The cell of a row in the column ``key``, whose best printed value is ``best``."""
    value = value_of(row, key)
    text = number(value)
    error = row["scores"].get("energy_se" if key == "energy" else f"{key}_error")
    small = f"±{number(error)}" if key == "energy" or error is not None else ""
    alarm = key == "memorised" and bool(row["scores"].get("memorised_flag")) and not row.get("control")
    return Cell(text, small if value is not None else "", best == text, alarm)


def straightness(result: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The straightness table, one row per velocity model.

    Returns:
        Name and ``S ± error, S / E|Δ|², one-step gap, relative gap, path length, Euler errors, largest |λ|``.
    """
    return [
        (
            name,
            [
                f"{number(d['straightness'])} ± {number(d['straightness_error'])}",
                number(d["relative_straightness"]),
                number(d["one_step_gap"]),
                number(d["relative_gap"]),
                f"{d['path_length_ratio']:.3f}",
                *(_euler_share(d, steps) for steps in (8, 16)),
                number(max(d.get("stiffness") or [math.nan])),
            ],
        )
        for name, d in diagnoses(result).items()
    ]


def _euler_share(d: Mapping[str, Any], steps: int) -> str:
    """Euler's error at t = 1 over the RMS displacement, in per cent."""
    known = dict(zip(d.get("euler_steps") or (), d.get("euler_error_trimmed") or (), strict=True))
    if steps not in known or d["displacement"] < 1e-20:
        return "–"
    return f"{100 * known[steps] / math.sqrt(d['displacement']):.3g} %"


def timing(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the timing table; the relative time of the slowest row is 1."""
    rows = [row for row in model_rows(result) if row.get("relative_time") is not None]
    return [
        {
            "model": row["model"],
            "steps": row["steps"],
            "nfe": row["nfe"],
            "time": row["relative_time"],
            "text": number(float(row["relative_time"])),
            "faster": f"{1 / row['relative_time']:.3g}×" if row["relative_time"] > 0 else "–",
            "parameters": number(row.get("parameters")),
        }
        for row in rows
    ]


def facts(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten a nested mapping to ``(dotted key, text)`` pairs.

    >>> facts({"torch": "2.9", "machine": {"cores": 2}})
    [('torch', '2.9'), ('machine.cores', '2')]
    """
    out: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            out += facts(value, f"{prefix}{key}.")
        else:
            out.append((f"{prefix}{key}", str(value)))
    return out
