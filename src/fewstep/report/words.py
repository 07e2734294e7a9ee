"""What the numbers say, in words: the headline and the warnings of a report, computed from a comparison.

The headline compares the best row among those of fewest network calls with the first model, the teacher. Two
energies are called equal when they differ by less than two standard errors of their difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup

Row = Mapping[str, Any]


def number(value: float | int | None, places: int = 3) -> str:
    """A number as the report prints it: three places up to one, fewer above, more where it is tiny.

    >>> number(0.0163), number(1.554), number(0.00041), number(50), number(None)
    ('0.016', '1.55', '0.00041', '50', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size < 5e-10:
        return f"{0:.{places}f}"  # rounding in a difference of equal numbers
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if round(size, places) > 1:
        return f"{value:.2f}"
    if size >= 0.01:
        return f"{value:.{places}f}"
    return f"{value:.2g}" if size < 0.001 else f"{value:.4f}"


def calls(count: int, *, spelled: bool = False) -> str:
    """``one call``, ``8 calls``."""
    return ("one call" if spelled else "1 call") if count == 1 else f"{count} calls"


def model_rows(result: Mapping[str, Any]) -> list[Row]:
    """The rows of models, without the controls."""
    return [row for row in result["rows"] if not row.get("control")]


def control_rows(result: Mapping[str, Any]) -> list[Row]:
    """The rows that no model made."""
    return [row for row in result["rows"] if row.get("control")]


def energy_of(row: Row) -> float:
    """The row's energy distance; infinite when it is undefined."""
    value = row["scores"].get("energy")
    return math.inf if value is None else float(value)


def error_of(row: Row) -> float:
    """Standard error of the row's energy distance, 0 where there is none."""
    return float(row["scores"].get("energy_se") or 0.0)


def fastest_row(rows: Sequence[Row]) -> Row:
    """The best energy among the rows of fewest network calls."""
    fewest = min(row["nfe"] for row in rows)
    return min((row for row in rows if row["nfe"] == fewest), key=energy_of)


def matching_row(rows: Sequence[Row], target: Row) -> Row | None:
    """The row of fewest calls that is as good as ``target``, within two standard errors."""
    for row in sorted(rows, key=lambda r: r["nfe"]):
        if energy_of(row) <= energy_of(target) + 2 * math.hypot(error_of(row), error_of(target)):
            return row
    return None


def headline(result: Mapping[str, Any]) -> list[Markup]:
    """Two or three sentences: what the fewest calls reach, what the teacher needs for it, on which scores."""
    from markupsafe import Markup

    rows = model_rows(result)
    fast, teacher = fastest_row(rows), rows[0]["model"]
    teacher_rows = [row for row in rows if row["model"] == teacher]
    reaches = Markup("{} of <b>{}</b> {} energy {}").format(
        calls(fast["nfe"], spelled=True).capitalize(),
        fast["model"],
        "reaches" if fast["nfe"] == 1 else "reach",
        number(energy_of(fast)),
    )
    if fast["model"] == teacher:
        return [_alone(reaches, fast, teacher_rows)]
    match = matching_row(teacher_rows, fast)
    beside = match or min(teacher_rows, key=energy_of)
    first = min(teacher_rows, key=lambda r: r["nfe"])
    if match is None:
        form = "<b>{}</b> comes no lower than {energy}, with {calls}"
    elif match["nfe"] <= fast["nfe"]:
        form = "<b>{}</b> is as good with as many calls ({energy})"
    else:
        form = "<b>{}</b> needs {calls} for {energy}"
    second = Markup(form).format(teacher, energy=number(energy_of(beside)), calls=calls(beside["nfe"]))
    if first is not beside:
        second += Markup(", and scores {} with {}" if match is None else " and scores {} with {}").format(
            number(energy_of(first)), calls(first["nfe"], spelled=True)
        )
    return [reaches + "; " + second + ".", _fidelity(fast, beside)]


def _alone(reaches: Markup, fast: Row, rows: Sequence[Row]) -> Markup:
    """The headline of a single model."""
    from markupsafe import Markup

    best = min(rows, key=energy_of)
    scores = best["scores"]
    seen = Markup(" There, precision is {} and recall {}.").format(
        number(scores["precision"]), number(scores["recall"])
    )
    if best is fast:
        return reaches + Markup(", and more calls do not improve it." if len(rows) > 1 else ".") + seen
    return reaches + Markup("; {} reach {}.").format(calls(best["nfe"]), number(energy_of(best))) + seen


def _fidelity(fast: Row, beside: Row) -> Markup:
    """Precision and recall of the two rows the headline compares."""
    from markupsafe import Markup

    a, b = fast["scores"], beside["scores"]
    return Markup("Precision is {} against {} there, recall {} against {}.").format(
        number(a["precision"]), number(b["precision"]), number(a["recall"]), number(b["recall"])
    )


def warnings(result: Mapping[str, Any]) -> list[Markup]:
    """What must be kept in mind when the table is read; only what holds for these numbers."""
    rows = model_rows(result)
    found = [_gaussian(result, rows), _memorised(rows), _below_floor(rows)]
    return [*(warning for warning in found if warning is not None), *_lost(rows), *_not_straighter(result)]


def _gaussian(result: Mapping[str, Any], rows: Sequence[Row]) -> Markup | None:
    """A control without a model scores well in energy."""
    from markupsafe import Markup

    best = min(rows, key=energy_of)
    for row in control_rows(result):
        scores = row["scores"]
        precise = scores.get("precision") or 0.0
        if "Gaussian" in row["model"] and energy_of(row) < 3 * energy_of(best) and precise < 0.5:
            return Markup(
                "The {}, which is no model at all, scores {} in energy but precision {}: "
                "read energy and sliced W₂ only together with precision and recall."
            ).format(row["model"], number(energy_of(row)), number(precise))
    return None


def _memorised(rows: Sequence[Row]) -> Markup | None:
    from markupsafe import Markup

    flagged = [row for row in rows if row["scores"].get("memorised_flag")]
    if not flagged:
        return None
    worst = max(flagged, key=lambda row: row["scores"]["replicas"] - row["scores"]["replicas_base"])
    return Markup(
        "{} of {} rows are flagged for memorisation beyond chance (most: <b>{}</b> with {}; {:.1%} of "
        "its samples lie three times nearer to one training sample than to any other, {:.1%} of unseen "
        "data do): part of their score may be memory."
    ).format(
        len(flagged),
        len(rows),
        worst["model"],
        calls(worst["nfe"]),
        worst["scores"]["replicas"],
        worst["scores"]["replicas_base"],
    )


def _below_floor(rows: Sequence[Row]) -> Markup | None:
    """Nearer to the training data than data of the same law."""
    from markupsafe import Markup

    for row in sorted(rows, key=energy_of):
        floor, spread = row["scores"].get("energy_floor"), row["scores"].get("energy_floor_sd")
        if floor is not None and spread is not None and energy_of(row) < floor - 3 * spread:
            return Markup(
                "<b>{}</b> with {} scores energy {}, below the {} of fresh data of the same law: nearer "
                "to the training split than chance allows. Look at the held-out column."
            ).format(row["model"], calls(row["nfe"]), number(energy_of(row)), number(floor))
    return None


def _lost(rows: Sequence[Row]) -> list[Markup]:
    """The fast row of the headline loses precision or recall against the teacher's row beside it."""
    from markupsafe import Markup

    fast, teacher = fastest_row(rows), [row for row in rows if row["model"] == rows[0]["model"]]
    beside = matching_row(teacher, fast) or min(teacher, key=energy_of)
    if fast["model"] == beside["model"]:
        return []
    return [
        Markup("<b>{}</b> with {} has {} {}, <b>{}</b> with {} has {}: the energy does not show this loss.").format(
            fast["model"],
            calls(fast["nfe"]),
            name,
            number(fast["scores"][name]),
            beside["model"],
            calls(beside["nfe"]),
            number(beside["scores"][name]),
        )
        for name in ("precision", "recall")
        if fast["scores"][name] < beside["scores"][name] - 0.03
    ]


def diagnoses(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The velocity models' diagnoses, in the order of the rows (JSON files sort their keys)."""
    found = result.get("diagnosis") or {}
    return {name: found[name] for name in dict.fromkeys(r["model"] for r in model_rows(result)) if name in found}


def _not_straighter(result: Mapping[str, Any]) -> list[Markup]:
    """A straightened field that is no straighter than the first."""
    from markupsafe import Markup

    diagnosis = diagnoses(result)
    method = {row["model"]: row.get("method") for row in model_rows(result)}
    first = next(iter(diagnosis), "")
    return [
        Markup("<b>{}</b> is no straighter than <b>{}</b> (S {} against {}): ReFlow had no effect.").format(
            name, first, number(values["straightness"]), number(diagnosis[first]["straightness"])
        )
        for name, values in diagnosis.items()
        if name != first and method.get(name) == "reflow" and values["straightness"] >= diagnosis[first]["straightness"]
    ]
