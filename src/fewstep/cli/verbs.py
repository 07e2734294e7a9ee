"""The verbs: their arguments as dataclasses, and the functions that run them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, final

import tyro

Positional = tyro.conf.Positional


@dataclass(frozen=True)
class Demo:
    """Arguments of ``demo``."""

    out: Path = Path("runs/demo")
    """folder for everything the demo writes"""
    seed: int = 0
    """seed of data order, noise and weights"""


@dataclass(frozen=True)
class Run:
    """Arguments of ``run``."""

    recipe: Positional[str]
    """a YAML file, or the name of a recipe that comes with fewstep"""
    out: Path | None = None
    """run folder; default runs/NAME"""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """change a recipe's value, e.g. --set stages.teacher.samples=100000"""
    dry: tyro.conf.FlagCreatePairsOff[bool] = False
    """show stages, network calls and estimated minutes, and run nothing"""


@dataclass(frozen=True)
class Sample:
    """Arguments of ``sample``."""

    model: Positional[Path]
    """a model's folder"""
    num: int
    """how many samples"""
    out: Path
    """.npy, .npz or .png (a sheet)"""
    steps: int | None = None
    """solver steps; default: the model's"""
    solver: str | None = None
    """solver of a velocity model; default euler"""
    grid: str | None = None
    """time grid: uniform, shift:3, quadratic:2, or explicit times 0,0.2,1"""
    label: int | None = None
    """class of every sample; default: as often as in the data"""
    guidance: float | None = None
    """guidance weight of a conditional velocity model"""
    seed: int = 0
    """sample i is a function of (seed, i)"""
    batch_size: int = 256
    """rows per network call; does not change the samples"""


@dataclass(frozen=True)
class Diagnose:
    """Arguments of ``diagnose``."""

    model: Positional[Path]
    """a velocity model's folder"""
    out: Path | None = None
    """also write diagnosis.json here"""
    num: int = 256
    """noises to measure on"""
    seed: int = 0
    """seed of the noises"""


@dataclass(frozen=True)
class Compare:
    """Arguments of ``compare``."""

    models: Positional[tuple[Path, ...]]
    """models' folders"""
    data: str
    """a built-in name or a path"""
    steps: str = "1,2,4,8"
    """step counts for velocity models"""
    samples: int | None = None
    """generated samples; default min(4000, training rows)"""
    seed: int = 0
    """seed of the samples"""
    out: Path | None = None
    """also write compare.json and report.html here"""


@dataclass(frozen=True)
class List:
    """Arguments of ``list``."""

    what: Positional[Literal["methods", "solvers", "data", "networks", "grids", "recipes"]]
    """what to list"""


@dataclass(frozen=True)
class Doctor:
    """Arguments of ``doctor``: none."""


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
    "diagnose": Verb(Diagnose, "straightness, curvature and error along t, and a grid made from them"),
    "compare": Verb(Compare, "quality, network calls and time of several models side by side"),
    "list": Verb(List, "what there is: methods, solvers, data, networks, grids, recipes"),
    "doctor": Verb(Doctor, "what this machine can do"),
}
