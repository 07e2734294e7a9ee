"""The models of a comparison: opened, named apart, and drawn from with the conditions that each of them takes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from fewstep.data.dataset import LABEL, DataSet
from fewstep.data.scaling import Scaling
from fewstep.errors import UserError
from fewstep.flow.grids import GridSpec
from fewstep.generator import Config, Draw, Generator
from fewstep.interop.diffusers_classes import DiffusersCall
from fewstep.interop.diffusers_folders import is_diffusers_folder
from fewstep.interop.diffusers_networks import from_diffusers
from fewstep.interop.lora import Role
from fewstep.interop.open_model import load
from fewstep.networks import parameter_count
from fewstep.networks.adapter import Adapter, plain_call
from fewstep.networks.foreign import FOREIGN, Foreign
from fewstep.pipeline.compare_rows import MIN_ROWS, Cond, Conditions
from fewstep.training.world import default_device

Model = Generator | nn.Module | str | Path
SolverAndGrid = tuple[str | None, GridSpec | None]


@final
@dataclass(frozen=True)
class Entrant:
    """A model in a comparison.

    Attributes:
        model: the generator.
        given: names of the conditions that it is given from rows of the data; empty for a model without conditions,
            and for one with labels alone, which draws them as often as they were in its training data.
        drawn: the conditions of the samples, the same rows for every model.
        solver, grid: what velocity models are sampled with; None for their own.
        seed: of the samples.
    """

    model: Generator
    given: tuple[str, ...]
    drawn: Conditions
    solver: str | None
    grid: GridSpec | None
    seed: int

    @property
    def sampler(self) -> SolverAndGrid:
        """The solver and grid it is sampled with: those asked for; none for a map, which has its own sampler."""
        return (self.solver, self.grid) if self.model.config.rule.kind == "velocity" else (None, None)

    @property
    def draws_labels(self) -> bool:
        """Whether it draws labels itself."""
        return self.model.conditional and not self.given

    def most(self, count: int) -> int:
        """How many samples of it are measured: ``count``, or its different starts where there are fewer.

        Raises:
            UserError: fewer different starts than the nearest-neighbour scores need.
        """
        starts = self.model.distinct_starts
        if starts is not None and starts < MIN_ROWS:
            raise UserError(
                f"{self.model.name!r} has {starts} different starts, and a comparison needs at least {MIN_ROWS} "
                "samples: train it again with more held-out rows."
            )
        return count if starts is None else min(count, starts)

    def cond(self, num: int) -> dict[str, Any] | None:
        """The conditions of its first ``num`` samples; None where it draws them itself or takes none."""
        if not self.given:
            return None
        found: dict[str, Any] = dict(self.drawn.of(self.given, num))
        if LABEL in found and self.model.conditional:
            found[LABEL] = self.drawn.labels(num)  # a model knows labels by the data's names
        return found

    def draw(self, num: int, steps: int, as_asked: bool = True) -> Draw:
        """Its first ``num`` samples, in its own network units.

        Args:
            num: how many.
            steps: of the solver or the map.
            as_asked: with the solver and grid asked for; otherwise with its own.
        """
        solver, grid = self.sampler if as_asked else (None, None)
        return self.model.draw(num, steps=steps, seed=self.seed, solver=solver, grid=grid, cond=self.cond(num))

    def samples(self, draw: Draw) -> Tensor:
        """Samples (num, *shape) in the data's network units, zero at the padding of their rows."""
        return self.drawn.without_padding(in_reference_units(draw.x, self.model, self.drawn.data))

    def metric_conditions(self) -> tuple[str, ...]:
        """Names of the conditions that a metric may be given of its samples."""
        data = self.drawn.data
        if not self.draws_labels:
            return data.condition_names
        # its labels were not drawn with the other conditions of a row
        return (LABEL,) if data.labels is None or data.label_names == self.model.config.label_names else ()

    def metric_cond(self, draw: Draw, names: Sequence[str]) -> Cond:
        """These conditions of the samples of a draw."""
        return {LABEL: draw.cond[LABEL]} if self.draws_labels and names else self.drawn.of(names, len(draw.x))


