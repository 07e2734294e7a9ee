"""The arguments of the verbs as dataclasses, from which tyro makes the parsers and the help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import tyro.constructors

LISTS = ("methods", "solvers", "data", "networks", "grids", "recipes")


def option(metavar: str, default: str | None = None) -> Any:
    """How help shows an option.

    Args:
        metavar: the placeholder of its value.
        default: the default in words; None: tyro prints the value; empty: nothing is printed.
    """
    hint = None if default is None else default and f"(default: {default})"
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


def number(kind: type[int] | type[float], what: str) -> Any:
    """The parser of an optional number.

    Args:
        kind: its type.
        what: its name in the error ("a whole number").
    """

    def parse(texts: Sequence[str]) -> int | float:
        try:
            value = kind(texts[0])
        except ValueError:
            raise ValueError(f"{texts[0]!r} is not {what}.") from None
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"{texts[0]} is too large.")
        return value

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=parse,
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


WHOLE = number(int, "a whole number")
NUMBER = number(float, "a number")


MODULE = option("FILE.py:NAME", "none")


@dataclass(frozen=True)
class Demo:
    """Arguments of ``demo``."""

    out: Annotated[Path, option("DIR")] = Path("runs/demo")
    """folder for all output of the demo"""
    seed: Annotated[int, WHOLE] = 0
    """seed of data order, noise and weights"""


@dataclass(frozen=True)
class Run:
    """Arguments of ``run``."""

    recipe: Annotated[str, tyro.conf.Positional, option("RECIPE")]
    """a YAML file, or the name of a recipe that comes with fewstep"""
    out: Annotated[Path | None, option("DIR", "runs/NAME")] = None
    """run folder"""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """change a recipe's value, e.g. --set stages.teacher.samples=100000"""
    dry: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help_behavior_hint="")] = False
    """show stages, network calls and estimated minutes without running them"""
    module: Annotated[str | None, MODULE] = None
    """a function of yours that makes the network of stages that name none: its code is run"""


@dataclass(frozen=True)
class Sample:
    """Arguments of ``sample``."""

    model: Annotated[Path, tyro.conf.Positional, option("MODEL")]
    """a model's folder, of fewstep or of diffusers"""
    num: Annotated[int, WHOLE, option("N")]
    """number of samples"""
    out: Annotated[Path, option("FILE")]
    """.npy, .npz or .png (a sheet)"""
    steps: Annotated[int | None, WHOLE, option("K", "the model's")] = None
    """solver steps; network calls with --solver auto or fitted"""
    solver: Annotated[str | None, option("NAME", "euler")] = None
    """solver of a velocity model, see fewstep list solvers; auto and fitted are found for the model and stored in it"""
    grid: Annotated[str | None, option("GRID", "uniform")] = None
    """time grid: uniform, shift:3, quadratic:2, or explicit times 0,0.2,1, which fix the steps"""
    label: Annotated[str | None, option("LABEL", "drawn with the frequencies of the data")] = None
    """class of every sample"""
    guidance: Annotated[float | None, NUMBER, option("W", "none")] = None
    """guidance weight of a conditional velocity model"""
    cond: Annotated[Path | None, option("FILE.npz", "drawn from rows of the training data")] = None
    """the network's conditions by name, one row per sample or one row for all"""
    seed: Annotated[int, WHOLE] = 0
    """seed; sample i depends on the seed and i only"""
    batch_size: Annotated[int, WHOLE, option("N")] = 256
    """rows per network call; does not change the samples"""
    minutes: Annotated[float | None, NUMBER, option("M", "no limit")] = None
    """with --solver auto or fitted: spend about so long at most on finding the sampler"""
    module: Annotated[str | None, MODULE] = None
    """a function of yours that makes the network of a model saved with one of your own: its code is run"""


