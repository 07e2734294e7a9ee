"""Few-step methods side by side: `python benchmarks/maps.py digits|fashion_mnist|mixtures|modes`.

``digits`` and ``fashion_mnist``: every row is one model, trained from the same teacher (or from the data, where its
name says so) on the same number of samples, or with `--seconds S` for the same CPU time, and scored at the step counts
that it supports. Rows are stored in OUT, and the same command makes the missing ones; `--rows "a; b"` makes only
those. Fashion-MNIST needs `--data` with the folder of its idx files; its teacher and judge are in `benchmarks/assets`.

``mixtures``: random mixtures on the line and in the plane, default options, from a teacher or from data. W1 to new
samples of the law (in the plane the mean over directions), divided by that of one Euler step of the teacher.

``modes``: 25 modes of width .08 on a grid of spacing 1, distribution matching with default options. Energy
distance of one call to 10,000 new samples, divided by that of the teacher at 100 steps, and the number of 10,000
samples within three widths of the mode that has fewest.

Run with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import ASSETS, Row, Rows, markdown, score, score_samples, spread, train
from torch import Tensor

from fewstep import closed_form
from fewstep.data.load import load_data
from fewstep.errors import UserError
from fewstep.flow.noise import generator_for
from fewstep.generator import Generator, load
from fewstep.methods.registry import find_method
from fewstep.metrics import energy, sample_count
from fewstep.metrics.controls import moment_matched_gaussian
from fewstep.metrics.feature_distance import FeatureDistance, find_features
from fewstep.training.world import set_threads

SCRIPT = "benchmarks/maps.py"
ANY, ONE = (1, 2, 4, 8), (1,)
MATCHING = ("fgm", "sid", "dmd", "realuid")  # distribution matching methods


@dataclass(frozen=True)
class Setting:
    """A data set with its recipes.

    Attributes:
        data: the data of the recipes.
        network: the network of the recipes.
        first: stages that are trained before the models.
        usual: options of every model.
        changes: by method, options that differ from the usual ones.
    """

    data: Any
    network: Row
    first: Row
    usual: Row
    changes: dict[str, Row] = field(default_factory=dict)

    def header(self, seed: int) -> Row:
        """The fields that all recipes have."""
        return {"data": self.data, "network": self.network, "seed": seed}


def digits() -> Setting:
    """The 8 x 8 digits; every model has the teacher's number of samples."""
    first = {
        "teacher": {"method": "flow_matching", "samples": 800_000},
        "judge": {"method": "features", "samples": 200_000, "network": {"widths": [24, 48, 96]}},
    }
    changes: dict[str, Row] = {name: {"samples": 400_000} for name in MATCHING}
    return Setting("digits", {"name": "mlp", "preset": "small"}, first, {"samples": 800_000}, changes)


def fashion_mnist(folder: Path) -> Setting:
    """Fashion-MNIST, with numbers of samples for a CPU; `--seconds` gives all models the same time instead."""
    data = {"path": str(folder / "train-images-idx3-ubyte.gz"), "name": "fashion_mnist"}
    usual: Row = {"samples": 150_000, "batch_size": 128, "lr": 5e-4, "precision": "bf16"}
    pairs: Row = {"pairs": 10_000, "solver": "midpoint", "nfe": 16, "tolerance": 0.4}
    game: Row = {"samples": 240_000, "batch_size": 64, "start": 0.4, "start_lr": 5e-4, "lr": 5e-5}
    game |= {"time": "exponential:3.5", "online_lr": 3e-4, "online_ema": 0.9, "online_turns": 1}
    changes = {"reflow": pairs, "instaflow": pairs, **dict.fromkeys(MATCHING, game)}
    return Setting(data, {"name": "unet", "preset": "small"}, {}, usual, changes)


@dataclass(frozen=True)
class Model:
    """One row of the table.

    Attributes:
        stage: the fields of its stage.
        steps: step counts at which it is scored.
        from_data: whether it is trained on data, without a teacher.
        start: name of an earlier row whose model it starts from.
    """

    stage: Row
    steps: tuple[int, ...] = ANY
    from_data: bool = False
    start: str | None = None


