r"""Networks that fewstep did not build: what training, sampling and saving need to know of them.

A foreign network is called as every network here: ``v(x, t, **cond)`` with x (B, ...), t (B,) in [0, 1] (0 noise, 1
data) and conditions whose first dimension is B; its two-time form also takes the end time ``r`` (B,). A copy is made by
``copy.deepcopy``.

The two-time form adds :math:`f(r - t)` to the output of the sub-module that embeds the time, where the last layer of f
is zero initially. So it equals the velocity exactly before training, for every r.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.errors import UserError, unknown
from fewstep.networks.two_time import Interval

WRAPPED = "wrapped."  # prefix of the user's own parameter names in an adapter's state
FOREIGN = "foreign"  # name of the network in a description of a module that fewstep did not build


Combine = Callable[[Tensor, Tensor, float], Tensor]  # (v without, v with the conditions, weight) -> guided velocity


class Foreign(nn.Module, ABC):
    """A network from outside, ``v(x, t, r=None, **cond)``: (B, ...) like x.

    Attributes:
        null: what replaces a condition in an unconditional call, by name: a number, or a tensor of one row's shape.
            Conditions without an entry are given to both calls of a guided step.
        mask: name of the condition that says which entries of a sample are valid; None for none.
        combine: how guidance combines the two velocities; None for ``v_0 + w (v_c - v_0)``.
    """

    null: Mapping[str, Any]
    mask: str | None
    combine: Combine | None

    @property
    @abstractmethod
    def inner(self) -> nn.Module:
        """The user's own module, with the user's own parameter names."""

    @property
    @abstractmethod
    def two_time(self) -> bool:
        """Whether it takes the end time ``r``."""

    @abstractmethod
    def with_interval(self) -> Foreign:
        """A copy in two-time form, which equals this network until it is trained.

        The weights of the interval are drawn from torch's global generator: the caller seeds or forks it.

        Raises:
            UserError: it is not known where this network embeds the time.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What is recorded of it in JSON files; equal descriptions have weights of the same names and shapes."""

    def whole_state(self) -> dict[str, Tensor]:
        """All tensors that its calls depend on, by name: its state, and what it shares with others and does not own."""
        return self.state_dict()


@final
class Intervals(nn.Module):
    """The zero-initialised functions of ``r - t`` of a two-time network, one per time embedding.

    Args:
        places: names of the sub-modules whose outputs they are added to.
        widths: number of values (or channels) of these outputs.
    """

    def __init__(self, places: Sequence[str], widths: Sequence[int]) -> None:
        super().__init__()
        self.places = tuple(places)
        self.layers = nn.ModuleList(Interval(width) for width in widths)

    @contextmanager
    def added(self, module: nn.Module, length: Tensor) -> Iterator[None]:
        """Within the block, the outputs of the sub-modules have their functions of ``length`` (B,) added."""
        handles = [
            module.get_submodule(place).register_forward_hook(_adder(layer(length)))
            for place, layer in zip(self.places, self.layers, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _adder(added: Tensor) -> Any:
    """A forward hook that adds values (B, C) to an output (B, C), (B, T, C) or (B, C, H, W)."""

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        value = added.to(output.dtype)
        if output.ndim == 3:
            return output + value[:, None]
        return output + value.reshape(*value.shape, *(1,) * (output.ndim - 2))

    return hook


def embedding_width(module: nn.Module, place: str) -> int:
    """Number of values that the sub-module ``place`` returns: the outputs of its last linear layer.

    Raises:
        UserError: there is no such sub-module, or it has no linear layer.
    """
    names = [name for name, _ in module.named_modules()]
    if place not in names or not place:
        raise UserError(f"{unknown('sub-module', place, names)} time_embed names the sub-module that embeds the time.")
    linear = [layer for layer in module.get_submodule(place).modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise UserError(
            f"time_embed={place!r} has no linear layer, so the size of its output is not known: name the sub-module "
            "whose output is the learned embedding of the time, or one of its linear layers."
        )
    return linear[-1].out_features


def spread(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of valid entries, (B,), (B, T) or of the shape of x, as numbers 0 and 1 that multiply x (B, ...).

    Leading dimensions must agree with those of x: (B, T) fits (B, T, D).

    Raises:
        UserError: they do not.
    """
    if mask.ndim > x.ndim or any(m not in (1, n) for m, n in zip(mask.shape, x.shape, strict=False)):
        raise UserError(
            f"a mask of shape {tuple(mask.shape)} does not fit samples of shape {tuple(x.shape)}: its dimensions must "
            "be the first dimensions of the samples, as (B, T) for (B, T, D)."
        )
    return mask.to(x.dtype).reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))


def trainable_copy(module: nn.Module, two_time: bool = False) -> nn.Module:
    """A copy that can be trained: weights of half precision become float32, in which small updates are not lost.

    Args:
        module: the network.
        two_time: whether the copy is to take an end time; only a foreign network can be changed so.
    """
    new_form = two_time and isinstance(module, Foreign) and not module.two_time
    made: nn.Module = module.with_interval() if new_form and isinstance(module, Foreign) else copy.deepcopy(module)
    made.requires_grad_(True)
    for parameter in made.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    return made


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """All tensors that a network's calls depend on, by name: :meth:`Foreign.whole_state`, or its state."""
    return module.whole_state() if isinstance(module, Foreign) else module.state_dict()
