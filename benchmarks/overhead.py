"""Overhead of the library beside the network: `python benchmarks/overhead.py [--check]`.

Every line compares the time of the library with that of the same work written by hand, one after the other, in
rounds of shuffled order. It has the median and the 10th percentile in microseconds per unit (a solver step, a network
call, a training step), the median over rounds of the ratio, and the ratio of the 10th percentiles. A bar is missed if
both ratios are above it, because other processes disturb each of them. With `--check` the exit code is 1 if a bar is
missed. Run it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep import networks
from fewstep.data.dataset import DataSet
from fewstep.data.load import load_data
from fewstep.flow.couplings import GaussianSource, Independent
from fewstep.flow.paths import Linear
from fewstep.flow.time_laws import Uniform
from fewstep.methods.contract.options import Options
from fewstep.methods.families.straight_line import VelocityRegression
from fewstep.methods.training_pairs.batches import DataBatches
from fewstep.training.trainer import Trainer
from fewstep.training.world import LocalWorld

SOLVER_CALLS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}  # network calls per step
BATCH = 256
SIZE = 2  # dimensions of the training case

# The bars are higher for solvers with stages and histories, whose tensor operations the bare network calls lack.
BARS = {"euler": 1.12, "heun": 1.15, "ab2": 1.18, "dpm++2m": 1.2, "unipc2": 1.2}
SMALL_NETWORK_ALLOWANCE = 0.1  # added to the bar for a network whose call takes about ten tensor operations


@dataclass
class Case:
    """One line of the table: the same ``units`` of work by the library and by hand."""

    name: str
    ours: Callable[[], object]
    by_hand: Callable[[], object]
    units: int
    bar: float
    repeats: int = 1
    times: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "by_hand": []})

    def measure(self, side: str) -> None:
        """Time one side once and store microseconds per unit."""
        work = getattr(self, side)
        began = time.perf_counter()
        for _ in range(self.repeats):
            work()
        self.times[side].append((time.perf_counter() - began) / self.repeats / self.units * 1e6)

    def ratio(self) -> float:
        """Median over rounds of the library's time over that by hand."""
        rounds = zip(self.times["ours"], self.times["by_hand"], strict=True)
        return statistics.median(ours / by_hand for ours, by_hand in rounds)

    def low_ratio(self) -> float:
        """Ratio of the 10th percentiles."""
        return float(np.percentile(self.times["ours"], 10) / np.percentile(self.times["by_hand"], 10))

    def missed(self) -> bool:
        """Whether both ratios are above the bar."""
        return min(self.ratio(), self.low_ratio()) > self.bar

    def line(self) -> str:
        """The line of the table."""
        cells = [self.name]
        for side in ("ours", "by_hand"):
            values = self.times[side]
            cells.append(f"{statistics.median(values):.2f} ({np.percentile(values, 10):.2f})")
        verdict = " missed" if self.missed() else ""
        return f"| {' | '.join(cells)} | {self.ratio():.3f} ({self.low_ratio():.3f}) | {self.bar:.2f}{verdict} |"


class TinyMLP(nn.Module):
    """Hidden layers of equal width on (x, t)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        widths = [SIZE + 1, *[width] * depth]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, SIZE))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], 1))


class OneParameter(nn.Module):
    """``v(x, t) = w x``: nearly all time of its training step is overhead."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.w * x


def loop_case(steps: int) -> Case:
    """The solver loop against ``x = x + h * v`` with a network that returns its input."""
    x0 = torch.randn(64, SIZE) * 1e-3
    times = torch.linspace(0, 1, steps + 1)[:, None].repeat(1, 64).unbind(0)
    h = 1 / steps

    def v(x: Tensor, t: Tensor) -> Tensor:
        return x

    @torch.no_grad()
    def by_hand() -> Tensor:
        x = x0
        for k in range(steps):
            x = x + h * v(x, times[k])
        return x

    name = f"loop, {steps} steps"
    return Case(name, lambda: fs.solve(v, x0, steps=steps), by_hand, steps, bar=1.5, repeats=10)


