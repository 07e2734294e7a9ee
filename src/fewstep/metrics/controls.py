"""Controls: samples that cost no model, and what they score.

Every quality table carries two of them. A Gaussian with the mean and covariance of the data is the *negative*
control: it may match a good model in energy and sliced Wasserstein distance while almost none of its samples
look like data, so whatever it scores is the price of a distance read alone. Rows of the training data are the
*positive* control: nothing scores better, and the memorisation check must flag them. They are drawn at random
(seeded) from all of the split: the first rows of a sorted file would be another distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.metrics.frechet import moments
from fewstep.metrics.rows import Samples, as_rows, as_tensor, pick


def moment_matched_gaussian(y: Samples, n: int, seed: int = 0) -> Tensor:
    """Draw ``n`` samples of the Gaussian with the mean and covariance of ``y``.

    ``mean + z R`` with ``z`` standard normal and ``R^T R`` the covariance of ``y`` (normalised by N - 1), which may be
    rank deficient: directions in which the data do not vary are kept constant.

    Args:
        y: data ``(N, ...)``.
        n: number of samples.
        seed: seed of ``z``; the global random state is not touched.

    Returns:
        ``(n, ...)`` in the dtype and on the device of ``y``.

    Raises:
        UserError: ``n`` below 1, or unusable data.
    """
    rows = as_rows(y, "y")
    _check_count(n)
    mean, root = moments(rows)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, root.shape[0], generator=generator, dtype=torch.float64).to(rows.device)
    return (mean + z @ root).to(rows.dtype).reshape(n, *y.shape[1:])


def data_rows(y: Samples, n: int, seed: int = 0) -> Tensor:
    """Draw ``n`` different rows of the data ``(N, ...)`` at random, in the data's order; all when ``n >= N``."""
    _check_count(n)
    data = as_tensor(y, "y")
    return data[torch.as_tensor(pick(data.shape[0], n, seed), device=data.device)]


def _check_count(n: int) -> None:
    if n < 1:
        raise UserError(f"n = {n}: the number of samples must be at least 1.")
