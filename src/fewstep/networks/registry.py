"""The networks by name, and the two steps from a configuration to a module: ``resolve`` and ``build``.

``resolve`` turns the user's configuration (``{"name": "mlp", "preset": "small"}``) into a complete dictionary of
plain values that can be stored as JSON; ``build`` turns that dictionary into a module. A stored dictionary gives
the same network even if a later version changes the presets.

A module is called ``v(x, t, label=None, context=None)`` with x (B, *shape), t (B,) in [0, 1] (0 noise, 1
data), label (B,) and returns (B, *shape). Label ``classes`` is the null label; ``label=None`` means the same. With
``two_time: true`` it also takes an end time ``r=`` (B,) and is the average velocity from t to r
(:mod:`fewstep.networks.two_time`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from fewstep.errors import UserError, unknown
from fewstep.networks import mlp, unet
from fewstep.networks import option_checks as options
from fewstep.networks.foreign import FOREIGN

DATA_KEYS = ("shape", "classes", "context")  # the data decide these; every other key is an option


@final
@dataclass(frozen=True)
class Architecture:
    """One kind of network.

    Args:
        module: Called as ``module(shape, classes, context, **options)``.
        presets: Preset name to a complete set of options.
        checkers: Option name to the check of its value.
        complete: ``complete(shape, preset, given)`` completes checked options for samples of one shape.
    """

    module: Callable[..., nn.Module]
    presets: Mapping[str, dict[str, Any]]
    checkers: Mapping[str, options.Checker]
    complete: Callable[[list[int], dict[str, Any], dict[str, Any]], dict[str, Any]]


NETWORKS: dict[str, Architecture] = {
    "mlp": Architecture(mlp.MLP, mlp.PRESETS, mlp.CHECKERS, mlp.complete_options),
    "unet": Architecture(unet.UNet, unet.PRESETS, unet.CHECKERS, unet.complete_options),
}


def default_network(shape: Sequence[int]) -> dict[str, str]:
    """Name and preset of the default network, sized for training on a CPU.

    Up to 8 values: ``mlp`` ``compact``; up to 256 values: ``mlp`` ``small``; larger images (C, H, W):
    ``unet`` ``small``; other larger samples: ``mlp`` ``medium``.

    Args:
        shape: Shape of one sample.

    >>> default_network((1, 28, 28))
    {'name': 'unet', 'preset': 'small'}
    """
    sizes = options.data_shape(list(shape))
    size = options.features(sizes)
    if size <= 8:
        return {"name": "mlp", "preset": "compact"}
    if size <= 256:
        return {"name": "mlp", "preset": "small"}
    if len(sizes) == 3:
        return {"name": "unet", "preset": "small"}
    return {"name": "mlp", "preset": "medium"}


def _choose(given: dict[str, Any], shape: list[int]) -> tuple[str, dict[str, Any]]:
    """Remove ``name`` and ``preset`` from the configuration; return the name and the preset's options."""
    default = default_network(shape)
    name = given.pop("name", default["name"])
    if not isinstance(name, str) or name not in NETWORKS:
        raise unknown("network", name, NETWORKS)
    presets = NETWORKS[name].presets
    preset = given.pop("preset", default["preset"] if name == default["name"] else "small")
    if not isinstance(preset, str) or preset not in presets:
        raise unknown(f"preset of network {name!r}:", preset, presets)
    return name, presets[preset]


def resolve(config: Mapping[str, Any], shape: Sequence[int], classes: int = 0, context: int = 0) -> dict[str, Any]:
    """Complete and check a network configuration.

    Args:
        config: ``name``, ``preset``, ``two_time`` and options of the network, all optional; options override the
            preset. A resolved configuration is returned unchanged.
        shape: Shape of one sample.
        classes: Number of labels, 0 for none.
        context: Number of context values (mlp) or channels (unet), 0 for none.

    Returns:
        A plain dictionary ``{"name", "shape", "classes", "context", ...options}`` for :func:`build`; for a two-time
        network also ``"two_time": True`` (a velocity network has no such key).

    Raises:
        UserError: an unknown name, preset or key, a wrong value, or a configuration resolved for other data.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"network is {config!r}, but it must have keys and values, such as {{name: mlp}}.")
    if config.get("name") == FOREIGN:
        return _foreign(config)
    frame = {
        "shape": options.data_shape(list(shape)),
        "classes": options.count("network.classes", classes),
        "context": options.count("network.context", context),
    }
    given = dict(config)
    for key in DATA_KEYS:
        stored = given.pop(key, frame[key])
        stored = list(stored) if isinstance(stored, tuple) else stored
        if stored != frame[key]:
            raise UserError(f"network.{key} is {stored!r}, but the data has {frame[key]!r}: remove the key.")
    two_time = options.flag("network.two_time", given.pop("two_time", False))
    name, preset = _choose(given, options.data_shape(frame["shape"]))
    kind = NETWORKS[name]
    checked = options.checked(name, given, kind.checkers)
    full = {"name": name, **frame, **kind.complete(options.data_shape(frame["shape"]), preset, checked)}
    return {**full, "two_time": True} if two_time else full


def _foreign(config: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a network from outside, which takes no options; a false ``two_time`` is left out."""
    known = ("name", "module", "parameters", "time_embed", "null", "mask", "two_time", "lora", "diffusers")
    for key in config:
        if key not in known:
            raise UserError(
                f"network.{key} is an option of fewstep's own networks, and {config.get('module')} is a network from "
                "outside: set it when you build that network, or leave it out here."
            )
    full = {key: value for key, value in config.items() if key != "two_time"}
    return {**full, "two_time": True} if config.get("two_time") else full


def build(config: Mapping[str, Any]) -> nn.Module:
    """Build the module of a resolved configuration; its output layer is zero.

    The initial weights are drawn from torch's global generator: the caller seeds or forks it.

    Raises:
        UserError: as :func:`resolve`, or the configuration was not resolved (it has no ``shape``).
    """
    missing = [key for key in ("name", *DATA_KEYS) if key not in config]
    if missing:
        raise UserError(f"network configuration lacks {', '.join(missing)}: pass it through resolve() first.")
    full = resolve(config, config["shape"], config["classes"], config["context"])
    kind = NETWORKS[full["name"]]
    chosen = {key: full[key] for key in (*kind.checkers, "two_time") if key in full}
    return kind.module(tuple(full["shape"]), full["classes"], full["context"], **chosen)


def parameter_count(module: nn.Module) -> int:
    """Number of values in the parameters of a module (a shared parameter counts once)."""
    return sum(parameter.numel() for parameter in module.parameters())
