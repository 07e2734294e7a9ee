r"""From a velocity network to a two-time one: the average velocity of the flow from t to r.

.. math:: u(x, t, r) = \frac{X(x, t, r) - x}{r - t}, \qquad u(x, t, t) = v(x, t)

(arXiv 2505.13447, eq. 3; X is the flow map.) The network sees r through the interval: a second embedding, of
:math:`r - t`, is added to that of t before the conditioning's last nonlinearity. Its last layer starts at zero, so
a network that takes over a velocity's weights is that velocity for every r.

It is called ``u(x, t, r=r, **cond)``; without ``r`` it is the velocity, ``r = t``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UserError
from fewstep.networks.conditioning import TIME_FEATURES, time_features

INTERVAL = "conditioning.interval."  # what a two-time network has beside a velocity network's weights


@final
class Interval(nn.Module):
    """W2 SiLU(W1 phi(r - t)), (B,) to (B, width); W2 and its bias are zero at the start.

    ``phi`` is that of t, of low frequencies: the derivative of u in t is part of some losses.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(TIME_FEATURES, width)
        self.second = nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, length: Tensor) -> Tensor:
        phi = time_features(length).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(phi)))


def interval(width: int, two_time: bool) -> Interval | None:
    """The embedding of ``r - t`` that a network is built with: none for a velocity."""
    return Interval(width) if two_time else None


def take_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights of the same network, or of the velocity network that ``module`` is the two-time form of.

    In the second case ``u(x, t, r)`` is afterwards that velocity, whatever r.

    Raises:
        UserError: weights that are missing or left over otherwise.
    """
    own = module.state_dict()
    missing, left = own.keys() - state.keys(), state.keys() - own.keys()
    wrong = sorted(left | {name for name in missing if not name.startswith(INTERVAL)})
    if wrong:
        raise UserError(
            f"these weights are of another network: {wrong[0]!r} is in one and not in the other. Start from a model "
            "of the same network, or leave 'init' out."
        )
    module.load_state_dict({**own, **state})
    if missing:
        for name, parameter in module.named_parameters():
            if name.startswith(f"{INTERVAL}second."):
                nn.init.zeros_(parameter)
