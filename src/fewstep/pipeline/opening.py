"""A run: what its stages share. Data, models and features are opened once and kept for the run's life."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from fewstep.data.dataset import LABEL, DataSet
from fewstep.data.load import load_data
from fewstep.errors import UserError
from fewstep.flow.couplings import EmpiricalSource, GaussianSource, Source
from fewstep.flow.noise import isolated_rng
from fewstep.generator import Generator, load, read_config
from fewstep.interop.diffusers_folders import is_diffusers_folder
from fewstep.interop.diffusers_networks import rebuilt
from fewstep.interop.open_model import open_diffusers
from fewstep.methods.contract.stage import Spec, Stream
from fewstep.methods.registry import find_method
from fewstep.metrics.feature_distance import FeatureDistance, find_features
from fewstep.networks.foreign import FOREIGN, Foreign, own_copy, trainable_copy
from fewstep.pipeline.compare import check_reference
from fewstep.pipeline.recipe import Recipe
from fewstep.pipeline.stage_networks import difference, same_weights, stage_network
from fewstep.training.world import LocalWorld

DEQUANTISE = 0.025  # default noise on discrete data, network units; chosen, not tuned


@final
@dataclass(frozen=True)
class Run:
    """What the stages of one run share.

    Attributes:
        recipe: the checked recipe.
        out: the run folder.
        data: the training data.
        source: the base distribution.
        base_rows: the rows of a base that is another data set; None for N(0, I).
        world: the processes at work.
        foreign: networks that fewstep did not build, by the name in their description.
        given: models that were passed as objects, by the name that options have for them.
        stream: the stream that the training rows come from; None for data with random access.
    """

    recipe: Recipe
    out: Path
    data: DataSet
    source: Source
    base_rows: Tensor | None
    world: LocalWorld
    foreign: Mapping[str, Foreign] = field(default_factory=dict)
    given: Mapping[str, Generator] = field(default_factory=dict)
    stream: Stream | None = None
    _methods: dict[str, Spec] = field(default_factory=dict)
    _networks: dict[str, dict[str, Any]] = field(default_factory=dict)
    _models: dict[Path, Generator] = field(default_factory=dict)
    _opened: list[Foreign] = field(default_factory=list)  # networks of diffusers that were read from folders
    _features: dict[str, FeatureDistance] = field(default_factory=dict)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions that networks are given, ``label`` first."""
        return ((LABEL,) if self.recipe.conditional else ()) + tuple(self.data.conditions)

    @property
    def dequantise(self) -> float:
        """Standard deviation of the noise added to discrete data, so that they have a density."""
        if self.recipe.header.dequantise is not None:
            return self.recipe.header.dequantise
        return 0.0 if self.data.quantum is None else DEQUANTISE

    def method(self, name: str) -> Spec:
        """The method of a stage."""
        if name not in self._methods:
            self._methods[name] = find_method(self.recipe.stages[name].method)
        return self._methods[name]

    def network(self, name: str) -> dict[str, Any]:
        """The resolved network configuration of a stage."""
        if name not in self._networks:
            options = self.recipe.stages[name]
            self._networks[name] = stage_network(
                self.recipe, self.data, options, self.method(name), self.network_of, self.foreign
            )
        return self._networks[name]

    def network_of(self, chosen: str) -> dict[str, Any]:
        """The network of a stage, of a model that was passed, or of a model's folder; empty where it is not known."""
        if chosen in self.recipe.stages:
            return self.network(chosen)
        if chosen in self.given:
            return dict(self.given[chosen].config.network or {})
        folder = Path(chosen)
        if is_diffusers_folder(folder):
            return dict(self.model(folder).config.network or {})
        network = dict(read_config(folder).network or {})
        if network.get("name") != FOREIGN:
            return network
        # as it is declared now: what replaces a condition may have been said since
        declared = {**self.prototype(network).describe(), "two_time": bool(network.get("two_time"))}
        return declared if network.get("two_time") else {k: v for k, v in declared.items() if k != "two_time"}

    def prototype(self, network: Mapping[str, Any]) -> Foreign:
        """The network from outside that a description belongs to.

        Raises:
            UserError: it was not passed to the run, or another one of this name was.
        """
        for found in (*self.foreign.values(), *self._opened):
            if same_weights(found.describe(), network):
                return found
        name = network["module"]
        made = rebuilt({**network, "two_time": False})
        if made is not None:
            self._opened.append(made)
            return made
        if not self.foreign:
            raise UserError(
                f"a model of this run is a {name}, which fewstep did not build: pass the network, fs.train(…, "
                "network=net), or name the function that makes it, --module file.py:make."
            )
        others = "; ".join(difference(found.describe(), network) for found in self.foreign.values())
        raise UserError(
            f"a model of this run is a {name}, and the network that was passed has another form: {others}. Pass the "
            "network that the model was made with."
        )

    def open_model(self, folder: Path, *, full: bool = False) -> Generator:
        """The model in a folder, on this run's device; opened anew at every call.

        A network of diffusers is taken to work in the units of this run's data.

        Args:
            folder: of the model.
            full: in float32 where the user's network has half precision, as models between phases are kept.
        """
        if is_diffusers_folder(folder):
            scaling, device = self.data.scaling.as_dict(), self.world.device
            opened = open_diffusers(folder, shape=self.data.shape, scaling=scaling, classes=0, device=device)
            if isinstance(opened.module, Foreign):
                self._opened.append(opened.module)
            return opened
        network = read_config(folder).network or {}
        module: nn.Module | None = None
        if network.get("name") == FOREIGN:
            with isolated_rng():
                make = trainable_copy if full else own_copy
                module = make(self.prototype(network), bool(network.get("two_time")))
        return load(folder, module=module, device=self.world.device)

    def model(self, folder: Path) -> Generator:
        """The model in a folder, on this run's device."""
        key = folder.resolve()
        if key not in self._models:
            self._models[key] = self.open_model(folder)
        return self._models[key]

    def features(self, word: str) -> FeatureDistance:
        """The features that a word of the recipe stands for: a stage, a path, or LPIPS."""
        if word not in self._features:
            place = str(self.out / word) if word in self.recipe.stages else word
            scaling = self.data.scaling.as_dict()
            self._features[word] = find_features(place, self.data.shape, self.world.device, scaling)
        return self._features[word]


