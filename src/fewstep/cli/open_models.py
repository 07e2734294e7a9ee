"""Opening what the user names as MODEL: a folder of fewstep or of diffusers, or code that makes a network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from fewstep.cli.user_module import Made, call_made, foreign_of, is_code, network_of
from fewstep.data.dataset import LABEL, DataSet
from fewstep.errors import UserError
from fewstep.flow.noise import isolated_rng
from fewstep.generator import Generator, read_config
from fewstep.generator.conditions import kept_conditions
from fewstep.interop.diffusers_folders import is_diffusers_folder
from fewstep.interop.diffusers_networks import rebuilt
from fewstep.interop.open_model import load, open_diffusers
from fewstep.networks.foreign import FOREIGN, Foreign
from fewstep.pipeline.compare_models import conditions_of
from fewstep.pipeline.stage_networks import difference
from fewstep.training.world import default_device


def open_model(place: Path, module: str | None = None, data: DataSet | None = None) -> Generator:
    """One model, see :func:`open_models`."""
    return open_models([place], module, data)[0]


def open_models(places: Sequence[Path], module: str | None = None, data: DataSet | None = None) -> list[Generator]:
    """The models that the user names, on the default device.

    Args:
        places: folders of fewstep or of diffusers, or code, ``file.py:make``.
        module: the code that makes the network of saved models whose network only the user can build.
        data: gives the shape and units of networks that are saved without them.

    Raises:
        UserError: a place that is no model, a network that the saved weights do not belong to, code that fails, a
            module that no model needs.
    """
    made = None if module is None else call_made(module)
    found, used = [], False
    for place in places:
        if is_code(place):
            found.append(_from_code(str(place), data))
        elif is_diffusers_folder(place):
            found.append(_from_diffusers(place, data))
        else:
            own = made is not None and _needs_module(place)
            used = used or own
            network = _fitting(place, made, str(module)) if made is not None and own else None
            found.append(load(place, module=network, device=default_device()))
    if made is not None and not used:
        raise UserError(
            f"--module {module} makes a network, and {' and '.join(map(str, places))} brings its own: leave --module "
            "out. To use the network as it is, without saved weights, give it as MODEL."
        )
    if data is not None:
        for model in found:
            _take_conditions(model, data)
    return found


def condition_names(model: Generator, data: DataSet) -> tuple[str, ...]:
    """The conditions that a model's network is given with rows of the data.

    Args:
        model: of :func:`open_models`, opened with this data.
        data: the data.

    Raises:
        UserError: a condition that the model takes and the data do not have.
    """
    names = (*((LABEL,) if model.conditional else ()), *model.config.conditions)
    missing = [name for name in names if name not in data.condition_names]
    if missing:
        raise UserError(
            f"{model.name!r} takes the condition {missing[0]!r}, and the data {data.name!r} have "
            f"{', '.join(data.condition_names) or 'none'}: name it with the data, --data '{{path: FILE, conditions: "
            f"[{missing[0]}]}}', or labels: FILE for labels."
        )
    return names


def _take_conditions(model: Generator, data: DataSet) -> None:
    """Let a network that was saved without conditions of its own draw those of the data."""
    config = model.config
    if config.method is not None or config.conditions or model.kept:
        return
    names = conditions_of(model, True, data)
    labels = LABEL in names or model.conditional
    if labels and data.labels is not None and len(config.class_weights) != data.classes:
        shares = np.bincount(data.labels, minlength=data.classes) / len(data.labels)
        config = replace(config, class_weights=tuple(shares.tolist()), label_names=data.label_names)
    shapes = {name: tuple(data.conditions[name].shape[1:]) for name in names if name != LABEL}
    model.config = replace(config, conditions=shapes, mask=data.mask if data.mask in shapes else None)
    model.kept = kept_conditions(data, names)


def _from_diffusers(place: Path, data: DataSet | None) -> Generator:
    device = default_device()
    if data is None:
        return open_diffusers(place, device=device)
    return open_diffusers(place, shape=data.shape, scaling=data.scaling.as_dict(), device=device)


def _needs_module(place: Path) -> bool:
    config = read_config(place)
    network = config.network or {}
    return config.network is None or (network.get("name") == FOREIGN and rebuilt(network) is None)


def _fitting(place: Path, made: Made, module: str) -> nn.Module:
    """A copy of the user's network in the form of the saved model."""
    network, saved = network_of(made), read_config(place).network
    if saved is None:
        return copy.deepcopy(network)
    foreign = foreign_of(made)
    found = difference(foreign.describe(), saved)
    if found:
        raise UserError(
            f"--module {module} makes another network than {place} was saved with: it has {found}. Make the network "
            "as it was, with the same sizes and the same fs.adapt(…) arguments."
        )
    return _two_time_form(foreign, bool(saved.get("two_time")))


def _two_time_form(foreign: Foreign, two_time: bool) -> nn.Module:
    with isolated_rng():
        return foreign.with_interval() if two_time and not foreign.two_time else copy.deepcopy(foreign)


def _from_code(place: str, data: DataSet | None) -> Generator:
    """The network of the user's own as it is, with the weights that it is made with."""
    made = call_made(place)
    if isinstance(made, Generator):
        made.module.to(default_device()).requires_grad_(False)
        return made
    if data is None:
        raise UserError(
            f"{place} makes a network, and the shape of its samples is not known: let it return "
            "fs.Generator(net, shape=(…)), or name data with --data."
        )
    generator = Generator(foreign_of(made).to(default_device()).requires_grad_(False), shape=data.shape)
    generator.config = replace(generator.config, scaling=data.scaling.as_dict())
    generator.name = place.rpartition("/")[2]
    return generator


def foreign_network(module: str | None) -> list[Foreign]:
    """The user's network for the stages of a run; empty without one."""
    return [] if module is None else [foreign_of(call_made(module))]