def network_case(name: str, network: nn.Module, x0: Tensor, solver: str, nfe: int, bar: float, repeats: int) -> Case:
    """A solve against the same number of bare network calls."""
    steps = nfe // SOLVER_CALLS.get(solver, 1)
    t = torch.full((len(x0),), 0.5)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(nfe):
            network(x0, t)

    assert fs.solve(network, x0, solver=solver, steps=steps).nfe == nfe
    return Case(
        f"{name}, {solver}, {nfe} calls",
        lambda: fs.solve(network, x0, solver=solver, steps=steps),
        bare,
        nfe,
        bar,
        repeats,
    )


def training_case(steps: int) -> Case:
    """A training step of a one-parameter network against the same step by hand."""
    data = load_data("moons")
    assert tuple(data.shape) == (SIZE,)
    options = Options(method="flow_matching", batch_size=BATCH, samples=steps * BATCH)
    student = OneParameter()
    trainer = Trainer(student, options, (0, "bench"), LocalWorld(quiet=True))
    batches = DataBatches(data, Independent(GaussianSource((SIZE,))), (), 0.0, (0, "bench"))
    phase = iter(range(1, 1_000_000))

    def ours() -> None:
        objective = VelocityRegression(student, Linear(), Uniform())
        trainer.train(next(phase), steps * BATCH, objective, batches, "")

    return Case("training step", ours, hand_written_training(data, options, steps), steps, bar=1.5)


def hand_written_training(data: DataSet, options: Options, steps: int) -> Callable[[], float]:
    """The same training steps, written by hand for this case only."""
    network = OneParameter()
    rows = data.network_rows(data.train)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=0.0, fused=True)
    parameters = list(network.parameters())
    averages = [p.detach().clone() for p in parameters]

    def by_hand() -> float:
        total, begin = 0.0, 0
        order = torch.randperm(len(rows), generator=generator)
        for _ in range(steps):
            if begin + BATCH > len(rows):
                order, begin = torch.randperm(len(rows), generator=generator), 0
            x1 = rows[order[begin : begin + BATCH]]
            begin += BATCH
            x0 = torch.randn(x1.shape, generator=generator)
            t = torch.rand(BATCH, generator=generator)
            s = t[:, None]
            loss = (network((1 - s) * x0 + s * x1, t) - (x1 - x0)).square().mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, options.clip)
            optimiser.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - options.ema)
            total += loss.item()
        return total

    return by_hand


def all_cases() -> list[Case]:
    """The lines of the table."""
    nets = {"MLP 3x64": TinyMLP(64, 3).eval(), "MLP 2x32": TinyMLP(32, 2).eval()}
    plans = [
        ("euler", 8),
        ("euler", 50),
        ("midpoint", 16),
        ("heun", 16),
        ("rk4", 32),
        ("ab2", 8),
        ("dpm++2m", 8),
        ("unipc2", 8),
    ]  # (solver, network calls)
    unet = networks.build(networks.resolve({"name": "unet", "preset": "small"}, (1, 28, 28))).eval()
    return [
        loop_case(8),
        loop_case(50),
        *(
            network_case(
                f"{name}, batch {batch}",
                net,
                torch.randn(batch, SIZE),
                *plan,
                BARS.get(plan[0], 1.2) + (SMALL_NETWORK_ALLOWANCE if name == "MLP 2x32" else 0.0),
                max(1, 64 // plan[1]),
            )
            for name, net in nets.items()
            for batch in (64, 1)
            for plan in plans
        ),
        training_case(50),
        network_case("U-Net small, 1x28x28, batch 16", unet, torch.randn(16, 1, 28, 28), "euler", 4, 1.05, 1),
    ]


def main() -> int:
    """Measure all cases and print the table; 1 if a bar is missed and ``--check`` is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    options = parser.parse_args()
    torch.manual_seed(0)
    cases = all_cases()
    sides = ["ours", "by_hand"]
    for case in cases:  # warm up
        for side in sides:
            case.measure(side)
            case.times[side].clear()
    order = random.Random(0)
    for _ in range(options.rounds):
        for case in order.sample(cases, len(cases)):
            order.shuffle(sides)
            for side in sides:
                case.measure(side)
    print("| case | fewstep, µs | by hand, µs | ratio | bar |\n|---|---|---|---|---|")
    for case in cases:
        print(case.line())
    print(f"\nMedian (10th percentile) of {options.rounds} rounds in shuffled order, ", end="")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s).")
    missed = [case.name for case in cases if case.missed()]
    if options.check and missed:
        print(f"bars missed: {', '.join(missed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
