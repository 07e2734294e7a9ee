"""Where sampling starts: base samples, and what the network is shown of the data with them."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow.couplings import Pair
from fewstep.flow.noise import generator_for, integer_rows, noise_rows
from fewstep.generator.config import Config
from fewstep.solvers.solve import check_start

Starts = tuple[Tensor, Tensor | None]  # base samples (num, ...) and their contexts (num, ...)


@final
@dataclass(frozen=True, eq=False)
class BaseRows:
    """The rows that base samples are made of, in network units; ``base.safetensors`` holds them.

        x0_i = rows[k_i]                            without ``scale``
        x0_i = rows[k_i] + scale[k_i] * noise_i     with it; noise_i ~ N(0, I)

    where ``k_i`` and ``noise_i`` are functions of (seed, i).

    Attributes:
        rows: (N, *shape): the rows of an empirical base; of examples, the known part of the start (in-painting) or the
            blurred data (super-resolution).
        context: (N, ...): what the network is shown with each row; None for an empirical base.
        scale: standard deviation of the noise, (N, ...), broadcast to ``rows``; None where no noise is added.
    """

    rows: Tensor
    context: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def of_examples(cls, pair: Pair) -> BaseRows:
        """The starts of a coupling's pairs, without their noise where the coupling says what its scale is."""
        context, scale = pair.cond.get("context"), pair.beside.get("start_scale")
        return cls(pair.x0 if scale is None else pair.beside["start_mean"], context, scale)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, those that are None left out."""
        named = {"rows": self.rows, "context": self.context, "scale": self.scale}
        return {name: value for name, value in named.items() if value is not None}


def distinct_starts(config: Config, base: BaseRows | None) -> int | None:
    """How many different starts the examples of a model give; None where starts are drawn without end."""
    if config.base != "examples" or base is None or base.scale is not None:
        return None
    return len(base.rows)


def given_starts(config: Config, name: str, num: int | None, noise: Tensor, context: Tensor | None) -> Starts:
    """The user's own base samples and contexts, checked.

    Raises:
        UserError: noise of another shape than the model's, or of another number than ``num``; a context that is
            missing or of another number than the noise.
    """
    check_start(noise)
    if tuple(noise.shape[1:]) != config.shape:
        raise UserError(f"noise has rows of shape {tuple(noise.shape[1:])}, the model needs {config.shape}.")
    if num not in (None, len(noise)):
        raise UserError(f"num={num} and noise of {len(noise)} rows contradict each other: leave num out.")
    needed = (config.network or {}).get("context", 0) if "context" not in config.conditions else 0
    if (context is None and needed) or (context is not None and len(context) != len(noise)):
        raise UserError(f"{name!r} takes a context: pass one row of it per row of noise, context=c.")
    return noise, context


def draw_starts(config: Config, name: str, base: BaseRows | None, num: int | None, seed: int) -> Starts:
    """Draw base samples and contexts: start ``i`` is a function of (seed, i).

    Args:
        config: of the model.
        name: the model's name, for messages.
        base: the rows kept with the model; None where the base is Gaussian.
        num: how many.
        seed: the samples' seed.

    Returns:
        Base samples ``(num, *shape)`` float32, and contexts ``(num, ...)`` or None.

    Raises:
        UserError: ``num`` is no whole number from 1 up, or needs more memory than there is; the rows are missing.
    """
    if not isinstance(num, int | np.integer) or isinstance(num, bool) or num < 1:
        raise UserError(f"the number of samples must be a whole number of at least 1, got {num!r}.")
    num = int(num)
    check_memory(num, config.shape)
    if config.base == "gaussian":
        return noise_rows(num, config.shape, seed=seed), None
    if base is None:
        raise UserError(f"{name!r} starts from data and its base rows are missing: pass noise=x0.")
    if config.base == "empirical":
        return base.rows[integer_rows(num, len(base.rows), seed=seed)], None
    chosen = example_rows(num, len(base.rows), seed)
    x0 = base.rows[chosen]
    if base.scale is not None:
        x0 = x0 + base.scale[chosen] * noise_rows(num, config.shape, seed=seed)
    elif num > len(base.rows):
        warnings.warn(
            f"{name!r} has {len(base.rows)} different starts and adds no noise to them: of {num} samples, only "
            f"{len(base.rows)} differ. Draw at most that many, or pass noise=x0 with its context.",
            stacklevel=4,
        )
    return x0, None if base.context is None else base.context[chosen]


def example_rows(num: int, kept: int, seed: int) -> Tensor:
    """Numbers of the example rows of samples ``0 … num``: each row once in random order before any is used again.

    Args:
        num: number of samples.
        kept: number of example rows.
        seed: the samples' seed.

    Returns:
        (num,) int64; entry ``i`` is a function of (seed, i).

    >>> rows = example_rows(10, kept=5, seed=0)
    >>> sorted(rows[:5].tolist()), sorted(rows[5:].tolist())
    ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    """
    rounds = -(-num // kept)
    orders = [torch.randperm(kept, generator=generator_for(seed, "examples", k)) for k in range(rounds)]
    return torch.cat(orders)[:num]


def check_memory(num: int, shape: tuple[int, ...]) -> None:
    """Refuse a number of float32 samples that does not fit into this machine's memory."""
    size = 4 * num * math.prod(shape)
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        return
    if size > memory:
        raise UserError(
            f"{num:,} samples of shape {shape} take {size / 2**30:.0f} GiB, and this machine has "
            f"{memory / 2**30:.0f} GiB of memory: draw fewer at a time, with other seeds."
        )
