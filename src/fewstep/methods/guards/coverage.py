"""Whether a student that plays against a discriminator still covers what its teacher makes.

On held-out pairs: the distance to the teacher's endpoints, and precision and recall against them (k = 5). An
adversarial term that wins drops modes: recall falls long before the loss tells anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from fewstep.methods.contract.objective import Collapse
from fewstep.methods.guards.best_weights import StudentSnapshot
from fewstep.metrics.neighbours import prdc
from fewstep.store.pairs import Columns, PairRows

CHECKS = 10  # per phase
MOST = 1024  # held-out pairs that are looked at
NEIGHBOURS = 5
LEAST = 32  # held-out pairs below which recall says nothing
LOWEST = 0.6  # recall as a share of what it was, below which training stops
FURTHEST = 2.0  # distance to the teacher, likewise, above which it stops


@final
class CoverageGuard:
    """Looks at the averaged student on held-out pairs.

    Attributes:
        checks: how often in a phase.
        state: recall and distance at the first look, which later ones are compared with, and the last weights that
            passed.

    Args:
        student: copied; ``v(x, t, **cond)``.
        held_out: pairs the student never learns from.
        name: of the stage, for messages.
        advice: what to change when it goes wrong.
    """

    def __init__(self, student: nn.Module, held_out: PairRows, name: str, advice: str) -> None:
        self.checks = CHECKS if len(held_out) >= LEAST else 0
        self._student = StudentSnapshot(student)
        self.state = {"first": torch.full((2,), math.nan, dtype=torch.float64), **self._student.state}
        self._rows: Columns = held_out.columns(torch.arange(min(MOST, len(held_out))))
        self._name, self._advice = name, advice

    @torch.no_grad()
    def look(self, weights: Mapping[str, Tensor], judge: nn.Module | None) -> dict[str, float]:
        """``rmse`` to the teacher per dimension, ``precision``, ``recall`` and the discriminator's ``gap``.

        Raises:
            Collapse: recall or distance have become so much worse that the student is lost.
        """
        cond = {name: value for name, value in self._rows.items() if name not in ("x0", "x1")}
        x = self._student.one_step(weights, self._rows["x0"], cond)
        x1 = self._rows["x1"].to(x.device)
        rmse = float((x - x1).square().mean().sqrt())
        if not math.isfinite(rmse):
            return {"rmse": rmse}  # the trainer's own guard speaks of that
        near = prdc(x1, x, NEIGHBOURS)
        found = {"rmse": rmse, "precision": near.precision, "recall": near.recall}
        if judge is not None:
            label = cond["label"].to(x.device) if "label" in cond else None
            found["gap"] = float((judge(x1, label) - judge(x, label)).mean())
        self._judge(found)
        self._student.keep(weights)
        return found

    def best(self) -> dict[str, Tensor] | None:
        """The weights at the last look, None before the first."""
        return self._student.best()

    def _judge(self, found: Mapping[str, float]) -> None:
        first = self.state["first"]
        if not bool(first.isfinite().all()):
            first.copy_(torch.tensor([found["recall"], found["rmse"]], dtype=torch.float64))
            return
        recall, rmse = first.tolist()
        gap = f", the discriminator's gap is {found['gap']:.2g}" if "gap" in found else ""
        if found["recall"] < LOWEST * recall:
            what = f"recall of the teacher's endpoints fell from {recall:.2f} to {found['recall']:.2f}"
        elif found["rmse"] > FURTHEST * rmse:
            what = f"the distance to the teacher's endpoints rose from {rmse:.3g} to {found['rmse']:.3g} per dimension"
        else:
            return
        raise Collapse(f"stage {self._name!r} is collapsing: {what}{gap}. {self._advice}")
