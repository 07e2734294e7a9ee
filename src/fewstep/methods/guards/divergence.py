"""Stop a distribution matching whose samples move away from the data, and keep its best weights.

Samples of the generator with averaged weights, on fixed noises, are compared with data rows by the energy distance and
by precision and recall (k = 5). These show a divergence or a missing mode long before the loss does.
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
from fewstep.methods.training_pairs.batches import without_padding
from fewstep.metrics.neighbours import prdc
from fewstep.metrics.sample_distances import energy, energy_floor

CHECKS = 20  # per phase; chosen, not tuned
MAX_ROWS = 512  # rows that are compared, so that a check costs little beside the steps between two checks; not tuned
MIN_ROWS = 32  # with fewer rows nothing is measured: the distances would be mostly chance; chosen, not tuned
NEIGHBOURS = 5  # k of precision and recall, as in every comparison
# Training stops if the energy distance is above all three limits. They are chosen so that no run of benchmarks/maps.py
# that ended well is stopped: the energy oscillates in the first checks, and near its floor it varies by chance.
MAX_ENERGY_RATIO = 5.0  # times the least energy so far
MAX_CHANCE_RATIO = 25.0  # times the energy of two draws of the data
MAX_FIRST_SHARE = 0.25  # of the energy at the first check
# Training also stops if the recall is below a share of the best so far, once the best is above a second number.
MIN_RECALL_SHARE = 0.5  # of the best recall so far; chosen, not tuned
SETTLED_RECALL = 0.3  # best recall above which the limit holds; chosen, not tuned


@final
class DivergenceGuard:
    """Measures the first call of the generator with averaged weights, and stops a training that diverges.

    (Here a training diverges; a :class:`~fewstep.methods.families.distribution.Divergence` is one of two laws.)

    Args:
        student: the network ``v(x, t, **cond)`` that is copied.
        stage: gives data, base, seed and name.
        advice: the options to change when training is stopped, for messages.

    Attributes:
        rows: noises and data rows, with the rows' conditions; the same at every check.
        checks: number of checks in a phase; 0 with fewer than 32 rows.
        state: least energy, best recall, energy at the first check, and the weights at the least energy; a checkpoint
            must keep it.
    """

    def __init__(self, student: nn.Module, stage: Stage, advice: str) -> None:
        chosen = stage.data.train[:: max(1, len(stage.data.train) // MAX_ROWS)][:MAX_ROWS]
        self._key = (stage.seed, stage.name, "watch")
        noise = stage.source.sample(len(chosen), self.generator())
        pair = Pair(noise, stage.data.network_rows(chosen), stage.cond_rows(chosen))
        self.rows = without_padding(pair, stage.data.mask)
        self.checks = CHECKS if len(chosen) >= MIN_ROWS else 0
        self._student = StudentSnapshot(student)
        self.state = {"best": torch.tensor([math.inf, 0.0, 0.0], dtype=torch.float64), **self._student.state}
        self._chance = float(energy_floor(self.rows.x1, len(chosen))) if self.checks else 0.0
        self._name, self._advice = stage.name, advice

    def generator(self) -> torch.Generator:
        """A generator that makes the same draws at every check."""
        return generator_for(*self._key)

    @torch.no_grad()
    def look(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Measure the generator with these weights.

        Args:
            weights: averaged weights by parameter name.

        Returns:
            ``energy``: energy distance to the data rows. ``precision`` and ``recall`` against them.

        Raises:
            Collapse: energy or recall is past its limits.
        """
        x = self._student.one_step(weights, self.rows.x0, self.rows.cond)
        real = self.rows.x1.to(x.device)
        if not bool(x.isfinite().all()):
            return {"energy": math.nan}  # the trainer stops at weights that are not finite
        scores = prdc(real, x, NEIGHBOURS)
        found = {"energy": float(energy(x, real)), "precision": scores.precision, "recall": scores.recall}
        self._check_limits(found, weights)
        return found

    def best(self) -> dict[str, Tensor] | None:
        """The weights at the check with the least energy distance; None before the first check."""
        return self._student.best()

    def _check_limits(self, found: Mapping[str, float], weights: Mapping[str, Tensor]) -> None:
        least, recall, first = self.state["best"].tolist()
        first = first or found["energy"]
        limit = max(MAX_ENERGY_RATIO * least, MAX_CHANCE_RATIO * self._chance, MAX_FIRST_SHARE * first)
        if found["energy"] > limit:
            what = f"the energy distance to the data rose from {least:.3g} to {found['energy']:.3g}"
        elif found["recall"] < MIN_RECALL_SHARE * recall and recall > SETTLED_RECALL:
            what = f"recall of the data fell from {recall:.2f} to {found['recall']:.2f}"
        else:
            if found["energy"] < least:
                self._student.keep(weights)
            new = [min(least, found["energy"]), max(recall, found["recall"]), first]
            self.state["best"].copy_(torch.tensor(new, dtype=torch.float64))
            return
        raise Collapse(f"stage {self._name!r} is diverging: {what}. {self._advice}")
