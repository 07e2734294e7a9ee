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
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.errors import UserError, unknown
from fewstep.networks.two_time import Interval

HALF = (torch.float16, torch.bfloat16)
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
        held: names of parameters that the user froze, and that no copy trains; :func:`freeze` writes them.
    """

    null: Mapping[str, Any]
    mask: str | None
    combine: Combine | None
    held: frozenset[str] = frozenset()

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
    def added(self, module: nn.Module, length: Tensor) -> Iterator[nn.Module]:
        """The module with the functions of ``length`` (B,) added to the outputs of its sub-modules.

        What is yielded shares everything with ``module`` but the modules on the way to these sub-modules, which are
        copied for this call. So a block that is computed again in the backward pass (activation checkpointing) adds
        the interval of its own call, whatever was called since, and ``module`` itself is not changed.

        Args:
            module: the network.
            length: ``r - t``, (B,).

        Raises:
            UserError: a sub-module was not called within the block, so that the result does not depend on r; its
                output is no tensor (or tuple with one) of the width of the functions.
        """
        called: set[str] = set()
        hooks = {
            registered(module, place): _adder(place, layer, length, called)
            for place, layer in zip(self.places, self.layers, strict=True)
        }
        yield _view(module, hooks, {})
        missing = [place for place in self.places if place not in called]
        if missing:
            raise UserError(
                f"time_embed={missing[0]!r} was not called in a call of the network, so its result does not depend on "
                "the end time r: the call must use the module it is given (m in lambda m, x, t: …), and time_embed "
                "must name a sub-module that is called as a module and whose output is the embedding of t."
            )


Hook = Callable[[nn.Module, Any, Any], Any]  # a forward hook: (module, arguments, output) -> output


def _view(module: nn.Module, hooks: Mapping[nn.Module, Hook], made: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module itself, or a copy with the hooks if it or a module below it has one; ``made`` holds those so far."""
    if module not in made:
        made[module] = module
        children = _children(module).items()
        below = {name: None if child is None else _view(child, hooks, made) for name, child in children}
        if module in hooks or any(below[name] is not child for name, child in children):
            made[module] = _shallow(module, below, hooks.get(module))
    return made[module]


def registered(module: nn.Module, place: str) -> nn.Module:
    """The sub-module of this name itself: within torch.export, attributes of a module are stand-ins.

    Args:
        module: any module.
        place: name of one of its sub-modules.
    """
    for name in place.split("."):
        child = _children(module)[name]
        assert child is not None, "the place exists"
        module = child
    return module


def _children(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """The registered sub-modules by name, see :func:`registered`."""
    children: Mapping[str, nn.Module | None] = module.__dict__["_modules"]
    return children


def _shallow(module: nn.Module, below: Mapping[str, nn.Module | None], hook: Hook | None) -> nn.Module:
    """A module with other sub-modules and one more hook; its parameters, buffers and all else are shared."""
    copied: nn.Module = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    own = OrderedDict(module._forward_hooks) if hook is None else OrderedDict({**module._forward_hooks, -1: hook})
    # a compiled call would call the former sub-modules
    copied.__dict__.update(_modules=dict(below), _forward_hooks=own, _compiled_call_impl=None)
    return copied


def _adder(place: str, layer: nn.Module, length: Tensor, called: set[str]) -> Hook:
    """A forward hook that adds ``layer(length)`` to an output, or to the first entry of its width of a tuple."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        called.add(place)
        value = layer(length)
        parts = list(output) if isinstance(output, (tuple, list)) else [output]
        fits = [number for number, part in enumerate(parts) if _takes(part, value)]
        if not fits:
            shapes = ", ".join(str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in parts)
            raise UserError(
                f"the output of time_embed={place!r} ({shapes}) is not the embedding of {len(value)} times in "
                f"{value.shape[1]} numbers, (B, {value.shape[1]}): name the sub-module, or the linear layer, whose "
                "output is that."
            )
        parts[fits[0]] = _plus(parts[fits[0]], value)
        return type(output)(parts) if isinstance(output, (tuple, list)) else parts[0]

    return hook


def _takes(output: Any, value: Tensor) -> bool:
    """Whether values (B, C) can be added to an output (B, C), (B, T, C) or (B, C, H, W)."""
    if not isinstance(output, Tensor) or output.ndim < 2:
        return False
    width = output.shape[1] if output.ndim > 3 else output.shape[-1]
    return width == value.shape[1] and output.shape[0] in (1, value.shape[0])


def _plus(output: Tensor, value: Tensor) -> Tensor:
    """Values (B, C) added to an output (B, C), (B, T, C) or (B, C, H, W)."""
    value = value.to(output.dtype)
    if output.ndim == 3:
        return output + value[:, None]
    return output + value.reshape(*value.shape, *(1,) * (output.ndim - 2))


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


def held_parameters(module: nn.Module) -> frozenset[str]:
    """Names of the parameters of a network from outside that stay as they are in training: those that its user froze.

    Where all are frozen, the network is a finished teacher, and what was frozen before that counts.
    """
    if not isinstance(module, Foreign):
        return frozenset()
    flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    return frozenset(name for name, learns in flags.items() if not learns) if any(flags.values()) else module.held


def freeze(module: nn.Module) -> nn.Module:
    """The module with all its parameters frozen; a foreign one remembers which of them were frozen before."""
    if isinstance(module, Foreign):
        module.held = held_parameters(module)
    return module.requires_grad_(False)


@contextmanager
def frozen_within(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block the modules are frozen (:func:`freeze`); after it their parameters learn or not as before."""
    kept = list(modules)
    flags = [(parameter, parameter.requires_grad) for module in kept for parameter in module.parameters()]
    for module in kept:
        freeze(module)
    try:
        yield
    finally:
        for parameter, learns in flags:
            parameter.requires_grad_(learns)


def own_copy(module: nn.Module, two_time: bool = False) -> nn.Module:
    """A copy with the dtypes of the user's own module.

    Args:
        module: the network.
        two_time: whether the copy is to take an end time; only a foreign network can be changed so.
    """
    if two_time and isinstance(module, Foreign) and not module.two_time:
        return module.with_interval()
    return copy.deepcopy(module)


def trainable_copy(module: nn.Module, two_time: bool = False) -> nn.Module:
    """A copy that can be trained: numbers of half precision become float32, in which small updates are not lost, and
    all parameters learn but those that the user froze (:func:`held_parameters`).

    Args:
        module: the network.
        two_time: as in :func:`own_copy`.
    """
    made, held = own_copy(module, two_time), held_parameters(module)
    made.requires_grad_(True)  # a network may have its own rule: a role leaves its base frozen
    for name, parameter in made.named_parameters():
        if name in held:
            parameter.requires_grad_(False)
        if parameter.dtype in HALF:
            parameter.data = parameter.data.float()
    for owner in made.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.dtype in HALF:
                owner._buffers[name] = buffer.float()
    return made


def in_own_dtypes(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Weights in the dtypes that a network has them in; those that it does not have are unchanged.

    Args:
        state: the weights by name.
        module: the network.
    """
    own = module.state_dict()
    return {name: value.to(own[name].dtype) if name in own else value for name, value in state.items()}


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """All tensors that a network's calls depend on, by name: :meth:`Foreign.whole_state`, or its state."""
    return module.whole_state() if isinstance(module, Foreign) else module.state_dict()