def models() -> dict[str, Model]:
    """The models by name."""
    return {
        "reflow": Model({"method": "reflow", "mix": 1.0}),
        "instaflow, regression": Model({"method": "instaflow", "adversarial": 0}, ONE),
        "meanflow": Model({"method": "meanflow"}),
        "meanflow, split": Model({"method": "meanflow", "target": "split"}),
        "lagrangian": Model({"method": "lagrangian"}),
        "shortcut": Model({"method": "shortcut"}),
        "consistency": Model({"method": "consistency"}),
        "consistency, continuous": Model({"method": "consistency", "target": "continuous"}),
        "consistency_fm, K = 2": Model({"method": "consistency_fm"}, (2,)),
        "fgm": Model({"method": "fgm"}, ONE),
        "sid": Model({"method": "sid"}, ONE),
        "dmd": Model({"method": "dmd"}, ONE),
        "realuid": Model({"method": "realuid"}, ONE),
        "sid, from instaflow": Model({"method": "sid", "samples": 100_000}, ONE, start="instaflow, regression"),
        "dmd, from instaflow": Model({"method": "dmd", "samples": 100_000}, ONE, start="instaflow, regression"),
        "dmd, two calls": Model({"method": "dmd", "steps": 2}, (1, 2)),
        "meanflow, from data": Model({"method": "meanflow"}, from_data=True),
        "lagrangian, from data": Model({"method": "lagrangian"}, from_data=True),
        "imm, from data": Model({"method": "imm"}, from_data=True),
        "shortcut, from data": Model({"method": "shortcut"}, from_data=True),
        "meanflow, alpha": Model({"method": "meanflow", "target": "alpha"}),
        "meanflow, improved, from data": Model({"method": "meanflow", "target": "improved"}, from_data=True),
        "meanflow, alpha, from data": Model({"method": "meanflow", "target": "alpha"}, from_data=True),
        "consistency_fm, K = 2, from data": Model({"method": "consistency_fm"}, (2,), from_data=True),
    }


def stage_of(setting: Setting, model: Model, teacher: Path) -> Row:
    """The fields of a model's stage, without options that its method does not have."""
    method = model.stage["method"]
    known = find_method(method).options.model_fields
    stage = setting.usual | setting.changes.get(method, {}) | model.stage
    if not model.from_data:
        stage = {"teacher": str(teacher), **stage}
    return {key: value for key, value in stage.items() if key in known or key in model.stage}


def seconds_of(setting: Setting, stage: Row, folder: Path, seed: int) -> float:
    """Train a stage; return the CPU seconds."""
    began = time.process_time()
    train(setting.header(seed) | {"stages": {"model": stage}}, folder, SCRIPT)
    return time.process_time() - began


def samples_in(setting: Setting, stage: Row, folder: Path, seed: int, seconds: float) -> tuple[int, float]:
    """Estimate from short runs the samples that a stage sees in ``seconds``, and the seconds for its pairs."""
    batch = stage.get("batch_size", 256)

    def short(batches: int, tag: str) -> float:
        other = folder.with_name(f"{folder.name}-{tag}")
        copy_pairs(folder.with_name(f"{folder.name}-first"), other)
        return seconds_of(setting, {**stage, "samples": batches * batch, "lr": 1e-6}, other, seed)

    first, few, more = short(24, "first"), short(24, "few"), short(48, "more")
    made = (folder.with_name(f"{folder.name}-first") / "model" / "pairs").exists()
    pairs = max(0.0, first - few) if made else 0.0
    copy_pairs(folder.with_name(f"{folder.name}-first"), folder)
    return max(batch, int((seconds - pairs - few) / ((more - few) / (24 * batch)))), pairs


def copy_pairs(source: Path, target: Path) -> None:
    """Copy the pairs of one run to another: equal requests give equal pairs."""
    if source != target and (source / "model" / "pairs").exists() and not target.exists():
        shutil.copytree(source / "model" / "pairs", target / "model" / "pairs")


def seeds_of(arguments: argparse.Namespace) -> list[int]:
    """The seeds of the rows to make."""
    return [] if arguments.table else [int(part) for part in arguments.seeds.split(",")]


def names_of(arguments: argparse.Namespace, every: Iterable[str]) -> list[str]:
    """The names of the rows to make."""
    return [name.strip() for name in arguments.rows.split(";")] if arguments.rows else list(every)


def folder_of(out: Path, name: str) -> Path:
    """The folder of a row's model."""
    return out / "models" / "".join(c if c.isalnum() else "-" for c in name)


def scores(path: Path, steps: tuple[int, ...], data: Any, judge: FeatureDistance, **how: Any) -> Row:
    """Scores at every step count, as ``score@steps``; step counts that the model refuses are left out."""
    found = {}
    for count in steps:
        try:
            found |= {f"{key}@{count}": value for key, value in score(load(path), data, judge, count, **how).items()}
        except UserError as refused:
            print(f"{path.name} at {count} steps: {refused}")
    return found


