"""Errors of solvers on frozen models: `python benchmarks/solvers.py [MODEL ...] [--calls 4,6,8,10]`.

For every model and number of network calls the table has the root mean square endpoint error per dimension, on new
noise and against a converged reference, of: Euler and the best of seven common solvers on uniform steps; the best of
the whole scan (every solver on every grid, chosen by this error itself); `auto`; `fitted`. `fresh over pilot` is the
error on new noise relative to that on the noise of the choice, minus one; `s` are CPU seconds on one thread. A MODEL
is a folder, or the name of a data set, whose teacher is then trained first (`digits`: the demo's; 2-D sets: defaults;
`fashion_mnist`: from assets). With `--refined` the table has the errors of every multistep solver on uniform steps and
on the best grid after refinement. Run with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import fewstep as fs
from fewstep.diagnostics.pick import candidates, refine
from fewstep.diagnostics.pilot import Pilot
from fewstep.diagnostics.tune import noises_for
from fewstep.flow.grids import make_grid
from fewstep.flow.paths import make_path
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.solvers.tables import SOLVERS, Table, table
from fewstep.training.world import LocalWorld, set_threads

USUAL = ("euler", "midpoint", "heun", "ab2", "ab3", "dpm++2m", "unipc2")
MULTISTEP = ("ab2", "ab3", "abm2", "dpm++2m", "unipc2")
ASSETS = Path(__file__).parent / "assets"
FRESH = {True: 128, False: 4096}  # new noise samples: for images of 28 x 28, for smaller data
SEED = 1000
COLUMNS = (
    "calls", "Euler", "best of seven, uniform", "best of the scan",
    "auto", "auto / best of the scan", "fresh over pilot", "s",
    "fitted", "times better than the seven", "fresh over pilot", "s",
)  # fmt: skip


def model_of(name: str, out: Path, seed: int) -> fs.Generator:
    """Load a model's folder, or train and load the teacher of a data set."""
    if (Path(name) / "config.json").is_file():
        return fs.load(name)
    if name == "fashion_mnist":
        return fs.load(ASSETS / "fashion_mnist_teacher")
    teacher = {"method": "flow_matching", "samples": 800_000 if name == "digits" else 600_000}
    network = {"name": "mlp", "preset": "small"} if name == "digits" else {}
    fields = {"data": name, "network": network, "seed": seed, "stages": {"teacher": teacher}}
    run_recipe(make_recipe(fields, "benchmarks/solvers.py"), out / f"{name}-{seed}", LocalWorld(quiet=True))
    return fs.load(out / f"{name}-{seed}" / "teacher")


def uniform(solver: str, calls: int) -> Table | None:
    """The table of a solver on uniform steps; None if ``calls`` is not a multiple of its calls per step."""
    per_step = SOLVERS[solver].calls
    return None if calls % per_step else table(solver, make_grid("uniform", calls // per_step))


def noises(model: fs.Generator, num: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Base noise of a model and its conditions."""
    draw = model.draw(num, steps=1, solver="euler", grid="uniform", seed=seed)
    return draw.x0, draw.conditions(model.device)


def line(model: fs.Generator, fresh: Pilot, calls: int) -> str:
    """One row of the table."""
    path = make_path(model.config.path)
    usual = {name: fresh.error(made) for name in USUAL if (made := uniform(name, calls)) is not None}
    best = min(usual, key=lambda name: usual[name])
    scanned = min((fresh.error(made), solver, grid) for solver, grid, made in candidates(calls, path))
    cells = [f"{usual['euler']:.4f}", f"{usual[best]:.4f} {best}", f"{scanned[0]:.4f} {scanned[1]} {scanned[2]}"]
    for kind in ("auto", "fitted"):
        x0, cond = noises(model, noises_for(kind, model.config.shape), SEED + 1)
        began = time.process_time()
        choice = fs.tune(model.module, x0, calls=calls, kind=kind, cond=cond, path=path)
        seconds = time.process_time() - began
        error = fresh.error(choice.table)
        cells.append(f"{error:.4f}" + (f" {choice.solver} from {choice.origin}" if kind == "auto" else ""))
        cells.append(f"{error / scanned[0]:.2f}" if kind == "auto" else f"{usual[best] / error:.1f}")
        cells.append(f"{error / choice.pilot_error - 1:+.0%}")
        cells.append(f"{seconds:.0f}")
    return f"| {calls} | " + " | ".join(cells) + " |"


def refinement(model: fs.Generator, fresh: Pilot, calls: int) -> str:
    """One row of the table of ``--refined``: error on uniform steps, on the refined grid, and their ratio."""
    pilot = Pilot(
        model.module, *noises(model, noises_for("auto", model.config.shape) // 2, SEED + 1), steps=fresh.steps
    )
    cells, path = [], make_path(model.config.path)
    for solver in MULTISTEP:
        made = uniform(solver, calls)
        assert made is not None, "a multistep solver needs one call per step"
        scanned = [found for name, _, found in candidates(calls, path) if name == solver]
        grid, _ = refine(pilot, solver, min(scanned, key=pilot.error).grid, path)
        before, after = fresh.error(made), fresh.error(table(solver, grid, path))
        cells.append(f"{before:.4f} → {after:.4f} ({after / before:.2f})")
    return f"| {calls} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table of every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["digits", "moons", "eight_gaussians", "checkerboard"])
    parser.add_argument("--calls", default="4,6,8,10")
    parser.add_argument("--refined", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="seed of the teachers")
    parser.add_argument("--out", type=Path, default=Path("runs/solvers"))
    arguments = parser.parse_args()
    set_threads()
    calls = [int(part) for part in arguments.calls.split(",")]
    for name in arguments.models:
        model = model_of(name, arguments.out, arguments.seed)
        fresh = Pilot(model.module, *noises(model, FRESH[max(model.config.shape) > 16], SEED))
        print(f"\n### {name}: spread {fresh.spread:.3f}, reference RK4 with {fresh.steps} steps\n")
        if arguments.refined:
            print("| calls | " + " | ".join(MULTISTEP) + " |\n|--:|" + "--:|" * len(MULTISTEP))
        else:
            print(f"| {' | '.join(COLUMNS)} |\n|" + "--:|" * len(COLUMNS))
        for number in calls:
            print((refinement if arguments.refined else line)(model, fresh, number), flush=True)


if __name__ == "__main__":
    main()
