"""Distances and quality scores of generated samples; each names its protocol."""

from __future__ import annotations

from fewstep.metrics.controls import data_rows, moment_matched_gaussian
from fewstep.metrics.evaluate import Reference, Scores, evaluate, sample_count
from fewstep.metrics.frechet import Frechet, frechet_distance
from fewstep.metrics.memorisation import Memorisation, nearest_neighbour_check
from fewstep.metrics.neighbours import PRDC, expected_coverage, prdc
from fewstep.metrics.sample_distances import Estimate, energy, energy_floor, mmd, sliced_w2, sliced_w2_floor

__all__ = [
    "PRDC",
    "Estimate",
    "Frechet",
    "Memorisation",
    "Reference",
    "Scores",
    "data_rows",
    "energy",
    "energy_floor",
    "evaluate",
    "expected_coverage",
    "frechet_distance",
    "mmd",
    "moment_matched_gaussian",
    "nearest_neighbour_check",
    "prdc",
    "sample_count",
    "sliced_w2",
    "sliced_w2_floor",
]
