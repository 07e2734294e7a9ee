"""What a model folder's ``config.json`` says, and the check of it when it is read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, final

from fewstep.data.scaling import Scaling
from fewstep.errors import UserError, unknown
from fewstep.flow.couplings import Facts
from fewstep.solvers.maps import SampleRule
from fewstep.store.files import read_json

FORMAT = 2


@final
@dataclass(frozen=True)
class Config:
    """Everything about a generator but its weights; ``config.json`` holds these fields.

    Attributes:
        shape: of one sample inside the network.
        rule: how the network is sampled: as a velocity or as a map, and in how many steps.
        solver, grid: how a velocity is sampled when the user names none.
        network: resolved network configuration; the description of a network from outside; None where neither is known.
        scaling: from network units to data units; None when they are the same.
        class_weights: share of every class in the data; empty for an unconditional model.
        conditions: shapes of one row of the conditions beside ``label``, by name.
        mask: name of the condition that marks the valid entries of a sample; None for none.
        label_names: the labels as the data names them; None when they are 0 … classes - 1.
        guidance: guidance weight baked into the weights; None when there is none.
        guidable: whether the network was also trained without its conditions, which guidance needs.
        path: the affine path it was trained on: ``linear``, ``cosine`` or ``vp``.
        base: ``gaussian``: x0 ~ N(0, I); ``empirical``: x0 drawn from the rows in ``base.safetensors``; ``examples``:
            x0 made from damaged data (in-painting, super-resolution), whose rows and contexts are in that file.
        coupling: facts of the coupling it was trained on; None when they are not known.
        features: digest of the features in its loss; None when the loss used none.
        method, stage, data: the method, the recipe's stage and the data that it was trained with.
    """

    shape: tuple[int, ...]
    rule: SampleRule = field(default_factory=SampleRule)
    solver: str = "euler"
    grid: str = "uniform"
    network: dict[str, Any] | None = None
    scaling: dict[str, Any] | None = None
    class_weights: tuple[float, ...] = ()
    conditions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    mask: str | None = None
    label_names: tuple[str | int, ...] | None = None
    guidance: float | None = None
    guidable: bool = True
    path: str = "linear"
    base: Literal["gaussian", "empirical", "examples"] = "gaussian"
    coupling: Facts | None = None
    features: str | None = None
    method: str | None = None
    stage: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


def read_config(folder: Path) -> Config:
    """Read and check ``config.json``, of this format or of format 1.

    Args:
        folder: the model folder.

    Raises:
        UserError: no model folder, another format, unknown keys, values of a wrong type or in contradiction.
    """
    path = folder / "config.json"
    if not os.path.isfile(path):
        what = "is not a folder" if not os.path.isdir(folder) else "has no config.json"
        raise UserError(f"{folder} is no model: it {what}. Give a stage's folder, such as runs/demo/teacher.")
    values = read_json(path)
    version = values.pop("format", None) if isinstance(values, dict) else None
    if version not in (1, FORMAT):
        raise UserError(
            f"{path} is not a fewstep model's config, or is of a newer version (formats 1 and {FORMAT} are known). "
            "Give a model's folder, or update fewstep."
        )
    if version == 1:
        values = from_format_1(values)
    _check_keys(path, values, Config)
    for key, record in (("rule", SampleRule), ("coupling", Facts)):
        if isinstance(values.get(key), dict):
            _check_keys(path, values[key], record, f"{key}.")
    return _checked_config(values, path)


def from_format_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a format-1 file as format 2 has them.

    Format 1 had the fields of ``rule`` at the top level, and an empty ``coupling`` where the facts were not known.
    """
    names = {entry.name for entry in fields(SampleRule)}
    rule = {key: value for key, value in values.items() if key in names}
    others = {key: value for key, value in values.items() if key not in names}
    return {"rule": rule, **others, "coupling": others.get("coupling") or None}


def _check_keys(path: Path, values: Mapping[str, Any], record: type, prefix: str = "") -> None:
    known = [prefix + entry.name for entry in fields(record)]
    for key in values:
        if prefix + key not in known:
            raise UserError(f"{path}: {unknown('key', prefix + key, known)} It may come from a newer version.")


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
    if conflict := _conflict(config):
        raise UserError(f"{path} is damaged: {conflict}. Restore the file or run the recipe again.")
    return config


def _conflict(config: Config) -> str | None:
    """The first contradiction between fields, or None."""
    network, weights, rule = config.network or {}, config.class_weights, config.rule
    if not config.shape or min(config.shape) < 1:
        return f"shape {list(config.shape)} is no shape of a sample"
    if rule.default_steps < 1 or min(rule.steps or (1,)) < 1:
        return "step counts must be at least 1"
    if weights and not (all(0 <= w < math.inf for w in weights) and sum(weights) > 0):
        return "class_weights must be shares of classes"
    if network and list(network.get("shape", config.shape)) != list(config.shape):
        return f"the network is for samples of shape {network['shape']}, the model for {list(config.shape)}"
    if network and network.get("classes", len(weights)) != len(weights):
        return f"the network has {network['classes']} classes, and class_weights {len(weights)}"
    if config.scaling is not None and Scaling.from_dict(config.scaling).shape not in (None, config.shape):
        return f"the scaling is for another shape than {list(config.shape)}"
    if config.mask is not None and config.mask not in config.conditions:
        return f"its mask {config.mask!r} is none of its conditions"
    if config.label_names is not None and len(config.label_names) != len(weights):
        return f"{len(config.label_names)} label_names for {len(weights)} classes"
    return None


def sample_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one sample as a tuple, refused unless it holds positive whole numbers."""
    sizes = tuple(shape) if isinstance(shape, list | tuple) else ()
    if not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise UserError(f"shape must be the sizes of one sample, such as (2,) or (3, 32, 32), got {shape!r}.")
    return sizes
