"""Shared by the benchmarks that make a table row by row: rows in a file, scores of a model, medians over seeds."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fewstep.generator import Generator
from fewstep.metrics import evaluate, sample_count
from fewstep.metrics.feature_distance import FeatureDistance
from fewstep.networks import parameter_count
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.training.world import LocalWorld

ASSETS = Path(__file__).parent / "assets"
SCORES = ("energy", "fd_percent", "precision", "recall", "coverage")
MAX_SAMPLES = 2000  # generated samples of an evaluation

Row = dict[str, Any]


class Rows:
    """Rows of a table in a file, one JSON line each, to which the same command adds the missing rows.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Row] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def __contains__(self, key: tuple[str, int]) -> bool:
        return any((line["name"], line["seed"]) == key for line in self.lines)

    def add(self, line: Row) -> None:
        """Append a row to the file and print it."""
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def values(self, name: str, key: str, seed: int | None = None) -> list[float]:
        """The values of a column in the rows of one name, for all seeds or for one."""
        lines = [line for line in self.lines if line["name"] == name and seed in (None, line["seed"])]
        return [line[key] for line in lines if key in line]

    @property
    def names(self) -> list[str]:
        """The names of the rows, in the order in which they were made."""
        return list(dict.fromkeys(line["name"] for line in self.lines))


def train(fields: Row, out: Path, script: str) -> None:
    """Train the stages of a recipe that is given by its fields."""
    run_recipe(make_recipe({"conditional": False, **fields}, script), out, LocalWorld(quiet=True))


def score(model: Generator, data: Any, judge: FeatureDistance, steps: int, **how: Any) -> dict[str, float]:
    """Score a model against the training split: energy, Fréchet distance on the judge's features, neighbours."""
    rows = data.train_rows()
    x = model.draw(min(MAX_SAMPLES, sample_count(len(rows))), steps=steps, **how).x
    return score_samples(x, rows, judge)


def score_samples(x: Any, rows: Any, judge: FeatureDistance) -> dict[str, float]:
    """The scores of :func:`score` for given samples."""
    found = evaluate(x, rows, None, judge.pooled, features_name=judge.name)
    return {name: getattr(found, name) for name in SCORES}


def size_and_cost(model: Generator) -> dict[str, float]:
    """Number of parameters, and :func:`macs`."""
    return {"parameters": parameter_count(model.module), "macs": macs(model)}


def macs(model: Generator) -> float:
    """Millions of multiply-add operations of one network call."""
    x = torch.zeros(1, *model.config.shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.module(x, torch.zeros(1))
    return counter.get_total_flops() / 2e6


def spread(values: Sequence[float], form: str, full: bool = True) -> str:
    """Format the median, with smallest and largest value in brackets if there are several values."""
    if not values:
        return ""
    text = f"{statistics.median(values):{form}}"
    return text + f" ({min(values):{form}}–{max(values):{form}})" if full and len(values) > 1 else text


def markdown(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; numbers are printed without leading zero."""
    text = ["| | " + " | ".join(titles) + " |", "|---|" + "--:|" * len(titles)]
    text += [f"| {first} | " + " | ".join(cells) + " |" for first, *cells in lines]
    return re.sub(r"(?<![\d.])0\.", ".", "\n".join(text))
