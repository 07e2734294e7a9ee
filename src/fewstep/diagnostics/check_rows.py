r"""The rows that a check evaluates a network on, and the targets that it is compared with.

For data row ``x1``, noise ``x0`` and time t, the state is ``x_t`` and the target of flow matching is
``u = alpha' x1 + sigma' x0``. A trained network approximates ``E[u | x_t, c]``, and so

.. math:: E|v - u|^2 = E|v - \hat u|^2 + E|u - \hat u|^2, \qquad \hat u = E[u | x_t, c].

The last term is the same for every network. ``u_hat`` is known in closed form for the law that gives the same weight
to every row at hand: it is used for differences of losses, which then have a smaller standard error (for data in
the plane by a factor of several) and the same mean.

The weight of a row is ``1 / (1 + 1/b_1^2 + 1/b_0^2)`` with the factors of v in the data and the noise prediction: the
error of a velocity converted from either of them is then bounded at every time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from fewstep.data.dataset import DataSet
from fewstep.errors import UserError
from fewstep.flow.affine_path import AffinePath
from fewstep.flow.noise import generator_for
from fewstep.networks.foreign import spread

FIRST, LAST = 0.02, 0.98  # times lie between them: targets of some paths are infinite at 1
REFERENCES, FEW_REFERENCES, LARGE = 2048, 256, 2048  # other data rows used; as many for rows of more values than LARGE
BLOCK, BLOCK_VALUES = 256, 1 << 20  # rows per network call: at most so many, and at most so many values


@final
@dataclass(frozen=True)
class Source:
    """Data rows in network units with their conditions, by row number.

    Args:
        count: number of rows.
        rows: ``rows(indices)`` gives ``(n, *shape)``, float32.
        conditions: ``conditions(indices)`` gives the conditions by name, each (n, ...).
    """

    count: int
    rows: Callable[[Tensor], Tensor]
    conditions: Callable[[Tensor], dict[str, Tensor]]


def source_of(data: Any, conditions: Mapping[str, Any] | None) -> Source:
    """Read the arguments of the user.

    Args:
        data: a :class:`~fewstep.data.dataset.DataSet`, or rows ``(N, *shape)`` in network units.
        conditions: by name, each (N, ...); None: those of a data set, labels included.

    Raises:
        UserError: fewer than 2 rows, rows that are no numbers, conditions of another length.
    """
    if isinstance(data, DataSet):
        count, rows = len(data), _rows_of_data_set(data)
        if conditions is None:
            return Source(count, rows, lambda i: data.cond_rows(i, data.condition_names))
    else:
        count, rows = _rows_of_array(data)
    given = {name: torch.as_tensor(value) for name, value in (conditions or {}).items()}
    for name, value in given.items():
        if value.ndim == 0 or len(value) != count:
            raise UserError(
                f"the condition {name!r} has shape {tuple(value.shape)}, and there are {count} rows of data: its first "
                "dimension must be the rows."
            )
    return Source(count, rows, lambda i: {name: value[i.to(value.device)] for name, value in given.items()})


def _rows_of_data_set(data: DataSet) -> Callable[[Tensor], Tensor]:
    return lambda indices: data.network_rows(indices)


def _rows_of_array(data: Any) -> tuple[int, Callable[[Tensor], Tensor]]:
    """Number of rows of an array or tensor, and how to take some of them (a memory-mapped file is not read whole)."""
    try:
        array = data.detach() if isinstance(data, Tensor) else np.asanyarray(data)
        real = not array.is_complex() if isinstance(array, Tensor) else array.dtype.kind in "fiub"
    except ValueError as error:  # rows of different shapes
        raise UserError(f"data must be a DataSet or rows (N, *shape) in network units: {error}.") from error
    if array.ndim < 2 or len(array) < 2 or not real:
        raise UserError(
            f"data must be a DataSet or rows (N, *shape) of real numbers in network units, at least 2; got "
            f"{type(data).__name__} of shape {tuple(array.shape)} and dtype {array.dtype}."
        )
    if isinstance(array, Tensor):
        return len(array), lambda indices: array[indices.to(array.device)].float()
    return len(array), lambda indices: torch.from_numpy(np.array(array[indices.numpy()], dtype=np.float32))


@final
@dataclass(frozen=True)
class Rows:
    """States to evaluate a network on, and their targets, all (n, *shape); times and weights are (n,).

    Args:
        x0, x1: noise and data.
        t: times.
        x: states on the path.
        u: targets ``alpha' x1 + sigma' x0``.
        mean: ``u_hat`` of the module's docstring; ``u`` where it is not known.
        linear: the best velocity that is linear in x.
        weight: weights of the rows.
        valid: 1 where an entry counts, 0 at padding, (n, 1, ...) or (n, *shape).
        cond: conditions by name, each (n, ...).
    """

    x0: Tensor
    x1: Tensor
    t: Tensor
    x: Tensor
    u: Tensor
    mean: Tensor
    linear: Tensor
    weight: Tensor
    valid: Tensor
    cond: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.x)

    def first(self, count: int) -> Rows:
        """The first ``count`` rows."""
        part = {name: value[:count] for name, value in vars(self).items() if name != "cond"}
        return Rows(**part, cond={name: value[:count] for name, value in self.cond.items()})

    def squares(self, difference: Tensor) -> Tensor:
        """Weighted mean squares of (n, *shape) per row, float64 (n,); values that are not finite count as 1e30."""
        plain = (difference * self.valid).flatten(1).double().square().mean(1)
        return torch.nan_to_num(self.weight.double() * plain, nan=1e30, posinf=1e30).clamp(max=1e30)

    @property
    def least(self) -> float:
        """Loss of ``u_hat``, the least that there is for the law of the rows at hand."""
        return float(self.squares(self.u - self.mean).mean())

    @property
    def unit(self) -> float:
        """Loss of the best linear velocity: losses are given in this unit."""
        return max(float(self.squares(self.linear - self.u).mean()), 1e-30)


@final
@dataclass(frozen=True)
class Setting:
    """The data of a check in a fixed order, from which rows are made in any units.

    Args:
        path: the probability path.
        x1: data rows that the network is evaluated on, (n, *shape).
        others: other data rows, (m, *shape).
        cond: conditions of ``x1``.
        other_cond: conditions of ``others``.
        seed: of the noise and the times.
        mask: name of the condition with the valid entries; the others are zero. None for none.
    """

    path: AffinePath
    x1: Tensor
    others: Tensor
    cond: dict[str, Tensor]
    other_cond: dict[str, Tensor]
    seed: int
    mask: str | None = None

    def without_conditions(self) -> Setting:
        """The same data without conditions."""
        return replace(self, cond={}, other_cond={}, mask=None)

    def rows(self, change: Callable[[Tensor], Tensor] | None = None, draw: int = 0) -> Rows:
        """Rows to evaluate a network on.

        Args:
            change: applied to the data, to try other units.
            draw: another number gives other noise and times of the same data.
        """
        x1 = self.x1 if change is None else change(self.x1)
        others = self.others if change is None else change(self.others)
        generator = generator_for(self.seed, "check", draw)
        x0 = torch.randn(x1.shape, generator=generator)
        valid = torch.ones(len(x1), *(1,) * (x1.ndim - 1))
        if self.mask is not None:
            valid = spread(self.cond[self.mask], x1)
            x0, x1 = valid * x0, valid * x1
            others = spread(self.other_cond[self.mask], others) * others
        order, offset = torch.randperm(len(x1), generator=generator), torch.rand(len(x1), generator=generator)
        t = FIRST + (LAST - FIRST) * (order + offset) / len(x1)
        x, u = self.path.interpolate(x0, x1, t), self.path.target(x0, x1, t)
        mean = self._mean(x, t, x1, others, u)
        linear = linear_velocity(self.path, others, x, t)
        return Rows(x0, x1, t, x, u, mean, linear, _weights(self.path, t), valid, self.cond)

    def _mean(self, x: Tensor, t: Tensor, x1: Tensor, others: Tensor, u: Tensor) -> Tensor:
        """``E[u | x_t, c]`` for the law of the rows at hand; ``u`` where rows with equal conditions are not known."""
        if x[0].numel() > LARGE or any(value.is_floating_point() or value.ndim > 1 for value in self.cond.values()):
            return u
        known = torch.cat([x1, others]).flatten(1)
        a, s = self.path.alpha(t)[:, None], self.path.sigma_squared(t)[:, None]
        y = x.flatten(1)
        square = y.square().sum(1, keepdim=True) - 2 * a * (y @ known.T) + a.square() * known.square().sum(1)
        logits = (-square / (2 * s)).double()
        for name, value in self.cond.items():
            logits[value[:, None] != torch.cat([value, self.other_cond[name]])] = -torch.inf
        data = (torch.softmax(logits, 1).float() @ known).reshape(x.shape)
        return self.path.data_to_velocity(data, x, t)


def setting_of(source: Source, path: AffinePath, count: int, seed: int, few: bool, mask: str | None = None) -> Setting:
    """Choose the rows of a check.

    Args:
        source: data and conditions.
        path: the probability path.
        count: rows to evaluate; data rows are repeated where there are fewer.
        seed: of the choice.
        few: whether to use few other rows.
        mask: name of the condition with the valid entries; None for none.

    Raises:
        UserError: the mask is missing; a row has a value that is not finite.
    """
    order = torch.randperm(source.count, generator=generator_for(seed, "check", "order"))
    chosen = order[torch.arange(count) % len(order)]
    large = few or source.rows(order[:1])[0].numel() > LARGE
    rest = order[count:] if len(order) - count >= 32 else order
    rest = rest[: FEW_REFERENCES if large else REFERENCES]
    x1, others = source.rows(chosen).cpu(), source.rows(rest).cpu()
    if not (bool(torch.isfinite(x1).all()) and bool(torch.isfinite(others).all())):
        raise UserError("data has values that are not finite: remove these rows, or replace the values.")
    cond, other_cond = (
        {name: value.cpu() for name, value in source.conditions(index).items()} for index in (chosen, rest)
    )
    if mask is not None and mask not in cond:
        raise UserError(f"the condition {mask!r}, the mask of the network, is missing: pass it in conditions=.")
    return Setting(path, x1, others, cond, other_cond, seed, mask)


def _weights(path: AffinePath, t: Tensor) -> Tensor:
    b1, b0 = path.data_coefficients(t)[1], path.noise_coefficients(t)[1]
    return 1 / (1 + 1 / b1.square() + 1 / b0.square())


def linear_velocity(path: AffinePath, data: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The velocity of Gaussian data with the mean and covariance of ``data``, at states x (n, *shape), times t (n,).

    Where there are fewer than four rows per value, the covariance is drawn towards a multiple of the identity.
    """
    mean = data.mean(0).flatten()
    centred = data.flatten(1) - mean
    count, size = centred.shape
    _, singular, axes = torch.linalg.svd(centred, full_matrices=False)
    variances = singular.square() / max(count - 1, 1)
    shrink = size / (count + size) if count < 4 * size else 0.0
    common = shrink * variances.sum() / size
    variances = (1 - shrink) * variances + common
    a, da = path.alpha(t)[:, None], path.alpha_dot(t)[:, None]
    s2, ss = path.sigma_squared(t)[:, None], path.sigma_sigma_dot(t)[:, None]
    away = x.flatten(1) - a * mean
    along = away @ axes.T
    inside = ((da * a * variances + ss) / (a * a * variances + s2) * along) @ axes
    outside = (da * a * common + ss) / (a * a * common + s2) * (away - along @ axes)
    return (da * mean + inside + outside).reshape(x.shape)


@final
class Network:
    """The network as a check calls it: on its own device, in blocks, without gradients, its rows counted.

    Args:
        call: ``v(x, t, **cond)``.
        device: where it computes.
    """

    def __init__(self, call: Callable[..., Any], device: torch.device) -> None:
        self.call, self.device, self.evaluated = call, device, 0

    def __call__(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """The output for states x (n, *shape), times t (n,) and conditions (n, ...), on the CPU in float32."""
        block = max(1, min(BLOCK, BLOCK_VALUES // max(1, x[0].numel())))
        found = [
            self.once(x[start : start + block], t[start : start + block], **_part(cond, start, start + block))
            for start in range(0, len(x), block)
        ]
        return torch.cat([value.cpu().float() for value in found])

    def once(self, x: Tensor, t: Tensor, **cond: Tensor) -> Any:
        """One call, whatever it returns."""
        self.evaluated += len(x)
        with torch.no_grad():
            moved = {name: value.to(self.device) for name, value in cond.items()}
            return self.call(x.to(self.device), t.to(self.device), **moved)


def _part(cond: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: value[start:stop] for name, value in cond.items()}
