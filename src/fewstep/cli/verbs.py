"""The verbs: their arguments, what they do, and where their work is."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from fewstep.cli.arguments import Compare, Demo, Diagnose, Doctor, List, Run, Sample


@final
@dataclass(frozen=True)
class Verb:
    """A verb: its arguments, what it does, where its work is."""

    arguments: type[Any]
    summary: str
    more: str = ""

    @property
    def run(self) -> Callable[[Any], int]:
        """The function that does the work, imported now."""
        work = importlib.import_module("fewstep.cli.work")
        function: Callable[[Any], int] = getattr(work, self.arguments.__name__.lower())
        return function

    def description(self) -> str:
        """What ``fewstep VERB --help`` says first."""
        return f"{self.summary[0].upper()}{self.summary[1:]}. {self.more}".strip()


VERBS: dict[str, Verb] = {
    "demo": Verb(Demo, "the whole story on embedded data: teacher, ReFlow, one-step student, report"),
    "run": Verb(Run, "run a recipe's stages; the same command again resumes"),
    "sample": Verb(Sample, "draw samples from a model"),
    "diagnose": Verb(
        Diagnose, "straightness, curvature, error and stiffness along t; the best solver and grid; a verdict"
    ),
    "compare": Verb(Compare, "quality, network calls and time of several models side by side"),
    "list": Verb(List, "what there is: methods, solvers, data, networks, grids, recipes"),
    "doctor": Verb(Doctor, "what this machine can do"),
}
