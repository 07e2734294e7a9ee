"""Adversarial losses of a discriminator's scores of real and generated samples, and the penalty on its gradient.

With scores ``r`` of real and ``f`` of generated samples and ``s(x) = softplus(x) = log(1 + e^x)``:

| loss | discriminator | generator | at ``r = f = 0`` |
|---|---|---|---|
| ``non_saturating`` (arXiv:1406.2661, sec. 3) | ``s(-r) + s(f)`` | ``s(-f) = -log sigmoid(f)`` | 2 log 2 |
| ``hinge`` (arXiv:1705.02894, eq. 3) | ``max(0, 1 - r) + max(0, 1 + f)`` | ``-f`` | 2 |
| ``relativistic`` (arXiv:1807.00734; 2501.05441, eq. 2) | ``s(-(r - f))``, row by row | ``s(-(f - r))`` | log 2 |

The last column is the discriminator's loss for constant scores. A discriminator that has learned nothing has that loss,
and so has one that cannot distinguish samples of equal laws; the loss alone does not tell the two cases apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from fewstep.errors import unknown

Scores = Callable[[Tensor, Tensor], Tensor]


@final
@dataclass(frozen=True)
class AdversarialLoss:
    """Mean losses as functions of the scores ``(real, fake)``, each (B,); see the table above.

    Attributes:
        discriminator: loss of the discriminator, a scalar.
        generator: loss of the generator, a scalar.
    """

    discriminator: Scores
    generator: Scores


LOSSES: dict[str, AdversarialLoss] = {
    "non_saturating": AdversarialLoss(
        lambda real, fake: (softplus(-real) + softplus(fake)).mean(),
        lambda real, fake: softplus(-fake).mean(),
    ),
    "hinge": AdversarialLoss(
        lambda real, fake: (relu(1 - real) + relu(1 + fake)).mean(),
        lambda real, fake: -fake.mean(),
    ),
    "relativistic": AdversarialLoss(
        lambda real, fake: softplus(fake - real).mean(),
        lambda real, fake: softplus(real - fake).mean(),
    ),
}


def find_adversarial(name: str) -> AdversarialLoss:
    """The adversarial loss of a name.

    Args:
        name: ``non_saturating``, ``hinge`` or ``relativistic``.

    Raises:
        UserError: there is no loss of that name.

    >>> find_adversarial("hinge").discriminator(torch.zeros(4), torch.zeros(4)).item()
    2.0
    """
    if name not in LOSSES:
        raise unknown("adversarial loss", name, LOSSES)
    return LOSSES[name]


def slope(scores: Tensor, x: Tensor) -> Tensor:
    """The gradient penalty ``E |grad_x D(x)|^2``, a scalar: R1 on real samples, R2 on generated ones.

    Args:
        scores: ``D(x)``, (B,), computed from x row by row.
        x: (B, ...), with ``requires_grad``. The square is summed over the entries of a sample.

    Source: arXiv:1801.04406, eq. 9.

    >>> x = torch.ones(2, 3, requires_grad=True)
    >>> slope(2 * x.sum(1), x).item()
    12.0
    """
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean()
