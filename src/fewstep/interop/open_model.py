"""Opening a model's folder, whether fewstep or diffusers wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import nn

from fewstep.errors import UserError
from fewstep.generator import Config, Generator, read_config
from fewstep.generator import load as load_folder
from fewstep.interop.diffusers_classes import CLASSES
from fewstep.interop.diffusers_folders import is_diffusers_folder, read_network_config
from fewstep.interop.diffusers_networks import from_diffusers, rebuilt

CLASS_ENTRIES = {"UNet2DModel": "num_class_embeds", "DiTTransformer2DModel": "num_embeds_ada_norm"}


@final
@dataclass(frozen=True)
class FolderKind:
    """What kind of model is in a folder, read without its weights.

    Attributes:
        kind: ``velocity``, ``map`` or ``features``.
        guidance: guidance weight baked into its weights; None for none.
        labels: whether it takes labels.
        scaling: from the network's units to those of the data; None where they are the same.
    """

    kind: Literal["velocity", "map", "features"]
    guidance: float | None
    labels: bool
    scaling: dict[str, Any] | None = None


def folder_kind(folder: str | Path) -> FolderKind:
    """What kind of model is in a folder of fewstep or of diffusers; no weights are read.

    Raises:
        UserError: no model's folder, or one of diffusers whose network is not known as a flow's velocity.
    """
    folder = Path(folder)
    if is_diffusers_folder(folder):
        name, config = read_network_config(folder)
        return FolderKind("velocity", None, "label" in CLASSES[name].conditions(config))
    found = read_config(folder)
    return FolderKind(found.rule.kind, found.guidance, bool(found.class_weights), found.scaling)


def load(folder: str | Path, module: nn.Module | None = None, device: str | torch.device = "cpu") -> Generator:
    """Load a model folder: its network with the saved weights, frozen, and how it is sampled.

    A folder that diffusers saved (a network or a pipeline) is opened as a velocity, see :func:`fewstep.from_diffusers`.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``, or what ``save_pretrained`` of diffusers wrote.
        module: the network to fill with the weights; needed for a module that neither fewstep nor diffusers built.
        device: where to put it.

    Returns:
        The generator; the global random state is left as it was.

    Raises:
        UserError: no model folder, a truncated file, weights that do not fit the network, a feature network.

    >>> import tempfile, torch, fewstep as fs
    >>> class Velocity(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = torch.nn.Linear(2, 2)
    ...     def forward(self, x, t):
    ...         return self.linear(x)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     saved = fs.Generator(Velocity(), shape=(2,)).save(folder)
    ...     generator = fs.load(folder, module=Velocity())
    >>> generator.sample(3, steps=4, seed=0).shape
    torch.Size([3, 2])
    """
    folder = Path(folder)
    if not is_diffusers_folder(folder):
        module = rebuilt(read_config(folder).network or {}) if module is None else module
        return load_folder(folder, module=module, device=device)
    if module is not None:
        raise UserError(f"{folder} was saved by diffusers and says what its network is: leave the module out.")
    return open_diffusers(folder, device=device)


def open_diffusers(
    folder: Path,
    *,
    shape: tuple[int, ...] | None = None,
    scaling: Mapping[str, Any] | None = None,
    classes: int | None = None,
    device: str | torch.device = "cpu",
) -> Generator:
    """The network of a saved network or pipeline of diffusers as a generator, frozen.

    Args:
        folder: the folder.
        shape: of one sample, where the network's configuration does not say.
        scaling: from network units to data units; None where they are the same.
        classes: number of classes to draw labels from; None: as many as the network embeds, without the null label.
        device: where to put it.

    Raises:
        UserError: as :func:`~fewstep.interop.diffusers_networks.from_diffusers`; the shape of a sample is not known.
    """
    name, config = read_network_config(folder)
    kind = CLASSES[name]
    found = kind.shape(config) or shape
    if found is None:
        raise UserError(
            f"{folder} does not record the size of its samples: name data whose rows have that shape, or use "
            "fs.Generator(fs.from_diffusers(folder), shape=…)."
        )
    if classes is None:
        labels = "label" in kind.conditions(config)
        classes = int(config.get(CLASS_ENTRIES.get(name, ""), 0) or 0) if labels else 0
    adapter = from_diffusers(folder).to(device).requires_grad_(False)
    made = Config(
        shape=found,
        network=adapter.describe(),
        scaling=None if scaling is None else dict(scaling),
        class_weights=(1 / classes,) * classes if classes else (),
    )
    generator = Generator(adapter, config=made)
    generator.name, generator.folder = folder.resolve().name, folder
    return generator
