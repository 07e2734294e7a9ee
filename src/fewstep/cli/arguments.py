"""The verbs' arguments as dataclasses; tyro makes the parsers and the help of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import tyro.constructors

LISTS = ("methods", "solvers", "data", "networks", "grids", "recipes")


def shown(metavar: str, default: str | None = None) -> Any:
    """How help shows an option: what stands for its value, and in words what happens without it."""
    hint = None if default is None else default and f"(default: {default})"
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


def number(kind: type[int] | type[float], what: str) -> Any:
    """An option's number, absent or given; what is no number is refused in plain words."""

    def read(words: Sequence[str]) -> int | float:
        try:
            value = kind(words[0])
        except ValueError:
            raise ValueError(f"{words[0]!r} is not {what}.") from None
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"{words[0]} is too large.")
        return value

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


WHOLE = number(int, "a whole number")
NUMBER = number(float, "a number")


@dataclass(frozen=True)
class Demo:
    """Arguments of ``demo``."""

    out: Annotated[Path, shown("DIR")] = Path("runs/demo")
    """folder for everything the demo writes"""
    seed: Annotated[int, WHOLE] = 0
    """seed of data order, noise and weights"""


@dataclass(frozen=True)
class Run:
    """Arguments of ``run``."""

    recipe: Annotated[str, tyro.conf.Positional, shown("RECIPE")]
    """a YAML file, or the name of a recipe that comes with fewstep"""
    out: Annotated[Path | None, shown("DIR", "runs/NAME")] = None
    """run folder"""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """change a recipe's value, e.g. --set stages.teacher.samples=100000"""
    dry: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help_behavior_hint="")] = False
    """show stages, network calls and estimated minutes, and run nothing"""


@dataclass(frozen=True)
class Sample:
    """Arguments of ``sample``."""

    model: Annotated[Path, tyro.conf.Positional, shown("MODEL")]
    """a model's folder"""
    num: Annotated[int, WHOLE, shown("N")]
    """how many samples"""
    out: Annotated[Path, shown("FILE")]
    """.npy, .npz or .png (a sheet)"""
    steps: Annotated[int | None, WHOLE, shown("K", "the model's")] = None
    """solver steps; network calls with --solver auto or fitted"""
    solver: Annotated[str | None, shown("NAME", "euler")] = None
    """solver of a velocity model, see fewstep list solvers; auto and fitted are found for the model and kept with it"""
    grid: Annotated[str | None, shown("GRID", "uniform")] = None
    """time grid: uniform, shift:3, quadratic:2, or explicit times 0,0.2,1, which fix the steps"""
    label: Annotated[str | None, shown("LABEL", "drawn as often as in the data")] = None
    """class of every sample"""
    guidance: Annotated[float | None, NUMBER, shown("W", "none")] = None
    """guidance weight of a conditional velocity model"""
    seed: Annotated[int, WHOLE] = 0
    """sample i is a function of (seed, i)"""
    batch_size: Annotated[int, WHOLE, shown("N")] = 256
    """rows per network call; does not change the samples"""


@dataclass(frozen=True)
class Diagnose:
    """Arguments of ``diagnose``."""

    model: Annotated[Path, tyro.conf.Positional, shown("MODEL")]
    """a velocity model's folder"""
    out: Annotated[Path | None, shown("DIR", "print only")] = None
    """also write diagnosis.json here"""
    num: Annotated[int, WHOLE, shown("N")] = 256
    """noises to measure on"""
    calls: Annotated[str, shown("K,K,...")] = "4,8,16"
    """numbers of network calls to find the best sampler for, kept with the model; 'none' to leave that out"""
    data: Annotated[str | None, shown("DATA", "no likelihood")] = None
    """also the log-likelihood of this data's held-out rows"""
    seed: Annotated[int, WHOLE] = 0
    """seed of the noises"""


@dataclass(frozen=True)
class Compare:
    """Arguments of ``compare``."""

    models: Annotated[tuple[Path, ...], tyro.conf.Positional, shown("MODEL...", "")]
    """models' folders, one or more"""
    data: Annotated[str, shown("DATA")]
    """a built-in name or a path"""
    steps: Annotated[str, shown("K,K,...")] = "1,2,4,8"
    """step counts for velocity models"""
    solver: Annotated[str | None, shown("NAME", "each model's own")] = None
    """solver of velocity models; with auto and fitted, steps are network calls"""
    grid: Annotated[str | None, shown("GRID", "each model's own")] = None
    """time grid of velocity models; explicit times fix the steps"""
    samples: Annotated[int | None, WHOLE, shown("N", "min(4000, training rows)")] = None
    """generated samples"""
    features: Annotated[str | None, shown("FEATURES", "the values themselves")] = None
    """what the Fréchet distance looks at: a features stage's folder, a CIFAR ResNet's file, lpips:vgg or lpips:alex"""
    seed: Annotated[int, WHOLE] = 0
    """seed of the samples"""
    out: Annotated[Path | None, shown("DIR", "print only")] = None
    """also write compare.json, compare.md and report.html here"""


@dataclass(frozen=True)
class List:
    """Arguments of ``list``."""

    what: Annotated[str, tyro.conf.Positional, shown("{" + ",".join(LISTS) + "}")]
    """what to list"""
    table: Annotated[str | None, shown("SOLVER", "")] = None
    """with solvers: print the numbers that this solver is on a grid"""
    steps: Annotated[int | None, WHOLE, shown("K", "4")] = None
    """with --table: solver steps"""
    grid: Annotated[str | None, shown("GRID", "uniform")] = None
    """with --table: time grid, or explicit times, which fix the steps"""
    path: Annotated[str | None, shown("PATH", "linear")] = None
    """with --table: the path that the field was trained on: linear, cosine, vp, …"""


@dataclass(frozen=True)
class Doctor:
    """Arguments of ``doctor``: none."""
