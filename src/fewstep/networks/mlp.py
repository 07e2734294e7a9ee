r"""A residual multilayer perceptron on flattened samples.

.. math::
    h_0 = W_{in} [x, context], \qquad
    h_{l+1} = h_l + W_2\,\mathrm{SiLU}\bigl((1 + s_l(c)) \odot W_1 h_l + b_l(c)\bigr), \qquad
    v = W_{out}\,\mathrm{SiLU}(h_L) + g(c) \odot x

with the scale and shift :math:`(s_l, b_l)` linear in the conditioning c (FiLM, arXiv 1709.07871), and
:math:`W_{out} = g = 0` at the start, so that training begins at v = 0. There is no normalisation: with
these few blocks it gained little on digits and cost accuracy on two-dimensional data.

The gain g(c), linear in c, is the part of the velocity that is linear in x. For independent Gaussian
coordinates it is all of it, and where the data hardly vary it is -1/(1 - t), which a network that adds up
bounded features fits badly. (A skip connection weighted by the noise level: arXiv 2206.00364, eq. 7.)
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.networks import option_checks as options
from fewstep.networks.conditioning import Conditioning, check_inputs, join_context
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


def fill(shape: list[int], preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Complete checked options; an MLP takes samples of any shape."""
    return {**preset, **given}


@final
class Block(nn.Module):
    """h + W2 SiLU((1 + s(c)) W1 h + b(c)), (B, width) to (B, width)."""

    def __init__(self, width: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.film = nn.Linear(embedding, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(width, width)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
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
        two_time: Whether it takes an end r too (:mod:`fewstep.networks.two_time`).
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
        """v(x, t): x (B, *shape), t (B,), label (B,) or None (null), context (B, ...) or None.

        With r (B,): u(x, t, r).
        """
        check_inputs(self.shape, self.classes, x, t, label, r)
        values = None if context is None else context.flatten(1)
        h = self.input(join_context(x.flatten(1), values, self._context_values))
        c = self.conditioning(t, label, r)
        for block in self.blocks:
            h = block(h, c)
        v = torch.addcmul(self.output(F.silu(h)), self.gain(c).to(x.dtype), x.flatten(1))
        return v.reshape(x.shape)
