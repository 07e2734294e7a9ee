"""The sentences of a report: the headline and the warnings, computed from a comparison.

The headline compares the row with the lowest energy among those with the fewest network calls with the first model,
which is the teacher. Two energies count as equal if they differ by at most two standard errors of their difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup

Row = Mapping[str, Any]


def number(value: float | int | None, places: int = 3) -> str:
    """Format a number: three places up to 1, fewer above, more below 0.01; a dash for None, NaN and infinity.

    >>> number(0.0163), number(1.554), number(0.00041), number(50), number(None)
    ('0.016', '1.55', '0.00041', '50', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size < 5e-10:
        return f"{0:.{places}f}"  # a rounding error of a difference
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
    """Format a number of calls.

    >>> calls(1), calls(1, spelled=True), calls(8)
    ('1 call', 'one call', '8 calls')
    """
    return ("one call" if spelled else "1 call") if count == 1 else f"{count} calls"


def model_rows(result: Mapping[str, Any]) -> list[Row]:
    """The rows of models, without the controls."""
    return [row for row in result["rows"] if not row.get("control")]


def control_rows(result: Mapping[str, Any]) -> list[Row]:
    """The rows of the controls."""
    return [row for row in result["rows"] if row.get("control")]


def energy_of(row: Row) -> float:
    """The row's energy distance; infinity if it is undefined."""
    value = row["scores"].get("energy")
    return math.inf if value is None else float(value)


def error_of(row: Row) -> float:
    """Standard error of the row's energy distance; 0 if it is undefined."""
    return float(row["scores"].get("energy_se") or 0.0)


def fastest_row(rows: Sequence[Row]) -> Row:
    """The row with the lowest energy among those with the fewest network calls."""
    fewest = min(row["nfe"] for row in rows)
    return min((row for row in rows if row["nfe"] == fewest), key=energy_of)


def matching_row(rows: Sequence[Row], target: Row) -> Row | None:
    """The row with the fewest calls whose energy is at most that of ``target`` within two standard errors, or None."""
    for row in sorted(rows, key=lambda r: r["nfe"]):
        if energy_of(row) <= energy_of(target) + 2 * math.hypot(error_of(row), error_of(target)):
            return row
    return None


def headline(result: Mapping[str, Any]) -> list[Markup]:
    """The headline: the energy with the fewest calls, the teacher's calls for it, and precision and recall.

    Args:
        result: a comparison.

    Returns:
        One or two paragraphs, escaped.
    """
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
    compared = match or min(teacher_rows, key=energy_of)
    first = min(teacher_rows, key=lambda r: r["nfe"])
    if match is None:
        form = "<b>{}</b> reaches at best {energy}, with {calls}"
    elif match["nfe"] <= fast["nfe"]:
        form = "<b>{}</b> is as good with as many calls ({energy})"
    else:
        form = "<b>{}</b> needs {calls} for {energy}"
    second = Markup(form).format(teacher, energy=number(energy_of(compared)), calls=calls(compared["nfe"]))
    if first is not compared:
        second += Markup(", and scores {} with {}" if match is None else " and scores {} with {}").format(
            number(energy_of(first)), calls(first["nfe"], spelled=True)
        )
    return [reaches + "; " + second + ".", _fidelity(fast, compared)]


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


def _fidelity(fast: Row, compared: Row) -> Markup:
    """Precision and recall of the two rows the headline compares."""
    from markupsafe import Markup

    a, b = fast["scores"], compared["scores"]
    return Markup("Precision is {} against {} there, recall {} against {}.").format(
        number(a["precision"]), number(b["precision"]), number(a["recall"]), number(b["recall"])
    )


def warnings(result: Mapping[str, Any]) -> list[Markup]:
    """The warnings that apply to a comparison, escaped."""
    rows = model_rows(result)
    found = [_gaussian(result, rows), _memorised(rows), _below_floor(rows)]
    return [*(warning for warning in found if warning is not None), *_lost(rows), *_not_straighter(result)]


def failures(result: Mapping[str, Any]) -> list[Markup]:
    """The stages of the run that collapsed or were left out, and why."""
    from markupsafe import Markup

    return [Markup("<b>{stage}</b>: {reason}").format(**failure) for failure in result.get("failures") or ()]


def _gaussian(result: Mapping[str, Any], rows: Sequence[Row]) -> Markup | None:
    """The Gaussian control has an energy near that of the best model."""
    from markupsafe import Markup

    best = min(rows, key=energy_of)
    for row in control_rows(result):
        scores = row["scores"]
        precise = scores.get("precision") or 0.0
        if "Gaussian" in row["model"] and energy_of(row) < 3 * energy_of(best) and precise < 0.5:
            return Markup(
                "The {}, which uses no model, has energy {} but precision {}: "
                "read energy and sliced W₂ only together with precision and recall."
            ).format(row["model"], number(energy_of(row)), number(precise))
    return None


def _memorised(rows: Sequence[Row]) -> Markup | None:
    """Rows are flagged for memorisation."""
    from markupsafe import Markup

    flagged = [row for row in rows if row["scores"].get("memorised_flag")]
    if not flagged:
        return None
    worst = max(flagged, key=lambda row: row["scores"]["replicas"] - row["scores"]["replicas_base"])
    return Markup(
        "{} of {} rows are flagged for memorisation beyond chance (most: <b>{}</b> with {}; {:.1%} of "
        "its samples are three times nearer to one training sample than to any other, and {:.1%} of held-out "
        "data are): copies may improve their scores."
    ).format(
        len(flagged),
        len(rows),
        worst["model"],
        calls(worst["nfe"]),
        worst["scores"]["replicas"],
        worst["scores"]["replicas_base"],
    )


def _below_floor(rows: Sequence[Row]) -> Markup | None:
    """An energy is below the floor by more than three standard deviations."""
    from markupsafe import Markup

    for row in sorted(rows, key=energy_of):
        floor, spread = row["scores"].get("energy_floor"), row["scores"].get("energy_floor_sd")
        if floor is not None and spread is not None and energy_of(row) < floor - 3 * spread:
            return Markup(
                "<b>{}</b> with {} has energy {}, below the {} of new data of the same law: it is nearer to the "
                "training split than chance explains. Compare the held-out column."
            ).format(row["model"], calls(row["nfe"]), number(energy_of(row)), number(floor))
    return None


def _lost(rows: Sequence[Row]) -> list[Markup]:
    """The fast row of the headline has less precision or recall than the teacher's row that it is compared with."""
    from markupsafe import Markup

    fast, teacher = fastest_row(rows), [row for row in rows if row["model"] == rows[0]["model"]]
    compared = matching_row(teacher, fast) or min(teacher, key=energy_of)
    if fast["model"] == compared["model"]:
        return []
    return [
        Markup("<b>{}</b> with {} has {} {}, <b>{}</b> with {} has {}: the energy does not show this loss.").format(
            fast["model"],
            calls(fast["nfe"]),
            name,
            number(fast["scores"][name]),
            compared["model"],
            calls(compared["nfe"]),
            number(compared["scores"][name]),
        )
        for name in ("precision", "recall")
        if fast["scores"][name] < compared["scores"][name] - 0.03
    ]


def diagnoses(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The diagnoses of velocity models, in the order of the rows (the keys of JSON files are sorted)."""
    found = result.get("diagnosis") or {}
    return {name: found[name] for name in dict.fromkeys(r["model"] for r in model_rows(result)) if name in found}


def _not_straighter(result: Mapping[str, Any]) -> list[Markup]:
    """A ReFlow model is not straighter than the first model."""
    from markupsafe import Markup

    diagnosis = diagnoses(result)
    method = {row["model"]: row.get("method") for row in model_rows(result)}
    first = next(iter(diagnosis), "")
    return [
        Markup("<b>{}</b> is not straighter than <b>{}</b> (S {} against {}): ReFlow had no effect.").format(
            name, first, number(values["straightness"]), number(diagnosis[first]["straightness"])
        )
        for name, values in diagnosis.items()
        if name != first and method.get(name) == "reflow" and values["straightness"] >= diagnosis[first]["straightness"]
    ]
