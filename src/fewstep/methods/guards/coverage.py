"""Stops an adversarial training in which the student no longer covers the teacher's endpoints.

On held-out pairs it measures the distance to the teacher's endpoints, and precision and recall against them (k = 5).
An adversarial term that is too strong makes the student drop modes: recall falls long before the loss shows it.
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
MAX_PAIRS = 1024  # held-out pairs that are measured; chosen, not tuned
MIN_PAIRS = 32  # with fewer, recall has no meaning
NEIGHBOURS = 5
MIN_RECALL_SHARE = 0.6  # of the recall at the first check; training stops below it; chosen, not tuned
MAX_DISTANCE_RATIO = 2.0  # to the distance at the first check; training stops above it; chosen, not tuned


@final
class CoverageGuard:
    """Measures the averaged student on held-out pairs, and stops a training that loses them.

    Args:
        student: copied; ``v(x, t, **cond)``.
        held_out: pairs that the student never learns from.
        name: of the stage, for messages.
        advice: what to change when training is stopped.

    Attributes:
        checks: how often in a phase.
        state: recall and distance at the first check, and the last weights that passed; a checkpoint must keep it.
    """

    def __init__(self, student: nn.Module, held_out: PairRows, name: str, advice: str) -> None:
        self.checks = CHECKS if len(held_out) >= MIN_PAIRS else 0
        self._student = StudentSnapshot(student)
        self.state = {"first": torch.full((2,), math.nan, dtype=torch.float64), **self._student.state}
        self._rows: Columns = held_out.columns(torch.arange(min(MAX_PAIRS, len(held_out))))
        self._name, self._advice = name, advice

    @torch.no_grad()
    def look(self, weights: Mapping[str, Tensor], judge: nn.Module | None) -> dict[str, float]:
        """``rmse`` to the teacher per value, ``precision``, ``recall``, and the discriminator's ``gap``.

        Raises:
            Collapse: recall or distance is past its limit.
        """
        cond = {name: value for name, value in self._rows.items() if name not in ("x0", "x1")}
        x = self._student.one_step(weights, self._rows["x0"], cond)
        x1 = self._rows["x1"].to(x.device)
        rmse = float((x - x1).square().mean().sqrt())
        if not math.isfinite(rmse):
            return {"rmse": rmse}  # the trainer stops at weights that are not finite
        near = prdc(x1, x, NEIGHBOURS)
        found = {"rmse": rmse, "precision": near.precision, "recall": near.recall}
        if judge is not None:
            label = cond["label"].to(x.device) if "label" in cond else None
            found["gap"] = float((judge(x1, label) - judge(x, label)).mean())
        self._judge(found)
        self._student.keep(weights)
        return found

    def best(self) -> dict[str, Tensor] | None:
        """The weights at the last check that passed; None before the first."""
        return self._student.best()

    def _judge(self, found: Mapping[str, float]) -> None:
        first = self.state["first"]
        if not bool(first.isfinite().all()):
            first.copy_(torch.tensor([found["recall"], found["rmse"]], dtype=torch.float64))
            return
        recall, rmse = first.tolist()
        gap = f", the discriminator's gap is {found['gap']:.2g}" if "gap" in found else ""
        if found["recall"] < MIN_RECALL_SHARE * recall:
            what = f"recall of the teacher's endpoints fell from {recall:.2f} to {found['recall']:.2f}"
        elif found["rmse"] > MAX_DISTANCE_RATIO * rmse:
            what = f"the distance to the teacher's endpoints rose from {rmse:.3g} to {found['rmse']:.3g} per dimension"
        else:
            return
        raise Collapse(f"stage {self._name!r} is collapsing: {what}{gap}. {self._advice}")
