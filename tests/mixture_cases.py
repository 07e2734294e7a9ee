"""Runs on a mixture of two modes on the line, whose quantiles are known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fewstep as fs
from fewstep.flow.noise import generator_for
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.training.world import LocalWorld

MIXTURE = fs.closed_form.mixture(torch.tensor([0.4, 0.6]), torch.tensor([[-1.2], [0.9]]), torch.tensor([0.25, 0.35]))
NETWORK = {"name": "mlp", "width": 64, "blocks": 2, "embedding": 32}


def train_beside_a_teacher(out: Path, students: Mapping[str, dict[str, Any]]) -> Path:
    """Train a teacher on ``out/x.npy``, and from it the students; the run's folder."""
    np.save(out / "x.npy", MIXTURE.sample(20_000, generator_for("mixture data")).numpy())
    learned = {name: {**options, "teacher": "teacher"} for name, options in students.items()}
    stages = {"teacher": {"method": "flow_matching", "samples": 80_000}, **learned}
    data = {"path": str(out / "x.npy"), "scale": "none"}
    recipe = make_recipe({"data": data, "network": NETWORK, "stages": stages}, "x")
    run_recipe(recipe, out / "run", LocalWorld(quiet=True))
    return out / "run"


def w1(x: Tensor) -> float:
    """W1 of sorted samples to the exact quantiles."""
    p = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
    z = torch.special.ndtri(p)[:, None]
    exact = MIXTURE.flow_map(z, torch.zeros(len(x)), torch.ones(len(x)))
    return float((x.double().flatten().sort().values - exact.flatten()).abs().mean())
