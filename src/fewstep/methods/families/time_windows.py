"""The equal windows ``[k/K, (k+1)/K)`` of [0, 1], and the window that a time lies in."""

from __future__ import annotations

import torch
from torch import Tensor


def window_start(t: Tensor, segments: int) -> Tensor:
    """The last knot ``tau_k = k / K`` at or before t: a knot belongs to the window that starts there.

    Args:
        t: times (B,) in [0, 1]; t = 1 belongs to the last window.
        segments: K.

    Returns:
        (B,) in the dtype of t. The knots are bit for bit the times at which K Euler steps on the uniform grid call the
        network.

    >>> window_start(torch.tensor([0.0, 0.3, 0.5, 1.0]), 4)
    tensor([0.0000, 0.2500, 0.5000, 0.7500])
    """
    knots = torch.tensor([k / segments for k in range(segments)], dtype=t.dtype, device=t.device)
    return knots[torch.searchsorted(knots, t, right=True) - 1]
