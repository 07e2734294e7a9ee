r"""Discriminators: one score per sample, higher for real samples.

Vectors and small images (up to 256 values) pass a multilayer perceptron, larger images pass residual convolutions
that halve the sides down to 4. There is no batch normalisation, so that the gradient penalty of a sample depends on
that sample alone (arXiv 1801.04406), and no other normalisation, because the penalties bound the slope. Activations
of a frozen feature network can be inputs beside the sample (arXiv 2111.01007), averaged over positions down to at
most 4 x 4. With conditions the score is
:math:`\psi(h) + \sum_c e_c \cdot h` (projection, arXiv 1802.05637, eq. 3): :math:`e_c` is a row of a table for a
label, and a linear function of the values of any other condition, averaged over all dimensions but the last.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The constants below are chosen, not tuned.
MAX_VECTOR_SIZE = 256  # samples of at most so many values are treated as vectors
NEGATIVE_SLOPE = 0.2  # of the leaky rectifier
MIN_SIDE = 4  # images are halved until their shorter side is at most this
FEATURE_WIDTH = 64  # width of the layer on each layer of features
WIDTHS = (32, 64, 128, 128, 128)  # channels per resolution


@final
class Discriminator(nn.Module):
    """Scores ``(B,)`` of samples ``(B, *shape)``.

    Args:
        shape: of one sample.
        classes: number of labels, 0 for none.
        features: gives the activations of a frozen network on samples, each (B, C, ...); its weights are not in
            the module's state.
        conditions: shapes of one row of the other conditions, by name.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int = 0,
        features: Callable[[Tensor], Sequence[Tensor]] | None = None,
        conditions: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        size = math.prod(shape)
        if len(shape) != 3 or size <= MAX_VECTOR_SIZE:
            width = 256 if size > 2 else 128
            self.body: nn.Module = nn.Sequential(
                nn.Flatten(),
                nn.Linear(size, width),
                nn.LeakyReLU(NEGATIVE_SLOPE),
                nn.Linear(width, width),
                nn.LeakyReLU(NEGATIVE_SLOPE),
            )
        else:
            self.body, width = _convolutions(shape)
        self.features = features
        self.feature_layers = nn.ModuleList()
        if features is not None:
            with torch.no_grad():
                widths = [flat_activations(f).shape[1] for f in features(torch.zeros(1, *shape))]
            self.feature_layers = nn.ModuleList(
                nn.Sequential(nn.Linear(n, FEATURE_WIDTH), nn.LeakyReLU(NEGATIVE_SLOPE)) for n in widths
            )
            width += FEATURE_WIDTH * len(widths)
        self.head = nn.Linear(width, 1)
        self.table = nn.Embedding(classes, width) if classes else None
        if self.table is not None:
            nn.init.zeros_(self.table.weight)
        sizes = {name: part[-1] if part else 1 for name, part in conditions.items()}
        self.others = nn.ModuleDict({name: nn.Linear(size, width) for name, size in sizes.items()})
        for layer in self.others.values():
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, cond: Mapping[str, Tensor] = MappingProxyType({})) -> Tensor:
        """Scores (B,) of samples x (B, *shape) with their conditions, each (B, ...)."""
        h = self.body(x)
        if self.features is not None:
            pairs = zip(self.feature_layers, self.features(x), strict=True)
            h = torch.cat([h, *(layer(flat_activations(f)) for layer, f in pairs)], 1)
        score: Tensor = self.head(h).squeeze(1)
        if self.table is not None and "label" in cond:
            score = score + (self.table(cond["label"]) * h).sum(1) / math.sqrt(h.shape[1])
        for name, layer in self.others.items():
            rows = cond[name].to(h.dtype)
            mean = rows.reshape(len(rows), -1, rows.shape[-1] if rows.ndim > 1 else 1).mean(1)
            score = score + (layer(mean) * h).sum(1) / math.sqrt(h.shape[1])
        return score


def flat_activations(f: Tensor) -> Tensor:
    """Activations (B, C, ...) as rows (B, F); maps are averaged down to at most 4 x 4 positions first.

    >>> flat_activations(torch.zeros(2, 3, 16, 8)).shape
    torch.Size([2, 48])
    """
    if f.ndim == 4 and max(f.shape[2:]) > MIN_SIDE:
        f = F.adaptive_avg_pool2d(f, (min(MIN_SIDE, f.shape[2]), min(MIN_SIDE, f.shape[3])))
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
        """LReLU((avgpool(skip x) + second(LReLU(first x))) / sqrt 2)."""
        inner = self.second(F.leaky_relu(self.first(x), NEGATIVE_SLOPE))
        shortcut = F.avg_pool2d(self.skip(x), 2, ceil_mode=True)
        return F.leaky_relu((shortcut + inner) / math.sqrt(2.0), NEGATIVE_SLOPE)


def _convolutions(shape: tuple[int, ...]) -> tuple[nn.Module, int]:
    """The convolutional body for images (C, H, W), and the width of its output."""
    patch = 2 if min(shape[1:]) > 2 * MIN_SIDE and all(n % 2 == 0 for n in shape[1:]) else 1
    shape = (shape[0] * patch**2, shape[1] // patch, shape[2] // patch)
    side, halvings = min(shape[1:]), 0
    while side > MIN_SIDE and halvings < len(WIDTHS) - 1:
        side, halvings = -(-side // 2), halvings + 1
    widths = WIDTHS[: halvings + 1]
    blocks = [Halving(a, b) for a, b in itertools.pairwise(widths)]
    low = math.prod(-(-n // 2**halvings) for n in shape[1:]) * widths[-1]
    body = nn.Sequential(
        nn.PixelUnshuffle(patch),  # most of the time would be spent at the full resolution
        nn.Conv2d(shape[0], widths[0], 3, padding=1),
        nn.LeakyReLU(NEGATIVE_SLOPE),
        *blocks,
        nn.Flatten(),
        nn.Linear(low, 256),
        nn.LeakyReLU(NEGATIVE_SLOPE),
    )
    return body, 256
