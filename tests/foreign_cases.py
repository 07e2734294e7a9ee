"""Tiny networks that fewstep did not build, with data of their conditions, and how a cell of the matrix trains.

A cell is a method at a place: a network, its data, and what ``fs.train`` is told beside them.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from contract_cases import accepts
from fewstep.data.dataset import DataSet
from fewstep.data.sources import as_data
from fewstep.methods.registry import METHODS
from fewstep.networks.adapter import Adapter

ROWS, BATCH, SAMPLES = 64, 8, 32
LENGTH, CLASSES = 6, 3  # steps of a sequence; labels of the images
NULL = 3  # label of the torchcfm network that stands for no label
TEXT, POOLED = "encoder_hidden_states", "pooled_projections"
SMALL: dict[str, Any] = {
    "pairs": 40,
    "nfe": 4,
    "tolerance": 10.0,
    "particles": 4,
    "samples": SAMPLES,
    "batch_size": BATCH,
}


class Policy(nn.Module):
    """Velocity of action sequences, called ``(timestep, sample, obs)``, from time 1000 to 0, of the opposite sign.

    The last layer that it registers has no part in its output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 8)
        self.body = nn.Sequential(nn.Linear(2 + 3 + 8, 16), nn.SiLU(), nn.Linear(16, 2))
        self.spare = nn.Linear(3, 3)

    def forward(self, timestep: Tensor, sample: Tensor, obs: Tensor) -> Tensor:
        beside = torch.cat([obs, self.time((timestep[:, None] / 1000).to(sample.dtype))], 1)[:, None]
        return self.body(torch.cat([sample, beside.expand(-1, sample.shape[1], -1)], 2))


def call_policy(module: nn.Module, x: Tensor, t: Tensor, obs: Tensor, mask: Tensor) -> Tensor:
    """The policy's velocity; observation and mask must be those of one row, or the observation its null."""
    lengths = (obs[:, 0] * LENGTH).round()
    assert bool(((lengths == 0) | (lengths == mask.sum(1))).all()), "observation and mask are of different rows"
    return -module(1000 * (1 - t), x, obs)


def policy() -> Adapter:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Policy()
    return Adapter(module, call_policy, time_embed="time", mask="mask", null={"obs": 0.0})


def policy_data(rows: int = ROWS) -> DataSet:
    """Sequences of 2 to 6 steps around a line that the observation names; the observation begins with the length."""
    random = np.random.default_rng(0)
    lengths = random.integers(2, LENGTH + 1, rows)
    slope = random.normal(size=(rows, 2))
    x = slope[:, None] * np.linspace(-1, 1, LENGTH)[:, None] + 0.1 * random.normal(size=(rows, LENGTH, 2))
    columns = {
        "x": x.astype(np.float32),
        "obs": np.concatenate([lengths[:, None] / LENGTH, slope], 1).astype(np.float32),
        "mask": np.arange(LENGTH)[None] < lengths[:, None],
    }
    return as_data(columns, conditions=["obs", "mask"], mask="mask", layout="sequence", scale="none")


def torchcfm_unet(classes: int = CLASSES + 1) -> nn.Module:
    """torchcfm's U-Net on images of 4 x 4, with labels.

    Its 32 groups of one channel each would hide the bias before them: the gradients would be rounding errors, which
    differ between one process and two.
    """
    unet = pytest.importorskip("torchcfm.models.unet.unet", reason="needs torchcfm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = unet.UNetModelWrapper(
            dim=(1, 4, 4),
            num_channels=32,
            num_res_blocks=1,
            channel_mult=(1,),
            class_cond=True,
            num_classes=classes,
            use_scale_shift_norm=True,
        )
        for parameter in module.parameters():  # its last layers are zero at first
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    for layer in module.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.num_groups = 8
    return module


