"""Compare models side by side: quality, NFE and time at equal seeds, with the controls beside them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.data.dataset import DataSet
from fewstep.data.scaling import Scaling
from fewstep.diagnostics.diagnose import diagnose
from fewstep.errors import UserError
from fewstep.flow.grids import GridSpec, explicit_times
from fewstep.generator import Draw, Generator
from fewstep.metrics import Reference, data_rows, moment_matched_gaussian, sample_count
from fewstep.metrics.feature_distance import FeatureDistance
from fewstep.networks import parameter_count
from fewstep.pipeline.feature_checks import check_judge

GAUSSIAN, TRAINING = "moment-matched Gaussian", "training data"
MIN_ROWS = 6  # k-nearest-neighbour metrics (k = 5) need more rows than neighbours
TIMED_ROWS = 64  # samples in a timed draw
TIMED_REPEATS = 5  # timings of a row, of which the median counts
TIMED_SECONDS = 0.02  # of repeated draws in one timing; chosen, not tuned
DIAGNOSIS_SAMPLES = 256  # noises from which straightness is measured; chosen, not tuned

Say = Callable[[str], None]
SolverAndGrid = tuple[str | None, GridSpec | None]


def compare(
    models: Sequence[Generator],
    data: DataSet,
    *,
    steps: Sequence[int] = (1, 2, 4, 8, 50),
    solver: str | None = None,
    grid: GridSpec | None = None,
    samples: int | None = None,
    seed: int = 0,
    features: FeatureDistance | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Measure every model at every step count it can be sampled with.

    Args:
        models: generators of the data's shape; their names must differ.
        data: the reference: its training split, with the held-out split beside it.
        steps: step counts of velocity models and of maps made for several; a map of one step count is sampled with
            that one. Explicit times in ``grid`` fix the step count.
        solver, grid: how velocity models are sampled, their own when absent; with ``auto`` and ``fitted`` steps are
            network evaluations.
        samples: generated samples, at most the default ``min(4000, training rows)``.
        seed: of the samples; the same noise for every model and step count.
        features: the features of the Fréchet distance; the samples in network units when absent.
        say: called with a line of progress.

    Returns:
        A JSON-able mapping: ``protocol``, ``rows`` (models first, then the two controls), ``diagnosis``.

    Raises:
        UserError: no models, two of one name, another shape than the data's, too few samples or data rows, a model
            that was trained with ``features`` in its loss.
    """
    check_models(models, data)
    train, held_out = data.train_rows(), data.held_out_rows()
    check_reference(data)
    count = check_count(samples, len(train), say)
    beside = held_out if len(held_out) >= MIN_ROWS else None
    reference = make_reference(models, train, beside, features)
    rows: list[dict[str, Any]] = []
    fixed = None if grid is None else explicit_times(grid)
    for model in models:
        chosen = solver_of(model, solver, grid)
        for number in steps_of(model, steps if fixed is None else (len(fixed) - 1,)):
            draw = model.draw(count_for(model, count), steps=number, seed=seed, solver=chosen[0], grid=chosen[1])
            scores = reference.score(in_reference_units(draw.x, model, data)).as_dict()
            rows.append(row(model, number, draw, scores, chosen))
            say(f"  {model.name} at {number} step(s): energy {scores['energy']:.4f}")
    add_times(rows, models, seed, solver, grid)
    for name, x in (
        (GAUSSIAN, moment_matched_gaussian(train, count, seed)),
        (TRAINING, data_rows(train, count)),
    ):
        rows.append({"model": name, "control": True, "scores": reference.score(x).as_dict()})
    return {
        "protocol": {
            "seed": seed,
            "samples": count,
            "reference": f"{data.name}, training split of {len(train)} rows",
            "held_out": len(held_out),
            "units": "network units",
            "features": None if features is None else {"name": features.name, "digest": features.digest},
        },
        "data": {"name": data.name, "fingerprint": data.fingerprint, "shape": list(data.shape)},
        "rows": rows,
        "diagnosis": {
            model.name: diagnose_model(model, seed).as_dict()
            for model in models
            if model.config.rule.kind == "velocity"
        },
    }


def make_reference(
    models: Sequence[Generator], train: Tensor, held_out: Tensor | None, features: FeatureDistance | None
) -> Reference:
    """The data that every row is scored against, with the Fréchet distance on ``features``."""
    if features is None:
        return Reference(train, held_out)
    check_judge(models, features)
    return Reference(train, held_out, features.pooled, features_name=features.name)


def check_models(models: Sequence[Generator], data: DataSet) -> None:
    """Refuse no models, models of another shape, and names that occur twice."""
    if not models:
        raise UserError("no model to compare: give at least one model's folder.")
    for model in models:
        if model.config.shape != data.shape:
            raise UserError(
                f"{model.name!r} makes samples of shape {model.config.shape}, the data {data.name!r} has "
                f"{data.shape}: compare models of one data set with that data."
            )
    names = [model.name for model in models]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two models are called {twice[0]!r}: give them different names.")


