"""A run killed twice by SIGKILL, while it makes pairs and while it trains, ends as if it never was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.errors import UserError
from fewstep.generator import load
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.pipeline.statistics import Statistics
from fewstep.store import pairs as storing
from fewstep.training import trainer as training
from fewstep.training.trainer import Trainer
from fewstep.training.world import LocalWorld

STEPS = 50
RECIPE: dict[str, Any] = {
    "data": {"name": "moons", "rows": 1500},
    "network": {"name": "mlp", "width": 16, "blocks": 1, "embedding": 8, "dropout": 0.1},
    "seed": 3,
    "stages": {
        "teacher": {"method": "flow_matching", "samples": STEPS * 256},
        "straight": {
            "method": "reflow",
            "teacher": "teacher",
            "rounds": 2,
            "pairs": 600,
            "real_pairs": 300,
            "samples": 2 * STEPS * 256,
        },
        "onestep": {"method": "distill", "teacher": "straight", "pairs": 300, "samples": STEPS * 256},
    },
}

CHILD = """
import json, os, signal, sys
from pathlib import Path
import torch
from fewstep.generator import load
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.store import pairs as storing
from fewstep.training import trainer as training
from fewstep.training.world import LocalWorld

torch.set_num_threads(1)
recipe, out, what, last = sys.argv[1:]
storing.SHARD_ROWS = 256
training.CHECKPOINT_SECONDS = (0.0, 0.0)
owner, name = {"shard": (storing.PairStore, "write_shard"), "step": (training.Trainer, "_step")}[what]
work, done = getattr(owner, name), []

def counted(*args):
    work(*args)
    done.append(1)
    if len(done) == int(last):
        os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, name, counted)
run_recipe(make_recipe(json.loads(recipe), "recipe"), Path(out), LocalWorld(quiet=True))
"""


def run_and_be_killed(out: Path, what: str, last: int) -> None:
    """Run the recipe in a process that ends itself after so many steps or shards."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(RECIPE), str(out), what, str(last)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr


def stage_files(out: Path) -> dict[str, bytes]:
    names = [out / name for name in RECIPE["stages"]]
    files = [path for folder in names for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(files)}


def test_a_run_killed_twice_ends_with_the_bytes_of_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storing, "SHARD_ROWS", 256)
    recipe, world = make_recipe(RECIPE, "recipe"), LocalWorld(quiet=True)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_recipe(recipe, whole, world)

    run_and_be_killed(cut, "shard", 6)  # round 1 has 3 + 2 shards: this is the first of round 2
    assert sorted(path.name for path in (cut / "straight/pairs/round-2/generated").iterdir()) == [
        "00000.safetensors",
        "manifest.json",
    ]
    written = (cut / "straight/pairs/round-2/generated/00000.safetensors").stat().st_mtime_ns
    run_and_be_killed(cut, "step", 35)  # the process begins with round 2, of 50 steps
    for folder in ("straight/checkpoints", "straight/pairs/round-2/inverted", "straight/rounds/round-1"):
        (cut / folder / ".tmp-0123456789abcdef-half").write_bytes(b"half a file")
    with (cut / "stats.jsonl").open("a") as file:
        file.write('{"stage": "straight", "samp')  # the line it was writing

    taken: list[int] = []
    step = Trainer._step

    def counted(self: Trainer, *args: Any) -> None:
        taken.append(self.position.total_samples)
        step(self, *args)

    monkeypatch.setattr(Trainer, "_step", counted)
    run_recipe(recipe, cut, world)
    # step 35 was made but not kept; nothing else is made again
    assert taken == [*range((STEPS + 34) * 256, 2 * STEPS * 256, 256), *range(0, STEPS * 256, 256)]
    assert (cut / "straight/pairs/round-2/generated/00000.safetensors").stat().st_mtime_ns == written
    truth, found = stage_files(whole), stage_files(cut)
    assert sorted(found) == sorted(truth)
    assert [name for name in truth if found[name] != truth[name]] == []
    assert (cut / "stats.jsonl").read_bytes() == (whole / "stats.jsonl").read_bytes()
    assert sum(name.startswith("straight/checkpoints/") for name in truth) == 1

    taken.clear()
    run_recipe(recipe, cut, world)  # finished: nothing happens
    assert taken == []
    assert stage_files(cut) == truth


