"""Effect of each loss term of one-step distillation: `python benchmarks/distillation.py digits|fashion_mnist`.

Every row is one student, which is trained, scored and written to OUT/rows.jsonl; the same command again makes the
missing rows and prints the table. `--rows "rec; all, real = data"` makes only those; `--seeds 0,1,2` are the seeds of
teachers and of students. Fashion-MNIST needs `--data` with the folder of its idx files; its teacher and judge are in
`benchmarks/assets`. Scores are medians over the seeds, with the smallest and largest value where there are several:
energy distance and neighbours in network units, the Fréchet distance on features that no loss uses. `rmse` is the
root mean square distance per dimension to the teacher's endpoints on held-out noise. `s` are CPU seconds of the
student. Run with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import ASSETS, SCORES, Row, Rows, markdown, score, size_and_cost, spread, train

from fewstep.data.load import load_data
from fewstep.generator import Generator, load
from fewstep.methods.families.straight_line import one_step
from fewstep.methods.registry import find_method
from fewstep.metrics.feature_distance import find_features
from fewstep.store.pairs import PairStore
from fewstep.training.world import set_threads

SCRIPT = "benchmarks/distillation.py"
TIMED, REPEATS = 64, 7  # samples of a timing, and its repetitions


class Setting:
    """A data set with its recipes.

    Args:
        data: the data of the recipes.
        network: the network of the recipes.
        first: stages that are trained before the students.
        student: options of every student.
        small: options that differ for students with a smaller network.
    """

    def __init__(
        self,
        data: Any,
        network: Row,
        first: Row,
        student: Row,
        small: Row,
    ) -> None:
        self.data, self.network, self.first, self.student, self.small = data, network, first, student, small


def digits() -> Setting:
    """The 8 x 8 digits, with a teacher of their own."""
    first = {
        "teacher": {"method": "flow_matching", "samples": 800_000},
        "straight": {"method": "reflow", "teacher": "teacher", "samples": 600_000},
        "features": {"method": "features", "samples": 200_000},
        "judge": {"method": "features", "samples": 200_000, "network": {"widths": [24, 48, 96]}},
        "seen": {"method": "features", "samples": 200_000, "network": {"widths": [12, 24]}},
    }
    student = {"samples": 500_000, "init": "straight"}
    return Setting("digits", {"name": "mlp", "preset": "small"}, first, student, {})


def fashion_mnist(folder: Path) -> Setting:
    """Fashion-MNIST, with the teacher in assets."""
    image: Row = {"samples": 150_000, "batch_size": 128, "lr": 5e-4, "precision": "bf16"}
    image |= {"pairs": 10_000, "solver": "midpoint", "nfe": 16, "tolerance": 0.4}
    data = {
        "path": str(folder / "train-images-idx3-ubyte.gz"),
        "labels": str(folder / "train-labels-idx1-ubyte.gz"),
        "name": "fashion_mnist",
    }
    teacher = str(ASSETS / "fashion_mnist_teacher")
    first = {
        "straight": {"method": "reflow", "teacher": teacher, "mix": 1.0, **image},
        "features": {"method": "features", "samples": 200_000, "learn": "noise"},
        "seen": {"method": "features", "samples": 200_000, "learn": "noise", "network": {"widths": [12, 24]}},
    }
    student = {"init": "straight", "discriminator_lr": 1e-3, "penalty_every": 4, **image}
    small = {"samples": 400_000, "lr": 2e-3}
    return Setting(data, {"name": "unet", "preset": "small"}, first, student, small)


HARD: Row = {"shares": [0.5, 0, 0.5], "adversarial": 0.5, "adversarial_lr": 2e-4}
GENTLE: Row = {"shares": [0.5, 0, 0.5], "adversarial": 0.25, "adversarial_lr": 1e-3, "samples": 800_000}
SMALL = {"1/4": 0.25, "1/8": 0.125}


def students() -> dict[str, Row]:
    """The students by name; each is a set of options that replace those of the setting."""
    off: Row = {"method": "instaflow", "adversarial": 0}
    on, gentle = {"method": "instaflow", **HARD}, {"method": "instaflow", **GENTLE}
    seen = {"features": "features", "shares": [0.5, 0.1, 0.4]}
    through = {"adversarial": 0.5, "sees": "features", "features": "seen", "perceptual": 0}
    made = {
        "rec": off,
        "rec + perceptual": {**off, **seen},
        "rec + adversarial, real = teacher": {**on, "discriminator_real": "teacher"},
        "rec + adversarial, real = data": on,
        "all, real = data": {**on, **seen},
        "rec, 800k": {**off, "samples": 800_000},
        "rec + gentle adversarial, real = data, 800k": gentle,
        "rec + adversarial through features, real = data, 800k": {**gentle, **through},
    }
    for name, size in SMALL.items():
        small = {"network": {"size": size}, "init": None}
        made[f"{name}: rec"] = {**off, **small}
        made[f"{name}: rec + adversarial, real = teacher"] = {**on, **small, "discriminator_real": "teacher"}
        made[f"{name}: rec + adversarial, real = data"] = {**on, **small}
        made[f"{name}: all, real = data"] = {**on, **seen, **small}
        made[f"{name}: rec, 800k"] = {**off, **small, "samples": 800_000}
        made[f"{name}: rec + gentle adversarial, real = data, 800k"] = {**gentle, **small}
        made[f"{name}: rec + adversarial through features, real = data, 800k"] = {**gentle, **through, **small}
        for annealing in (False, True):
            for guided in (0, 1):
                words = ["annealed" if annealing else "straightened", *(["guided"] if guided else [])]
                slim = {"method": "slimflow", "annealing": annealing, "flow_weight": guided, **small}
                made[f"{name}: {', '.join(words)}"] = slim
    straight = {"method": "reflow", "init": None, "mix": 1.0}
    made["2-RF: ushape, huber"] = {**straight, "time": "ushape:4", "loss": "huber"}
    made["2-RF++: ushape, perceptual"] = {
        **straight, "time": "ushape:4", "loss": "perceptual:0.05", "features": "features",
    }  # fmt: skip
    made["Simple ReFlow: exponential, normalised"] = {**straight, "time": "exponential", "weight": "normalised"}
    made["2-RF: plain"] = straight
    return made


def prepare(setting: Setting, out: Path, seed: int) -> None:
    """Train teacher, straight flow and features."""
    fields = {"data": setting.data, "network": setting.network, "seed": seed, "stages": setting.first}
    train(fields, out, SCRIPT)


def student(setting: Setting, out: Path, seed: int, name: str, changes: Row) -> tuple[Path, float]:
    """Train one student; return its folder and the CPU seconds."""
    folder = out / "students" / "".join(letter if letter.isalnum() else "-" for letter in name)
    known = find_method(changes["method"]).options.model_fields
    usual = {**setting.student, **(setting.small if "network" in changes else {})}
    stage = {"teacher": "teacher", **{k: v for k, v in usual.items() if k in known}, **changes}
    for key in ("teacher", "init", "features"):
        word = stage.get(key)
        if word is not None:
            found = out / word
            stage[key] = str(found if found.is_dir() else ASSETS / f"fashion_mnist_{word}")
    tag = {"slimflow": "slimflow", "reflow": "round-1"}.get(stage["method"], "distill")
    made = [*out.glob(f"straight/pairs/{tag}"), *sorted((out / "students").glob(f"*/student/pairs/{tag}"))]
    if made and not folder.exists():  # equal requests give equal pairs, so they are copied
        shutil.copytree(made[0], folder / "student" / "pairs" / tag)
    fields = {"data": setting.data, "network": setting.network, "seed": seed, "stages": {"student": stage}}
    began = time.process_time()
    train(fields, folder, SCRIPT)
    return folder / "student", time.process_time() - began


def time_ratio(model: Generator, teacher: Generator) -> float:
    """Wall time of one step over that of the teacher's fifty steps; medians of alternating timings."""
    works: list[Callable[[], object]] = [lambda: model.draw(TIMED, steps=1), lambda: teacher.draw(TIMED, steps=50)]
    times: list[list[float]] = [[], []]
    for _ in range(REPEATS):
        for work, kept in zip(works, times, strict=True):
            began = time.perf_counter()
            work()
            kept.append(time.perf_counter() - began)
    return statistics.median(times[0]) / statistics.median(times[1])