def call_torchcfm(module: nn.Module, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return module(t, x, label)


def torchcfm() -> Adapter:
    return Adapter(torchcfm_unet(), call_torchcfm, time_embed="time_embed", null={"label": NULL})


def images(shape: tuple[int, ...] = (1, 4, 4), rows: int = ROWS, scale: str | None = "none") -> DataSet:
    """Noisy constant images, as bright as their label says."""
    random = np.random.default_rng(0)
    label = random.integers(0, CLASSES, rows)
    label[:CLASSES] = np.arange(CLASSES)
    x = 0.3 * random.normal(size=(rows, *shape)) + label.reshape(-1, 1, 1, 1) - 1.0
    return as_data({"x": x.astype(np.float32), "label": label}, layout="image", scale=scale)


@functools.cache
def diffusers_module(name: str, **changes: Any) -> Any:
    pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")
    from diffusers_cases import CASES

    return CASES[name].module(**changes)


def sd3() -> Adapter:
    """Stable Diffusion 3's transformer with one block on latents of 4 x 4: four tokens of picture, six of text."""
    module = copy.deepcopy(diffusers_module("SD3Transformer2DModel", sample_size=4, num_layers=1))
    net: Adapter = fs.from_diffusers(module)
    net.null = {TEXT: torch.zeros(6, 16), POOLED: 0.0}
    return net


def sd3_data(rows: int = ROWS) -> DataSet:
    random = np.random.default_rng(0)
    columns = {
        "x": random.normal(size=(rows, 4, 4, 4)).astype(np.float32),
        TEXT: random.normal(size=(rows, 6, 16)).astype(np.float32),
        POOLED: random.normal(size=(rows, 16)).astype(np.float32),
    }
    return as_data(columns, conditions=[TEXT, POOLED], layout="image", scale="none")


def dit() -> Adapter:
    """A DiT with one block on latents of 4 x 4; its null label, 5, is not the number of classes."""
    module = copy.deepcopy(diffusers_module("DiTTransformer2DModel", sample_size=4, num_layers=1))
    module.proj_out_2.weight.data.mul_(0.3)  # an untrained network that is not too far from a flow to be inverted
    return fs.from_diffusers(module)


FEWSTEP_UNET = {"name": "unet", "widths": [8], "blocks": 1, "middle": 1, "patch": 1, "embedding": 8}


@dataclass(frozen=True)
class Place:
    """A network and its data.

    Attributes:
        network: makes the network; None for fewstep's own U-Net, whose teacher lies in a folder.
        data: makes the data.
        labels: whether networks are given the data's labels.
        options: what ``fs.train`` is told beside.
    """

    network: Callable[[], Adapter] | None
    data: Callable[[], DataSet]
    labels: bool = False
    options: dict[str, Any] = field(default_factory=dict)


PLACES = {
    "torchcfm": Place(torchcfm, images, labels=True),
    "sd3": Place(sd3, sd3_data),
    "dit": Place(dit, functools.partial(images, (2, 4, 4)), labels=True),
    "policy": Place(policy, policy_data),
    "unet": Place(None, functools.partial(images, scale=None), labels=True),
}
GENERATIVE = [name for name, spec in METHODS.items() if spec.makes != "features"]
CELLS = [(method, place) for place in PLACES for method in GENERATIVE]


def models(method: str, place: str, folder: Path) -> dict[str, Any]:
    """What the cell learns from: ``teacher``, or the ``network`` of a method without one.

    Args:
        method, place: the cell.
        folder: of fewstep's own teacher.
    """
    make = PLACES[place].network
    if make is None:
        return {"teacher": folder} if accepts(method, "teacher") else {"network": dict(FEWSTEP_UNET)}
    net = make()
    if not accepts(method, "teacher"):
        return {"network": net}
    return {"teacher": net}


def options_of(method: str) -> dict[str, Any]:
    """The small options that the method has."""
    return {name: value for name, value in SMALL.items() if name in METHODS[method].options.model_fields}


def train_cell(method: str, place: str, out: Path, folder: Path, **changes: Any) -> fs.Generator:
    """Train a cell; the same call again goes on where it was."""
    at = PLACES[place]
    told: dict[str, Any] = {
        "check": False,
        **options_of(method),
        **models(method, place, folder),
        **at.options,
        **changes,
    }
    return fs.train(method, data=at.data(), out=out, conditional=at.labels, quiet=True, **told)


def train_own_teacher(folder: Path) -> Path:
    """The teacher of the place ``unet``."""
    fs.train(
        "flow_matching",
        data=images(scale=None),
        out=folder,
        network=FEWSTEP_UNET,
        conditional=True,
        quiet=True,
        samples=320,
        batch_size=32,
    )
    return folder


def velocity_of(net: nn.Module, x: Tensor, t: float, **cond: Any) -> Tensor:
    """``v(x, t)`` at one time for all rows."""
    return net(x, torch.full((len(x),), t), **cond)


def available(place: str) -> bool:
    """Whether the library that the network of a place comes from is installed."""
    needed = {"torchcfm": "torchcfm", "sd3": "diffusers", "dit": "diffusers"}.get(place)
    return needed is None or importlib.util.find_spec(needed) is not None
