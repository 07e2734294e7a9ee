"""The verb ``check``: whether a network is the velocity of the flow to the data."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fewstep.cli import arguments
from fewstep.cli.named_data import named_data
from fewstep.cli.open_models import condition_names, open_model
from fewstep.data.dataset import DataSet
from fewstep.data.scaling import Scaling
from fewstep.diagnostics.check_velocity import check_velocity
from fewstep.errors import UserError
from fewstep.flow.noise import generator_for
from fewstep.generator import Generator
from fewstep.training.world import set_threads

MAX_ROWS = 4096  # training rows that a check chooses from; chosen, not tuned
FAULTS_FOUND = 1  # exit code


def check(options: arguments.Check) -> int:
    """Check a network against data and print the report; 1 where it has a fault."""
    set_threads()
    data = named_data(options.data)
    model = open_model(options.model, options.module, data)
    _refuse_unfit(model, data)
    chosen = data.train[_rows(len(data.train), options.seed)]
    cond = data.cond_rows(chosen, condition_names(model, data))
    found = check_velocity(
        model.module, network_rows(model, data, chosen), conditions=cond, path=model.config.path, seed=options.seed
    )
    print(f"model  {options.model}\ndata   {data.name}, {len(chosen)} training rows of shape {data.shape}\n\n{found}")
    if not found.ok:
        print("\nnext   mend the first fault, then run the same command again")
        return FAULTS_FOUND
    print(f"\nnext   fewstep diagnose {options.model}" if model.folder else "\nnext   fs.train(…, teacher=net)")
    return 0


def _rows(count: int, seed: int) -> np.ndarray:
    """Positions of the training rows to check on, ascending: all, or :data:`MAX_ROWS` of them."""
    order = torch.randperm(count, generator=generator_for(seed, "check verb", "rows"))[:MAX_ROWS]
    return order.sort().values.numpy()


def _refuse_unfit(model: Generator, data: DataSet) -> None:
    config = model.config
    if config.rule.kind == "map" and not (config.network or {}).get("two_time"):
        raise UserError(f"{model.name!r} is a one-step map, not a velocity: check the flow that it was distilled from.")
    if config.base != "gaussian":
        raise UserError(f"{model.name!r} starts from data, and a check compares with the flow from Gaussian noise.")
    if config.shape != data.shape:
        raise UserError(
            f"{model.name!r} makes samples of shape {config.shape}, and the data {data.name!r} has {data.shape}: give "
            "the data that it was trained on."
        )


def network_rows(model: Generator, data: DataSet, rows: np.ndarray) -> Tensor:
    """Rows of the data in the units of the model's network, float32 (n, *shape)."""
    scaling = model.config.scaling
    if scaling is None or scaling == data.scaling.as_dict():
        plain = data.rows[rows]
        return data.network_rows(rows) if scaling is not None else torch.as_tensor(np.array(plain, dtype=np.float32))
    return Scaling.from_dict(scaling).normalise(data.rows[rows])
