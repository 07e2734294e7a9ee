"""A policy of your own with an observation and a mask: adapt, check, train down to one call, compare by your metric.

The network makes chunks of up to 8 points in the plane, which lead to a goal past an obstacle half-way, on the left or
on the right. Chunks are ragged: short ones are padded, and a mask says which points count. Its convention is that of
many diffusion policies: arguments (timestep, sample, obs), time from 1000 (noise) to 0, output noise minus data.

Run: python examples/own_conditions.py [--quick]
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch import nn

import fewstep as fs

LENGTH = 8  # points of the longest chunk


class Policy(nn.Module):
    """A network that fewstep did not build: (timestep (B,), sample (B, 8, 2), obs (B, 2)) -> noise minus data."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Linear(2 * LENGTH + 2, width)
        self.body = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.last = nn.Linear(width, 2 * LENGTH)

    def forward(self, timestep: torch.Tensor, sample: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        """Return (B, 8, 2)."""
        waves = timestep[:, None] / 1000 * torch.pi * torch.arange(1, 9)
        time = self.time(torch.cat([waves.sin(), waves.cos()], 1))
        h = self.first(torch.cat([sample.flatten(1), obs], 1)) + time
        return self.last(self.body(h)).view_as(sample)


def demonstrations(num: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Chunks ``x`` (num, 8, 2), goals ``obs`` (num, 2) and masks ``mask`` (num, 8), True for points that count."""
    angle = 2 * torch.pi * torch.rand(num, generator=generator)
    goal = torch.stack([angle.cos(), angle.sin()], 1) * 2
    lengths = torch.randint(5, LENGTH + 1, (num,), generator=generator)
    side = torch.randint(0, 2, (num,), generator=generator) * 2.0 - 1.0  # left or right of the obstacle
    share = ((torch.arange(LENGTH) + 1) / lengths[:, None]).clamp(max=1)
    across = torch.stack([-goal[:, 1], goal[:, 0]], 1) / 2
    bow = (side[:, None] * torch.sin(torch.pi * share))[..., None] * across[:, None]
    x = share[..., None] * goal[:, None] + bow + 0.05 * torch.randn(num, LENGTH, 2, generator=generator)
    mask = torch.arange(LENGTH) < lengths[:, None]
    return {"x": x * mask[..., None], "obs": goal, "mask": mask}


def train_policy(policy: Policy, data: dict[str, torch.Tensor], steps: int) -> None:
    """The user's own loop, in the policy's own convention: nothing of fewstep."""
    optimiser = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(0, len(data["x"]), (256,))
        x, obs, valid = data["x"][rows], data["obs"][rows], data["mask"][rows][..., None]
        noise, sigma = torch.randn_like(x) * valid, torch.rand(256)
        noisy = torch.lerp(x, noise, sigma[:, None, None])
        error = (policy(1000 * sigma, noisy, obs) - (noise - x)).square() * valid
        loss = error.sum() / (2 * valid.sum())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def success(x: torch.Tensor, obs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 for a chunk that ends within 0.4 of the goal and keeps 0.4 away from the obstacle half-way, else 0."""
    last = x[torch.arange(len(x)), mask.sum(1).long() - 1]
    arrives = (last - obs).norm(dim=1) < 0.4
    far = (x - obs[:, None] / 2).norm(dim=2).masked_fill(~mask.bool(), 9.0)
    return (arrives & (far.amin(1) > 0.4)).float()


def main(quick: bool = False) -> dict[str, float]:
    """Run the example and return the shares of successful chunks by model and number of calls."""
    torch.manual_seed(0)
    rows = demonstrations(4000, torch.Generator().manual_seed(0))
    policy = Policy()
    train_policy(policy, rows, steps=800 if quick else 4000)

    # one declaration: order of the arguments, time from 1000 to 0, opposite sign, and which condition is the mask
    net = fs.adapt(policy, lambda m, x, t, obs, mask: -m(1000 * (1 - t), x, obs), time_embed="time", mask="mask")
    # arrays by name; the conditions are those that the call takes, and rows stay in the units that the policy has seen
    named = {"conditions": ["obs", "mask"], "mask": "mask", "layout": "sequence", "scale": "none"}
    data = fs.as_data(rows, name="chunks", **named)
    # is the declaration right? And what does the check say of a wrong one?
    print(fs.check_velocity(net, data))
    wrong = fs.adapt(policy, lambda m, x, t, obs, mask: -m(1000 * t, x, obs), mask="mask")
    print("\nThe same of a declaration with the time in the wrong direction:")
    print(fs.check_velocity(wrong, data, rows=64).faults[0].text)

    with tempfile.TemporaryDirectory() as folder:
        few = {"samples": 60_000, "pairs": 2000} if quick else {"samples": 500_000, "pairs": 20_000}
        one = fs.train("distill", teacher=net, data=data, out=f"{folder}/onecall", nfe=16, tolerance=1.0, **few)

        # chunks for a given observation: one goal, 100 chunks of six points
        goal, mask = torch.tensor([[0.0, 2.0]]), (torch.arange(LENGTH) < 6)[None]
        chunks = one.sample(100, cond={"obs": goal, "mask": mask}, seed=0)
        reached = success(chunks, goal.expand(100, -1), mask.expand(100, -1)).mean()
        left = (chunks[:, 2, 0] < 0).float().mean()
        print(f"\ngoal (0, 2): {reached:.0%} of 100 chunks succeed; {left:.0%} pass the obstacle on the left")

        metrics = {"success": success}  # called with samples and, by name, their conditions
        found = fs.compare([net, one], data, steps=[1, 16], metrics=metrics, samples=1000, diagnosis=False)
        print(found.table)
    return {f"{row['model']} {row.get('steps', '')}".strip(): row["scores"]["success"] for row in found.rows}


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="fewer samples: a few seconds, worse results")
    main(options.parse_args().quick)