def in_reference_units(x: Tensor, model: Generator, data: DataSet) -> Tensor:
    """Samples in the data's network units; a model scaled otherwise goes through the data's own units."""
    if model.config.scaling == data.scaling.as_dict():
        return x
    rows = x.float().numpy()
    if model.config.scaling is not None:
        own = Scaling.from_dict(model.config.scaling)
        rows = own.arrange(own.to_data(x).numpy())
    return data.scaling.normalise(rows)


def open_models(models: Any, data: DataSet, in_data_units: bool) -> list[tuple[Generator, bool]]:
    """The generators, with names that differ, and whether each was given as a bare network.

    Args:
        models: generators, folders, networks; one of them, or several.
        data: the reference.
        in_data_units: whether a bare network is in the data's own units.

    Raises:
        UserError: no model, one twice, one of another shape than the data's, or something else.
    """
    listed = [models] if isinstance(models, (Generator, nn.Module, str, Path)) else list(models)
    if not listed:
        raise UserError("no model to compare: give at least one model's folder.")
    # a folder of diffusers says nothing of units and conditions: it is opened as a network
    listed = [from_diffusers(model) if _is_of_diffusers(model) else model for model in listed]
    opened = [_open(model, data, in_data_units) for model in listed]
    _refuse_twice(listed)
    for model in opened:
        if model.config.shape != data.shape:
            raise UserError(
                f"{model.name!r} makes samples of shape {model.config.shape}, the data {data.name!r} has "
                f"{data.shape}: compare models of one data set with that data."
            )
    bare = [isinstance(model, nn.Module) for model in listed]
    named = with_names(opened, distinct_names(opened, [model.folder for model in opened]))
    return list(zip(named, bare, strict=True))


def _is_of_diffusers(model: Any) -> bool:
    return isinstance(model, (str, Path)) and is_diffusers_folder(model)


def _open(model: Any, data: DataSet, in_data_units: bool) -> Generator:
    if isinstance(model, Generator):
        return model
    if isinstance(model, (str, Path)):
        return load(model, device=default_device())
    if not isinstance(model, nn.Module):
        raise UserError(
            f"a model to compare is a {type(model).__name__}: give generators (fs.load, fs.train), models' folders, or "
            "networks v(x, t, **cond) (a torch.nn.Module, fs.adapt)."
        )
    network = model if isinstance(model, Foreign) else Adapter(model)
    scaling = None if in_data_units else data.scaling.as_dict()
    generator = Generator(network, config=Config(shape=data.shape, network=network.describe(), scaling=scaling))
    adapter = _adapter_of(network)
    generator.name = type(network if adapter is None else adapter.wrapped).__name__
    return generator


def _refuse_twice(models: Sequence[Model]) -> None:
    """Refuse the same object or folder twice."""
    seen: list[Any] = [Path(model).resolve() if isinstance(model, (str, Path)) else id(model) for model in models]
    for k, model in enumerate(models):
        if seen.index(seen[k]) < k:
            what = repr(str(model)) if isinstance(model, (str, Path)) else f"number {seen.index(seen[k]) + 1}"
            raise UserError(f"the model {what} is given twice: name every model once.")


def distinct_names(models: Sequence[Generator], folders: Sequence[Path | None]) -> list[str]:
    """Their names; of models with one name, the shortest ends of their folders' paths that tell them apart, or numbers.

    ``runs/a/teacher`` and ``runs/b/teacher`` become ``a/teacher`` and ``b/teacher``; two networks in memory called
    ``Policy`` become ``Policy`` and ``Policy (2)``.
    """
    names = [model.name for model in models]
    found = list(names)
    for name in dict.fromkeys(names):
        same = [k for k, other in enumerate(names) if other == name]
        paths = [folder.resolve() for k in same if (folder := folders[k]) is not None]
        if len(same) > 1 and len(set(paths)) == len(same):
            ends = path_ends(paths)
        else:
            ends = [name if number == 1 else f"{name} ({number})" for number in range(1, len(same) + 1)]
        for k, end in zip(same, ends, strict=True):
            found[k] = end
    for k, name in enumerate(found):  # 'a/b' may also be the name of another model
        number = 2
        while found[k] in found[:k]:
            found[k], number = f"{name} ({number})", number + 1
    return found


