"""The network that a stage trains: its own, the recipe's, the default, or a smaller copy of its teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from fewstep.data.dataset import DataSet
from fewstep.errors import UserError
from fewstep.interop.diffusers_networks import RECORD
from fewstep.methods.contract.options import Options
from fewstep.methods.contract.stage import Spec
from fewstep.networks import build
from fewstep.networks.extractors import NAME, build_features
from fewstep.networks.foreign import FOREIGN, Foreign
from fewstep.networks.registry import DATA_KEYS
from fewstep.networks.sizes import read_size, shrink
from fewstep.pipeline.recipe import Recipe


def stage_network(
    recipe: Recipe,
    data: DataSet,
    options: Options,
    method: Spec,
    network_of: Callable[[str], dict[str, Any]],
    foreign: Mapping[str, Foreign] = MappingProxyType({}),
) -> dict[str, Any]:
    """The resolved network configuration of a stage.

    Args:
        recipe: the recipe, whose network stages without one of their own have.
        data: fixes the shape and the number of classes.
        options: the stage's options.
        method: the stage's method.
        network_of: gives the configuration of an earlier stage, or of a model from outside the recipe.
        foreign: the networks from outside that were passed to the run, by name.

    Raises:
        UserError: as :func:`fewstep.networks.resolve`; a ``size`` that :func:`share_of_teacher` refuses.
    """
    chosen = options.network if options.network is not None else recipe.header.network
    config = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
    if "size" in config and "network" not in options.model_fields_set and options.teacher is not None:
        network = network_of(options.teacher)  # no size is known of a network from outside: the default is its own
        config = {**network, "two_time": False} if network.get("name") == FOREIGN else config
    if "size" in config:
        config = share_of_teacher(options, config, network_of)
    if not config and method.makes != "features":
        config = foreign_default(options, foreign, network_of)
    if config.get("name") == FOREIGN and "module" not in config:
        config = dict(described(foreign))
    if config.get("name") != FOREIGN and method.makes != "features":
        refuse_conditions(data)
    return method.network(options, data, config, data.classes if recipe.conditional else 0)


def foreign_default(
    options: Options, foreign: Mapping[str, Foreign], network_of: Callable[[str], dict[str, Any]]
) -> dict[str, Any]:
    """The network of a stage that names none: that of a teacher or init from outside, else the network that was passed
    to the run; empty for fewstep's default.
    """
    for source in (options.init, options.teacher):
        if source is not None:
            network = network_of(source)
            return {**network, "two_time": False} if network.get("name") == FOREIGN else {}
    return described(foreign) if foreign else {}


def described(foreign: Mapping[str, Foreign]) -> dict[str, Any]:
    """The description of the network that was passed to the run.

    Raises:
        UserError: there is none.
    """
    if not foreign:
        raise UserError(
            "network: foreign is a network of your own, and none was given: name the function that makes it, "
            "--module file.py:make, or pass it, fs.train(…, network=net)."
        )
    return next(iter(foreign.values())).describe()


def refuse_conditions(data: DataSet) -> None:
    """Refuse data whose conditions fewstep's own networks do not take.

    Raises:
        UserError: a condition other than ``label`` and ``context``, or a mask.
    """
    others = [name for name in data.conditions if name != "context"]
    if others:
        raise UserError(
            f"the data {data.name!r} have the condition {others[0]!r}, and fewstep's own networks take 'label' and "
            "'context' only: bring a network that takes it, fs.adapt(net, …) with fs.train, or --module file.py:make; "
            "or call the array 'context'."
        )


def build_network(network: Mapping[str, Any]) -> nn.Module:
    """The module of a stage's resolved configuration: a velocity network or a feature network."""
    return build_features(network) if network["name"] == NAME else build(network)


def same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the weights of network ``one`` can be loaded into network ``other``.

    Dropout may differ, because it has no weights; and ``other`` may be the two-time form of ``one``.
    """
    if one.get("two_time") and not other.get("two_time"):
        return False
    return not difference(one, other)


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In which entry two networks differ that decides about their weights, in words; empty where there is none.

    Of a network from outside the class's own name counts: the module that it is defined in has another name when it
    runs as a program. What replaces a condition has no weights, and where the time is embedded has some in a two-time
    network only.

    Args:
        found: description of the network that was given.
        wanted: description of the network that the weights belong to.
    """
    two_time = bool(found.get("two_time") or wanted.get("two_time"))
    one, other = _comparable(found, two_time), _comparable(wanted, two_time)
    keys = [key for key in {**other, **one} if one.get(key) != other.get(key)]
    return f"{keys[0]} {found.get(keys[0])!r} and not {wanted.get(keys[0])!r}" if keys else ""


def _comparable(network: Mapping[str, Any], two_time: bool) -> dict[str, Any]:
    free = ["dropout", "two_time"]
    if network.get("name") == FOREIGN:
        free += ["null"] if two_time else ["null", "time_embed"]
    kept = {key: value for key, value in network.items() if key not in free}
    if "module" in kept:
        kept["module"] = str(kept["module"]).rpartition(".")[2]
    if RECORD in kept:
        kept[RECORD] = {key: value for key, value in kept[RECORD].items() if key != "null"}
    return kept


def share_of_teacher(
    options: Options, config: dict[str, Any], network_of: Callable[[str], dict[str, Any]]
) -> dict[str, Any]:
    """``{size: 0.25}``: the teacher's network with about a quarter of its parameters.

    Raises:
        UserError: keys beside ``size``, a size outside (0, 1], no teacher, a teacher that fewstep did not build or
            whose kind of network has no sizes.
    """
    size = config["size"]
    read_size(size)
    beside = sorted(str(key) for key in config if key != "size")
    if beside:
        raise UserError(
            f"network has 'size' and {beside[0]!r}: a size scales the teacher's network as it is. Give the size alone, "
            "or the network's options alone."
        )
    if options.teacher is None:
        raise UserError(
            f"network.size is {size!r}, a share of the teacher's network, and method {options.method!r} has no teacher "
            "here: give name, preset and options instead."
        )
    network = network_of(options.teacher)
    if not network or network.get("name") == FOREIGN:
        raise UserError(
            f"network.size is {size!r}, a share of the teacher's network, and {options.teacher!r} is a module that "
            "fewstep did not build: give the student's network by name, such as 'network: {name: mlp, preset: tiny}'."
        )
    return {key: value for key, value in shrink(network, size).items() if key not in DATA_KEYS}
