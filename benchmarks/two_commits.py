"""CPU time of two checkouts: `python benchmarks/two_commits.py OTHER [--rounds 7]`.

OTHER is a second checkout, such as one made by `git worktree add OTHER COMMIT`. A process of each checkout measures a
training step of some methods (two runs of different length, so that the start cancels) and a solve of a small network.
The two take turns. The table has the medians over the rounds and their ratio. It uses recipes and `fewstep.solve`
alone, which mean the same in both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.training.world import LocalWorld

METHODS = ("flow_matching", "meanflow", "consistency")
SOLVERS = ("euler", "heun", "unipc2")
SHORT, LONG, SOLVES, BATCH = 200, 1200, 2000, 64


class Small(nn.Module):
    """A network so small that the solver's own work counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity at x (B, 2) and t (B,)."""
        return self.second(torch.tanh(self.first(torch.cat([x, t[:, None]], 1))))


def training(method: str, steps: int, folder: Path) -> float:
    """CPU seconds of a run of one stage."""
    stage = {"method": method, "samples": BATCH * steps, "batch_size": BATCH}
    header = {"data": {"path": str(folder / "rows.npy")}, "network": {"name": "mlp", "preset": "tiny"}}
    recipe = make_recipe({**header, "stages": {"stage": stage}}, "two_commits")
    began = time.process_time()
    run_recipe(recipe, folder / f"{method}-{steps}", LocalWorld(quiet=True))
    return time.process_time() - began


def measure() -> dict[str, float]:
    """Microseconds of every case in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "rows.npy", np.random.default_rng(0).normal(size=(1000, 2)).astype("float32"))
        training("flow_matching", 20, folder)  # warm up
        for method in METHODS:
            short, long = (training(method, steps, folder) for steps in (SHORT, LONG))
            found[f"training step, {method}"] = (long - short) / (LONG - SHORT) * 1e6
    network, x = Small().requires_grad_(False), torch.randn(BATCH, 2)
    for solver in SOLVERS:
        fs.solve(network, x, solver=solver, steps=8)
        began = time.process_time()
        for _ in range(SOLVES):
            fs.solve(network, x, solver=solver, steps=8)
        found[f"solve, {solver}, 8 steps"] = (time.process_time() - began) / SOLVES * 1e6
    return found


def in_checkout(checkout: Path) -> dict[str, float]:
    """:func:`measure` in a process that imports the package of a checkout."""
    paths = os.pathsep.join([str(checkout / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    command = [sys.executable, __file__, "--measure"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure both checkouts in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?", help="the other checkout")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--measure", action="store_true", help="measure this process's package, as JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure()))
        return
    if arguments.other is None:
        parser.error("name the other checkout")
    here = Path(__file__).parents[1]
    times: dict[str, dict[str, list[float]]] = {}
    for number in range(arguments.rounds):
        order = [("other", arguments.other), ("here", here)]
        for side, checkout in order[:: 1 if number % 2 else -1]:
            for case, value in in_checkout(checkout).items():
                times.setdefault(case, {}).setdefault(side, []).append(value)
    print("| case | other, µs | here, µs | ratio |\n|---|--:|--:|--:|")
    for case, sides in times.items():
        other, own = (statistics.median(sides[side]) for side in ("other", "here"))
        print(f"| {case} | {other:.0f} | {own:.0f} | {own / other:.3f} |")


if __name__ == "__main__":
    main()