def rmse(model: Generator, pairs: Path) -> float:
    """Root mean square distance to the teacher's endpoints of held-out pairs, per dimension."""
    manifest = json.loads((pairs / "manifest.json").read_text())["request"]
    held_out = PairStore(pairs, {}, manifest["rows"]).held_out_rows()
    columns = held_out.columns(torch.arange(min(1024, len(held_out))))
    with torch.no_grad():
        x = one_step(model.module, columns["x0"], {})
    return float((x - columns["x1"]).square().mean().sqrt())


def measure(setting: Setting, out: Path, seed: int, name: str, changes: Row | None) -> Row:
    """Make one line of rows.jsonl."""
    data = load_data(setting.data, seed=seed)
    found = out / "teacher"
    teacher = load(found if found.is_dir() else ASSETS / "fashion_mnist_teacher")
    judge_folder = out / "judge" if (out / "judge").is_dir() else ASSETS / "fashion_mnist_features"
    judge = find_features(judge_folder, data.shape)
    line: Row = {"name": name, "seed": seed}
    if changes is None:
        kind, steps = name.split(" @")
        model = teacher if kind == "teacher" else load(out / kind)
        return line | score(model, data, judge, int(steps)) | size_and_cost(model)
    folder, seconds = student(setting, out, seed, name, changes)
    model = load(folder)
    pairs = next((folder / "pairs").glob("*/generated"))
    return (
        line
        | score(model, data, judge, 1)
        | size_and_cost(model)
        | {"rmse": rmse(model, pairs), "time": time_ratio(model, teacher), "seconds": seconds}
    )