def test_a_stage_begun_with_other_options_is_refused(tmp_path: Path) -> None:
    fields = {**RECIPE, "stages": {"teacher": {"method": "flow_matching", "samples": 512}}}
    run_recipe(make_recipe(fields, "recipe"), tmp_path, LocalWorld(quiet=True))
    fields["stages"]["teacher"]["lr"] = 0.5
    with pytest.raises(UserError, match=r"begun with options\.lr = 0\.002, and the recipe now says 0\.5"):
        run_recipe(make_recipe(fields, "recipe"), tmp_path, LocalWorld(quiet=True))


def test_statistics_drop_what_will_be_written_again_and_mend_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    other = '{"samples": 900, "stage": "a"}\n'
    kept = '{"samples": 100, "stage": "b"}\n{"samples": 200, "stage": "b"}'
    for tail, expected in (
        ("\n", kept),
        ('\n{"samples": 300, "stage": "b"}\n', kept),
        ("", kept),
        ("\n{", kept),
    ):
        path.write_text(other + kept + tail)
        statistics = Statistics(path, "b", writes=True)
        statistics.keep_until(200)
        assert path.read_text() == other + expected + "\n"
        statistics.write({"samples": 300})
        assert path.read_text() == other + expected + '\n{"samples": 300, "stage": "b"}\n'


def test_processes_other_than_the_first_write_no_statistics(tmp_path: Path) -> None:
    statistics = Statistics(tmp_path / "stats.jsonl", "b", writes=False)
    statistics.keep_until(0)
    statistics.write({"samples": 300})
    assert list(tmp_path.iterdir()) == []


def test_by_default_checkpoints_are_between_two_and_thirty_seconds_apart() -> None:
    least, most = training.CHECKPOINT_SECONDS
    assert 0 < least <= 2
    assert most < 30


class StopError(Exception):
    """The run was stopped."""


STAGES: dict[str, dict[str, Any]] = {
    "slimflow": {"method": "slimflow", "pairs": 300, "nfe": 8, "tolerance": 1, "samples": 40 * 128},
    "distill": {"method": "distill", "progressive": 4, "samples": 40 * 128},
    "consistency": {"method": "consistency", "samples": 40 * 128},
    "continuous": {"method": "consistency", "target": "continuous", "samples": 40 * 128},
    "consistency_fm": {"method": "consistency_fm", "teacher": None, "regression": 0.5, "samples": 40 * 128},
    "fgm": {"method": "fgm", "online_ema": 0.9, "lr": 1e-4, "samples": 40 * 128},
    "alpha": {"method": "meanflow", "target": "alpha", "samples": 40 * 128},
}


@pytest.mark.parametrize("method", STAGES)
def test_a_stopped_stage_goes_on_where_it_was(
    tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A second phase puts the first one's average in the student, and only when it begins; targets have a state."""
    stages = {"s": {"teacher": str(tiny_run / "teacher"), "batch_size": 128, **STAGES[method]}}
    recipe = make_recipe({"data": {"name": "moons", "rows": 500}, "stages": stages}, "test")
    step, done = Trainer._step, []

    def stopping(*arguments: Any) -> None:
        if len(done) == 30:
            raise StopError
        done.append(step(*arguments))

    run_recipe(recipe, tmp_path / "whole", LocalWorld(quiet=True))
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(training, "SAVE_SHARE", 0.0)
    monkeypatch.setattr(Trainer, "_step", stopping)
    with pytest.raises(StopError):
        run_recipe(recipe, tmp_path / "run", LocalWorld(quiet=True))
    monkeypatch.setattr(Trainer, "_step", step)
    run_recipe(recipe, tmp_path / "run", LocalWorld(quiet=True))
    whole, resumed = (load(tmp_path / name / "s").module.state_dict() for name in ("whole", "run"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
