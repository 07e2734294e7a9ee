"""Stop a distillation in which the student no longer covers the teacher's endpoints.

On held-out pairs the distance to the teacher's endpoints is measured, and precision and recall against them (k = 5). If
the adversarial term is too strong, modes are missing from the student's samples; recall shows this long before the
loss.
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

CHECKS = 10  # per phase; chosen, not tuned
MAX_PAIRS = 1024  # held-out pairs that are measured; chosen, not tuned
MIN_PAIRS = 32  # with fewer held-out pairs nothing is measured: recall would be mostly chance; chosen, not tuned
NEIGHBOURS = 5  # k of precision and recall, as in every comparison
MIN_RECALL_SHARE = 0.6  # of the recall at the first check; training stops below it; chosen, not tuned
MAX_DISTANCE_RATIO = 2.0  # to the distance at the first check; training stops above it; chosen, not tuned


@final
class CoverageGuard:
    """Measures the student with averaged weights on held-out pairs, and stops training below a limit of recall or above
    a limit of distance.

    Args:
        student: the network ``v(x, t, **cond)`` that is copied.
        held_out: pairs that are not used for training.
        name: of the stage, for messages.
        advice: the options to change when training is stopped, for messages.

    Attributes:
        checks: number of checks in a phase; 0 with fewer than 32 held-out pairs.
        state: recall and distance at the first check, and the weights at the last check that passed; a checkpoint must
            keep it.
    """

    def __init__(self, student: nn.Module, held_out: PairRows, name: str, advice: str) -> None:
        self.checks = CHECKS if len(held_out) >= MIN_PAIRS else 0
        self._student = StudentSnapshot(student)
        self.state = {"first": torch.full((2,), math.nan, dtype=torch.float64), **self._student.state}
        self._rows: Columns = held_out.columns(torch.arange(min(MAX_PAIRS, len(held_out))))
        self._name, self._advice = name, advice

    @torch.no_grad()
    def look(self, weights: Mapping[str, Tensor], discriminator: nn.Module | None) -> dict[str, float]:
        """Measure the student with these weights.

        Args:
            weights: averaged weights by parameter name.
            discriminator: scores (B,) of samples and their conditions; None without an adversarial term.

        Returns:
            ``rmse``: root mean square distance per value to the teacher's endpoints. ``precision``, ``recall``. With a
            discriminator D, ``gap``: mean D of the teacher's endpoints minus mean D of the student's samples.

        Raises:
            Collapse: recall is below .6 of that at the first check, or the distance above twice that.
        """
        cond = {name: value for name, value in self._rows.items() if name not in ("x0", "x1")}
        x = self._student.one_step(weights, self._rows["x0"], cond)
        x1 = self._rows["x1"].to(x.device)
        rmse = float((x - x1).square().mean().sqrt())
        if not math.isfinite(rmse):
            return {"rmse": rmse}  # the trainer stops at weights that are not finite
        scores = prdc(x1, x, NEIGHBOURS)
        found = {"rmse": rmse, "precision": scores.precision, "recall": scores.recall}
        if discriminator is not None:
            moved = {name: rows.to(x.device) for name, rows in cond.items()}
            found["gap"] = float((discriminator(x1, moved) - discriminator(x, moved)).mean())
        self._check_limits(found)
        self._student.keep(weights)
        return found

    def best(self) -> dict[str, Tensor] | None:
        """The weights at the last check that passed; None if none has."""
        return self._student.best()

    def _check_limits(self, found: Mapping[str, float]) -> None:
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
