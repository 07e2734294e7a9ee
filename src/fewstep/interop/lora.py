r"""Roles of a training as low-rank adapters of one frozen network.

A role (teacher, student, online model) is the user's network with, in chosen layers, the weights

.. math:: W + \frac{\alpha}{k} B A, \qquad A \in R^{k \times n}, \quad B \in R^{m \times k}

(arXiv:2106.09685, eq. 3; k is the rank, and B is 0 initially). Its parameters are A and B alone, so optimisers,
averages and checkpoints hold nothing else, and all roles share the tensors of W, the base.

Every role has module objects of its own around the shared tensors. So no role changes another one's mode or gradients
between forward and backward, and the network's own activation checkpointing computes again what it computed before.
(With several adapters in one module, of which each call activates one, both go wrong: peft's ``set_adapter`` changes
``requires_grad``, and checkpointing computes again with the adapter that is active during the backward pass.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.flow.noise import isolated_rng
from fewstep.interop.lora_layers import (
    NAME,
    Settings,
    device_of,
    find_places,
    frozen,
    lora_layers,
    tensors_of,
    with_adapter,
    with_tensors,
)
from fewstep.networks.adapter import Adapter
from fewstep.networks.foreign import Foreign, Intervals

PEFT_PREFIX = "base_model.model"  # of the keys in a file that peft writes


def lora(
    net: nn.Module, rank: int = 16, targets: str | Sequence[str] | None = None, alpha: float | None = None
) -> Role:
    """A frozen network as a role without an adapter; its copies have one and can be trained.

    The result equals the network exactly, and is meant as the teacher. ``copy.deepcopy`` of it gives a role with a new
    adapter, for a student; a copy of that has the same values. A is drawn from torch's global generator: the caller
    seeds it.

    The network's weights are shared, not copied, until they are moved to another device. Training does not change them.
    Activation checkpointing is switched on in the network itself, before this call, and not of the reentrant kind: that
    one gives no gradients to the weights of a block whose inputs need none, and a frozen network's first block is such.

    Args:
        net: an :class:`~fewstep.networks.adapter.Adapter`, or a module ``v(x, t, **cond)``.
        rank: k, the number of rows of A.
        targets: the layers with an adapter: the ends of their names, or a regular expression for whole names. Default:
            the linear layers of attention; in a network without these, all its linear and convolution layers.
        alpha: the factor of ``B A`` is ``alpha / rank``; by default it is 1.

    Raises:
        UserError: peft is not installed (extra ``lora``); a role is given; no layer has these names, or one of them
            cannot have an adapter; ``rank`` is no positive integer; ``alpha`` is not positive.

    >>> import copy, torch, fewstep as fs
    >>> class Velocity(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(3, 2)
    ...     def forward(self, x, t):
    ...         return self.layer(torch.cat([x, t[:, None]], 1))
    >>> teacher = fs.lora(Velocity(), rank=1)
    >>> student = copy.deepcopy(teacher)
    >>> [tuple(p.shape) for p in student.parameters()]
    [(1, 3), (2, 1)]
    >>> x, t = torch.ones(4, 2), torch.zeros(4)
    >>> torch.equal(student(x, t), teacher(x, t))
    True
    """
    if isinstance(net, Foreign) and not isinstance(net, Adapter):
        raise UserError(
            f"fs.lora was given a {type(net).__name__}, which is no plain network: copy a role with copy.deepcopy, or "
            "make one network of it first (fewstep.interop.lora.merged)."
        )
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"rank is {rank!r}: it is the number of rows of the matrix A, a positive integer such as 16.")
    alpha = float(rank if alpha is None else alpha)
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"alpha is {alpha}: the update is alpha / rank times B A, so it must be positive.")
    adapter = net if isinstance(net, Adapter) else Adapter(net)
    intervals = copy.deepcopy(adapter.intervals)
    base = with_tensors(adapter, {id(tensor): frozen(tensor) for tensor in tensors_of(adapter)})
    base.intervals = None
    declared = targets if targets is None or isinstance(targets, str) else tuple(targets)
    return Role(base, Settings(rank, alpha, find_places(base, declared, rank), declared), intervals=intervals)


@final
class Role(Foreign):
    """A network with an adapter of its own on a shared, frozen base: ``v(x, t, r=None, **cond)``.

    ``copy.deepcopy`` makes another role on the same base. Moving a role to another device or dtype moves the base, and
    with it every role on it. Without an adapter, a role is the base itself; loading the state of a role that has one
    gives it one.

    Args:
        base: the user's network; it is shared and not registered, so it is in no list of parameters and in no state.
        settings: of the adapters.
        adapted: the network with the adapter; None for none.
        intervals: the functions of ``r - t`` of a two-time network, trained with the adapter.
    """

    base: Adapter
    adapted: Adapter

    def __init__(
        self, base: Adapter, settings: Settings, adapted: Adapter | None = None, intervals: Intervals | None = None
    ) -> None:
        super().__init__()
        self.__dict__["base"] = base  # not registered
        self.settings = settings
        self.null, self.mask, self.combine = base.null, base.mask, base.combine
        self.intervals = intervals
        self._hold(adapted)
        self.eval()

    @property
    def has_adapter(self) -> bool:
        """Whether it has an adapter; without one it is the base."""
        return self.adapted is not self.base

    @property
    def inner(self) -> nn.Module:
        """A module of the user's class with the user's names: the base's own, or a new one with the adapter added."""
        return merge(self) if self.has_adapter else self.base.wrapped

    @property
    def two_time(self) -> bool:
        """Whether it takes the end time ``r``."""
        return self.intervals is not None

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Tensor) -> Tensor:
        """The velocity, or the average velocity from t to r, (B, ...) like x."""
        return self.adapted.evaluate(x, t, r, cond, self.intervals)

    def layers(self) -> dict[str, Any]:
        """peft's layers by the name of the user's layer that each replaces; none without an adapter."""
        return lora_layers(self.adapted.wrapped) if self.has_adapter else {}

    def train(self, mode: bool = True) -> Role:
        """Put the dropout layers of this role's network into training mode; other roles' are not changed."""
        super().train(mode)
        self.adapted.train(mode)
        return self

    def with_interval(self) -> Role:
        """A copy in two-time form, with an adapter.

        Raises:
            UserError: it is not known where the network embeds the time.
        """
        if not self.base.places:
            self.base.with_interval()  # raises, with the names that may be meant
        made = copy.deepcopy(self)
        made.intervals = Intervals(self.base.places, self.base.widths).to(device_of(self.base))
        return made

    def whole_state(self) -> dict[str, Tensor]:
        """The base's tensors and the role's own, by name."""
        return {**{f"base.{name}": value for name, value in self.base.state_dict().items()}, **self.state_dict()}

    def describe(self) -> dict[str, Any]:
        """The base's description, and rank, alpha and layers of the adapters on it, for JSON files.

        It is the same with and without an adapter, because either loads the state of a role that has one.
        """
        declared = self.settings.targets if isinstance(self.settings.targets, str | None) else [*self.settings.targets]
        adapter = {
            "rank": self.settings.rank,
            "alpha": self.settings.alpha,
            "targets": declared,
            "layers": len(self.settings.places),
        }
        made = {**self.base.describe(), "lora": adapter}
        return {**made, "two_time": True} if self.two_time else made

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load an adapter's weights; a role without an adapter gets one if there are such weights."""
        if not self.has_adapter and any(name.startswith("adapter.") for name in state_dict):
            with isolated_rng(device_of(self.base)):
                self._hold(with_adapter(self.base, self.settings))
            self.train(self.training)
        return super().load_state_dict(state_dict, strict, assign)

    def _hold(self, adapted: Adapter | None) -> None:
        """Take a network with an adapter for its own, and register the adapter's matrices by the layers' names."""
        self.__dict__["adapted"] = self.base if adapted is None else adapted
        self.adapter = nn.Module()
        for place, layer in self.layers().items():
            node = self.adapter
            for part in place.split("."):
                if part not in node._modules:
                    setattr(node, part, nn.Module())
                node = node._modules[part]  # type: ignore[assignment]
            node.lora_A, node.lora_B = layer.lora_A[NAME], layer.lora_B[NAME]

    def __deepcopy__(self, memo: dict[int, Any]) -> Role:
        memo.update({id(tensor): tensor for tensor in tensors_of(self.base)})
        adapted = copy.deepcopy(self.adapted, memo) if self.has_adapter else with_adapter(self.base, self.settings)
        made = Role(self.base, self.settings, adapted, copy.deepcopy(self.intervals, memo))
        memo[id(self)] = made
        return made.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Role:
        """Move the adapter, and the base's tensors in place, so that all roles go on sharing them."""
        super()._apply(fn, recurse)
        for tensor in tensors_of(self.base):
            if type(tensor) in (nn.Parameter, Tensor):
                tensor.data = fn(tensor.data)
        self.adapted._apply(fn)  # tensors of other classes, such as quantised weights
        return self