def open_run(recipe: Recipe, out: Path, world: LocalWorld, foreign: Sequence[Foreign] = ()) -> Run:
    """Load the data and the base of a run; nothing is written.

    Args:
        recipe: the recipe.
        out: the run folder.
        world: the processes at work.
        foreign: networks that fewstep did not build; the first is that of stages which name none.

    Raises:
        UserError: unreadable data, labels asked for that are not there, a base of another shape.
    """
    header = recipe.header
    data = load_data(header.data, seed=header.seed)
    if recipe.conditional and data.labels is None:
        raise UserError(
            f"conditional: true, but the data {data.name!r} has no labels: name them, data: {{path: …, labels: …}}."
        )
    check_reference(data)
    source, rows = make_source(header.base, data)
    return Run(recipe, out, data, source, rows, world, by_name(foreign))


def by_name(foreign: Sequence[Foreign]) -> dict[str, Foreign]:
    """Networks from outside by the name in their description.

    Raises:
        UserError: two different ones have the same name.
    """
    found: dict[str, Foreign] = {}
    for network in foreign:
        name = network.describe()["module"]
        if not same_weights(found.setdefault(name, network).describe(), network.describe()):
            raise UserError(
                f"two different networks are called {name}: give one of them a name, fs.adapt(…, name='small')."
            )
    return found


def make_source(base: str | Mapping[str, Any], data: DataSet) -> tuple[Source, Tensor | None]:
    """The base distribution: N(0, I), or the training rows of another data set of the same shape."""
    if base == "gaussian":
        return GaussianSource(data.shape), None
    other = load_data(base)
    if other.shape != data.shape:
        raise UserError(f"base {other.name!r} has rows of shape {other.shape}, the data {data.shape}: they must agree.")
    rows = other.train_rows()
    return EmpiricalSource(rows), rows
