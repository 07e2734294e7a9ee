"""Whether a generator that is matched to a distribution still comes nearer to it.

On a fixed set of noises, with the averaged generator: energy distance to data rows, precision and recall against them
(k = 5). A game that diverges, or drops modes, shows in these long before its loss tells anything; training stops then,
and what was best is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from fewstep.flow.couplings import Pair
from fewstep.flow.noise import generator_for
from fewstep.methods.contract.objective import Collapse
from fewstep.methods.contract.stage import Stage
from fewstep.methods.guards.best_weights import StudentSnapshot
from fewstep.metrics.neighbours import prdc
from fewstep.metrics.sample_distances import energy, energy_floor

CHECKS = 20  # per stage
MOST = 512  # rows that are looked at: a look must cost little beside the steps between two of them
NEIGHBOURS = 5
LEAST = 32  # rows below which none of it says anything
FURTHEST = 5.0  # energy as a multiple of the best so far above which training stops,
CHANCE = 25.0  # unless it is a smaller multiple of what two draws of the data have,
NEAR = 0.25  # or a smaller share of the first one: games oscillate before they settle
LOWEST = 0.5  # recall as a share of the best so far, below which it stops
SETTLED = 0.3  # recall that must have been reached before it says anything


@final
class DivergenceGuard:
    """Looks at the averaged generator, at its first call.

    Attributes:
        rows: noises and data rows, with the rows' labels.
        checks: how often.
        state: the best numbers so far, the first energy, and the weights that had the least energy.

    Args:
        student: copied; ``v(x, t, **cond)``.
        stage: for data, seed and name.
        advice: what to change when it goes wrong.
    """

    def __init__(self, student: nn.Module, stage: Stage, advice: str) -> None:
        chosen = stage.data.train[:: max(1, len(stage.data.train) // MOST)][:MOST]
        self._key = (stage.seed, stage.name, "watch")
        labels = stage.data.label_rows(chosen) if stage.conditional else None
        noise = stage.source.sample(len(chosen), self.generator())
        self.rows = Pair(noise, stage.data.network_rows(chosen), {} if labels is None else {"label": labels})
        self.checks = CHECKS if len(chosen) >= LEAST else 0
        self._student = StudentSnapshot(student)
        self.state = {"best": torch.tensor([math.inf, 0.0, 0.0], dtype=torch.float64), **self._student.state}
        self._chance = float(energy_floor(self.rows.x1, len(chosen))) if self.checks else 0.0
        self._name, self._advice = stage.name, advice

    def generator(self) -> torch.Generator:
        """The same draws at every look."""
        return generator_for(*self._key)

    @torch.no_grad()
    def look(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """``energy``, ``precision`` and ``recall``.

        Raises:
            Collapse: they have become so much worse that the generator is lost.
        """
        x = self._student.one_step(weights, self.rows.x0, self.rows.cond)
        real = self.rows.x1.to(x.device)
        if not bool(x.isfinite().all()):
            return {"energy": math.nan}  # the trainer's own guard speaks of that
        near = prdc(real, x, NEIGHBOURS)
        found = {"energy": float(energy(x, real)), "precision": near.precision, "recall": near.recall}
        self._judge(found, weights)
        return found

    def _judge(self, found: Mapping[str, float], weights: Mapping[str, Tensor]) -> None:
        best, recall, first = self.state["best"].tolist()
        first = first or found["energy"]
        if found["energy"] > max(FURTHEST * best, CHANCE * self._chance, NEAR * first):
            what = f"the energy distance to the data rose from {best:.3g} to {found['energy']:.3g}"
        elif found["recall"] < LOWEST * recall and recall > SETTLED:
            what = f"recall of the data fell from {recall:.2f} to {found['recall']:.2f}"
        else:
            if found["energy"] < best:
                self._student.keep(weights)
            new = [min(best, found["energy"]), max(recall, found["recall"]), first]
            self.state["best"].copy_(torch.tensor(new, dtype=torch.float64))
            return
        raise Collapse(f"stage {self._name!r} is diverging: {what}. {self._advice}")

    def best(self) -> dict[str, Tensor] | None:
        """The weights at the least energy distance, None before the first look."""
        return self._student.best()
