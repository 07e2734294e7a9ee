"""Equal windows of time, and the window that a time falls into."""

from __future__ import annotations

import torch
from torch import Tensor


def window_start(t: Tensor, segments: int) -> Tensor:
    """The last knot ``tau_k = k / K`` at or before ``t``: a knot belongs to the window that starts there.

    Args:
        t: times (B,) in [0, 1]; t = 1 belongs to the last window.
        segments: K.

    Returns:
        (B,) in the dtype of ``t``. The knots are the numbers that Euler steps on the uniform grid call the network at.
    """
    knots = torch.tensor([k / segments for k in range(segments)], dtype=t.dtype, device=t.device)
    return knots[torch.searchsorted(knots, t, right=True) - 1]
