"""Train from a stream with conditions: rows are read in order, and a stopped training goes on.

The loader makes batches of points around an observation; nothing holds all of them. ``fs.stream`` keeps the first rows
for scaling and guards and reads the rest once. The training is stopped half-way and run again: it resumes from its last
checkpoint, and because the loader repeats its order, the result equals that of a training that was never stopped. Where
the order is not known to repeat, the printed promise says that a resumed training may see other rows.

Run: python examples/stream.py [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import fewstep as fs


class Stopped(Exception):
    """Stands for a machine that goes down in the middle of a training."""


class Velocity(nn.Module):
    """A network of the user's own: (x (B, 2), t (B,), obs (B, 2)) -> velocity (B, 2)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.last = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor, t: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        """Return (B, 2)."""
        return self.last(self.layers(torch.cat([x, t[:, None], obs], 1)))


def loader(batches: int, stop: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of 256 points ``x`` at distance .2 from their observation ``obs``, in the same order every time."""
    generator = torch.Generator().manual_seed(0)
    for number in range(batches):
        if stop is not None and number == stop - 4:
            time.sleep(2.5)  # a slow batch: checkpoints are written at most every two seconds
        if number == stop:
            raise Stopped
        obs = torch.rand(256, 2, generator=generator) * 2 - 1
        yield {"x": obs + 0.2 * torch.randn(256, 2, generator=generator), "obs": obs}


def train(out: Path, samples: int, stop: int | None = None) -> fs.Generator:
    """Train from the stream; ``stop`` is the batch at which the loader fails."""
    torch.manual_seed(0)
    net = fs.adapt(Velocity())
    # repeatable: the loader's order is fixed, which cannot be told from outside
    named = {"x": "x", "conditions": ("obs",), "scale": "none", "repeatable": True}
    rows = fs.stream(lambda: loader(1000, stop), reservoir=2048, **named)
    return fs.train("flow_matching", network=net, data=rows, out=out, samples=samples, lr=5e-3)


def main(quick: bool = False) -> dict[str, float]:
    """Run the example; the mean distance to the observation, and the difference between the two trainings."""
    samples = 20_480 if quick else 204_800
    with tempfile.TemporaryDirectory() as folder:
        whole = train(Path(folder) / "a" / "flow", samples)
        try:
            train(Path(folder) / "b" / "flow", samples, stop=samples // 512)
        except Stopped:
            print("the loader failed half-way; the same call again goes on from the last checkpoint")
        kept = len(list((Path(folder) / "b" / "flow" / "checkpoints").iterdir()))
        resumed = train(Path(folder) / "b" / "flow", samples)
    obs = torch.tensor([[0.5, -0.5]]).expand(500, 2)
    x = resumed.sample(cond={"obs": obs}, steps=32)
    distance = float((x - obs).norm(dim=1).mean())
    difference = float((x - whole.sample(cond={"obs": obs}, steps=32)).abs().max())
    print(f"mean distance to the observation: {distance:.3f}; of the data: 0.251")
    print(f"largest difference between the samples of both trainings: {difference}")
    return {"distance": distance, "difference": difference, "checkpoints": kept}


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="fewer samples: a few seconds, worse results")
    main(options.parse_args().quick)
