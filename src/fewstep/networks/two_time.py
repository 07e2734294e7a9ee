r"""Two-time networks, which give the average velocity of the flow from t to r.

.. math:: u(x, t, r) = \frac{X(x, t, r) - x}{r - t}, \qquad u(x, t, t) = v(x, t)

(arXiv 2505.13447, eq. 3; X is the flow map.) A second embedding, of the interval :math:`r - t`, is added to that of t
before the last nonlinearity of the conditioning. Its last layer is zero initially, so a two-time network with the
weights of a velocity network returns that velocity for every r.

The network is called ``u(x, t, r=r, **cond)``; without ``r`` it returns the velocity, ``r = t``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UserError
from fewstep.networks.conditioning import TIME_FEATURES, time_features

INTERVAL = "conditioning.interval."  # prefix of the weights that only a two-time network has


@final
class Interval(nn.Module):
    """W2 SiLU(W1 phi(r - t)); W2 and its bias are zero initially.

    ``phi`` is :func:`~fewstep.networks.conditioning.time_features`, of low frequencies, because some losses contain
    the derivative of u in t.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(TIME_FEATURES, width)
        self.second = nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, length: Tensor) -> Tensor:
        """Intervals r - t (B,) to (B, width)."""
        phi = time_features(length).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(phi)))


def interval(width: int, two_time: bool) -> Interval | None:
    """The embedding of ``r - t`` of a two-time network; None for a velocity network."""
    return Interval(width) if two_time else None


def take_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights of the same network, or weights of a velocity network into its two-time form.

    In the second case ``u(x, t, r)`` equals that velocity for every r afterwards.

    Args:
        module: the network that gets the weights.
        state: names and values of the weights.

    Raises:
        UserError: any other weights are missing or left over.
    """
    own = module.state_dict()
    missing, left = own.keys() - state.keys(), state.keys() - own.keys()
    wrong = sorted(left | {name for name in missing if not name.startswith(INTERVAL)})
    if wrong:
        raise UserError(
            f"these weights are of another network: only one of the two has {wrong[0]!r}. Give 'init' a model "
            "with the same network, or remove 'init'."
        )
    module.load_state_dict({**own, **state})
    if missing:
        for name, parameter in module.named_parameters():
            if name.startswith(f"{INTERVAL}second."):
                nn.init.zeros_(parameter)
