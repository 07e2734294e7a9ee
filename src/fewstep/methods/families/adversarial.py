"""Adversarial losses: a discriminator's scores of real and generated samples, and the penalties that keep it smooth.

With scores ``r`` of real and ``f`` of generated samples and ``s(x) = softplus(x) = log(1 + e^x)``:

| loss | discriminator | generator | at ``r = f = 0`` |
|---|---|---|---|
| ``non_saturating`` (arXiv:1406.2661, sec. 3) | ``s(-r) + s(f)`` | ``s(-f) = -log sigmoid(f)`` | 2 log 2 |
| ``hinge`` (arXiv:1705.02894, eq. 3) | ``max(0, 1 - r) + max(0, 1 + f)`` | ``-f`` | 2 |
| ``relativistic`` (arXiv:1807.00734; 2501.05441, eq. 2) | ``s(-(r - f))``, row by row | ``s(-(f - r))`` | log 2 |

A discriminator's loss that stays at the last column is no proof of balance: a discriminator that has learned nothing
scores the same.
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
    """Mean losses of the two players as functions of the scores ``(real, fake)``, each (B,)."""

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
    """Look a loss up by name."""
    if name not in LOSSES:
        raise unknown("adversarial loss", name, LOSSES)
    return LOSSES[name]


def slope(scores: Tensor, x: Tensor) -> Tensor:
    """``E |grad_x D(x)|^2``, summed over the entries of a sample: R1 on real, R2 on generated ones.

    (arXiv:1801.04406, eq. 9.) ``scores`` (B,) must have been computed from ``x``, row by row.
    """
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean()
