"""What the scripts that fill a table row by row share: rows kept in a file, a model's scores, medians over seeds."""

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
MOST_SAMPLES = 2000  # of an evaluation

Row = dict[str, Any]


class Rows:
    """Rows of a table, one JSON line each, in a file that the same command goes on with.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Row] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def __contains__(self, key: tuple[str, int]) -> bool:
        return any((line["name"], line["seed"]) == key for line in self.lines)

    def add(self, line: Row) -> None:
        """Keep and print a row."""
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def values(self, name: str, key: str, seed: int | None = None) -> list[float]:
        """A column of all seeds, or of one."""
        lines = [line for line in self.lines if line["name"] == name and seed in (None, line["seed"])]
        return [line[key] for line in lines if key in line]

    @property
    def names(self) -> list[str]:
        """Of the rows, in the order they were made."""
        return list(dict.fromkeys(line["name"] for line in self.lines))


def train(fields: Row, out: Path, script: str) -> None:
    """Run a recipe given by its fields."""
    run_recipe(make_recipe({"conditional": False, **fields}, script), out, LocalWorld(quiet=True))


def score(model: Generator, data: Any, judge: FeatureDistance, steps: int, **how: Any) -> dict[str, float]:
    """Energy distance, Fréchet distance on the judge's features and neighbours, against the training split."""
    rows = data.train_rows()
    x = model.draw(min(MOST_SAMPLES, sample_count(len(rows))), steps=steps, **how).x
    return score_samples(x, rows, judge)


def score_samples(x: Any, rows: Any, judge: FeatureDistance) -> dict[str, float]:
    """As :func:`score`, of samples."""
    found = evaluate(x, rows, None, judge.pooled, features_name=judge.name)
    return {name: getattr(found, name) for name in SCORES}


def size_and_cost(model: Generator) -> dict[str, float]:
    """Parameters, and multiplications with additions of one network call in millions of pairs."""
    return {"parameters": parameter_count(model.module), "macs": macs(model)}


def macs(model: Generator) -> float:
    """Multiplications and additions of one network call, in millions of pairs."""
    x = torch.zeros(1, *model.config.shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.module(x, torch.zeros(1))
    return counter.get_total_flops() / 2e6


def spread(values: Sequence[float], form: str, full: bool = True) -> str:
    """Median, with the least and the most in brackets where there are several."""
    if not values:
        return ""
    text = f"{statistics.median(values):{form}}"
    return text + f" ({min(values):{form}}–{max(values):{form}})" if full and len(values) > 1 else text


def markdown(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table, numbers without their leading zero."""
    text = ["| | " + " | ".join(titles) + " |", "|---|" + "--:|" * len(titles)]
    text += [f"| {first} | " + " | ".join(cells) + " |" for first, *cells in lines]
    return re.sub(r"(?<![\d.])0\.", ".", "\n".join(text))