def check_reference(data: DataSet) -> None:
    """Refuse data with too few rows for the metrics, or whose rows are all equal."""
    if len(data.train) < MIN_ROWS:
        raise UserError(
            f"the data {data.name!r} has {len(data.train)} training rows (a tenth is held out), and a comparison "
            f"needs at least {MIN_ROWS}: give more rows."
        )
    first = data.rows[data.train[0]]
    # rows are read in pieces, and reading ends at the first row that differs: large data stay on disk
    pieces = (data.train[i : i + 1024] for i in range(0, len(data.train), 1024))
    if all(bool((data.rows[piece] == first).all()) for piece in pieces):
        raise UserError(
            f"all training rows of {data.name!r} are equal: there is no distribution to learn or to compare."
        )


def check_count(samples: int | None, reference: int, say: Say) -> int:
    """How many samples to generate: the protocol's number, or fewer when the user asks for fewer."""
    most = sample_count(reference)
    if samples is None:
        return most
    if samples < MIN_ROWS:
        raise UserError(f"a comparison needs at least {MIN_ROWS} samples, got {samples}: leave samples out.")
    if samples > most:
        say(f"  samples: {most} of the {samples} asked for; the protocol takes min(4000, training rows)")
    return min(samples, most)


def count_for(model: Generator, count: int) -> int:
    """How many samples of a model are measured: ``count``, or its different starts where there are fewer.

    Raises:
        UserError: fewer different starts than the nearest-neighbour scores need.
    """
    starts = model.distinct_starts
    if starts is not None and starts < MIN_ROWS:
        raise UserError(
            f"{model.name!r} has {starts} different starts, and a comparison needs at least {MIN_ROWS} samples: "
            "train it again with more held-out rows."
        )
    return count if starts is None else min(count, starts)


def in_reference_units(x: Tensor, model: Generator, data: DataSet) -> Tensor:
    """Samples in the data's network units; a model scaled otherwise goes through the data's own units."""
    if model.config.scaling == data.scaling.as_dict():
        return x
    rows = x.float().numpy()
    if model.config.scaling is not None:
        own = Scaling.from_dict(model.config.scaling)
        rows = own.arrange(own.to_data(x).numpy())
    return data.scaling.normalise(rows)


def name_apart(models: Sequence[Generator], folders: Sequence[Path]) -> None:
    """Give models of the same name the shortest ends of their folders' paths that tell them apart.

    ``runs/a/teacher`` and ``runs/b/teacher`` become ``a/teacher`` and ``b/teacher``.

    Raises:
        UserError: one folder is given twice.
    """
    paths = [folder.resolve() for folder in folders]
    for path, folder in zip(paths, folders, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"the model {str(folder)!r} is given twice: name every model once.")
    names = [model.name for model in models]
    for k, name in enumerate(names):
        same = [path for path, other in zip(paths, names, strict=True) if other == name]
        if len(same) == 1:
            continue
        depth = 1
        while len({path.parts[-depth:] for path in same}) < len(same):
            depth += 1
        models[k].name = "/".join(paths[k].parts[-depth:])


def solver_of(model: Generator, solver: str | None, grid: GridSpec | None) -> SolverAndGrid:
    """The solver and grid a model is sampled with: those asked for; none for a map, which has its own sampler."""
    return (solver, grid) if model.config.rule.kind == "velocity" else (None, None)


def steps_of(model: Generator, steps: Sequence[int]) -> list[int]:
    """The step counts a model is measured at."""
    own = model.config.rule.steps
    if model.config.rule.kind == "map" and model.config.rule.sampler == "euler":
        return list(own or (model.config.rule.default_steps,))
    wanted = sorted(set(steps))
    if model.config.rule.kind == "map" and own is not None:
        return [number for number in wanted if number in own] or [model.config.rule.default_steps]
    return wanted


def row(model: Generator, steps: int, draw: Draw, scores: dict[str, Any], chosen: SolverAndGrid) -> dict[str, Any]:
    """One line of the table."""
    velocity, grid = model.config.rule.kind == "velocity", chosen[1] or model.config.grid
    return {
        "model": model.name,
        "method": model.config.method,
        "steps": steps,
        "nfe": draw.nfe,
        "samples": len(draw.x),
        "solver": chosen[0] or model.config.solver if velocity else "own",
        "grid": (grid if isinstance(grid, str) else list(grid)) if velocity else None,
        "parameters": parameter_count(model.module),
        "scores": scores,
    }


