"""Samplers and grids that were found for a model, kept as numbers in its folder: ``samplers.json``.

Each belongs to the weights, a number of calls or steps, and a guidance weight. The file holds the weights' digest;
beside other weights it is ignored and overwritten.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from torch import Tensor

from fewstep.diagnostics.cost import Watch
from fewstep.diagnostics.model_grids import model_grid
from fewstep.diagnostics.pick import Choice, restore
from fewstep.diagnostics.tune import noises_for, tune
from fewstep.errors import UserError
from fewstep.flow.field import Field
from fewstep.flow.grids import Grid, check_steps, make_grid
from fewstep.flow.paths import make_path
from fewstep.store.files import read_json, write_json

FILE = "samplers.json"
FORMAT = 1
GRID_NOISES = 256  # a grid is found on the flow of so many noises; chosen, not tuned

Pilot = Callable[[int], tuple[Field, Tensor, dict[str, Any]]]  # number of noises -> the field, starts, conditions


@final
class Samplers:
    """The samplers and grids found for one model so far; finds further ones when asked.

    Args:
        weights: digest of the weights.
        path: name of the path the model was trained on.
        folder: the model's folder; None for a model in memory only.
    """

    def __init__(self, weights: str, path: str, folder: Path | None = None) -> None:
        self.weights, self.path, self.folder = weights, path, folder
        self._choices: dict[str, Choice] = {}
        self._grids: dict[str, Grid] = {}
        if folder is not None:
            self._read(folder)

    def __len__(self) -> int:
        return len(self._choices) + len(self._grids)

    def known(self, kind: str, calls: int, guidance: float | None) -> Choice | None:
        """The sampler of a kind (``auto``, ``fitted``) with a number of calls, if it was found before."""
        return self._choices.get(_key(kind, calls, guidance))

    def tuned(
        self,
        kind: str,
        calls: int,
        guidance: float | None,
        shape: tuple[int, ...],
        pilot: Pilot,
        max_rows: int | None = None,
        progress: Watch | None = None,
    ) -> Choice:
        """The sampler of a kind with a number of calls; found now unless it was before.

        One that was found within a limit of network rows is found again where there is no limit.
        """
        known = self.known(kind, calls, guidance)
        if known is not None and (max_rows is not None or not known.notes):
            return known
        field, x0, cond = pilot(noises_for(kind, shape))
        limits: dict[str, Any] = {"max_rows": max_rows, "progress": progress}
        found = tune(field, x0, calls=calls, kind=kind, cond=cond, path=self.path, **limits)
        self._choices[_key(kind, calls, guidance)] = found
        self._keep()
        return found

    def grid(self, name: str, steps: int, guidance: float | None, pilot: Pilot) -> Grid:
        """The model's grid of a name and a number of steps; made now unless it was before."""
        key = f"{name}, {check_steps(steps)} steps{_guided(guidance)}"
        if key not in self._grids:
            field, x0, cond = pilot(GRID_NOISES)
            self._grids[key] = model_grid(name, field, x0, steps, cond=cond)
            self._keep()
        return self._grids[key]

    def write(self, folder: Path) -> None:
        """Write ``samplers.json``."""
        choices = {key: self._choices[key].as_dict() for key in sorted(self._choices)}
        grids = {key: list(self._grids[key]) for key in sorted(self._grids)}
        write_json(folder / FILE, {"format": FORMAT, "weights": self.weights, "choices": choices, "grids": grids})

    def _keep(self) -> None:
        """Write the file, unless there is no folder or it cannot be written to: sampling goes on without."""
        if self.folder is not None and os.access(self.folder, os.W_OK):
            self.write(self.folder)

    def _read(self, folder: Path) -> None:
        """Read ``samplers.json``, if it is there and belongs to these weights."""
        if not (folder / FILE).is_file():
            return
        values: Any = read_json(folder / FILE)
        if not isinstance(values, dict) or values.get("weights") != self.weights or values.get("format") != FORMAT:
            return
        path = make_path(self.path)
        try:
            self._choices = {key: restore(choice, path) for key, choice in dict(values["choices"]).items()}
            self._grids = {key: make_grid(times) for key, times in dict(values["grids"]).items()}
        except (UserError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"{folder / FILE} is damaged: delete it, and samplers are found again.") from error


def _key(kind: str, calls: int, guidance: float | None) -> str:
    return f"{kind}, {check_steps(calls)} calls{_guided(guidance)}"


def _guided(guidance: float | None) -> str:
    return "" if guidance in (None, 1.0) else f", guidance {guidance:g}"
