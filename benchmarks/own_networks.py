"""Networks from outside made fast with default options, and what it costs in quality.

    python benchmarks/own_networks.py digits --out runs/own-networks --rows distill,dmd,consistency
    python benchmarks/own_networks.py policy --out runs/own-networks

``digits``: a torchcfm U-Net with labels is trained by a plain loop on 220,000 samples; then each method trains a
student of the same class from it with default options. ``policy``: a small network of another convention (argument
order (timestep, sample, obs), time from 1000 to 0, noise minus data) is adapted and straightened with default options.
Energy is that of ``fs.compare``'s protocol. The same command resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.data.dataset import DataSet
from fewstep.data.load import load_data
from fewstep.data.sources import as_data
from fewstep.metrics import Reference, sample_count
from fewstep.networks.adapter import Adapter

TEACHER_SAMPLES, BATCH, LR = 220_000, 256, 1e-3


def unet() -> nn.Module:
    """torchcfm's U-Net for digits; with 32 channels its time embedding needs use_scale_shift_norm to have an effect."""
    from torchcfm.models.unet import UNetModel

    return UNetModel(
        dim=(1, 8, 8), num_channels=32, num_res_blocks=1, channel_mult=(1,), class_cond=True, num_classes=11,
        use_scale_shift_norm=True,
    )  # fmt: skip


def train_unet(data: DataSet, path: Path, seed: int) -> nn.Module:
    """The teacher: a plain conditional flow matching loop; one label in ten is replaced by class 10."""
    torch.manual_seed(seed)
    net = unet()
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    rows, labels = data.train_rows(), data.label_rows(data.train)
    assert labels is not None
    optimiser = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0)
    steps = TEACHER_SAMPLES // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        chosen = torch.randint(len(rows), (BATCH,))
        x1, x0, t = rows[chosen], torch.randn(BATCH, 1, 8, 8), torch.rand(BATCH)
        label = torch.where(torch.rand(BATCH) < 0.1, 10, labels[chosen])
        x_t = torch.lerp(x0, x1, t[:, None, None, None])
        loss = (net(t, x_t, label) - (x1 - x0)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)
    return net.eval()


class Policy(nn.Module):
    """A conditional network of another convention: ``(timestep, sample, obs)``, time 1000 to 0, noise - data."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(9, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Linear(2 + 2, width)
        self.body = nn.Sequential(
            nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, timestep: Tensor, sample: Tensor, obs: Tensor) -> Tensor:
        """The noise minus the data."""
        t = timestep[:, None] / 1000
        waves = [f(torch.pi * k * t) for k in (0.5, 1, 1.5, 2) for f in (torch.sin, torch.cos)]
        return self.body(self.first(torch.cat([sample, obs], 1)) + self.time_embed(torch.cat([t, *waves], 1)))


def policy_data(seed: int, num: int = 20_000) -> DataSet:
    """Actions around the obstacle at an observation: two equally good ways, beside it on one side or the other."""
    g = np.random.default_rng(seed)
    obs = g.uniform(-1, 1, (num, 2))
    side = g.choice([-1.0, 1.0], num)[:, None]
    across = np.stack([-obs[:, 1], obs[:, 0]], 1) / np.linalg.norm(obs, axis=1, keepdims=True)
    x = obs + side * across + 0.1 * g.standard_normal((num, 2))
    return as_data({"x": x.astype("f4"), "obs": obs.astype("f4")}, conditions=["obs"], scale="none", name="policy")


def train_policy(data: DataSet, seed: int) -> nn.Module:
    """The teacher by a plain loop in its own convention."""
    torch.manual_seed(seed)
    net, rows = Policy(), data.train_rows()
    obs = data.cond_rows(data.train, ["obs"])["obs"]
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3)
    steps = 400_000 // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        chosen = torch.randint(len(rows), (BATCH,))
        x, noise, s = rows[chosen], torch.randn(BATCH, 2), torch.rand(BATCH)
        noisy = torch.lerp(x, noise, s[:, None])
        loss = (net(1000 * s, noisy, obs[chosen]) - (noise - x)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval()


def score(model: fs.Generator, data: DataSet, steps: int, reference: Reference, cond: dict[str, Tensor] | None) -> Any:
    """Energy, precision, recall and coverage at a number of steps."""
    count = sample_count(len(data.train))
    given = None if cond is None else {name: rows[:count] for name, rows in cond.items()}
    draw = model.draw(count, steps=steps, seed=0, cond=given)
    scores = reference.score(draw.x).as_dict()
    return {"calls": draw.nfe, **{key: scores[key] for key in ("energy", "precision", "recall", "coverage")}}


def digits(out: Path, rows: list[str], seed: int, say: Any) -> None:
    """The rows of the table for digits."""
    data = load_data("digits")
    net = train_unet(data, out / f"teacher-{seed}.pt", seed)
    adapted = Adapter(net, lambda m, x, t, label: m(t, x, label), time_embed="time_embed", null={"label": 10})
    teacher = fs.Generator(adapted, shape=data.shape, classes=10)
    reference = Reference(data.train_rows(), data.held_out_rows())
    for steps in (1, 4, 16):
        say({"seed": seed, "model": "teacher", **score(teacher, data, steps, reference, None)})
    for method in rows:
        began = time.process_time()
        student = fs.train(
            method, teacher=adapted, data=data, conditional=True, seed=seed, out=out / f"{method}-{seed}"
        )
        minutes = (time.process_time() - began) / 60
        made = score(student, data, 1, reference, None)
        say({"seed": seed, "model": method, **made, "cpu_minutes": round(minutes, 1)})


def policy(out: Path, rows: list[str], seed: int, say: Any) -> None:
    """The rows of the table for the policy."""
    data = policy_data(seed)
    net = train_policy(data, seed)
    adapted = Adapter(net, lambda m, x, t, obs: -m(1000 * (1 - t), x, obs), time_embed="time_embed")
    teacher = fs.Generator(adapted, shape=data.shape)
    reference = Reference(data.train_rows(), data.held_out_rows())
    cond = data.cond_rows(data.train, ["obs"])
    for steps in (1, 4, 16):
        say({"seed": seed, "model": "teacher", **score(teacher, data, steps, reference, cond)})
    for method in rows:
        student = fs.train(method, teacher=adapted, data=data, seed=seed, out=out / f"policy-{method}-{seed}")
        say({"seed": seed, "model": method, **score(student, data, 1, reference, cond)})


def main() -> None:
    """Run one part and print its rows as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["digits", "policy"])
    parser.add_argument("--out", type=Path, default=Path("runs/own-networks"))
    parser.add_argument("--rows", default=None, help="methods, by comma")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    default = "distill,dmd,consistency" if arguments.part == "digits" else "reflow"
    names = (arguments.rows or default).split(",")
    part = digits if arguments.part == "digits" else policy
    part(arguments.out, names, arguments.seed, lambda row: print(json.dumps(row), flush=True))


if __name__ == "__main__":
    main()