def add_times(
    rows: list[dict[str, Any]], models: Sequence[Generator], seed: int, solver: str | None, grid: GridSpec | None
) -> None:
    """Median wall time of a batch for every row, in shuffled order, as a ratio to the slowest row.

    Absolute times on a shared machine vary with its load; ratios measured in turn vary much less.
    """
    by_name = {model.name: model for model in models}
    timed = min(count_for(model, TIMED_ROWS) for model in models)

    def draw_of(line: dict[str, Any]) -> Callable[[], object]:
        model = by_name[line["model"]]
        chosen, times = solver_of(model, solver, grid)
        return lambda: model.draw(timed, steps=line["steps"], seed=seed, solver=chosen, grid=times)

    works = [draw_of(line) for line in rows]
    repeats = [_draws_per_timing(draw) for draw in works]
    times: list[list[float]] = [[] for _ in rows]
    shuffled = random.Random(seed)
    # every round times every row once, in an order of its own: load from other processes falls on all rows alike
    for k in [k for _ in range(TIMED_REPEATS) for k in shuffled.sample(range(len(rows)), len(rows))]:
        start = time.perf_counter()
        for _ in range(repeats[k]):
            works[k]()
        times[k].append((time.perf_counter() - start) / repeats[k])
    medians = [statistics.median(values) for values in times]
    for line, median in zip(rows, medians, strict=True):
        line["relative_time"] = median / max(medians)


def _draws_per_timing(draw: Callable[[], object]) -> int:
    """How often a draw is repeated within one timing, so that quick draws are timed over TIMED_SECONDS."""
    start = time.perf_counter()
    draw()
    return max(1, min(50, int(TIMED_SECONDS / (time.perf_counter() - start))))


def diagnose_model(model: Generator, seed: int) -> Any:
    """Straightness, curvature and errors along t of a velocity model, from noises of this seed."""
    draw = model.draw(count_for(model, DIAGNOSIS_SAMPLES), steps=1, seed=seed)
    cond = draw.conditions(model.device)
    return diagnose(model.module, draw.x0.to(model.device), cond=cond)


PERCENT = "_percent"  # of the Fréchet distance, on whichever features
COLUMNS = (
    ("steps", "steps"),
    ("NFE", "nfe"),
    ("energy", "energy"),
    ("held-out", "energy_held_out"),
    ("sliced W2", "sliced_w2"),
    ("FD", PERCENT),
    ("precision", "precision"),
    ("recall", "recall"),
    ("coverage", "coverage"),
    ("memorised", "memorised"),
    ("time", "relative_time"),
)


def table(result: dict[str, Any]) -> str:
    """The comparison as an aligned Markdown table."""
    frechet = next(key for key in result["rows"][0]["scores"] if key.endswith(PERCENT))
    titles = {PERCENT: f"{frechet.removesuffix(PERCENT)} %"}
    head = ["model", *(titles.get(key, title) for title, key in COLUMNS)]
    lines = [[line["model"], *(_cell(line, key) for _, key in COLUMNS)] for line in result["rows"]]
    widths = [max(len(line[k]) for line in [head, *lines]) for k in range(len(head))]

    def show(cells: Sequence[str]) -> str:
        padded = [
            cells[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)),
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join([":" + "-" * (widths[0] + 1), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    first = result["rows"][0]["scores"]
    held_out = first["energy_held_out_floor"]
    beside = "" if held_out is None else f" (held-out {held_out:.4f})"
    notes = (
        f"energy: V-statistic against the training split, {result['protocol']['samples']} samples, seed "
        f"{result['protocol']['seed']}; data-data floor {first['energy_floor']:.4f}{beside}. Never read "
        "energy or sliced W2 without precision and recall. time: relative to the slowest row."
    )
    failed = [f"{failure['stage']}: {failure['reason']}" for failure in result.get("failures", [])]
    if any(failure["compared"] for failure in result.get("failures", [])):
        notes += " (best): a stage that collapsed, with the weights of its best check."
    return "\n".join([show(head), rule, *map(show, lines), "", " ".join([notes, *fewer_samples(result)]), *failed])


def fewer_samples(result: dict[str, Any]) -> list[str]:
    """A sentence for every model that was measured on fewer samples than the protocol's."""
    wanted = result["protocol"]["samples"]
    counts = {line["model"]: line.get("samples", wanted) for line in result["rows"]}
    return [
        f"{name}: {count} samples only, its number of different starts."
        for name, count in counts.items()
        if count < wanted
    ]


def _cell(line: dict[str, Any], key: str) -> str:
    scores = line["scores"]
    if key == PERCENT:
        key = next(name for name in scores if name.endswith(PERCENT))
    value = line.get(key, scores.get(key))
    if value is None:
        return "–"
    if isinstance(value, int):
        return str(value)
    value = 0.0 if abs(value) < 5e-7 else value  # no negative zero
    if key in ("precision", "recall", "coverage", "memorised"):
        return f"{value:.3f}"
    if key == "relative_time":
        return f"{value:.3f}"
    return f"{value:.2f}" if key.endswith(PERCENT) else f"{value:.4f}"
