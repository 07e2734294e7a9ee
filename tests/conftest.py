"""Runs that several test files look at: trained once per session, in a second or two."""

from __future__ import annotations

import contextlib
import functools
import io
from pathlib import Path

import numpy as np
import pytest

from fewstep.cli.main import main
from fewstep.pipeline import compare

TINY = """
data: {name: moons, rows: 500}
network: {name: mlp, preset: tiny}
seed: 0
stages:
  teacher: {method: flow_matching, samples: 12_000, batch_size: 128}
  straight:
    {method: reflow, teacher: teacher, samples: 2_000, batch_size: 128, pairs: 300, nfe: 8, tolerance: 1}
  onestep:
    {method: distill, teacher: teacher, init: straight, samples: 2_000, batch_size: 128, pairs: 300, nfe: 8,
     tolerance: 1}
compare: {steps: [1, 2], samples: 100}
"""

LABELLED = """
data: {path: rows.npy, labels: labels.npy}
conditional: true
network: {name: mlp, preset: tiny}
stages:
  teacher: {method: flow_matching, samples: 12_000, batch_size: 128}
  onestep:
    {method: distill, teacher: teacher, guidance: 2, samples: 2_000, batch_size: 128, pairs: 300, nfe: 8,
     tolerance: 2}
compare: {steps: [2], samples: 50}
"""


def quietly(*arguments: object) -> str:
    """Run the command line, which must succeed; return what it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main([str(argument) for argument in arguments])
    assert code == 0, said.getvalue()
    return said.getvalue()


def cheapen_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons diagnose on a coarse grid and time once: for tests of what else a comparison does."""
    coarse = functools.partial(compare.diagnose, nodes=4, adaptive=False, sensitivity=False, stiffness=False)
    monkeypatch.setattr(compare, "diagnose", coarse)
    monkeypatch.setattr(compare, "TIMED_REPEATS", 1)
    monkeypatch.setattr(compare, "TIMED_SECONDS", 0.0)


@pytest.fixture
def quick_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's comparisons are cheap."""
    cheapen_comparisons(monkeypatch)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 500 moons: a teacher, a straightened flow and a one-step student. Do not write to it."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.yaml").write_text(TINY, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        cheapen_comparisons(patch)
        said = quietly("run", folder / "tiny.yaml", "--out", folder / "out")
    (folder / "said.txt").write_text(said, encoding="utf-8")
    return folder / "out"


@pytest.fixture(scope="session")
def labelled_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional teacher and a one-step student with guidance 2 baked in. Do not write to it.

    The labels are 2, 5 and 9, in shares of 70, 20 and 10 %; class k lies around (4 k, 0).
    """
    folder = tmp_path_factory.mktemp("labelled")
    random = np.random.default_rng(0)
    kind = np.repeat([0, 1, 2], [350, 100, 50])
    rows = random.normal(size=(500, 2)) * 0.3 + 4.0 * kind[:, None] * [1, 0]
    np.save(folder / "rows.npy", rows.astype(np.float32))
    np.save(folder / "labels.npy", np.array([2, 5, 9])[kind])
    recipe = LABELLED.replace("rows.npy", str(folder / "rows.npy")).replace("labels.npy", str(folder / "labels.npy"))
    (folder / "labelled.yaml").write_text(recipe, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        cheapen_comparisons(patch)
        quietly("run", folder / "labelled.yaml", "--out", folder / "out")
    return folder / "out"
