"""Samplers that were found for a model, kept beside its weights as numbers: ``samplers.json``.

A choice belongs to weights, number of calls and guidance. The file names the weights it was made for; beside other
weights it is ignored, and written anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

from fewstep.diagnostics.pick import Choice, restore
from fewstep.errors import UserError
from fewstep.flow.paths import make_path
from fewstep.store.files import read_json, write_json

FILE = "samplers.json"
FORMAT = 1


@final
class Samplers:
    """The choices made for one model so far.

    Args:
        weights: digest of the weights they were made for.
        path: name of the path the model was trained on.
    """

    def __init__(self, weights: str, path: str) -> None:
        self.weights = weights
        self.path = path
        self._choices: dict[str, Choice] = {}

    def find(self, kind: str, calls: int, guidance: float | None) -> Choice | None:
        """The choice for a kind of tuning, a number of calls and a guidance weight; None when there is none yet."""
        return self._choices.get(_key(kind, calls, guidance))

    def add(self, kind: str, calls: int, guidance: float | None, choice: Choice) -> None:
        """Keep a choice."""
        self._choices[_key(kind, calls, guidance)] = choice

    def __len__(self) -> int:
        return len(self._choices)

    def write(self, folder: Path) -> None:
        """Write ``samplers.json``."""
        choices = {key: self._choices[key].as_dict() for key in sorted(self._choices)}
        write_json(folder / FILE, {"format": FORMAT, "weights": self.weights, "choices": choices})

    def read(self, folder: Path) -> None:
        """Take what ``samplers.json`` holds, if it is there and of these weights."""
        if not (folder / FILE).is_file():
            return
        values: Any = read_json(folder / FILE)
        if not isinstance(values, dict) or values.get("weights") != self.weights or values.get("format") != FORMAT:
            return
        path = make_path(self.path)
        try:
            self._choices |= {key: restore(choice, path) for key, choice in dict(values["choices"]).items()}
        except (UserError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"{folder / FILE} is damaged: delete it, and samplers are found again.") from error


def _key(kind: str, calls: int, guidance: float | None) -> str:
    return f"{kind}, {calls} calls" + ("" if guidance in (None, 1.0) else f", guidance {guidance:g}")
