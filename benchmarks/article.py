"""The article's claims about ReFlow on digits: `python benchmarks/article.py --out runs/article --seeds 0,1,2`.

One teacher per seed; every line of the table is a ReFlow stage of that teacher, with the same number of samples seen.
The same command again resumes. It prints a Markdown table of means over seeds, with the largest deviation.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from fewstep.data.load import load_data
from fewstep.generator import load
from fewstep.pipeline.compare import compare
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.store.files import read_json, write_json
from fewstep.training.world import LocalWorld, set_threads

SAMPLES = 600_000  # of every ReFlow stage


def reflow(**options: Any) -> dict[str, Any]:
    """A ReFlow stage with these options."""
    return {"method": "reflow", "teacher": "teacher", "samples": SAMPLES, **options}


STAGES: dict[str, dict[str, Any]] = {
    "teacher": {"method": "flow_matching", "samples": 800_000},
    "plain": reflow(mix=1.0),
    "inverted": reflow(mix=0.9),
    "independent": reflow(mix=0.9, real="independent"),
    "plain-3": reflow(rounds=3, mix=1.0),
    "inverted-3": reflow(rounds=3),
    "independent-3": reflow(rounds=3, real="independent"),
    "anneal-3": reflow(rounds=3, real="anneal"),
    "flat-inverted-3": reflow(rounds=3, mix=0.9),
    "damaged": {"method": "flow_matching", "samples": 60_000},
    "damaged-plain": reflow(teacher="damaged", mix=1.0),
    "damaged-inverted": reflow(teacher="damaged", mix=0.9),
    "damaged-independent": reflow(teacher="damaged", mix=0.9, real="independent"),
    "raw": {"method": "flow_matching", "samples": 800_000, "ema": 0.0},
    "raw-plain": reflow(teacher="raw", mix=1.0),
}


def run_seed(out: Path, seed: int) -> dict[str, dict[str, float]]:
    """Train and measure one seed; the figures are stored in the folder of the models and reused."""
    stored = out / "measured.json"
    if stored.exists():
        figures: dict[str, dict[str, float]] = read_json(stored)
        return figures
    recipe = make_recipe({"data": "digits", "seed": seed, "stages": STAGES}, "benchmarks/article.py")
    folders = run_recipe(recipe, out, LocalWorld())
    models = [load(folder) for folder in folders]
    result = compare(models, load_data("digits"), steps=[1, 4, 50], seed=seed).result
    figures = {}
    for line in result["rows"]:
        row = figures.setdefault(line["model"], {})
        tag = f"@{line['steps']}" if "steps" in line else ""
        row[f"energy{tag}"] = line["scores"]["energy"]
        row[f"precision{tag}"] = line["scores"]["precision"]
        row[f"recall{tag}"] = line["scores"]["recall"]
    for name, diagnosis in result["diagnosis"].items():
        figures[name]["S"] = diagnosis["straightness"]
    write_json(stored, figures)
    return figures


COLUMNS = ("S", "energy@1", "precision@1", "recall@1", "energy@4", "energy@50", "precision@50", "recall@50")


def table(seeds: list[dict[str, dict[str, float]]]) -> str:
    """The Markdown table: means over seeds, with the largest deviation."""
    lines = ["| stage | " + " | ".join(COLUMNS) + " |", "|:--|" + "--:|" * len(COLUMNS)]
    for name in STAGES:
        cells = []
        for column in COLUMNS:
            values = [figures[name][column] for figures in seeds]
            mean = statistics.fmean(values)
            spread = max(abs(value - mean) for value in values)
            cells.append(f"{mean:.4f} ± {spread:.4f}" if "energy" in column else f"{mean:.3f} ± {spread:.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/article"))
    parser.add_argument("--seeds", default="0")
    arguments = parser.parse_args()
    set_threads()
    seeds = [int(part) for part in arguments.seeds.split(",")]
    print(table([run_seed(arguments.out / f"seed-{seed}", seed) for seed in seeds]))


if __name__ == "__main__":
    main()
