"""Compare models side by side: quality, NFE and time at equal seeds, with the controls beside them."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from torch import Tensor

from fewstep.data.dataset import DataSet
from fewstep.diagnostics.diagnose import diagnose
from fewstep.errors import UserError
from fewstep.flow.grids import GridSpec, explicit_times
from fewstep.generator import Draw, Generator
from fewstep.metrics import Reference, sample_count
from fewstep.metrics.feature_distance import FeatureDistance
from fewstep.metrics.user_metrics import Metric, UserMetric, user_metrics
from fewstep.pipeline.compare_models import (
    Entrant,
    Model,
    conditions_of,
    name_apart,
    number_of_parameters,
    open_models,
    steps_of,
)
from fewstep.pipeline.compare_rows import (
    MAX_ROWS,
    MIN_ROWS,
    Conditions,
    Control,
    ReferenceRows,
    check_reference,
    open_reference,
)
from fewstep.pipeline.compare_table import table
from fewstep.pipeline.feature_checks import check_judge, find_judge
from fewstep.training.world import default_device

__all__ = ["GAUSSIAN", "TRAINING", "Comparison", "check_reference", "compare", "name_apart", "table"]

GAUSSIAN, TRAINING = "moment-matched Gaussian", "training data"
TIMED_ROWS = 64  # samples in a timed draw
TIMED_REPEATS = 5  # timings of a row, of which the median counts
TIMED_SECONDS = 0.02  # of repeated draws in one timing; chosen, not tuned
DIAGNOSIS_SAMPLES = 256  # noises from which straightness is measured; chosen, not tuned

Say = Callable[[str], None]


@final
@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; ``print`` shows the table.

    Attributes:
        result: a JSON-able mapping: ``protocol``, ``data``, ``rows`` (models first, then the two controls),
            ``diagnosis`` of velocity models by name, unless it was left out.
        models: the models under the names that they have in it.
        data: the data set of the reference.
    """

    result: dict[str, Any]
    models: tuple[Generator, ...] = field(repr=False)
    data: DataSet = field(repr=False)

    @property
    def table(self) -> str:
        """The comparison as an aligned Markdown table."""
        return table(self.result)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One mapping per model and step count, then the two controls; ``row["scores"]`` holds the scores."""
        rows: list[dict[str, Any]] = self.result["rows"]
        return rows

    def as_dict(self) -> dict[str, Any]:
        """A copy of :attr:`result`."""
        return copy.deepcopy(self.result)

    def __str__(self) -> str:
        return self.table


def compare(
    models: Model | Sequence[Model],
    data: Any,
    *,
    steps: Sequence[int] = (1, 2, 4, 8, 50),
    solver: str | None = None,
    grid: GridSpec | None = None,
    samples: int | None = None,
    seed: int = 0,
    features: FeatureDistance | str | Path | None = None,
    metrics: Mapping[str, Metric] | None = None,
    max_rows: int = MAX_ROWS,
    diagnosis: bool = True,
    say: Say | None = print,
) -> Comparison:
    """Measure every model at every step count it can be sampled with.

    **Conditions.** A model that takes labels alone draws them as often as they were in its training data. All others
    are given conditions of training rows, which are drawn for the seed: the same rows for every model and step count,
    in timing and in the diagnosis. Where the data has a mask, the padding that the row of a sample has is zero in it.

    **Metrics of your own.** ``metrics={"success": f}`` calls ``f(samples, **conditions)`` with the samples ``(num,
    *data_shape)`` float32 in the data's own units and, by name, those conditions that ``f`` has parameters for
    (:class:`~fewstep.metrics.user_metrics.UserMetric`). It returns one value per sample, of which mean and standard
    error are reported (``scores["success"]``, ``scores["success_error"]``), or one number. The two controls are scored
    too: training rows with their own conditions, the Gaussian with those that models are given. A model without
    conditions is scored with these as well, so the score says what ignoring them costs.

    Args:
        models: generators, models' folders, or networks ``v(x, t, **cond)``, which are put into eval mode. A network
            is in the units in which :func:`fewstep.train` takes it: of arrays the values as they are, else the network
            units of the data. Models of one name are told apart by their folders, or numbered.
        data: the reference: a built-in name, a path, an array, a data set, or a stream, whose kept rows are used. Its
            training split counts, with the held-out split beside it.
        steps: step counts of velocity models and of maps made for several; a map of one step count is sampled with
            that one. Explicit times in ``grid`` fix the step count.
        solver, grid: how velocity models are sampled, their own when absent; with ``auto`` and ``fitted`` steps are
            network evaluations.
        samples: generated samples, at most the default ``min(4000, training rows)``.
        seed: of the samples; the same noise for every model and step count.
        features: the features of the Fréchet distance, or where they are; the samples in network units when absent.
        metrics: metrics of your own by name.
        max_rows: most rows of each split that are read, evenly spaced by index. Of larger data the result has no
            fingerprint, which would read all.
        diagnosis: whether velocity models are diagnosed too (:func:`fewstep.diagnose` on 256 noises, 330,000 rows of
            the network); the scores do not need it.
        say: called with a line of progress; None for none.

    Raises:
        UserError: no models, one twice, another shape than the data's, too few samples or data rows, a condition that
            the data does not have, a model that was trained with ``features`` in its loss, a metric that fails.

    >>> import torch, fewstep as fs
    >>> class Still(torch.nn.Module):
    ...     def forward(self, x, t):
    ...         return 0 * x
    >>> rows = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    >>> right = {"right": lambda x: (x[:, 0] > 0).float()}
    >>> found = fs.compare(Still(), rows, steps=[1], samples=200, metrics=right, say=None)
    >>> [row["model"] for row in found.rows], 0.4 < found.rows[0]["scores"]["right"] < 0.6
    (['Still', 'moment-matched Gaussian', 'training data'], True)
    """
    check_steps(steps)
    tell: Say = _nothing if say is None else say
    rows, origin, in_data_units = open_reference(data)
    check_reference(rows)
    own = user_metrics(metrics)
    opened = open_models(models, rows, in_data_units)
    reference = ReferenceRows.read(rows, check_max_rows(max_rows))
    count = check_count(samples, len(reference.train), tell)
    drawn = Conditions.drawn(rows, max(count, TIMED_ROWS, DIAGNOSIS_SAMPLES), seed)
    entrants = [Entrant(model, conditions_of(model, bare, rows), drawn, solver, grid, seed) for model, bare in opened]
    judge = features if isinstance(features, FeatureDistance) else _judge(features, rows)
    scorer = Scorer(make_reference([model for model, _ in opened], reference, judge), own, rows)
    controls = [
        control_row(GAUSSIAN, reference.gaussian(count, seed, drawn), scorer),
        control_row(TRAINING, reference.training(count), scorer),
    ]  # before the models: a metric that fails does so at once
    lines = measure(entrants, steps, count, scorer, tell)
    add_times(lines, entrants, seed)
    result = {
        "protocol": protocol(reference, origin, entrants, judge, count, seed)
        | {"max_rows": max_rows, "metrics": [metric.name for metric in own]},
        "data": {
            "name": rows.name,
            "fingerprint": rows.fingerprint if reference.whole else None,
            "shape": list(rows.shape),
        },
        "rows": lines + controls,
        "diagnosis": diagnose_models(entrants, tell) if diagnosis else {},
    }
    return Comparison(result, tuple(model for model, _ in opened), rows)


def _nothing(_: str) -> None:
    """Say nothing."""


def _judge(features: str | Path | None, data: DataSet) -> FeatureDistance | None:
    return find_judge(None if features is None else str(features), data, default_device())


@final
@dataclass(frozen=True)
class Scorer:
    """What samples are scored by.

    Attributes:
        reference: the data and the built-in scores.
        metrics: the user's own.
        data: the data set.
    """

    reference: Reference
    metrics: Sequence[UserMetric]
    data: DataSet

    def entrant(self, entrant: Entrant, draw: Draw) -> dict[str, Any]:
        """The scores of a model's samples."""
        x = entrant.samples(draw)
        scores: dict[str, Any] = {}
        for metric in self.metrics:
            whose = f"samples of {entrant.model.name!r}"
            names = metric.names(entrant.metric_conditions(), whose)
            scores |= metric.score(self.data.scaling.to_data(x), entrant.metric_cond(draw, names), whose)
        return {**self.reference.score(x).as_dict(), **scores}

    def control(self, name: str, control: Control) -> dict[str, Any]:
        """The scores of a control."""
        scores: dict[str, Any] = {}
        for metric in self.metrics:
            names = metric.names(self.data.condition_names, whose := f"rows of the {name}")
            given = control.cond.of(names, len(control.x))
            scores |= metric.score(self.data.scaling.to_data(control.x), given, whose)
        return {**self.reference.score(control.x).as_dict(), **scores}