@dataclass(frozen=True)
class Diagnose:
    """Arguments of ``diagnose``."""

    model: Annotated[Path, tyro.conf.Positional, option("MODEL")]
    """a velocity model's folder, of fewstep or of diffusers"""
    out: Annotated[Path | None, option("DIR", "print only")] = None
    """also write diagnosis.json here"""
    num: Annotated[int, WHOLE, option("N")] = 256
    """number of noise samples"""
    calls: Annotated[str, option("K,K,...")] = "4,8,16"
    """numbers of network calls to choose the best solver and grid for, stored with the model; 'none': do not choose"""
    data: Annotated[str | None, option("DATA", "no likelihood")] = None
    """also compute the log-likelihood of the held-out rows of this data"""
    seed: Annotated[int, WHOLE] = 0
    """seed of the noise samples"""
    minutes: Annotated[float | None, NUMBER, option("M", "no limit")] = None
    """spend about so long at most on the measures and on choosing solvers, with fewer noises and coarser references"""
    module: Annotated[str | None, MODULE] = None
    """a function of yours that makes the network of a model saved with one of your own: its code is run"""


@dataclass(frozen=True)
class Compare:
    """Arguments of ``compare``."""

    models: Annotated[tuple[Path, ...], tyro.conf.Positional, option("MODEL...", "")]
    """folders of models, of fewstep or of diffusers, one or more"""
    data: Annotated[str, option("DATA")]
    """a built-in name, a path, or a recipe's mapping: '{path: rows.npz, conditions: [obs]}'"""
    steps: Annotated[str, option("K,K,...")] = "1,2,4,8"
    """step counts for velocity models"""
    solver: Annotated[str | None, option("NAME", "each model's own")] = None
    """solver of velocity models; with auto and fitted, steps are network calls"""
    grid: Annotated[str | None, option("GRID", "each model's own")] = None
    """time grid of velocity models; explicit times fix the steps"""
    samples: Annotated[int | None, WHOLE, option("N", "min(4000, training rows)")] = None
    """number of generated samples"""
    features: Annotated[str | None, option("FEATURES", "the data values")] = None
    """features of the Fréchet distance: folder of a features stage, file of a CIFAR ResNet, lpips:vgg or lpips:alex"""
    seed: Annotated[int, WHOLE] = 0
    """seed of the samples"""
    out: Annotated[Path | None, option("DIR", "print only")] = None
    """also write compare.json, compare.md and report.html here"""
    module: Annotated[str | None, MODULE] = None
    """a function of yours that makes the network of a model saved with one of your own: its code is run"""


@dataclass(frozen=True)
class Check:
    """Arguments of ``check``."""

    model: Annotated[Path, tyro.conf.Positional, option("MODEL")]
    """a velocity model's folder, of fewstep or of diffusers, or FILE.py:NAME, a function that makes the network"""
    data: Annotated[str, option("DATA")]
    """the data that it was trained on: a built-in name, a path, or a mapping: '{path: rows.npz, conditions: [obs]}'"""
    seed: Annotated[int, WHOLE] = 0
    """seed of the rows, the noise and the times"""
    module: Annotated[str | None, MODULE] = None
    """a function of yours that makes the network of a model saved with one of your own: its code is run"""


@dataclass(frozen=True)
class List:
    """Arguments of ``list``."""

    what: Annotated[str, tyro.conf.Positional, option("{" + ",".join(LISTS) + "}")]
    """what to list"""
    table: Annotated[str | None, option("SOLVER", "")] = None
    """with solvers: print the coefficients of this solver on a grid"""
    steps: Annotated[int | None, WHOLE, option("K", "4")] = None
    """with --table: solver steps"""
    grid: Annotated[str | None, option("GRID", "uniform")] = None
    """with --table: time grid, or explicit times, which fix the steps"""
    path: Annotated[str | None, option("PATH", "linear")] = None
    """with --table: the path that the field was trained on: linear, cosine, vp, …"""


@dataclass(frozen=True)
class Doctor:
    """Arguments of ``doctor``: none."""
