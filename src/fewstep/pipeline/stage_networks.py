"""Which network a stage trains: its own, the recipe's, the default, or a share of its teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fewstep.data.dataset import DataSet
from fewstep.errors import UserError
from fewstep.generator import read_config
from fewstep.methods.contract.options import Options
from fewstep.methods.registry import find_method
from fewstep.networks import build
from fewstep.networks.extractors import NAME, build_features
from fewstep.networks.registry import DATA_KEYS
from fewstep.networks.sizes import read_size, shrink
from fewstep.pipeline.recipe import Recipe


def stage_network(recipe: Recipe, data: DataSet, options: Options) -> dict[str, Any]:
    """The resolved network configuration of a stage.

    Raises:
        UserError: as :func:`fewstep.networks.resolve`; a ``size`` that :func:`share_of_teacher` refuses.
    """
    method = find_method(options.method)
    chosen = options.network if options.network is not None else recipe.header.network
    config = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
    if "size" in config:
        config = share_of_teacher(recipe, data, options, config)
    return method.network(options, data, config, data.classes if recipe.conditional else 0)


def build_network(network: Mapping[str, Any]) -> nn.Module:
    """The module of a stage's resolved configuration, a velocity network or features."""
    return build_features(network) if network["name"] == NAME else build(network)


def same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one network's weights mean the same in the other.

    Dropout may differ, which has none; and the other may be the two-time form of the one.
    """
    if one.get("two_time") and not other.get("two_time"):
        return False
    free = {"dropout": None, "two_time": None}
    return {**one, **free} == {**other, **free}


def share_of_teacher(recipe: Recipe, data: DataSet, options: Options, config: dict[str, Any]) -> dict[str, Any]:
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
        network: dict[str, Any] | None = stage_network(recipe, data, recipe.stages[options.teacher])
    else:
        network = read_config(Path(options.teacher)).network
    if not network:
        raise UserError(
            f"network.size is {size!r}, a share of the teacher's network, and {options.teacher!r} is a module that "
            "fewstep did not build: give the student's network by name, such as 'network: {name: mlp, preset: tiny}'."
        )
    return {key: value for key, value in shrink(network, size).items() if key not in DATA_KEYS}