def table(rows: Rows) -> str:
    """The Markdown table: energy (range over seeds), Fréchet distance, precision/recall at every step count."""
    lines = []
    for name in rows.names:
        cells = []
        for steps in ANY:
            distance = spread(rows.values(name, f"energy@{steps}"), ".4f")
            frechet = spread(rows.values(name, f"fd_percent@{steps}"), ".2f", full=False)
            ratios = "/".join(
                spread(rows.values(name, f"{key}@{steps}"), ".2f", full=False) for key in ("precision", "recall")
            )
            cells.append(f"{distance} · {frechet} · {ratios}" if distance else "")
        extra = [
            spread(rows.values(name, key), form, full=False) for key, form in (("samples", ",.0f"), ("seconds", ".0f"))
        ]
        lines.append([name, *cells, *extra])
    return markdown([*(f"{steps} call{'s' if steps > 1 else ''}" for steps in ANY), "samples", "s"], lines)


def images(setting: Setting, arguments: argparse.Namespace, base: Path) -> None:
    """Make the rows of digits or Fashion-MNIST and print the table."""
    rows, known = Rows(base / "rows.jsonl"), models()
    controls = ["Gaussian", "teacher", "teacher, auto"]
    wanted = names_of(arguments, [*controls, *known])
    for seed in seeds_of(arguments):
        out = base / str(seed)
        if setting.first:
            train(
                {"data": setting.data, "network": setting.network, "seed": seed, "stages": setting.first}, out, SCRIPT
            )
        teacher = out / "teacher" if setting.first else ASSETS / "fashion_mnist_teacher"
        data = load_data(setting.data, seed=seed)
        judge = find_features(out / "judge" if setting.first else ASSETS / "fashion_mnist_features", data.shape)
        for name in wanted:
            if (name, seed) in rows:
                continue
            line: Row = {"name": name, "seed": seed}
            if name == "Gaussian":
                real = data.train_rows()
                found = score_samples(moment_matched_gaussian(real, min(2000, sample_count(len(real)))), real, judge)
                line |= {f"{key}@1": value for key, value in found.items()}
            elif name == "teacher":
                line |= scores(teacher, (*ANY, 50), data, judge)
            elif name == "teacher, auto":
                line |= scores(teacher, (4, 8), data, judge, solver="auto")
            else:
                model, folder = known[name], folder_of(out, name)
                stage, before = stage_of(setting, model, teacher), 0.0
                if model.start is not None:
                    stage["init"] = str(folder_of(out, model.start) / "model")
                    stage.pop("start", None)
                    before = rows.values(model.start, "seconds", seed)[0]
                elif arguments.seconds:
                    stage["samples"], before = samples_in(setting, stage, folder, seed, arguments.seconds)
                seconds = before + seconds_of(setting, stage, folder, seed)
                line |= {"samples": stage["samples"], "seconds": seconds}
                line |= scores(folder / "model", model.steps, data, judge)
                shutil.rmtree(folder / "model" / "pairs", ignore_errors=True)
            rows.add(line)
    print(table(rows))


def mixture(dimension: int, seed: int) -> tuple[Any, Tensor]:
    """A random mixture and 20,000 of its samples; on the line, seed 0 gives a mixture with fixed parameters."""
    draw = np.random.default_rng((seed, dimension))
    parts = int(draw.integers(2, 5) if dimension == 1 else draw.integers(3, 9))
    weights = draw.dirichlet(np.full(parts, 4.0))
    means, widths = draw.uniform(-2, 2, (parts, dimension)), draw.uniform(0.1, 0.4, parts)
    if (dimension, seed) == (1, 0):
        weights, means, widths = np.array([0.4, 0.6]), np.array([[-1.2], [0.9]]), np.array([0.25, 0.35])
    law = closed_form.mixture(*(torch.from_numpy(part) for part in (weights, means, widths)))
    return law, law.sample(20_000, generator_for("mixture", seed))


def distances(x: Tensor, law: Any, seed: int) -> dict[str, float]:
    """W1 and W2 to new samples of the law; in the plane their means over 64 directions."""
    y = law.sample(len(x), generator_for("judge", seed)).to(x)
    angles = torch.arange(64 if x[0].numel() > 1 else 1) * (torch.pi / 64)
    directions = torch.stack([angles.cos(), angles.sin()])[: x[0].numel()].to(x)
    gaps = (x @ directions).sort(0).values - (y @ directions).sort(0).values
    return {"w1": float(gaps.abs().mean()), "w2": float(gaps.square().mean(0).sqrt().mean())}


def trained(out: Path, samples: Tensor, seed: int) -> tuple[Row, Generator]:
    """Train a teacher with default options on samples; return the fields of its recipe and the teacher."""
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "data.npy", samples.float().numpy())
    header = {"data": str(out / "data.npy"), "seed": seed}
    train({**header, "stages": {"teacher": {"method": "flow_matching"}}}, out, SCRIPT)
    return header, load(out / "teacher")


