"""What a model folder's ``config.json`` says, and the check of it when it is read."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, final

from fewstep.data.scaling import Scaling
from fewstep.errors import UserError, unknown
from fewstep.store.files import read_json

FORMAT = 1


@final
@dataclass(frozen=True)
class Config:
    """Everything about a generator but its weights; ``config.json`` holds these fields.

    Attributes:
        shape: of one sample inside the network.
        kind: ``velocity``: any solver, any steps; ``map``: its own sampler, the step counts in ``steps``; ``features``:
            a feature network, which is not sampled.
        steps: step counts a map was made for; None is any for ``chain`` and ``restart``, else 1.
        multiple: whether multiples of ``steps`` are right too.
        default_steps: steps when the user names none.
        sampler: of a map: ``euler``, called as a velocity is; ``chain``, ``restart`` (:mod:`fewstep.solvers.maps`).
        solver, grid: how a velocity is sampled when the user names none.
        network: resolved network configuration, None for a module fewstep did not build.
        scaling: from network units to data units, None when they are the same.
        class_weights: share of every class in the data; empty when unconditional.
        label_names: the labels as the data names them, when they are not 0 … classes - 1.
        guidance: guidance baked into the weights, None when there is none.
        guidable: whether the network has learned without labels too, which guidance compares with.
        path: the affine path it was trained on: ``linear``, ``cosine`` or ``vp``.
        base: ``gaussian``; ``empirical``, drawn from the rows in ``base.safetensors``; ``examples``, made from
            data (in-painting, super-resolution), with damaged held-out rows and their contexts kept there.
        coupling: facts of the coupling it was trained on.
        features: digest of the features in its loss.
        method, stage, data: where it comes from.
    """

    shape: tuple[int, ...]
    kind: Literal["velocity", "map", "features"] = "velocity"
    steps: tuple[int, ...] | None = None
    default_steps: int = 50
    multiple: bool = False
    sampler: Literal["euler", "chain", "restart"] = "euler"
    solver: str = "euler"
    grid: str = "uniform"
    network: dict[str, Any] | None = None
    scaling: dict[str, Any] | None = None
    class_weights: tuple[float, ...] = ()
    label_names: tuple[str | int, ...] | None = None
    guidance: float | None = None
    guidable: bool = True
    path: str = "linear"
    base: Literal["gaussian", "empirical", "examples"] = "gaussian"
    coupling: dict[str, Any] = field(default_factory=dict)
    features: str | None = None
    method: str | None = None
    stage: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


def read_config(folder: Path) -> Config:
    """Read and check ``config.json``."""
    path = folder / "config.json"
    if not os.path.isfile(path):
        what = "is not a folder" if not os.path.isdir(folder) else "has no config.json"
        raise UserError(f"{folder} is no model: it {what}. Give a stage's folder, such as runs/demo/teacher.")
    values = read_json(path)
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise UserError(f"{path} is not a fewstep model's config, or of a newer version (format {FORMAT} is known).")
    known = [entry.name for entry in fields(Config)]
    for key in values:
        if key not in known:
            raise UserError(f"{path}: {unknown('key', key, known)} It may come from a newer version.")
    return _checked_config(values, path)


def _checked_config(values: dict[str, Any], path: Path) -> Config:
    """The config with every field's type checked, and the fields that must agree compared."""
    from pydantic import TypeAdapter, ValidationError

    try:
        config = TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].replace("Input should be", "must be").replace("Field required", "is missing")
        raise UserError(f"{path} is damaged: {place!r} {message}. Restore the file or run the recipe again.") from error
    network, weights = config.network or {}, config.class_weights
    conflict = None
    if not config.shape or min(config.shape) < 1:
        conflict = f"shape {list(config.shape)} is no shape of a sample"
    elif config.default_steps < 1 or min(config.steps or (1,)) < 1:
        conflict = "step counts must be at least 1"
    elif weights and not (all(0 <= w < math.inf for w in weights) and sum(weights) > 0):
        conflict = "class_weights must be shares of classes"
    elif network and list(network.get("shape", config.shape)) != list(config.shape):
        conflict = f"the network is for samples of shape {network['shape']}, the model for {list(config.shape)}"
    elif network and network.get("classes", len(weights)) != len(weights):
        conflict = f"the network has {network['classes']} classes, and class_weights {len(weights)}"
    elif config.scaling is not None and Scaling.from_dict(config.scaling).shape not in (None, config.shape):
        conflict = f"the scaling is for another shape than {list(config.shape)}"
    elif config.label_names is not None and len(config.label_names) != len(weights):
        conflict = f"{len(config.label_names)} label_names for {len(weights)} classes"
    if conflict:
        raise UserError(f"{path} is damaged: {conflict}. Restore the file or run the recipe again.")
    return config


def sample_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one sample as a tuple of positive whole numbers, which it must be."""
    sizes = tuple(shape) if isinstance(shape, list | tuple) else ()
    if not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise UserError(f"shape must be the sizes of one sample, such as (2,) or (3, 32, 32), got {shape!r}.")
    return sizes
