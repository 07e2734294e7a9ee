"""The comparison as text: an aligned Markdown table with its notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.metrics.user_metrics import ERROR

PERCENT = "_percent"  # of the Fréchet distance, on whichever features
COLUMNS = (
    ("steps", "steps"),
    ("NFE", "nfe"),
    ("energy", "energy"),
    ("held-out", "energy_held_out"),
    ("sliced W2", "sliced_w2"),
    ("FD", PERCENT),
    ("precision", "precision"),
    ("recall", "recall"),
    ("coverage", "coverage"),
    ("memorised", "memorised"),
)
TIME = ("time", "relative_time")


def table(result: Mapping[str, Any]) -> str:
    """The comparison as an aligned Markdown table."""
    users = result["protocol"].get("metrics", [])
    columns = [*COLUMNS, *((name, name) for name in users), TIME]
    titles = {PERCENT: f"{_frechet(result['rows'][0]['scores']).removesuffix(PERCENT)} %"}
    head = ["model", *(titles.get(key, title) for title, key in columns)]
    lines = [[line["model"], *(_cell(line, key, key in users) for _, key in columns)] for line in result["rows"]]
    widths = [max(len(line[k]) for line in [head, *lines]) for k in range(len(head))]

    def show(cells: Sequence[str]) -> str:
        padded = [
            cells[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)),
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join([":" + "-" * (widths[0] + 1), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    failed = [f"{failure['stage']}: {failure['reason']}" for failure in result.get("failures", [])]
    return "\n".join([show(head), rule, *map(show, lines), "", _notes(result), *failed])


def _notes(result: Mapping[str, Any]) -> str:
    """What the numbers are, in sentences."""
    first = result["rows"][0]["scores"]
    held_out = first["energy_held_out_floor"]
    beside = "" if held_out is None else f" (held-out {held_out:.4f})"
    notes = (
        f"energy: V-statistic against the training split, {result['protocol']['samples']} samples, seed "
        f"{result['protocol']['seed']}; data-data floor {first['energy_floor']:.4f}{beside}. Never read "
        "energy or sliced W2 without precision and recall. time: relative to the slowest row."
    )
    if any(failure["compared"] for failure in result.get("failures", [])):
        notes += " (best): a stage that collapsed, with the weights of its best check."
    return " ".join([notes, *fewer_samples(result)])


def fewer_samples(result: Mapping[str, Any]) -> list[str]:
    """A sentence for every model that was measured on fewer samples than the protocol's."""
    wanted = result["protocol"]["samples"]
    counts = {line["model"]: line.get("samples", wanted) for line in result["rows"]}
    return [
        f"{name}: {count} samples only, its number of different starts."
        for name, count in counts.items()
        if count < wanted
    ]


def _frechet(scores: Mapping[str, Any]) -> str:
    """The key of the Fréchet distance in per cent."""
    return next(name for name in scores if name.startswith("FD-") and name.endswith(PERCENT))


def _cell(line: Mapping[str, Any], key: str, of_user: bool) -> str:
    scores = line["scores"]
    if of_user:
        return measured(scores[key], scores.get(key + ERROR))
    if key == PERCENT:
        key = _frechet(scores)
    value = line.get(key, scores.get(key))
    if value is None:
        return "–"
    if isinstance(value, int):
        return str(value)
    value = 0.0 if abs(value) < 5e-7 else value  # no negative zero
    if key in ("precision", "recall", "coverage", "memorised", "relative_time"):
        return f"{value:.3f}"
    return f"{value:.2f}" if key.endswith(PERCENT) else f"{value:.4f}"


def measured(value: float, error: float | None) -> str:
    """A number with its standard error, if it has one: three places, or three digits of very small and large ones.

    >>> measured(0.9123, 0.0131), measured(0.5, None), measured(2e-5, 1.23e-6)
    ('0.912 ± 0.013', '0.500', '2e-05 ± 1.2e-06')
    """
    plain = value == 0 or 0.01 <= abs(value) < 1000
    text = f"{value:.3f}" if plain else f"{value:.3g}"
    if error is None:
        return text
    return f"{text} ± {error:.3f}" if plain else f"{text} ± {error:.2g}"
