"""The network that a stage trains: its own, the recipe's, the default, or a smaller copy of its teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fewstep.data.dataset import DataSet
from fewstep.errors import UserError
from fewstep.generator import read_config
from fewstep.methods.contract.options import Options
from fewstep.methods.contract.stage import Spec
from fewstep.networks import build
from fewstep.networks.extractors import NAME, build_features
from fewstep.networks.registry import DATA_KEYS
from fewstep.networks.sizes import read_size, shrink
from fewstep.pipeline.recipe import Recipe


def stage_network(
    recipe: Recipe, data: DataSet, options: Options, method: Spec, network_of: Callable[[str], dict[str, Any]]
) -> dict[str, Any]:
    """The resolved network configuration of a stage.

    Args:
        recipe: the recipe, whose network stages without one of their own have.
        data: fixes the shape and the number of classes.
        options: the stage's options.
        method: the stage's method.
        network_of: gives the configuration of an earlier stage by its name.

    Raises:
        UserError: as :func:`fewstep.networks.resolve`; a ``size`` that :func:`share_of_teacher` refuses.
    """
    chosen = options.network if options.network is not None else recipe.header.network
    config = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
    if "size" in config:
        config = share_of_teacher(recipe, options, config, network_of)
    return method.network(options, data, config, data.classes if recipe.conditional else 0)


def build_network(network: Mapping[str, Any]) -> nn.Module:
    """The module of a stage's resolved configuration: a velocity network or a feature network."""
    return build_features(network) if network["name"] == NAME else build(network)


def same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the weights of network ``one`` can be loaded into network ``other``.

    Dropout may differ, because it has no weights; and ``other`` may be the two-time form of ``one``.
    """
    if one.get("two_time") and not other.get("two_time"):
        return False
    free = {"dropout": None, "two_time": None}
    return {**one, **free} == {**other, **free}


def share_of_teacher(
    recipe: Recipe, options: Options, config: dict[str, Any], network_of: Callable[[str], dict[str, Any]]
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
    if options.teacher in recipe.stages:
        network: dict[str, Any] | None = network_of(options.teacher)
    else:
        network = read_config(Path(options.teacher)).network
    if not network:
        raise UserError(
            f"network.size is {size!r}, a share of the teacher's network, and {options.teacher!r} is a module that "
            "fewstep did not build: give the student's network by name, such as 'network: {name: mlp, preset: tiny}'."
        )
    return {key: value for key, value in shrink(network, size).items() if key not in DATA_KEYS}
