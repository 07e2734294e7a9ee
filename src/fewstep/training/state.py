"""Conversion of modules and optimisers to the named tensors of a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fewstep.errors import UserError


def strip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose name begins with a prefix, by the rest of the name.

    >>> list(strip({"ema.a": torch.zeros(1), "b": torch.zeros(1)}, "ema."))
    ['a']
    """
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Load the entries with a prefix into a module.

    Args:
        module: the module.
        tensors: of a checkpoint.
        prefix: of the module's entries.

    Raises:
        UserError: the entries are those of another network.
    """
    try:
        module.load_state_dict(strip(tensors, prefix))
    except RuntimeError as error:
        raise UserError(
            f"the checkpoint holds another network than the recipe describes: {error}. Use another --out."
        ) from error


def optimiser_tensors(role: str, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as tensors named ``optimiser.<role>.<number>.<name>``."""
    return {
        f"optimiser.{role}.{number}.{name}": value
        for number, entry in optimiser.state_dict()["state"].items()
        for name, value in entry.items()
    }


def load_optimiser(role: str, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore an optimiser's state from the tensors of :func:`optimiser_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in strip(tensors, f"optimiser.{role}.").items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
