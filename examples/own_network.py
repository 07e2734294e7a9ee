"""Use your own network: train it with your own loop, then diagnose, sample, save and load it with fewstep.

Run: python examples/own_network.py [steps]
"""

from __future__ import annotations

import sys
import tempfile

import torch
from torch import nn

import fewstep as fs


class Network(nn.Module):
    """A velocity network v(x, t): x (B, 2), t (B,), t = 0 noise, t = 1 data. Any module called so can be used."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return velocities (B, 2)."""
        return self.body(torch.cat([x, t[:, None]], dim=1))


def main(steps: int = 1500) -> None:
    """Train for ``steps`` steps, then compare solvers with the exact flow map."""
    torch.manual_seed(0)
    data = fs.closed_form.mixture(torch.ones(2), torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), torch.tensor([0.3, 0.5]))
    network = Network()
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x1 = data.sample(256, generator)
        x0, t = torch.randn_like(x1), torch.rand(256)
        x_t = torch.lerp(x0, x1, t[:, None])
        loss = (network(x_t, t) - (x1 - x0)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x0 = torch.randn(512, 2)
    # with more than a few steps the remaining error is that of the network, not of the solver
    exact = data.flow_map(x0, torch.zeros(512), torch.ones(512))
    d = fs.diagnose(network, x0)
    print(f"straightness {d.straightness:.3f}, error of one step {d.one_step_gap:.3f}")
    for count in (2, 4, 8, 16):
        error = (fs.solve(network, x0, solver="midpoint", steps=count).x - exact).square().sum(1).mean().sqrt()
        print(f"midpoint, {count:2} steps: {error:.3f} from the exact flow map")
    with tempfile.TemporaryDirectory() as folder:
        fs.Generator(network, shape=(2,)).save(folder)
        again = fs.load(folder, module=Network())
        print(again.sample(3, steps=16, seed=0))


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
