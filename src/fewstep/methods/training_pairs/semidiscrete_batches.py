"""Training pairs of the semidiscrete optimal coupling: fresh base rows, each with the data row that it is mapped to.

The potentials are fitted once and stored in the stage's folder. With labels every class has its own potentials, so that
the noise is independent of the class. They give any number of deterministic pairs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from fewstep.data.dataset import LABEL
from fewstep.errors import UserError
from fewstep.flow.couplings import Facts, Pair
from fewstep.flow.noise import generator_for
from fewstep.flow.semidiscrete import BALANCED, Potentials, assign
from fewstep.methods.contract.stage import Stage
from fewstep.store.files import atomic_file, make_folder
from fewstep.store.tensors import read_tensors

MAX_ROWS = 60_000  # data rows, because every base row is compared with all of them; chosen, not tuned
MAX_VALUES = 1 << 28  # values of the data, which are kept in memory; chosen, not tuned
MAX_IMBALANCE = 0.1  # squared relative deviation of the rows' shares above which to warn; chosen, not tuned


@final
class SemidiscreteBatches:
    """The pairs ``x0 ~ p0``, ``x1 = y_{j(x0)}`` with ``j(x0) = argmax_j <x0, y_j> - h_j``.

    With labels a class is drawn first, and j is one of its rows.

    Args:
        stage: gives data, base, seed and folder.

    Attributes:
        facts: dependent and deterministic.

    Raises:
        UserError: there are too many rows, or too many values; the data are a stream, or have conditions beside labels.

    Source: arXiv:2509.25519.
    """

    def __init__(self, stage: Stage) -> None:
        data = stage.data
        stage.require_random_access("coupling 'semidiscrete'")
        if stage.conditions not in ((), (LABEL,)):
            raise UserError(
                "coupling 'semidiscrete' assigns every noise to a data row, and with the conditions "
                f"{', '.join(stage.conditions)} the noise would depend on them: use 'coupling: independent'."
            )
        if len(data.train) > MAX_ROWS or len(data.train) * math.prod(data.shape) > MAX_VALUES:
            raise UserError(
                f"coupling 'semidiscrete' compares every noise with all {len(data.train):,} rows of shape "
                f"{data.shape}, and takes at most {MAX_ROWS:,} rows and {MAX_VALUES:,} values: use 'coupling: ot'."
            )
        self.facts = Facts(independent=False, deterministic=True, gaussian=stage.source.gaussian)
        self._source, self._dequantise, self._shape = stage.source, stage.dequantise, data.shape
        rows = data.network_rows(data.train).flatten(1)
        labels = data.label_rows(data.train) if stage.conditional else None
        kinds = range(data.classes) if labels is not None else [0]
        self._kind = torch.zeros(len(rows), dtype=torch.long) if labels is None else labels
        self._labelled = labels is not None
        self._rows = {kind: rows[self._kind == kind] for kind in kinds}
        self._potentials = self._fitted(stage)

    def batch(self, start: int, count: int, generator: torch.Generator) -> Pair:
        """Pairs of ``count`` fresh base rows."""
        x0 = self._source.sample(count, generator)
        kind = self._kind[torch.randint(len(self._kind), (count,), generator=generator)]
        flat, x1 = x0.flatten(1), torch.empty(count, math.prod(self._shape))
        for number in kind.unique().tolist():
            here, rows = kind == number, self._rows[number]
            x1[here] = rows[assign(flat[here], rows, self._potentials[number])]
        x1 = x1.view(count, *self._shape)
        if self._dequantise:
            x1 = x1 + self._dequantise * torch.randn(x1.shape, generator=generator)
        return Pair(x0, x1, {"label": kind} if self._labelled else {})

    def _fitted(self, stage: Stage) -> dict[int, Tensor]:
        """The potentials of every class: read from the stage's folder, or fitted now by the first process."""
        path = stage.folder / "pairs" / "potentials.safetensors"
        if stage.world.rank == 0 and not path.exists():
            self._fit(stage, path)
        stage.world.barrier()
        kept = read_tensors(path)
        return {kind: kept[str(kind)] for kind in self._rows}

    def _fit(self, stage: Stage, path: Path) -> None:
        from safetensors.torch import save_file

        def draw(count: int, generator: torch.Generator) -> Tensor:
            return self._source.sample(count, generator).flatten(1)

        found, worst = {}, 0.0
        for kind, rows in self._rows.items():
            if len(rows) == 0:
                found[str(kind)] = torch.zeros(0)
                continue
            fit = Potentials(rows, draw, generator_for(stage.seed, stage.name, "potentials", kind))
            steps = fit.fit() if len(rows) > 1 else 0
            found[str(kind)], worst = fit.h, max(worst, fit.chi2 if len(rows) > 1 else 0.0)
            stage.world.say(f"  potentials of {len(rows):,} rows: {steps:,} steps, imbalance {worst:.3f}")
        if worst > MAX_IMBALANCE:
            stage.world.say(
                f"warning: the shares of the data rows differ from equal ones by {math.sqrt(worst):.0%} (root mean "
                f"square; the goal is {math.sqrt(BALANCED):.0%}), and the model learns data with these shares. With "
                "'coupling: ot' all rows have equal shares."
            )
        make_folder(path.parent)
        with atomic_file(path) as temporary:
            save_file(found, temporary)
