r"""Does a generator copy its training data?

Three questions, because each alone is fooled by something:

1. *Too near?* Distances of generated samples to their nearest training sample are compared with the same
   distances of held-out data (Meehan, Chaudhuri & Dasgupta, arXiv 2004.05675). :attr:`Memorisation.share`
   counts those below the 5 % quantile of held-out data (5 % when nothing is wrong), and
   :attr:`Memorisation.auroc` is P(generated nearer than held-out) (0.5 when nothing is wrong). Blurred or
   low-variance samples lie near to everything and raise both.
2. *Near to one training sample only?* A sample is a replica when its nearest training sample is less than a
   third as far as the second nearest (Yoon et al. 2023; Gu et al., arXiv 2310.02664, Sec. 2). Blur does not
   raise :attr:`Memorisation.replicas`. In D dimensions fresh samples do this with probability about
   :math:`3^{-D}`, so held-out data give the base rate. Training data that hold each sample twice hide it.
3. *Nearer to training than to held-out data?* A generator that knows only the law cannot tell which data it
   was trained on: with :math:`n_t` training and :math:`n_h` held-out samples, its samples fall nearest to a
   held-out one with probability :math:`f = n_h / (n_t + n_h)`, however blurred. A copy never does. If the
   share is h,

   .. math:: c = 1 - h / f

   estimates the share of copies (:attr:`Memorisation.copied`, 0 in the mean when nothing is wrong). Its
   standard error under "nothing is wrong" is that of drawing the held-out set at random from both sets
   together: with :math:`w_i` the number of samples (out of N) whose nearest neighbour is point i,
   :math:`\mathrm{Var}\,h = n_h (1 - f)\,\mathrm{var}(w) / N^2`. Unbiased, but weak when few data are held
   out.

:attr:`Memorisation.flagged` asks for replicas beyond three standard errors over the base rate, or for copies
beyond three standard errors together with twice the expected share of near samples. A large share or AUROC
alone is blur.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.metrics.neighbours import nearest
from fewstep.metrics.rows import TIE, Samples, as_pair
from fewstep.metrics.sample_distances import Estimate

QUANTILE = 0.05
"""Share of held-out samples that count as near to the training data."""

RATIO = 1.0 / 3.0
"""Nearest over second nearest distance below which a sample is a replica."""


@dataclass(frozen=True)
class Memorisation:
    """What :func:`nearest_neighbour_check` found.

    Attributes:
        share: share of generated samples nearer to a training sample than 5 % of the held-out ones are.
        auroc: P(a generated sample is nearer to training data than a held-out one), ties half.
        median_ratio: median nearest distance of generated over that of held-out samples (1 when alike, 0 for
            copies).
        threshold: the 5 % quantile of held-out distances, in units of the data.
        replicas: share of generated samples less than a third as far from the nearest training sample as from
            the second nearest.
        replicas_base: the same share of held-out samples.
        replicas_se: standard error of ``replicas - replicas_base`` if there is no difference.
        copied: estimated share of copies, with its standard error when there are none.
    """

    share: float
    auroc: float
    median_ratio: float
    threshold: float
    replicas: float
    replicas_base: float
    replicas_se: float
    copied: Estimate

    @property
    def flagged(self) -> bool:
        """Whether this is memorisation beyond chance and beyond blur (module docstring)."""
        replicated = self.replicas - self.replicas_base > 3.0 * self.replicas_se
        copied = self.copied.value > 3.0 * self.copied.standard_error
        return replicated or (copied and self.share > 2.0 * QUANTILE)


def nearest_neighbour_check(fake: Samples, train: Samples, held_out: Samples) -> Memorisation:
    """Compare how near generated and held-out samples lie to the training data (module docstring).

    Args:
        fake: generated samples ``(N, ...)``.
        train: all data the generator was trained on ``(T, ...)``; a part of them would miss copies of the
            rest.
        held_out: data of the same law it was not trained on ``(H, ...)``; 100 or more make the quantile
            usable.

    Raises:
        UserError: other dimensions, fewer than two samples in a set, values that are not finite.
    """
    y, x = as_pair(fake, train, ("fake", "train"))
    z = as_pair(fake, held_out, ("fake", "held_out"))[1]
    squared, index = nearest(y, x, 2)
    squared_held = nearest(z, x, 2)[0]
    to_held, at_held = nearest(y, z)
    near, reference = squared[:, 0].sqrt(), squared_held[:, 0].sqrt()
    threshold = float(torch.quantile(reference, QUANTILE))
    replicas, base = _replicas(squared), _replicas(squared_held)
    n, h = y.shape[0], z.shape[0]
    pooled = (n * replicas + h * base + 1.0) / (n + h + 2.0)  # never 0: a rare event is not a certain one
    middle = float(reference.median())
    return Memorisation(
        share=float((near < threshold).double().mean()),
        auroc=_auroc(near, reference),
        median_ratio=float(near.median()) / middle if middle > 0.0 else math.inf,
        threshold=threshold,
        replicas=replicas,
        replicas_base=base,
        replicas_se=math.sqrt(pooled * (1.0 - pooled) * (1.0 / n + 1.0 / h)),
        copied=_copied(squared[:, 0], index[:, 0], to_held[:, 0], at_held[:, 0], x.shape[0], h),
    )


def _replicas(squared: Tensor) -> float:
    """Share of rows of ``(N, 2)`` squared distances whose first is below a ninth of the second."""
    return float((squared[:, 0] < RATIO**2 * squared[:, 1]).double().mean())


def _auroc(near: Tensor, reference: Tensor) -> float:
    """P(near < reference) + P(equal) / 2, by ranks."""
    ordered = reference.sort().values
    below = torch.searchsorted(ordered, near, right=False)
    through = torch.searchsorted(ordered, near, right=True)
    return float(1.0 - (below + through).double().mean() / (2.0 * ordered.numel()))


def _copied(
    near_train: Tensor, at_train: Tensor, near_held: Tensor, at_held: Tensor, n_train: int, n_held: int
) -> Estimate:
    """``1 - h / f`` and its standard error under exchangeable training and held-out data; ties count half."""
    total, size = n_train + n_held, near_train.numel()
    tie = (near_train - near_held).abs() <= TIE * torch.maximum(near_train, near_held)
    held = torch.where(tie, 0.5, (near_held < near_train).double())
    counts = torch.zeros(total, dtype=torch.float64, device=near_train.device)
    counts.index_add_(0, at_train, 1.0 - held)
    counts.index_add_(0, at_held + n_train, held)
    fraction = n_held / total
    spread = math.sqrt(n_held * (1.0 - fraction) * float(counts.var())) / size
    return Estimate(1.0 - float(held.mean()) / fraction, spread / fraction)
