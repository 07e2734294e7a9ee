r"""The conditioning of a network: the time, the interval of a two-time network, and the class label.

Time features (t = 0 noise, t = 1 data):

.. math:: \phi(t) = \bigl(t,\ \sin(\tfrac{\pi k t}{2}),\ \cos(\tfrac{\pi k t}{2})\bigr)_{k = 1, \dots, 4}

The highest frequency is :math:`2\pi`, so :math:`|d\phi/dt|` stays small. Methods that need the time derivative of
the network (MeanFlow, arXiv 2505.13447, eq. 6; sCM, arXiv 2410.11081, section 4) become unstable with high
frequencies, such as those of embeddings made for t in 0 ... 1000.

The embeddings of labels are the rows 0 ... classes - 1 of a table; row ``classes`` belongs to the null label of
classifier-free guidance (arXiv 2207.12598).
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UserError

FREQUENCIES = tuple(0.5 * math.pi * k for k in range(1, 5))
TIME_FEATURES = 1 + 2 * len(FREQUENCIES)


def time_features(t: Tensor) -> Tensor:
    """phi(t) of the module docstring: times (B,) to features (B, 9), in the dtype of t.

    >>> time_features(torch.zeros(2)).shape
    torch.Size([2, 9])
    """
    angles = torch.stack([t * frequency for frequency in FREQUENCIES], dim=-1)
    return torch.cat([t[:, None], angles.sin(), angles.cos()], dim=-1)


@final
class Conditioning(nn.Module):
    """c = SiLU(MLP(phi(t)) + interval(r - t) + table[label]), of shape (B, width).

    It is computed in float32 (in float64 if the weights are), also under autocast: bfloat16 keeps only 8 bits of t.

    Args:
        width: Number of values in c.
        classes: Number of classes; 0 means that labels are refused.
        interval: Embedding of the interval of a two-time network, (B,) to (B, width); None for a velocity network.
    """

    def __init__(self, width: int, classes: int, interval: nn.Module | None = None) -> None:
        super().__init__()
        self.classes = classes
        self.first = nn.Linear(TIME_FEATURES, width)
        self.second = nn.Linear(width, width)
        self.table = nn.Embedding(classes + 1, width) if classes else None
        if self.table is not None:
            nn.init.normal_(self.table.weight, std=0.3)
        self.interval = interval

    def forward(self, t: Tensor, label: Tensor | None, r: Tensor | None = None) -> Tensor:
        """c (B, width) of times t (B,), labels (B,) or None (null), and ends r (B,) or None (r = t)."""
        device = t.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._embed(t, label, r)
        return self._embed(t, label, r)

    def _embed(self, t: Tensor, label: Tensor | None, r: Tensor | None) -> Tensor:
        weight = self.first.weight
        wide = torch.promote_types(torch.promote_types(t.dtype, weight.dtype), torch.float32)
        phi = time_features(t.to(wide)).to(weight.dtype)
        c = self.second(F.silu(self.first(phi)))
        if self.interval is not None:
            length = torch.zeros_like(t, dtype=wide) if r is None else r.to(wide) - t.to(wide)
            c = c + self.interval(length)
        elif r is not None:
            raise UserError("r was given, but this is a velocity network: drop r= or build it with two_time: true.")
        if self.table is not None:
            rows = torch.full_like(t, self.classes, dtype=torch.long) if label is None else label
            c = c + self.table(rows)
        return F.silu(c)


def check_inputs(
    shape: tuple[int, ...], classes: int, x: Tensor, t: Tensor, label: Tensor | None, r: Tensor | None = None
) -> None:
    """Refuse a call of a network whose tensors do not fit together.

    Args:
        shape: shape of one sample.
        classes: number of classes, 0 for none.
        x, t, label, r: the arguments of the call.

    Raises:
        UserError: x is not (B, *shape); t, r or label is not (B,); a label is given and there are no classes.
    """
    batch = x.shape[0] if x.dim() else 0
    if tuple(x.shape[1:]) != shape or not x.dim():
        sizes = ", ".join(map(str, shape))
        raise UserError(f"x has shape {tuple(x.shape)}, but this network was built for (B, {sizes}).")
    if t.dim() != 1 or t.shape[0] != batch:
        raise UserError(f"t has shape {tuple(t.shape)}; give one time per sample, shape ({batch},).")
    if r is not None and r.shape != t.shape:
        raise UserError(f"r has shape {tuple(r.shape)}; give one end time per sample, shape ({batch},).")
    if label is None:
        return
    if not classes:
        raise UserError(
            "label was given, but this network has classes=0: drop label=, or build the network with classes."
        )
    if label.dim() != 1 or label.shape[0] != batch:
        raise UserError(f"label has shape {tuple(label.shape)}; give one label per sample, shape ({batch},).")


def concatenate_context(x: Tensor, context: Tensor | None, channels: int) -> Tensor:
    """Concatenate ``context`` (B, channels, ...) to x (B, n, ...) along dimension 1.

    Args:
        x: the samples.
        context: the context; None if the network has none.
        channels: context channels that the network was built for.

    Raises:
        UserError: a context is missing, not expected, or does not have shape (B, channels, ...).
    """
    if not channels:
        if context is not None:
            raise UserError(
                "context was given, but this network has context=0: drop context=, or build the network with context."
            )
        return x
    expected = (x.shape[0], channels, *x.shape[2:])
    if context is None:
        raise UserError(f"this network has context={channels}: pass context= of shape {tuple(expected)}.")
    if tuple(context.shape) != expected:
        raise UserError(f"context has shape {tuple(context.shape)}, but it must be {tuple(expected)}.")
    return torch.cat([x, context.to(x.dtype)], dim=1)