def measure(
    entrants: Sequence[Entrant], steps: Sequence[int], count: int, scorer: Scorer, tell: Say
) -> list[dict[str, Any]]:
    """The rows of the models: every model at every step count it can be sampled with."""
    lines = []
    for entrant in entrants:
        fixed = None if entrant.grid is None else explicit_times(entrant.grid)
        for number in steps_of(entrant.model, steps if fixed is None else (len(fixed) - 1,)):
            draw = entrant.draw(entrant.most(count), number)
            scores = scorer.entrant(entrant, draw)
            lines.append(row(entrant, number, draw, scores))
            tell(f"  {entrant.model.name} at {number} step(s): energy {scores['energy']:.4f}")
    return lines


def control_row(name: str, control: Control, scorer: Scorer) -> dict[str, Any]:
    """The row of a control."""
    return {"model": name, "control": True, "scores": scorer.control(name, control)}


def protocol(
    reference: ReferenceRows,
    origin: str,
    entrants: Sequence[Entrant],
    judge: FeatureDistance | None,
    count: int,
    seed: int,
) -> dict[str, Any]:
    """What the scores were computed from."""
    return {
        "seed": seed,
        "samples": count,
        "reference": reference.describe(origin),
        "held_out": len(reference.held_out),
        "units": "network units",
        "features": None if judge is None else {"name": judge.name, "digest": judge.digest},
        "conditions": {entrant.model.name: list(entrant.given) for entrant in entrants if entrant.given},
    }


