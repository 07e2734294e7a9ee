r"""Discriminators: one number per sample, high for real ones.

Vectors and small images (up to 256 values) go through a multilayer perceptron, larger images through residual
convolutions that halve the sides down to 4. There is no normalisation over the batch, so that the gradient penalties
of one sample are that sample's alone (arXiv 1801.04406), and no normalisation at all: the
penalties bound the slope. It may look through frozen features too (arXiv 2111.01007): their activations, averaged over
positions down to at most 4 x 4, are scored beside the sample itself. With classes the score is
:math:`\psi(h) + e_{label} \cdot h` (projection, arXiv 1802.05637, eq. 3).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FLAT = 256  # values up to which a sample is treated as a vector
SLOPE = 0.2  # of the leaky rectifier
LOWEST = 4  # side of the image at which halving ends
LOOK = 64  # values that a layer of features is summed up in
WIDTHS = (32, 64, 128, 128, 128)


@final
class Discriminator(nn.Module):
    """Scores ``(B,)`` of samples ``(B, *shape)``.

    Args:
        shape: of one sample.
        classes: number of labels, 0 for none.
        features: frozen activations of samples, each (B, C, ...); no part of the module's state.
    """

    def __init__(
        self, shape: tuple[int, ...], classes: int = 0, features: Callable[[Tensor], Sequence[Tensor]] | None = None
    ) -> None:
        super().__init__()
        size = math.prod(shape)
        if len(shape) != 3 or size <= FLAT:
            width = 256 if size > 2 else 128
            self.body: nn.Module = nn.Sequential(
                nn.Flatten(), nn.Linear(size, width), nn.LeakyReLU(SLOPE), nn.Linear(width, width), nn.LeakyReLU(SLOPE)
            )
        else:
            self.body, width = _convolutions(shape)
        self.features = features
        self.looks = nn.ModuleList()
        if features is not None:
            with torch.no_grad():
                seen = [coarse(f).shape[1] for f in features(torch.zeros(1, *shape))]
            self.looks = nn.ModuleList(nn.Sequential(nn.Linear(n, LOOK), nn.LeakyReLU(SLOPE)) for n in seen)
            width += LOOK * len(seen)
        self.head = nn.Linear(width, 1)
        self.table = nn.Embedding(classes, width) if classes else None
        if self.table is not None:
            nn.init.zeros_(self.table.weight)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Score of every sample; ``label`` (B,) where there are classes."""
        h = self.body(x)
        if self.features is not None:
            seen = [look(coarse(f)) for look, f in zip(self.looks, self.features(x), strict=True)]
            h = torch.cat([h, *seen], 1)
        score: Tensor = self.head(h).squeeze(1)
        if self.table is not None and label is not None:
            score = score + (self.table(label) * h).sum(1) / math.sqrt(h.shape[1])
        return score


def coarse(f: Tensor) -> Tensor:
    """Activations (B, C, ...) as rows, maps averaged down to at most 4 x 4 positions."""
    if f.ndim == 4 and max(f.shape[2:]) > LOWEST:
        f = F.adaptive_avg_pool2d(f, (min(LOWEST, f.shape[2]), min(LOWEST, f.shape[3])))
    return f.flatten(1)


@final
class Halving(nn.Module):
    """A residual block that halves both sides: (B, before, H, W) to (B, after, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=2, padding=1)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.skip = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second(F.leaky_relu(self.first(x), SLOPE))
        straight = F.avg_pool2d(self.skip(x), 2, ceil_mode=True)
        return F.leaky_relu((straight + inner) / math.sqrt(2.0), SLOPE)


def _convolutions(shape: tuple[int, ...]) -> tuple[nn.Module, int]:
    """The convolutional body and the number of features it ends with."""
    patch = 2 if min(shape[1:]) > 2 * LOWEST and all(n % 2 == 0 for n in shape[1:]) else 1
    shape = (shape[0] * patch**2, shape[1] // patch, shape[2] // patch)
    side, halvings = min(shape[1:]), 0
    while side > LOWEST and halvings < len(WIDTHS) - 1:
        side, halvings = -(-side // 2), halvings + 1
    widths = WIDTHS[: halvings + 1]
    blocks = [Halving(a, b) for a, b in itertools.pairwise(widths)]
    low = math.prod(-(-n // 2**halvings) for n in shape[1:]) * widths[-1]
    body = nn.Sequential(
        nn.PixelUnshuffle(patch),  # the finest level costs most and tells least
        nn.Conv2d(shape[0], widths[0], 3, padding=1),
        nn.LeakyReLU(SLOPE),
        *blocks,
        nn.Flatten(),
        nn.Linear(low, 256),
        nn.LeakyReLU(SLOPE),
    )
    return body, 256