COLUMNS = (
    ("energy", "energy", ".4f"), ("fd_percent", "FD-judge %", ".2f"), ("precision", "precision", ".3f"),
    ("recall", "recall", ".3f"), ("coverage", "coverage", ".3f"), ("rmse", "rmse", ".3f"),
    ("parameters", "parameters", ",.0f"), ("macs", "M MACs", ".2f"), ("time", "time / teacher's 50", ".4f"),
    ("seconds", "s", ".0f"),
)  # fmt: skip


def table(rows: Rows) -> str:
    """The Markdown table: medians over seeds, with the range in brackets."""
    ranged = (*SCORES, "rmse")
    lines = [
        [name, *(spread(rows.values(name, key), form, key in ranged) for key, _, form in COLUMNS)]
        for name in rows.names
    ]
    return markdown([title for _, title, _ in COLUMNS], lines)


def main() -> None:
    """Make the missing rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=["digits", "fashion_mnist"])
    parser.add_argument("--data", type=Path, default=Path(), help="folder of the Fashion-MNIST files")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rows", help="names, separated by ';'; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--table", action="store_true", help="only print the table of the existing rows")
    arguments = parser.parse_args()
    set_threads()
    setting = digits() if arguments.setting == "digits" else fashion_mnist(arguments.data)
    base = arguments.out / arguments.setting
    kept = Rows(base / "rows.jsonl")
    wanted: dict[str, Row | None] = {"teacher @1": None, "teacher @50": None, "straight @1": None, **students()}
    if arguments.rows:
        wanted = {name.strip(): wanted[name.strip()] for name in arguments.rows.split(";")}
    for seed in [] if arguments.table else [int(part) for part in arguments.seeds.split(",")]:
        out = base / str(seed)
        prepare(setting, out, seed)
        for name, changes in wanted.items():
            if (name, seed) not in kept:
                kept.add(measure(setting, out, seed, name, changes))
    print(table(kept))


if __name__ == "__main__":
    main()