def merge(role: Role) -> nn.Module:
    """A copy of the user's module with the adapter added to its weights; the role and its base are not changed.

    The sum is rounded to the dtype of the base's weights. The functions of ``r - t`` of a two-time role are not in it:
    :func:`merged` has them.

    Args:
        role: the role; without an adapter the result is a copy of the base.

    Returns:
        A module of the user's class, whose state has the user's names; its parameters can be trained.
    """
    made = copy.deepcopy(role.base.wrapped)
    for place, layer in role.layers().items():
        whole = copy.deepcopy(layer)
        whole.merge(safe_merge=True, adapter_names=[NAME])
        made.set_submodule(place, whole.get_base_layer())
    for parameter in made.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return made


def merged(role: Role) -> Adapter:
    """:func:`merge` under the same declaration, ``v(x, t, r=None, **cond)``: a network without peft's layers.

    Args:
        role: the role.
    """
    memo: dict[int, Any] = {id(role.base.wrapped): merge(role)}
    made = copy.deepcopy(role.base, memo)
    made.intervals = copy.deepcopy(role.intervals)
    return made


def lora_state(role: Role, prefix: str = PEFT_PREFIX) -> dict[str, Tensor]:
    """The adapter's matrices under the names that peft's files have, ``prefix.layer.lora_A.weight``.

    ``peft.set_peft_model_state_dict`` reads them as they are; diffusers' loaders want the prefix ``transformer`` or
    ``unet``, and take alpha to be the rank unless told otherwise.

    Args:
        role: the role.
        prefix: the first part of the names.

    Raises:
        UserError: the role has no adapter.
    """
    if not role.has_adapter:
        raise UserError("this role has no adapter, it is the base: take the state of a trained copy.")
    return {f"{prefix}.{name}": value.detach() for name, value in role.adapter.state_dict().items()}
