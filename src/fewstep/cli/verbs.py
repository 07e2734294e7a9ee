"""The table of verbs: name, arguments, help text, and the function that runs them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from fewstep.cli.arguments import Check, Compare, Demo, Diagnose, Doctor, List, Run, Sample


@final
@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        arguments: dataclass of its arguments; its name in lower case is the function that runs it.
        summary: one line for ``fewstep --help``.
        more: further sentences for ``fewstep VERB --help``.
        place: the module with the function.
    """

    arguments: type[Any]
    summary: str
    more: str = ""
    place: str = "fewstep.cli.work"

    @property
    def run(self) -> Callable[[Any], int]:
        """The function that runs the verb; importing it loads torch."""
        work = importlib.import_module(self.place)
        function: Callable[[Any], int] = getattr(work, self.arguments.__name__.lower())
        return function

    def description(self) -> str:
        """The first paragraph of ``fewstep VERB --help``."""
        return f"{self.summary[0].upper()}{self.summary[1:]}. {self.more}".strip()


VERBS: dict[str, Verb] = {
    "demo": Verb(Demo, "teacher, ReFlow, one-step student and report on the built-in digits"),
    "run": Verb(Run, "run a recipe's stages; the same command again resumes"),
    "sample": Verb(Sample, "draw samples from a model"),
    "diagnose": Verb(
        Diagnose, "straightness, curvature, error and stiffness along t; the best solver and grid; conclusions"
    ),
    "check": Verb(
        Check,
        "whether a network is the velocity of the flow to the data, and the likely fix where it is not",
        "Exit code 0: no fault was found; 1: faults were found.",
        place="fewstep.cli.check_verb",
    ),
    "compare": Verb(Compare, "quality, network calls and time of several models side by side"),
    "list": Verb(List, "list the methods, solvers, data, networks, grids or recipes", place="fewstep.cli.catalogue"),
    "doctor": Verb(Doctor, "versions, device, threads and bf16 speed of this machine"),
}
