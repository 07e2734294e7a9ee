r"""A diffusion denoiser as a velocity on the linear path, and a velocity as a denoiser.

A denoiser network of Karras et al. (arXiv:2206.00364, eq. 7 and table 1) predicts data from ``y = x1 + sigma n`` by

    D(y, sigma) = c_skip y + c_out F(c_in y, c_noise),
    c_skip = s^2 / (sigma^2 + s^2),   c_out = sigma s / sqrt(sigma^2 + s^2),   c_in = 1 / sqrt(sigma^2 + s^2),
    c_noise = log(sigma) / 4,

with ``s`` the standard deviation of the data. The linear path's state ``x = t x1 + (1 - t) x0`` is ``t y`` with
``sigma = (1 - t) / t``, and its velocity is ``v = (D - x) / (1 - t)``. Substituted, with ``d = (1 - t)^2 + s^2 t^2``,
``1 / t`` and ``1 / (1 - t)`` cancel:

    v(x, t) = (s^2 t - (1 - t)) / d  x  +  s / sqrt(d)  F(x / sqrt(d), log((1 - t) / t) / 4),

which is regular on [0, 1] except for the logarithm, whose argument is clipped. (arXiv:2405.20320 initialises a
rectified flow with a denoiser.) With ``F = 0`` and data N(0, s^2) it is the exact velocity.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.flow.field import Velocity
from fewstep.flow.paths import expand_time

CLIP = 1e-5  # nearest time to an end whose c_noise the network is given; chosen, not tuned


@final
class DenoiserVelocity(nn.Module):
    """``v(x, t)`` of a denoiser's raw network ``F(x, c_noise)``, the network inside the preconditioning of ``D``.

    ``fs.Generator(DenoiserVelocity(net, 0.5), shape=(3, 32, 32))`` samples it. Its parameters are the network's own:
    training continues from them. Source: arXiv:2206.00364, eq. 7 and table 1, in the form of the module's docstring.

    Args:
        network: called as ``network(x, c_noise, **cond)`` with ``x`` (B, ...) and ``c_noise`` (B,); returns (B, ...).
        sigma_data: standard deviation of the data it was made for, in its own units (EDM: 0.5 for images in [-1, 1]).
        clip: at times nearer than this to an end, ``c_noise`` is that of the time at this distance.

    Raises:
        UserError: ``sigma_data`` is not positive; ``clip`` is not in (0, 1/2).
    """

    def __init__(self, network: nn.Module, sigma_data: float, clip: float = CLIP) -> None:
        super().__init__()
        if not 0.0 < sigma_data < math.inf:
            raise UserError(f"sigma_data is the data's standard deviation and must be positive, got {sigma_data}.")
        if not 0.0 < clip < 0.5:
            raise UserError(f"clip is a distance from the ends of [0, 1] and must be in (0, 0.5), got {clip}.")
        self.network = network
        self.sigma_data = float(sigma_data)
        self.clip = float(clip)

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The velocity, (B, ...), of ``x`` (B, ...) at ``t`` (B,) in [0, 1]; conditions are given to the network."""
        variance = self.sigma_data**2
        root = ((1 - t).square() + variance * t.square()).sqrt()
        c_noise = -torch.logit(t.clamp(self.clip, 1 - self.clip)) / 4
        raw = self.network(x / expand_time(root, x), c_noise.to(x.dtype), **cond)
        own = (variance * t - (1 - t)) / root.square()
        return expand_time(own, x) * x + expand_time(self.sigma_data / root, x) * raw


def denoise(v: Velocity, y: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
    """The denoiser ``D(y, sigma) = E[x1 | x1 + sigma n = y]`` of a velocity on the linear path.

    ``D = (y + sigma v(y / (1 + sigma), 1 / (1 + sigma))) / (1 + sigma)``: the state is ``x = t y`` at
    ``t = 1 / (1 + sigma)``, and ``D = x + (1 - t) v``. It is the posterior mean only for a flow from N(0, I) drawn
    independently of the data. Source: arXiv:2206.00364, eq. 7, solved for ``D``.

    Args:
        v: ``v(x, t, **cond)``.
        y: noisy data, (B, ...).
        sigma: standard deviations of the noise, (B,), not negative.

    Returns:
        ``D``, (B, ...).
    """
    scale = expand_time(1 / (1 + sigma), y)
    return scale * (y + expand_time(sigma, y) * v(scale * y, (1 / (1 + sigma)).to(y.dtype), **cond))