def make_reference(models: Sequence[Generator], rows: ReferenceRows, features: FeatureDistance | None) -> Reference:
    """The data that every row is scored against, with the Fréchet distance on ``features``."""
    held_out: Tensor | None = rows.held_out if len(rows.held_out) >= MIN_ROWS else None
    if features is None:
        return Reference(rows.train, held_out)
    check_judge(models, features)
    return Reference(rows.train, held_out, features.pooled, features_name=features.name)


def check_steps(steps: Sequence[int]) -> None:
    """Refuse step counts that are no whole numbers of at least 1, and none at all."""
    if isinstance(steps, (str, int)) or not steps or any(not isinstance(n, int) or n < 1 for n in steps):
        raise UserError(f"steps must be a list of whole numbers of at least 1, such as [1, 2, 4], got {steps!r}.")


def check_max_rows(max_rows: int) -> int:
    """Refuse a number of rows that is too small for the metrics."""
    if not isinstance(max_rows, int) or isinstance(max_rows, bool) or max_rows < MIN_ROWS:
        raise UserError(f"max_rows must be a whole number of at least {MIN_ROWS}, got {max_rows!r}.")
    return max_rows


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


def row(entrant: Entrant, steps: int, draw: Draw, scores: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    model, (solver, grid) = entrant.model, entrant.sampler
    velocity, times = model.config.rule.kind == "velocity", grid or model.config.grid
    return {
        "model": model.name,
        "method": model.config.method,
        "steps": steps,
        "nfe": draw.nfe,
        "samples": len(draw.x),
        "solver": solver or model.config.solver if velocity else "own",
        "grid": (times if isinstance(times, str) else list(times)) if velocity else None,
        "parameters": number_of_parameters(model.module),
        "scores": scores,
    }


def add_times(rows: list[dict[str, Any]], entrants: Sequence[Entrant], seed: int) -> None:
    """Median wall time of a batch for every row, in shuffled order, as a ratio to the slowest row.

    Absolute times on a shared machine vary with its load; ratios measured in turn vary much less.
    """
    by_name = {entrant.model.name: entrant for entrant in entrants}
    timed = min(entrant.most(TIMED_ROWS) for entrant in entrants)

    def draw_of(line: dict[str, Any]) -> Callable[[], object]:
        return lambda: by_name[line["model"]].draw(timed, line["steps"])

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


def diagnose_models(entrants: Sequence[Entrant], tell: Say) -> dict[str, Any]:
    """The diagnoses of the velocity models by name."""
    found = {}
    for entrant in entrants:
        if entrant.model.config.rule.kind == "velocity":
            tell(f"  {entrant.model.name}: diagnosis")
            found[entrant.model.name] = diagnose_model(entrant).as_dict()
    return found


def diagnose_model(entrant: Entrant) -> Any:
    """Straightness, curvature and errors along t of a velocity model, from noises and conditions of its samples."""
    model = entrant.model
    draw = entrant.draw(entrant.most(DIAGNOSIS_SAMPLES), 1, as_asked=False)
    cond = draw.conditions(model.device)
    return diagnose(model.module, draw.x0.to(model.device), cond=cond)
