"""Quality over seeds: `python benchmarks/quality.py digits|conditional|mixtures|ot --out runs/quality --seeds 0,1,2`.

- ``digits``: the demo's recipe; straightness and one-step energy against the teacher's.
- ``conditional``: share of the one-step student's samples whose label a classifier trained on the data finds.
- ``mixtures``: random 2-D mixtures with unequal weights and widths, with default options.
- ``ot``: optimal-transport and independent coupling from eight Gaussians to moons, one step.

Each prints a Markdown table. The same command again resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.data.load import load_data
from fewstep.diagnostics.diagnose import diagnose
from fewstep.flow.noise import noise_rows
from fewstep.generator import Generator, load
from fewstep.metrics import energy, sample_count, sliced_w2
from fewstep.pipeline.recipe import load_recipe, make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.training.world import LocalWorld, set_threads

Line = list[str]


def energies(model: Generator, train: torch.Tensor, steps: list[int]) -> list[float]:
    """Energy distance at each step count, seed 0."""
    count = sample_count(len(train))
    return [float(energy(model.draw(count, steps=number).x, train)) for number in steps]


def straightness(model: Generator) -> float:
    """S on 512 samples of noise."""
    return diagnose(model.module, noise_rows(512, model.config.shape, seed=0)).straightness


def digits(out: Path, seed: int) -> Line:
    """Train the demo's recipe; energies, ratio of straightness, and ratios of energies."""
    run_recipe(load_recipe("digits", [f"seed={seed}"]), out, LocalWorld())
    teacher, straight, student = (load(out / name) for name in ("teacher", "straight", "onestep"))
    train = load_data("digits").train_rows()
    first, many = energies(teacher, train, [1, 50])
    reflowed = energies(straight, train, [1])[0]
    distilled = energies(student, train, [1])[0]
    ratio = straightness(straight) / straightness(teacher)
    values = [first, many, reflowed, distilled, ratio, reflowed / first, reflowed / many]
    return [*(f"{value:.4f}" for value in values), f"{(distilled - 0.002) / many:.3f}"]


def conditional(out: Path, seed: int) -> Line:
    """Share of samples to which a classifier trained on the data gives the requested label."""
    from sklearn.svm import SVC

    run_recipe(load_recipe("digits_conditional", [f"seed={seed}"]), out, LocalWorld())
    data = load_data("digits")
    assert data.labels is not None
    pixels = data.rows.reshape(len(data), -1).astype(float)
    judge = SVC(gamma=0.001, C=10).fit(pixels[data.train], data.labels[data.train])
    label = torch.arange(10).repeat_interleave(200)
    shares = [judge.score(pixels[data.held_out], data.labels[data.held_out])]
    for name, how in (
        ("teacher", {"steps": 50}),
        ("teacher", {"steps": 50, "guidance": 2.0}),
        ("straight", {"steps": 1}),
        ("onestep", {}),
    ):
        x = load(out / name).sample(2000, label=label, seed=seed, **how)  # type: ignore[arg-type]
        shares.append(float((judge.predict(x.flatten(1).numpy()) == label.numpy()).mean()))
    return [f"{share:.4f}" for share in shares]


def mixtures(out: Path, seed: int) -> Line:
    """Train on a random mixture of 3 to 7 modes with default options; energies over their bars."""
    random = np.random.default_rng(seed)
    modes = int(random.integers(3, 8))
    weights = random.dirichlet(2 * np.ones(modes))
    means, widths = (
        4 * random.normal(size=(modes, 2)),
        np.exp(random.uniform(np.log(0.05), np.log(0.8), modes)),
    )
    chosen = random.choice(modes, p=weights, size=20_000)
    x = 10 * (means[chosen] + widths[chosen, None] * random.normal(size=(20_000, 2))) + 100
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "x.npy", x.astype(np.float32))
    stages: dict[str, dict[str, Any]] = {
        "teacher": {"method": "flow_matching"},
        "straight": {"method": "reflow", "teacher": "teacher"},
        "onestep": {"method": "distill", "teacher": "straight"},
    }
    recipe = make_recipe({"data": str(out / "x.npy"), "seed": seed, "stages": stages}, "benchmarks/quality.py")
    run_recipe(recipe, out, LocalWorld())
    train = load_data(out / "x.npy").train_rows()
    first, many = energies(load(out / "teacher"), train, [1, 50])
    reflowed = energies(load(out / "straight"), train, [1])[0]
    distilled = energies(load(out / "onestep"), train, [1])[0]
    bars = [reflowed / (first / 20), reflowed / (3 * many + 0.003), distilled / (1.2 * reflowed)]
    return [
        str(modes),
        *(f"{v:.5f}" for v in (first, many, reflowed, distilled)),
        *(f"{b:.3f}" for b in bars),
    ]


def ot(out: Path, seed: int) -> Line:
    """Sliced W2 of one step from eight Gaussians to moons, for both couplings."""
    stages = {name: {"method": "flow_matching", "coupling": name, "samples": 200_000} for name in ("independent", "ot")}
    recipe = make_recipe(
        {"data": "moons", "base": "eight_gaussians", "seed": seed, "stages": stages}, "benchmarks/quality.py"
    )
    run_recipe(recipe, out, LocalWorld())
    train = load_data("moons").train_rows()
    return [f"{sliced_w2(load(out / name).draw(4000, steps=1).x, train):.4f}" for name in stages]


TABLES: dict[str, tuple[Any, str]] = {
    "digits": (
        digits,
        "teacher@1 | teacher@50 | straight@1 | onestep@1 | S ratio (≤ .1) | straight@1 / teacher@1 (≤ .05) | "
        "straight@1 / teacher@50 (≤ 2.5) | (onestep − .002) / teacher@50 (≤ 1.3)",
    ),
    "conditional": (
        conditional,
        "held-out data | teacher@50 | teacher@50, w = 2 | straight@1 | onestep@1 (≥ .97)",
    ),
    "mixtures": (
        mixtures,
        "modes | teacher@1 | teacher@50 | straight@1 | onestep@1 | of bar: teacher@1 / 20 | of bar: 3 teacher@50 + .003"
        " | of bar: 1.2 straight@1",
    ),
    "ot": (ot, "independent | ot"),
}


def main() -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=TABLES)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_args()
    set_threads()
    measure, head = TABLES[arguments.what]
    lines = []
    for word in arguments.seeds.split(","):
        cells = measure(arguments.out / arguments.what / f"seed-{word}", int(word))
        lines.append(f"| {word} | " + " | ".join(cells) + " |")
    print(f"\n| seed | {head} |")
    print("|--:|" + "--:|" * (head.count("|") + 1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
