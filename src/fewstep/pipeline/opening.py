"""A run: what its stages share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from fewstep.data.dataset import DataSet
from fewstep.data.load import load_data
from fewstep.errors import UserError
from fewstep.flow.couplings import EmpiricalSource, GaussianSource, Source
from fewstep.methods.contract.options import Options
from fewstep.pipeline.compare import check_reference
from fewstep.pipeline.recipe import Recipe
from fewstep.pipeline.stage_networks import stage_network
from fewstep.training.world import LocalWorld

DEQUANTISE = 0.025  # default noise on discrete data, network units


@final
@dataclass(frozen=True)
class Run:
    """What the stages of one run share."""

    recipe: Recipe
    out: Path
    data: DataSet
    source: Source
    base_rows: Tensor | None
    world: LocalWorld

    @property
    def dequantise(self) -> float:
        """Noise added to discrete data so that its law has a density, and inverted data the base's law."""
        if self.recipe.header.dequantise is not None:
            return self.recipe.header.dequantise
        return 0.0 if self.data.quantum is None else DEQUANTISE


def open_run(recipe: Recipe, out: Path, world: LocalWorld) -> Run:
    """Load the data and prepare the run folder.

    Raises:
        UserError: unreadable data, an output path that cannot be written, labels asked for that are not there.
    """
    header = recipe.header
    data = load_data(header.data, seed=header.seed)
    if recipe.conditional and data.labels is None:
        raise UserError(
            f"conditional: true, but the data {data.name!r} has no labels: name them, data: {{path: …, labels: …}}."
        )
    check_reference(data)
    source, rows = make_source(header.base, data)
    return Run(recipe, out, data, source, rows, world)


def make_source(base: str | Mapping[str, Any], data: DataSet) -> tuple[Source, Tensor | None]:
    """The base distribution: N(0, I), or the training rows of another data set of the same shape."""
    if base == "gaussian":
        return GaussianSource(data.shape), None
    other = load_data(base)
    if other.shape != data.shape:
        raise UserError(f"base {other.name!r} has rows of shape {other.shape}, the data {data.shape}: they must agree.")
    rows = other.train_rows()
    return EmpiricalSource(rows), rows


def network_of(run: Run, options: Options) -> dict[str, Any]:
    """The resolved network configuration of a stage."""
    return stage_network(run.recipe, run.data, options)
