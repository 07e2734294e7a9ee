"""Folders that diffusers saved: what is in them without reading weights, and the network of one.

Loading runs no code of the folder: the class comes from :data:`~fewstep.interop.diffusers_classes.CLASSES`, weights
are read from safetensors files only, and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.errors import UserError, require_extra, suggestion
from fewstep.interop.diffusers_classes import CLASSES
from fewstep.store.files import read_json

COMPONENTS = ("transformer", "unet")  # where pipelines keep their network
RENAMED_DTYPE = (0, 42)  # from this version on, torch_dtype= warns


def is_diffusers_folder(path: str | Path) -> bool:
    """Whether a folder holds a saved pipeline or network of diffusers; its configuration alone is read."""
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return True
    config = folder / "config.json"
    found = read_json(config) if config.is_file() else None
    return isinstance(found, dict) and "_class_name" in found


def read_network_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """Class and configuration of the network of a saved pipeline or network; no weights are read.

    Raises:
        UserError: no network, a class that is not known, a scheduler that is not one of flows, a damaged configuration.
    """
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        check_scheduler(folder)
        folder = folder / component_of({key: isinstance(v, list) and v[0] for key, v in index.items()})
    name, config = saved_class(folder), dict(read_json(folder / "config.json"))
    if "in_channels" not in config:  # every class of the table has it
        raise UserError(
            f"{folder / 'config.json'} is damaged: 'in_channels' is missing. Save or copy the {name} again."
        )
    return name, config


def component_of(present: Mapping[str, Any]) -> str:
    """The name of a pipeline's network among its parts, of which true values exist.

    Raises:
        UserError: there is none, or there are two that share the times.
    """
    found = [name for name in COMPONENTS if present.get(name)]
    if not found:
        raise UserError(
            f"this pipeline has no network named {' or '.join(COMPONENTS)}; its parts are "
            f"{', '.join(present)}: name the one that is, component='…'."
        )
    if present.get("transformer_2"):
        raise UserError(
            "this pipeline has two networks, 'transformer' for early times and 'transformer_2' for late ones: one "
            "velocity is not enough for it. component='transformer' takes one of them."
        )
    return found[0]


def check_flow(scheduler: Mapping[str, Any]) -> None:
    """Refuse a pipeline whose scheduler says that its network does not predict a flow's velocity.

    Args:
        scheduler: the scheduler's configuration.

    Raises:
        UserError: it is neither a scheduler for flows nor set to predict one.
    """
    name, predicted = str(scheduler.get("_class_name", "")), scheduler.get("prediction_type")
    if name.startswith(("FlowMatch", "FlowMap")) or predicted == "flow_prediction" or scheduler.get("use_flow_sigmas"):
        return
    raise UserError(
        f"the scheduler of this pipeline is {name or 'unknown'} (prediction_type {predicted!r}): its network was not "
        "trained as the velocity of a flow from Gaussian noise, x_t = (1 - t) x0 + t x1. If it was, pass the network "
        "itself (its own folder, or the module); if not, describe it as a velocity with fs.adapt(module, call)."
    )


def check_scheduler(folder: Path) -> Mapping[str, Any] | None:
    """The configuration of the scheduler of a saved pipeline, which must be one of flows; None where there is none."""
    path = folder / "scheduler" / "scheduler_config.json"
    found = read_json(path) if path.is_file() else None
    if found is not None:
        check_flow(found)
    return found


def load_network(folder: Path, dtype: torch.dtype, variant: str | None) -> nn.Module:
    """The network of a folder, its class taken from the table here."""
    return load_class(saved_class(folder), folder, dtype, variant)


def saved_class(folder: Path) -> str:
    """The name of the class that a folder's configuration names, which must be one of the table here.

    Raises:
        UserError: there is no configuration, it names no class, or one that is not known.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no config.json: give the folder that save_pretrained of diffusers wrote, of a network "
            "(config.json and *.safetensors) or of a pipeline (model_index.json)."
        )
    name = read_json(folder / "config.json").get("_class_name")
    if name is None:
        raise UserError(f"{folder / 'config.json'} names no class of diffusers; fs.load reads folders of fewstep.")
    if name not in CLASSES:
        raise unknown_class(str(name))
    return str(name)


def load_class(name: str, folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    """``diffusers.NAME.from_pretrained(folder)``, from safetensors files of this machine.

    Raises:
        UserError: the installed version has no such class, or it cannot read the folder.
        MissingExtra: diffusers is not installed.
    """
    found, version = find_class(name), require_extra("diffusers", "diffusers").__version__
    spelling = "dtype" if tuple(int(part) for part in version.split(".")[:2]) >= RENAMED_DTYPE else "torch_dtype"
    loading = {spelling: dtype, "variant": variant, "local_files_only": True, "use_safetensors": True}
    try:
        return found.from_pretrained(folder, **loading)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"diffusers cannot load {folder}: {error}") from error


def find_class(name: str) -> Any:
    """A class of the installed diffusers.

    Raises:
        UserError: the installed version has no such class.
        MissingExtra: diffusers is not installed.
    """
    diffusers = require_extra("diffusers", "diffusers")
    if name not in dir(diffusers):
        raise UserError(
            f"diffusers {diffusers.__version__} has no {name}: install a later one, pip install -U diffusers."
        )
    return getattr(diffusers, name)


def unknown_class(name: str) -> UserError:
    """The error for a class that is not in the table here, with what to do; the caller raises it."""
    return UserError(
        f"{name!r} is no class of diffusers that is known here: {suggestion(name, CLASSES)}Known: "
        f"{', '.join(CLASSES)}. Describe another network with "
        "fs.adapt(module, lambda module, x, t, **cond: velocity, time_embed='name of its time embedding')."
    )
