"""Two processes (gloo, CPU) do what one does with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import training_cases
from fewstep.errors import UserError
from fewstep.generator import read_tensors
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.store import pairs as storing
from fewstep.training.checkpoint import Checkpoints, read_checkpoint
from fewstep.training.trainer import Trainer
from fewstep.training.world import LocalWorld
from training_cases import Net, Noise, TwoPlayers, options

SAMPLES = 40 * 64
SCRIPT = """
import sys
from pathlib import Path
from test_distributed import work

work(Path(sys.argv[1]), Path(sys.argv[2]))
"""
NETWORK = {"name": "mlp", "width": 16, "blocks": 1, "embedding": 8}
DATA = {"name": "moons", "rows": 1500}


def recipe(teacher: Path | None) -> dict[str, Any]:
    """A teacher; or, with one, what is learnt from it."""
    common = {"samples": SAMPLES, "batch_size": 64}
    stages: dict[str, Any] = {"flow": {"method": "flow_matching", **common}}
    if teacher is not None:
        learnt = {"teacher": str(teacher), "pairs": 1000, **common}
        stages["straight"] = {"method": "reflow", "real_pairs": 600, **learnt}
        stages["onestep"] = {"method": "instaflow", "discriminator_real": "both", **learnt, "pairs": 1200}
        maps = {"teacher": str(teacher), **common}
        stages["consistency"] = {"method": "consistency", **maps}
        stages["alpha"] = {"method": "meanflow", "target": "alpha", **maps}
        stages["fgm"] = {"method": "fgm", **maps}
        stages["realuid"] = {"method": "realuid", "steps": 2, "online_ema": 0.8, **maps}
    return {"data": DATA, "network": NETWORK, "seed": 1, "stages": stages}


def train_players(out: Path, world: LocalWorld) -> None:
    """Two roles on two phases, with checkpoints."""
    student = Net(dropout=0.0)
    lines: list[dict[str, Any]] = []
    made = Trainer(student, options(batch_size=16), (0, "gan"), world, Checkpoints(out / "players"), lines.append)
    for number in range(2):
        made.train(number, 16 * 20, TwoPlayers(student, dropout=0.0), Noise(), "players")
    made.save(keep=1)
    if world.rank == 0:
        (out / "players.json").write_text(json.dumps(lines))


def bypass(world: LocalWorld) -> str:
    """What happens to a loss that calls the module past its wrapper."""
    student = Net(dropout=0.0)

    class Bypass(training_cases.Regression):
        def loss(self, role: str, nets: Any, *args: Any) -> Any:
            return super().loss(role, {**nets, "student": student}, *args)

    try:
        Trainer(student, options(), (0, "s"), world).train(0, 80, Bypass(student), Noise(), "s")
    except AssertionError as error:
        return str(error)
    return ""


def work(out: Path, teacher: Path) -> None:
    """What both worlds do."""
    torch.set_num_threads(1)
    storing.SHARD_ROWS = 256
    world = LocalWorld(quiet=True)
    run_recipe(make_recipe(recipe(teacher), "recipe"), out, world)
    train_players(out, world)
    said = bypass(world)
    (out / f"rank-{world.rank}-of-{world.size}.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The output of one process and of two."""
    folder = tmp_path_factory.mktemp("worlds")
    rows, threads = storing.SHARD_ROWS, torch.get_num_threads()
    run_recipe(make_recipe(recipe(None), "recipe"), folder / "first", LocalWorld(quiet=True))
    teacher = folder / "first" / "flow"
    work(folder / "one", teacher)
    storing.SHARD_ROWS = rows
    torch.set_num_threads(threads)
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)]),
    }
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += [str(script), str(folder / "two"), str(teacher)]
    done = subprocess.run(
        [sys.executable, *launch], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "one", folder / "two"


def losses(out: Path, stage: str) -> torch.Tensor:
    lines = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    own = [line["terms"]["loss"] for line in lines if line["stage"] == stage and "loss" in line.get("terms", {})]
    return torch.tensor(own, dtype=torch.float64)


@pytest.mark.parametrize("stage", ["flow", "straight", "consistency", "alpha", "fgm", "realuid"])
def test_two_processes_give_the_loss_curve_of_one(worlds: tuple[Path, Path], stage: str) -> None:
    """Losses of neighbouring points are squares of small differences, and have fewer digits."""
    one, two = (losses(out, stage) for out in worlds)
    slack = 1 if stage in ("flow", "straight") else 100
    assert len(one) == len(two) == (39 if stage in ("fgm", "realuid") else 40)  # the rest is the head start
    torch.testing.assert_close(two[:10], one[:10], rtol=1e-6 * slack, atol=0)
    torch.testing.assert_close(two, one, rtol=1e-5 * slack, atol=0)


def test_two_processes_play_the_game_of_one(worlds: tuple[Path, Path]) -> None:
    """The adversarial weight is found from both processes' gradients; the checks are the same in both."""
    one, two = (
        [line for line in map(json.loads, (out / "stats.jsonl").read_text().splitlines()) if line["stage"] == "onestep"]
        for out in worlds
    )
    assert [sorted(line) for line in two] == [sorted(line) for line in one]
    for here, there in zip(one, two, strict=True):
        for part in {"terms", "check"} & set(here):
            assert there[part] == pytest.approx(here[part], rel=2e-4, abs=2e-5)
    assert any("weight/adversarial" in line.get("terms", {}) for line in one)


def test_two_processes_give_the_weights_of_one(worlds: tuple[Path, Path]) -> None:
    for stage in ("flow", "straight", "onestep", "consistency", "alpha", "fgm", "realuid"):
        one, two = (read_tensors(out / stage / "model.safetensors") for out in worlds)
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


def test_two_processes_make_the_pairs_of_one_byte_for_byte(worlds: tuple[Path, Path]) -> None:
    one, two = (
        {
            str(path.relative_to(out)): path.read_bytes()
            for path in (out / "straight/pairs").rglob("*")
            if path.is_file()
        }
        for out in worlds
    )
    assert len(one) == 4 + 3 + 2  # shards of generated and of inverted pairs, and their manifests
    assert two == one


def test_two_processes_leave_the_files_of_one(worlds: tuple[Path, Path]) -> None:
    one, two = (
        sorted(str(path.relative_to(out)) for path in out.rglob("*") if not path.name.startswith("rank-"))
        for out in worlds
    )
    assert two == one


def test_two_roles_learn_alike_in_two_processes(worlds: tuple[Path, Path]) -> None:
    one, two = (json.loads((out / "players.json").read_text()) for out in worlds)
    assert [line["samples"] for line in two] == [line["samples"] for line in one]
    for here, there in zip(one, two, strict=True):
        assert there["terms"] == pytest.approx(here["terms"], rel=1e-4, abs=1e-5)
    (a, b) = (read_checkpoint(next((out / "players").iterdir())) for out in worlds)
    assert a[0].keys() == b[0].keys()
    assert a[1]["position"] == b[1]["position"]
    for name in ("discriminator.0.weight", "student.first.weight", "ema.first.weight"):
        torch.testing.assert_close(b[0][name], a[0][name], rtol=1e-4, atol=1e-5)


def test_a_loss_that_bypasses_the_wrapper_is_found_out(worlds: tuple[Path, Path]) -> None:
    one, two = worlds
    assert json.loads((one / "rank-0-of-1.json").read_text()) == ""
    for rank in range(2):
        said = json.loads((two / f"rank-{rank}-of-2.json").read_text())
        assert "must call nets['student']" in said


def test_a_batch_that_does_not_divide_is_refused() -> None:
    class Three:
        size, rank, device = 3, 0, torch.device("cpu")

    with pytest.raises(UserError, match="batch_size 64 does not divide among 3 processes: make it a multiple of 3"):
        Trainer(Net(), options(batch_size=64), (0, "s"), Three())  # type: ignore[arg-type]
