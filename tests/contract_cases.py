"""Every method, planned as the pipeline plans it, on tiny data with a tiny teacher; no tests here.

A case is a method with options. Every method of the registry is one, with a teacher where it takes one, and a second
one without where it can do without. ``VARIANTS`` adds the options that lead to another loss.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fewstep.data.builtin import DATA
from fewstep.flow.couplings import Pair
from fewstep.flow.noise import Draws
from fewstep.generator import load, save_model
from fewstep.methods.contract.objective import Batches, Objective, Terms
from fewstep.methods.contract.options import Options
from fewstep.methods.contract.stage import Phase, Plan, Stage
from fewstep.methods.registry import METHODS
from fewstep.pipeline import train_stage as staging
from fewstep.pipeline.opening import Run
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.pipeline.teachers import as_teacher
from fewstep.training.trainer import Trainer
from fewstep.training.world import LocalWorld

BATCH = 32
STEPS = 12  # optimiser steps of a stage
VECTOR, IMAGE = (2,), (1, 8, 8)
SETTINGS = ("plain", "labels", "dropout", "bf16")

# What a method needs beside ``method`` and ``teacher``. By the design that is nothing; a method that cannot do without
# has its options here.
NEEDED: dict[str, dict[str, Any]] = {}

# Options that lead to another loss, or to another state, than the method's defaults.
VARIANTS: dict[str, dict[str, Any]] = {
    "distill, steps": {"method": "distill", "steps": 2},
    "distill, progressive": {"method": "distill", "progressive": 4},
    "reflow, normalised": {"method": "reflow", "weight": "normalised", "mix": 1.0, "rounds": 2},
    "instaflow, both": {"method": "instaflow", "discriminator_real": "both", "penalty_every": 2},
    "consistency, continuous": {"method": "consistency", "target": "continuous"},
    "meanflow, split": {"method": "meanflow", "target": "split"},
    "meanflow, alpha": {"method": "meanflow", "target": "alpha"},
    "fgm, average": {"method": "fgm", "online_ema": 0.9, "steps": 2},
}

# Sizes of whatever method has an option of the name: small, and no check of the pairs' accuracy.
SMALL: dict[str, Any] = {
    "pairs": 400,
    "nfe": 4,
    "tolerance": 1e6,
    "particles": 8,
    "batch_size": BATCH,
    "samples": STEPS * BATCH,
}

NETWORKS: dict[tuple[int, ...], dict[str, Any]] = {
    VECTOR: {"name": "mlp", "width": 16, "blocks": 1, "embedding": 8},
    IMAGE: {"name": "unet", "widths": [8], "blocks": 1, "middle": 1, "patch": 1, "embedding": 8},
}


def accepts(method: str, teacher: str | None) -> bool:
    """Whether the method's options can be made with this teacher."""
    try:
        METHODS[method].options(method=method, **NEEDED.get(method, {}), teacher=teacher)
    except ValidationError:
        return False
    return True


def make_cases() -> dict[str, dict[str, Any]]:
    """The options of every case, with ``teacher: True`` where it has one."""
    cases: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        fields = {"method": method, **NEEDED.get(method, {})}
        taught = accepts(method, "teacher")
        cases[method] = {**fields, "teacher": taught}
        if taught and accepts(method, None):
            cases[f"{method}, alone"] = {**fields, "teacher": False}
    for name, fields in VARIANTS.items():
        cases[name] = {**fields, "teacher": True}
    return cases


CASES = make_cases()


