"""The rows of the global batch that a process gets."""

from __future__ import annotations

import torch

from fewstep.errors import UserError
from fewstep.flow.couplings import Pair
from fewstep.flow.noise import equal_share
from fewstep.training.world import LocalWorld


def process_rows(world: LocalWorld, batch: int) -> slice | None:
    """This process's rows of the global batch; None for one process, which has all.

    Args:
        world: the processes.
        batch: rows of the global batch.

    Raises:
        UserError: the rows cannot be divided equally.
    """
    if world.size == 1:
        return None
    if batch % world.size:
        raise UserError(
            f"batch_size {batch} does not divide among {world.size} processes: make it a multiple of {world.size}."
        )
    each = batch // world.size
    return slice(world.rank * each, (world.rank + 1) * each)


def check_groups(world: LocalWorld, batch: int, group: int) -> None:
    """Refuse a batch size with which a group of rows would be divided between processes.

    Args:
        world: the processes.
        batch: rows of the global batch.
        group: rows in a group.

    Raises:
        UserError: the rows of a process are not whole groups.
    """
    if batch % (group * world.size):
        processes = f" on {world.size} processes" if world.size > 1 else ""
        raise UserError(
            f"batch_size {batch} does not divide into groups of {group} rows{processes}: make it a multiple of "
            f"{group * world.size}."
        )


def local_pair(pair: Pair, rows: slice | None, batch: int, device: torch.device) -> Pair:
    """This process's rows of the global batch, and an equal share of the tensors in ``beside``, on its device.

    Args:
        pair: the global batch.
        rows: as :func:`process_rows`.
        batch: rows of the global batch.
        device: of this process.
    """
    if rows is None:
        return pair if device.type == "cpu" else pair.to(device)
    cond = {name: value[rows] for name, value in pair.cond.items()}
    beside = {name: value[equal_share(len(value), rows, batch)] for name, value in pair.beside.items()}
    return Pair(pair.x0[rows], pair.x1[rows], cond, beside).to(device)