def path_ends(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of different paths that differ."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def with_names(models: Sequence[Generator], names: Sequence[str]) -> list[Generator]:
    """The models under these names; one that is renamed is a copy with the same network."""
    found = []
    for model, name in zip(models, names, strict=True):
        named = model if model.name == name else copy.copy(model)
        named.name = name
        found.append(named)
    return found


def name_apart(models: Sequence[Generator], folders: Sequence[Path]) -> None:
    """Rename models of the same name as :func:`distinct_names` does, in place.

    Raises:
        UserError: one folder is given twice.
    """
    _refuse_twice(folders)
    for model, name in zip(models, distinct_names(models, folders), strict=True):
        model.name = name


def conditions_of(model: Generator, bare: bool, data: DataSet) -> tuple[str, ...]:
    """Names of the conditions that a model is given from rows of the data.

    A trained model says which it takes. A network of the user's own is given the conditions that it names as
    parameters, and with ``**cond`` all those of the data. Labels that it can do without are given to a bare network
    only: a generator says by its ``classes`` whether it takes them.

    Raises:
        UserError: the data does not have a condition that it needs.
    """
    config, known = model.config, data.condition_names
    network = config.network or {}
    if config.conditions or config.method is not None or network.get("name", FOREIGN) != FOREIGN:
        needed = [*([LABEL] if config.class_weights and config.conditions else []), *config.conditions]
        optional: list[str] = []
    else:
        needed, optional = _parameters(model.module, known)
        optional = [name for name in optional if name != LABEL or bare]
        if config.base == "examples":  # its context comes with its starts
            needed, optional = ([name for name in names if name != "context"] for names in (needed, optional))
    if model.conditional and set(needed) | set(optional) <= {LABEL}:
        return ()  # labels alone: the model draws them
    missing = [name for name in needed if name not in known]
    if missing:
        has = f"the conditions {', '.join(known)}" if known else "no conditions"
        raise UserError(
            f"{model.name!r} takes {', '.join(map(repr, missing))}, and the data {data.name!r} has {has}: give data "
            "with these conditions, by the names that the model has for them (fs.adapt names a network's)."
        )
    return tuple(name for name in known if name in (*needed, *optional))


def _parameters(module: nn.Module, known: Sequence[str]) -> tuple[list[str], list[str]]:
    """The conditions that a network needs, and those among ``known`` that it can be given."""
    call, skipped = module.forward, 2  # after x, t
    if (adapter := _adapter_of(module)) is not None:
        if isinstance(adapter.call, DiffusersCall):
            needs, takes = adapter.call.conditions(adapter.wrapped)
            return [*needs], [name for name in takes if name in known]
        own = adapter.call is plain_call
        call, skipped = (adapter.wrapped.forward, 2) if own else (adapter.call, 3)
    try:
        listed = list(inspect.signature(call).parameters.values())[skipped:]
    except (TypeError, ValueError):
        return [], []
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = {p.name: p for p in listed if p.kind not in variable and p.name != "r"}
    needed = [name for name, p in named.items() if p.default is p.empty]
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in listed)
    return needed, [name for name in known if name not in needed and (takes_all or name in named)]


def _adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter that calls the user's own module; None for a network without one."""
    found = module.base if isinstance(module, Role) else module
    return found if isinstance(found, Adapter) else None


def number_of_parameters(module: nn.Module) -> int:
    """Parameters of a network, and what it shares with others without owning it (the base of an adapter)."""
    count = parameter_count(module)
    if not isinstance(module, Foreign):
        return count
    own = module.state_dict()
    shared: Mapping[str, Tensor] = {k: v for k, v in module.whole_state().items() if k not in own}
    return count + sum(values.numel() for values in shared.values())


def steps_of(model: Generator, steps: Sequence[int]) -> list[int]:
    """The step counts a model is measured at."""
    own = model.config.rule.steps
    if model.config.rule.kind == "map" and model.config.rule.sampler == "euler":
        return list(own or (model.config.rule.default_steps,))
    wanted = sorted(set(steps))
    if model.config.rule.kind == "map" and own is not None:
        return [number for number in wanted if number in own] or [model.config.rule.default_steps]
    return wanted