@dataclass(frozen=True)
class Place:
    """Data, network and teacher that the cases of one setting share.

    Attributes:
        header: the recipe without its stages.
        teacher: folder of the teacher.
        precision: of the stages.
    """

    header: dict[str, Any]
    teacher: Path
    precision: str = "fp32"

    @property
    def shape(self) -> tuple[int, ...]:
        return VECTOR if self.header["network"]["name"] == "mlp" else IMAGE

    def stage(self, case: str, **changes: Any) -> dict[str, Any]:
        """A stage of a recipe."""
        fields = dict(CASES[case])
        taught = fields.pop("teacher")
        known = METHODS[fields["method"]].options.model_fields
        small = {name: value for name, value in SMALL.items() if name in known}
        if "pairs" in small and self.shape == IMAGE:
            small["pairs"] = 64
        teacher = {"teacher": str(self.teacher)} if taught else {}
        return {**small, "precision": self.precision, **fields, **teacher, **changes}

    def recipe(self, **stages: dict[str, Any]) -> Any:
        return make_recipe({**self.header, "stages": stages}, "the recipe")


def write_vectors(folder: Path) -> dict[str, str]:
    """250 rows along the diagonal, far from Gaussian noise, and on which half each is."""
    random = np.random.default_rng(0)
    along = random.uniform(-1.0, 1.0, size=250)
    rows = along[:, None] + random.normal(size=(250, 2)) * [0.1, 0.2]
    np.save(folder / "rows.npy", rows.astype(np.float32))
    np.save(folder / "labels.npy", (along > 0).astype(np.int64))
    return {"path": str(folder / "rows.npy"), "labels": str(folder / "labels.npy")}


def write_images(folder: Path) -> dict[str, str]:
    """160 of the digits, of four kinds, and their labels."""
    rows, labels = DATA["digits"].make(0, np.random.default_rng(0))
    assert labels is not None
    chosen = np.flatnonzero(labels < 4)[:160]
    np.save(folder / "images.npy", rows[chosen])
    np.save(folder / "labels.npy", labels[chosen])
    return {"path": str(folder / "images.npy"), "labels": str(folder / "labels.npy")}


def make_place(folder: Path, shape: tuple[int, ...], setting: str, steps: int | None = None) -> Place:
    """The setting's data, and a teacher trained on them for a moment."""
    folder.mkdir(parents=True, exist_ok=True)
    network = {**NETWORKS[shape], **({"dropout": 0.2} if setting == "dropout" else {})}
    header = {
        "data": write_vectors(folder) if shape == VECTOR else write_images(folder),
        "network": network,
        "conditional": setting == "labels",
        "seed": 1,
    }
    steps = steps or (300 if shape == VECTOR else 30)
    teacher = {"method": "flow_matching", "samples": steps * 64, "batch_size": 64, "lr": 5e-3}
    place = Place(header, folder / "run" / "teacher")
    run_recipe(place.recipe(teacher=teacher), folder / "run", LocalWorld(quiet=True))
    return place


@dataclass(frozen=True)
class Planned:
    """A stage, planned."""

    run: Run
    stage: Stage
    options: Options
    plan: Plan
    config: Any

    def trainer(self) -> Trainer:
        """A trainer as :func:`fewstep.pipeline.train_stage.train_stage` makes it, without checkpoints."""
        return Trainer(self.plan.student, self.options, (self.stage.seed, self.stage.name), self.run.world)

    def phases(self) -> Iterator[tuple[Phase, Objective, Batches]]:
        """The phases, prepared one after the other; each gets the student as it is then for a frozen teacher."""
        previous = None
        for number, phase in enumerate(self.plan.phases):
            yield (phase, *phase.prepare(previous))
            if number + 1 == len(self.plan.phases):
                return
            kept = self.stage.folder / "rounds" / f"{number}"
            save_model(kept, self.plan.student.state_dict(), self.config)
            previous = as_teacher(load(kept), phase.name)


def plan_case(place: Place, case: str, out: Path, **changes: Any) -> Planned:
    """Everything that a run does up to the training of the stage, by the run itself."""
    found: list[Planned] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "train_stage", lambda *planned: found.append(Planned(*planned)))
        run_recipe(place.recipe(stage=place.stage(case, **changes)), out, LocalWorld(quiet=True))
    (planned,) = found
    return planned


