"""Small networks, objectives and batches for the tests of training; no tests here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.flow.couplings import Facts, Pair
from fewstep.flow.noise import Draws
from fewstep.methods.contract.objective import Networks, Objective, Terms
from fewstep.methods.contract.options import Options
from fewstep.training.checkpoint import Checkpoints
from fewstep.training.trainer import Trainer
from fewstep.training.world import LocalWorld

BATCH = 8


class Noise:
    """Fresh Gaussian pairs from the step's generator."""

    facts = Facts(independent=True, deterministic=False)

    def __init__(self, dim: int = 2) -> None:
        self.dim = dim

    def batch(self, start: int, count: int, generator: torch.Generator) -> Pair:
        x = torch.randn(2, count, self.dim, generator=generator)
        return Pair(x[0], 2.0 * x[1] + 1.0)


def filled(module: nn.Module, seed: int, scale: float) -> nn.Module:
    """The module with weights drawn anew, whatever the global random state was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return module


def linear() -> nn.Linear:
    """A linear map from 3 to 2 numbers."""
    model = nn.Linear(3, 2)
    filled(model, 2, 0.5)
    return model


class Net(nn.Module):
    """A network with dropout, a running statistic and a counter."""

    running: Tensor
    calls: Tensor

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(3, 6), nn.Dropout(dropout), nn.Linear(6, 2)
        filled(self, 0, 0.5)
        self.register_buffer("running", torch.zeros(2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.training:
            self.running = 0.9 * self.running + 0.1 * x.detach().mean(0)
            self.calls += 1
        return self.last(self.drop(torch.tanh(self.first(torch.cat([x, t[:, None]], 1)))))


class Regression(Objective):
    """Velocity of the line; ``hook(step)`` may change the loss or raise."""

    def __init__(self, student: nn.Module, hook: Callable[[int], float | None] = lambda step: None) -> None:
        self.modules = {"student": student}
        self.hook = hook
        self.step = 0

    def turns(self, step: int) -> tuple[str, ...]:
        self.step = step
        return ("student",)

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        factor = self.hook(self.step)
        t = draws.uniform()
        x_t = (1 - t)[:, None] * batch.x0 + t[:, None] * batch.x1
        loss = (nets["student"](x_t, t) - (batch.x1 - batch.x0)).square().mean()
        return {"loss": loss if factor is None else loss * factor, "x0": batch.x0.detach().mean()}


class TwoPlayers(Objective):
    """A generator against a discriminator that learns twice as often."""

    def __init__(
        self,
        student: nn.Module,
        hook: Callable[[int, str], float | None] = lambda *_: None,
        dropout: float = 0.2,
    ) -> None:
        discriminator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))
        self.modules = {"student": student, "discriminator": filled(discriminator, 1, 0.3)}
        self.hook = hook
        self.step = 0

    def turns(self, step: int) -> tuple[str, ...]:
        self.step = step
        return ("discriminator",) if step % 2 else ("discriminator", "student")

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        factor = self.hook(self.step, role)
        start = torch.zeros(len(batch.x0))
        judge = nets["discriminator"]
        if role == "student":
            loss = -judge(batch.x0 + nets["student"](batch.x0, start)).mean()
        else:
            with torch.no_grad():
                fake = batch.x0 + nets["student"](batch.x0, start)
            noise = 0.1 * draws.normal((2,))
            loss = nn.functional.softplus(judge(fake)).mean() + nn.functional.softplus(-judge(batch.x1 + noise)).mean()
        return {"loss": loss if factor is None else loss * factor}


def options(**fields: Any) -> Options:
    return Options(**{"method": "test", "batch_size": BATCH, "lr": 0.01, "ema": 0.9, **fields})


@dataclass
class Run:
    """A trainer with its lines of statistics."""

    trainer: Trainer
    lines: list[dict[str, Any]]


def start(
    student: nn.Module, folder: Path | None = None, lines: list[dict[str, Any]] | None = None, **fields: Any
) -> Run:
    """A trainer on ``student``; with ``folder``, it resumes what lies there and drops the later ``lines``."""
    kept = [] if lines is None else lines
    checkpoints = None if folder is None else Checkpoints(folder)
    trainer = Trainer(student, options(**fields), (0, "stage"), LocalWorld(quiet=True), checkpoints, kept.append)
    trainer.resume()
    kept[:] = [line for line in kept if line["samples"] <= trainer.position.total_samples]
    return Run(trainer, kept)
