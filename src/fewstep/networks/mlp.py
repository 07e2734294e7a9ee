r"""A residual multilayer perceptron on flattened samples.

.. math::
    h_0 = W_{in} [x, context], \qquad
    h_{l+1} = h_l + W_2\,\mathrm{SiLU}\bigl((1 + s_l(c)) \odot W_1 h_l + b_l(c)\bigr), \qquad
    v = W_{out}\,\mathrm{SiLU}(h_L) + g(c) \odot x

with the scale and shift :math:`(s_l, b_l)` linear in the conditioning c (FiLM, arXiv 1709.07871), and
:math:`W_{out} = g = 0` initially, so that training begins at v = 0. There is no normalisation: with so few
blocks it improved digits little and reduced the accuracy on two-dimensional data.

The gain g(c), linear in c, gives the part of the velocity that is linear in x. For independent Gaussian
coordinates the velocity has no other part. For features that hardly vary g must be -1/(1 - t), which the sum of
hidden features fits badly near t = 1. (A skip connection weighted by the noise level: arXiv 2206.00364, eq. 7.)
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.networks import option_checks as options
from fewstep.networks.conditioning import Conditioning, check_inputs, concatenate_context
from fewstep.networks.two_time import interval

CHECKERS: dict[str, options.Checker] = {
    "width": options.positive,
    "blocks": options.positive,
    "embedding": options.positive,
    "dropout": options.probability,
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"width": 64, "blocks": 2, "embedding": 32, "dropout": 0.0},
    "compact": {"width": 128, "blocks": 2, "embedding": 32, "dropout": 0.0},
    "small": {"width": 288, "blocks": 2, "embedding": 64, "dropout": 0.0},
    "medium": {"width": 512, "blocks": 3, "embedding": 128, "dropout": 0.0},
    "large": {"width": 1024, "blocks": 4, "embedding": 256, "dropout": 0.0},
}


def complete_options(shape: list[int], preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Complete checked options with those of the preset; an MLP takes samples of any shape.

    Args:
        shape: shape of one sample.
        preset: all options of the preset.
        given: the options that were given.
    """
    return {**preset, **given}


@final
class Block(nn.Module):
    """h + W2 SiLU((1 + s(c)) W1 h + b(c))."""

    def __init__(self, width: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.film = nn.Linear(embedding, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(width, width)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """h (B, width) and c (B, embedding) to (B, width)."""
        scale, shift = self.film(c).to(h.dtype).chunk(2, dim=-1)
        inner = torch.addcmul(shift, self.first(h), 1 + scale)
        return h + self.second(self.dropout(F.silu(inner)))


@final
class MLP(nn.Module):
    """Residual MLP with FiLM conditioning.

    Args:
        shape: Shape of one sample; flattened inside.
        classes: Number of labels; label ``classes`` is the null label. 0: no labels.
        context: Context channels of shape ``shape[1:]`` each (values, for vectors), concatenated to x. 0: none.
        width: Width of the residual stream.
        blocks: Number of residual blocks.
        embedding: Width of the conditioning vector.
        dropout: Dropout probability inside the blocks.
        two_time: Whether it also takes an end time r (:mod:`fewstep.networks.two_time`).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        context: int,
        *,
        width: int,
        blocks: int,
        embedding: int,
        dropout: float,
        two_time: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.classes, self.context = tuple(shape), classes, context
        size = options.features(shape)
        self.conditioning = Conditioning(embedding, classes, interval(embedding, two_time))
        self._context_values = context * math.prod(shape[1:])
        self.input = nn.Linear(size + self._context_values, width)
        self.blocks = nn.ModuleList(Block(width, embedding, dropout) for _ in range(blocks))
        self.output = nn.Linear(width, size)
        self.gain = nn.Linear(embedding, size)
        for layer in (self.output, self.gain):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        context: Tensor | None = None,
        r: Tensor | None = None,
    ) -> Tensor:
        """v(x, t), or u(x, t, r) with r; (B, *shape).

        Args:
            x: samples (B, *shape).
            t: times (B,).
            label: labels (B,); None: the null label.
            context: context (B, context, *shape[1:]), or None.
            r: end times (B,) of a two-time network; None: r = t.
        """
        check_inputs(self.shape, self.classes, x, t, label, r)
        values = None if context is None else context.flatten(1)
        h = self.input(concatenate_context(x.flatten(1), values, self._context_values))
        c = self.conditioning(t, label, r)
        for block in self.blocks:
            h = block(h, c)
        v = torch.addcmul(self.output(F.silu(h)), self.gain(c).to(x.dtype), x.flatten(1))
        return v.reshape(x.shape)