def stir(weights: Iterable[Tensor], seed: int = 0) -> None:
    """Add a little noise to weights, so that no gradient is zero because layers start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


@dataclass(frozen=True)
class Turn:
    """A role's turn, ready to be taken as often as wanted.

    Attributes:
        trainer: has the objective's modules in their modes.
        objective: whose loss it is.
        batch: the rows.
        role: whose turn it is.
        done: share of the training done.
    """

    trainer: Trainer
    objective: Objective
    batch: Pair
    role: str
    done: float

    def loss(self, *, autocast: bool = True, nets: dict[str, nn.Module] | None = None, seed: int = 7) -> Terms:
        """The terms, as the trainer asks for them; always with the same draws."""
        torch.default_generator.manual_seed(seed)
        draws = Draws(torch.Generator().manual_seed(5), len(self.batch.x0))
        own = self.trainer._networks(self.role)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and self.trainer.options.precision == "bf16"):
            return self.objective.loss(self.role, nets or own, self.batch, draws, self.done)


def turns_of(planned: Planned, done: tuple[float, ...] = (0.0, 0.6), *, stirred: bool = True) -> Iterator[Turn]:
    """Every role's turn in every phase."""
    if stirred:
        stir(planned.plan.student.parameters())
    trainer = planned.trainer()
    for _, objective, batches in planned.phases():
        trainer._prepare(objective)
        for number, (role, module) in enumerate(objective.modules.items()):
            if stirred and role != "student":
                stir(module.parameters(), number)
        if stirred:  # averages begin as copies of what they are compared with
            stir([value for value in objective.state.values() if value.dtype == torch.float32], len(objective.modules))
        batch = batches.batch(0, BATCH, torch.Generator().manual_seed(3))
        with trainer._turns_ended():
            for role in objective.modules:
                yield from (Turn(trainer, objective, batch, role, share) for share in done)


def raw(tensor: Tensor) -> tuple[Any, ...]:
    """Type, shape and bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def below(value: Any) -> list[tuple[str, Any]]:
    """The named parts of a value that may hold other values."""
    if isinstance(value, nn.Module):
        kept = {name: part for name, part in vars(value).items() if not name.startswith("_")}
        return [*kept.items(), *value._parameters.items(), *value._buffers.items(), *value._modules.items()]
    if isinstance(value, dict):
        return [(str(name), part) for name, part in value.items()]
    if isinstance(value, list | tuple):
        return [(str(number), part) for number, part in enumerate(value)]
    if isinstance(value, functools.partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    owner = getattr(value, "__self__", None)
    if owner is not None and not isinstance(value, type):
        return [("self", owner)]
    cells = getattr(value, "__closure__", None) or ()
    own = vars(value) if type(value).__module__.startswith("fewstep") else {}
    return [*own.items(), *((f"cell {n}", cell.cell_contents) for n, cell in enumerate(cells))]


def contents(*values: Any) -> tuple[dict[str, Any], list[nn.Module]]:
    """What is held by values, by their attributes, by theirs …, in comparable form; and the modules among them."""
    found: dict[str, Any] = {}
    modules: list[nn.Module] = []
    waiting: list[tuple[str, Any]] = [(str(number), value) for number, value in enumerate(values)]
    seen: set[int] = set()
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Tensor):
            found[path] = (raw(value), value.requires_grad)
        elif isinstance(value, np.ndarray):
            found[path] = (value.dtype, value.shape, value.tobytes())
        elif isinstance(value, torch.Generator):
            found[path] = raw(value.get_state())
        elif value is None or isinstance(value, str | int | float | bool | Path):
            found[path] = repr(value)
        elif id(value) not in seen:
            seen.add(id(value))
            found[path] = (type(value).__name__, id(value))
            if isinstance(value, nn.Module):
                modules.append(value)
            waiting += [(f"{path}.{name}", part) for name, part in below(value)]
    return found, modules