def modes(arguments: argparse.Namespace, base: Path) -> None:
    """Make the rows of the mixture of 25 modes and print the table."""
    rows, width = Rows(base / "rows.jsonl"), 0.08
    centres = torch.cartesian_prod(*[torch.arange(-2.0, 3.0, dtype=torch.float64)] * 2)
    law = closed_form.mixture(torch.full((25,), 0.04).to(centres), centres, torch.full((25,), width).to(centres))

    def measure(model: Generator, steps: int, seed: int) -> tuple[float, int]:
        """Energy distance, and samples of the mode that has fewest."""
        x, real = model.sample(10_000, steps=steps).double(), law.sample(10_000, generator_for("judge", seed))
        near = torch.cdist(x, centres).min(1)
        inside = torch.bincount(near.indices[near.values < 3 * width], minlength=25)
        return float(energy(x, real.to(x))), int(inside.min())

    for seed in seeds_of(arguments):
        out = base / str(seed)
        header, teacher = trained(out, law.sample(20_000, generator_for("modes", seed)), seed)
        if ("teacher at 100", seed) not in rows:
            found, least = measure(teacher, 100, seed)
            rows.add({"name": "teacher at 100", "seed": seed, "energy": found, "ratio": 1.0, "least": least})
        unit = rows.values("teacher at 100", "energy", seed)[0]
        for name in names_of(arguments, MATCHING):
            if (name, seed) in rows:
                continue
            stage = {"teacher": str(out / "teacher"), **models()[name].stage}
            began = time.process_time()
            train({**header, "stages": {"model": stage}}, out / name, SCRIPT)
            seconds, (found, least) = time.process_time() - began, measure(load(out / name / "model"), 1, seed)
            line = {"name": name, "seed": seed, "energy": found, "ratio": found / unit, "least": least}
            rows.add(line | {"seconds": seconds})
    lines = [
        [name, *(spread(rows.values(name, key), form) for key, form in (("ratio", ".2f"), ("least", ".0f")))]
        for name in rows.names
    ]
    print(markdown(["energy / teacher's at 100", "least mode, of 400"], lines))


def mixtures(arguments: argparse.Namespace, base: Path) -> None:
    """Make the rows of random mixtures and print the table."""
    rows = Rows(base / "rows.jsonl")
    known = {name: model for name, model in models().items() if model.start is None}
    wanted = names_of(arguments, known)
    for seed in seeds_of(arguments):
        for dimension in (1, 2):
            law, samples = mixture(dimension, seed)
            out = base / f"{dimension}-{seed}"
            header, teacher = trained(out, samples, seed)
            euler = distances(teacher.sample(20_000, steps=1), law, seed)["w1"]
            for name in wanted:
                if (f"{name}, {dimension}-D", seed) in rows:
                    continue
                folder = out / "".join(c if c.isalnum() else "-" for c in name)
                stage = {**({} if known[name].from_data else {"teacher": str(out / "teacher")}), **known[name].stage}
                began = time.process_time()
                train({**header, "stages": {"model": stage}}, folder, SCRIPT)
                line: Row = {"name": f"{name}, {dimension}-D", "seed": seed, "seconds": time.process_time() - began}
                for steps in known[name].steps:
                    found = distances(load(folder / "model").sample(20_000, steps=steps), law, seed)
                    line |= {f"{name}@{steps}": value for name, value in found.items()}
                    line |= {f"ratio@{steps}": found["w1"] / euler}
                rows.add(line)
    lines = [[name, *(spread(rows.values(name, f"ratio@{steps}"), ".3f") for steps in ANY)] for name in rows.names]
    print(markdown([f"{steps}" for steps in ANY], lines))


def main() -> None:
    """Make the missing rows of a setting and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=["digits", "fashion_mnist", "mixtures", "modes"])
    parser.add_argument("--data", type=Path, default=Path(), help="folder of the Fashion-MNIST files")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--seconds", type=float, help="CPU seconds of every model, instead of a number of samples")
    parser.add_argument("--rows", help="names, separated by ';'; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/maps"))
    parser.add_argument("--table", action="store_true", help="only print the table of the existing rows")
    arguments = parser.parse_args()
    set_threads()
    base = arguments.out / arguments.setting / (f"{arguments.seconds:g}s" if arguments.seconds else "samples")
    base.mkdir(parents=True, exist_ok=True)
    if arguments.setting == "mixtures":
        mixtures(arguments, base)
    elif arguments.setting == "modes":
        modes(arguments, base)
    else:
        images(digits() if arguments.setting == "digits" else fashion_mnist(arguments.data), arguments, base)


if __name__ == "__main__":
    main()
