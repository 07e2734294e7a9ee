r"""What a network knows besides ``x``: the time and, if there are classes, the label.

Time features (t = 0 noise, t = 1 data):

.. math:: \phi(t) = \bigl(t,\ \sin(\tfrac{\pi k t}{2}),\ \cos(\tfrac{\pi k t}{2})\bigr)_{k = 1, \dots, 4}

The highest frequency is :math:`2\pi`, so :math:`|d\phi/dt|` stays small. This matters: methods that need the
time derivative of the network (MeanFlow, arXiv 2505.13447, eq. 6; sCM, arXiv 2410.11081, section 4) become
unstable when t enters through high frequencies, as in embeddings made for t in 0 ... 1000.

Labels are the rows 0 ... classes - 1 of a table; row ``classes`` is the null label of classifier-free
guidance (arXiv 2207.12598).
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
    """phi(t): times (B,) to features (B, 9), in the dtype of t."""
    angles = torch.stack([t * frequency for frequency in FREQUENCIES], dim=-1)
    return torch.cat([t[:, None], angles.sin(), angles.cos()], dim=-1)


@final
class Conditioning(nn.Module):
    """c = SiLU(MLP(phi(t)) + interval(r - t) + table[label]), of shape (B, width).

    Computed in float32 (or float64 if the weights are), under autocast too: bfloat16 holds only 8 bits of t.

    Args:
        width: Number of values in c.
        classes: Number of classes; 0 means that labels are refused.
        interval: Embedding of the interval of a two-time network, (B,) to (B, width); None: there is only t.
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
    """Refuse a call whose tensors do not fit together.

    Raises:
        UserError: x is not (B, *shape), t, r or label is not (B,), or a label without classes.
    """
    batch = x.shape[0] if x.dim() else 0
    if tuple(x.shape[1:]) != shape or not x.dim():
        sizes = ", ".join(map(str, shape))
        raise UserError(f"x has shape {tuple(x.shape)}, but this network was built for (B, {sizes}).")
    if t.dim() != 1 or t.shape[0] != batch:
        raise UserError(f"t has shape {tuple(t.shape)}; give one time per sample, shape ({batch},).")
    if r is not None and r.shape != t.shape:
        raise UserError(f"r has shape {tuple(r.shape)}; give one end per sample, shape ({batch},).")
    if label is None:
        return
    if not classes:
        raise UserError("label was given, but this network has classes=0; drop label= or build with classes.")
    if label.dim() != 1 or label.shape[0] != batch:
        raise UserError(f"label has shape {tuple(label.shape)}; give one label per sample, shape ({batch},).")


def join_context(x: Tensor, context: Tensor | None, wanted: int) -> Tensor:
    """Concatenate ``context`` (B, wanted, ...) to x (B, n, ...) along dimension 1.

    Raises:
        UserError: a context is missing, not expected, or does not have shape (B, wanted, ...).
    """
    if not wanted:
        if context is not None:
            raise UserError("context was given, but this network has context=0; drop context= or build with it.")
        return x
    expected = (x.shape[0], wanted, *x.shape[2:])
    if context is None:
        raise UserError(f"this network has context={wanted}: pass context= of shape {tuple(expected)}.")
    if tuple(context.shape) != expected:
        raise UserError(f"context has shape {tuple(context.shape)}, but it must be {tuple(expected)}.")
    return torch.cat([x, context.to(x.dtype)], dim=1)
