r"""Checks whether a generator copies its training data.

There are three measures, because each of them fails in some cases (given with it):

1. *Distance.* Distances of generated samples to their nearest training sample are compared with the same
   distances of held-out data (Meehan, Chaudhuri & Dasgupta, arXiv 2004.05675). :attr:`Memorisation.share`
   is the share of generated samples below the 5 % quantile of held-out data (5 % without memorisation), and
   :attr:`Memorisation.auroc` is P(generated nearer than held-out) (0.5 without memorisation). Blurred or
   low-variance samples are near to many training samples and raise both.
2. *Replicas.* A sample is a replica when its nearest training sample is less than a
   third as far as the second nearest (Yoon et al. 2023; Gu et al., arXiv 2310.02664, Sec. 2). Blur does not
   raise :attr:`Memorisation.replicas`. In D dimensions a fresh sample is a replica with probability about
   :math:`3^{-D}`; the share among held-out data is the base rate. If the training data contain each sample twice,
   this measure finds nothing.
3. *Copies.* The samples of a generator that learned only the law do not depend on which data were held out:
   with :math:`n_t` training and :math:`n_h` held-out samples, the nearest sample is a
   held-out one with probability :math:`f = n_h / (n_t + n_h)`, also for blurred samples; for a copy it never is.
   If the observed share is h,

   .. math:: c = 1 - h / f

   estimates the share of copies (:attr:`Memorisation.copied`, with mean 0 without
   memorisation). Its standard error without memorisation is that of drawing the held-out set at random from both
   sets together: with :math:`w_i` the number of samples (out of N) whose nearest neighbour is point i,
   :math:`\mathrm{Var}\,h = n_h (1 - f)\,\mathrm{var}(w) / N^2`. The estimate is
   unbiased, but its standard error is large when few data are held out.

:attr:`Memorisation.flagged` is True if the replicas exceed the base rate by three standard errors, or if the copies
exceed three standard errors and the share of near samples is over twice the expected one. A large share or AUROC
alone can come from blur and does not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.metrics.neighbours import nearest
from fewstep.metrics.rows import TIE_TOLERANCE, Samples, as_pair
from fewstep.metrics.sample_distances import Estimate

NEAR_QUANTILE = 0.05
"""Share of held-out samples that count as near to the training data; chosen, not tuned."""

MAX_REPLICA_RATIO = 1.0 / 3.0
"""Ratio of nearest to second nearest distance below which a sample is a replica (Yoon et al. 2023)."""


@dataclass(frozen=True)
class Memorisation:
    """Results of :func:`nearest_neighbour_check`.

    Attributes:
        share: share of generated samples nearer to a training sample than 5 % of the held-out ones are.
        auroc: P(a generated sample is nearer to training data than a held-out one); ties count half.
        median_ratio: median nearest distance of generated over that of held-out samples (1 without
            memorisation, 0 for copies).
        threshold: the 5 % quantile of held-out distances, in units of the data.
        replicas: share of generated samples less than a third as far from the nearest training sample as from
            the second nearest.
        replicas_base: the same share of held-out samples.
        replicas_se: standard error of ``replicas - replicas_base`` without memorisation.
        copied: estimated share of copies, with its standard error without memorisation.
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
        """Whether the samples show memorisation that chance and blur do not explain (module docstring)."""
        replicated = self.replicas - self.replicas_base > 3.0 * self.replicas_se
        copied = self.copied.value > 3.0 * self.copied.standard_error
        return replicated or (copied and self.share > 2.0 * NEAR_QUANTILE)


def nearest_neighbour_check(fake: Samples, train: Samples, held_out: Samples) -> Memorisation:
    """Compare the distances of generated and of held-out samples to the training data (module docstring).

    Args:
        fake: generated samples ``(N, ...)``.
        train: all data that the generator was trained on ``(T, ...)``; copies of data that are left out would not be
            found.
        held_out: data of the same law that it was not trained on ``(H, ...)``; with fewer than 100 the quantile is
            inaccurate.

    Raises:
        UserError: the dimensions differ, a set has fewer than two samples, or values are not finite.
    """
    y, x = as_pair(fake, train, ("fake", "train"))
    z = as_pair(fake, held_out, ("fake", "held_out"))[1]
    return check_from_held_out(y, x, z, nearest(z, x, 2)[0])


def check_from_held_out(y: Tensor, x: Tensor, z: Tensor, squared_held: Tensor) -> Memorisation:
    """:func:`nearest_neighbour_check` of generated ``y (N, D)``, training ``x`` and held-out rows ``z (H, D)``.

    ``squared_held (H, 2)`` are the squared distances of ``z`` to their two nearest rows of ``x``.
    """
    squared, index = nearest(y, x, 2)
    to_held, at_held = nearest(y, z)
    distances, reference = squared[:, 0].sqrt(), squared_held[:, 0].sqrt()
    threshold = float(torch.quantile(reference, NEAR_QUANTILE))
    replicas, base = _replicas(squared), _replicas(squared_held)
    n, h = y.shape[0], z.shape[0]
    # with pseudo-counts, because the standard error must not be 0 at an observed share of 0
    pooled = (n * replicas + h * base + 1.0) / (n + h + 2.0)
    middle = float(reference.median())
    return Memorisation(
        share=float((distances < threshold).double().mean()),
        auroc=_auroc(distances, reference),
        median_ratio=float(distances.median()) / middle if middle > 0.0 else math.inf,
        threshold=threshold,
        replicas=replicas,
        replicas_base=base,
        replicas_se=math.sqrt(pooled * (1.0 - pooled) * (1.0 / n + 1.0 / h)),
        copied=_copied(squared[:, 0], index[:, 0], to_held[:, 0], at_held[:, 0], x.shape[0], h),
    )


def _replicas(squared: Tensor) -> float:
    """Share of rows ``(N, 2)`` of squared distances whose first is below a ninth of the second."""
    return float((squared[:, 0] < MAX_REPLICA_RATIO**2 * squared[:, 1]).double().mean())


def _auroc(distances: Tensor, reference: Tensor) -> float:
    """P(distance < reference) + P(equal) / 2, by ranks."""
    ordered = reference.sort().values
    below = torch.searchsorted(ordered, distances, right=False)
    through = torch.searchsorted(ordered, distances, right=True)
    return float(1.0 - (below + through).double().mean() / (2.0 * ordered.numel()))


def _copied(
    near_train: Tensor, at_train: Tensor, near_held: Tensor, at_held: Tensor, n_train: int, n_held: int
) -> Estimate:
    """``1 - h / f`` and its standard error under exchangeable training and held-out data; ties count half."""
    total, size = n_train + n_held, near_train.numel()
    tie = (near_train - near_held).abs() <= TIE_TOLERANCE * torch.maximum(near_train, near_held)
    held = torch.where(tie, 0.5, (near_held < near_train).double())
    counts = torch.zeros(total, dtype=torch.float64, device=near_train.device)
    counts.index_add_(0, at_train, 1.0 - held)
    counts.index_add_(0, at_held + n_train, held)
    fraction = n_held / total
    spread = math.sqrt(n_held * (1.0 - fraction) * float(counts.var())) / size
    return Estimate(1.0 - float(held.mean()) / fraction, spread / fraction)
