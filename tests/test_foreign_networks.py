"""Every method on networks that fewstep did not build: it trains, goes on where it was, and two processes equal one.

The cells of the matrix are in tests/foreign_cases.py. Each is trained once; while it trains, its folder is copied as a
killed process would leave it.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep as fs
from fewstep.errors import UserError
from fewstep.generator import read_tensors
from fewstep.methods.guards import coverage, divergence
from fewstep.pipeline import train as training
from fewstep.store import files
from fewstep.training.trainer import Trainer
from fewstep.training.world import LocalWorld
from foreign_cases import CELLS, PLACES, available, policy, train_cell, train_own_teacher

Cell = tuple[str, str]
KILLED_AT = 24  # samples seen; every second phase has begun
UNSEEN = ("to_k.bias", "add_k_proj.bias")  # a softmax does not see it: its gradient is a rounding error
QUICK = ("meanflow", "dmd")  # at places other than the policy, the other methods are slow
SCRIPT = """
import sys
from pathlib import Path
from test_foreign_networks import work

work(Path(sys.argv[1]), Path(sys.argv[2]), [tuple(cell.split("-")) for cell in sys.argv[3:]])
"""
every_cell = pytest.mark.parametrize(
    "cell",
    [
        pytest.param(
            cell, id=" on ".join(cell), marks=() if cell[1] == "policy" or cell[0] in QUICK else pytest.mark.slow
        )
        for cell in CELLS
    ],
)


def cheapen(patch: pytest.MonkeyPatch) -> None:
    """Files are not forced to disk, versions are looked up once, and the guards look twice per phase."""
    patch.setattr(files, "_flush", lambda *_: None)
    patch.setattr(training, "environment", functools.cache(training.environment))
    patch.setattr(coverage, "CHECKS", 2)
    patch.setattr(divergence, "CHECKS", 2)


def out_of(root: Path, cell: Cell) -> Path:
    """The model folder of a cell."""
    return root / "-".join(cell) / "stage"


def work(root: Path, folder: Path, cells: list[Cell]) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        cheapen(patch)
        for cell in cells:
            train_cell(*cell, out_of(root, cell), folder)
        rank = int(os.environ["RANK"])
        net = policy()
        net.inner.spare.weight.data.fill_(rank)
        said = ""
        try:
            train_cell("flow_matching", "policy", root / "differ" / "stage", folder, network=net)
        except UserError as error:
            said = str(error)
        (root / f"rank-{rank}.json").write_text(json.dumps({"said": said, "means": averaged(rank)}))


def averaged(rank: int) -> list[list[float] | None]:
    """Gradients after :meth:`LocalWorld.average_gradients`: of a parameter that both processes use, one, and none."""
    both, one, none = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    both.grad = torch.tensor([1.0, 2.0 * rank])
    if rank == 0:
        one.grad = torch.tensor([4.0, 6.0])
    LocalWorld(quiet=True).average_gradients([both, one, none])
    return [None if p.grad is None else p.grad.tolist() for p in (both, one, none)]


class Matrix:
    """The cells, trained when they are first asked for.

    Args:
        root: everything is written here.
        cells: that two processes train.
    """

    def __init__(self, root: Path, cells: list[Cell]) -> None:
        self.root, self.cells = root, cells
        self.folder = train_own_teacher(root / "teacher")
        self.whole = functools.cache(self._train)
        self._two = self._launch()

    def _train(self, cell: Cell) -> fs.Generator:
        """Train a cell, and keep what a process that is killed in between leaves."""
        out, left = out_of(self.root / "one", cell), out_of(self.root / "killed", cell)
        step = Trainer._step

        def stepping(trainer: Trainer, *arguments: Any) -> None:
            if trainer.position.total_samples == KILLED_AT:
                trainer.save()
                shutil.copytree(out.parent, left.parent)
            step(trainer, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_step", stepping)
            return train_cell(*cell, out, self.folder)

    def _launch(self) -> subprocess.Popen[str]:
        """Start two processes that train the cells."""
        script = self.root / "script.py"
        script.write_text(SCRIPT)
        environment = {
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        }
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        return subprocess.Popen(
            [
                sys.executable,
                *launch,
                str(script),
                str(self.root / "two"),
                str(self.folder),
                *map("-".join, self.cells),
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    @functools.cached_property
    def two(self) -> Path:
        """The output of two processes."""
        said = self._two.communicate(timeout=300)[1]
        assert self._two.returncode == 0, said[-4000:]
        return self.root / "two"

    def close(self) -> None:
        """End the two processes where no test waited for them."""
        self._two.terminate()
        self._two.communicate(timeout=30)


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    items = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    chosen = {item.callspec.params["cell"] for item in items if "cell" in item.fixturenames}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        cheapen(patch)
        made = Matrix(
            tmp_path_factory.mktemp("matrix"), [cell for cell in CELLS if cell in chosen and available(cell[1])]
        )
        yield made
        made.close()
    torch.set_num_threads(threads)


def needs(cell: Cell) -> None:
    if not available(cell[1]):
        pytest.skip(f"the network of {cell[1]} is not installed")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out.parent / "stats.jsonl").read_text().splitlines()]


@every_cell
def test_a_cell_trains(matrix: Matrix, cell: Cell) -> None:
    """The student's weights move and its samples are finite; the class and the names are the user's."""
    needs(cell)
    generator = matrix.whole(cell)
    draw = generator.draw(5)
    assert draw.x.isfinite().all()
    assert draw.x.shape == (5, *PLACES[cell[1]].data().shape)
    assert not [line for line in lines(out_of(matrix.root / "one", cell)) if line.get("skipped")]
    if "mask" in draw.cond:
        assert not draw.cond["mask"].all()
        assert draw.x[~draw.cond["mask"]].abs().max() == 0.0
    if PLACES[cell[1]].network is None:
        return
    before, after = PLACES[cell[1]].network().inner, generator.inner
    assert type(after) is type(before)
    old, new = before.state_dict(), after.state_dict()
    assert list(new) == list(old)
    assert any(not torch.equal(new[name], old[name]) for name in old)
    saved = read_tensors(out_of(matrix.root / "one", cell) / "model.safetensors")
    assert all(name in old or name.startswith("intervals.") for name in saved)
    assert {name: torch.equal(saved[name], new[name]) for name in old} == dict.fromkeys(old, True)


@every_cell
def test_a_killed_cell_ends_as_the_uninterrupted_one(matrix: Matrix, cell: Cell) -> None:
    needs(cell)
    matrix.whole(cell)
    taken: list[int] = []
    step = Trainer._step

    def counted(trainer: Trainer, *arguments: Any) -> None:
        taken.append(trainer.position.total_samples)
        step(trainer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", counted)
        train_cell(*cell, out_of(matrix.root / "killed", cell), matrix.folder)
    assert taken[0] == KILLED_AT
    one, killed = (out_of(matrix.root / name, cell) for name in ("one", "killed"))
    for name in ("model.safetensors", "config.json"):
        assert (killed / name).read_bytes() == (one / name).read_bytes(), name
    assert (killed.parent / "stats.jsonl").read_bytes() == (one.parent / "stats.jsonl").read_bytes()


@every_cell
def test_two_processes_give_the_weights_of_one(matrix: Matrix, cell: Cell) -> None:
    needs(cell)
    matrix.whole(cell)
    one, two = (read_tensors(out_of(root, cell) / "model.safetensors") for root in (matrix.root / "one", matrix.two))
    assert one.keys() == two.keys()
    apart = [
        ((two[name] - value).abs() > 1e-5 + 1e-4 * value.abs()).flatten()
        for name, value in one.items()
        if not name.endswith(UNSEEN)
    ]
    assert torch.cat(apart).float().mean() < 1e-3  # Adam makes whole steps of gradients that are rounding errors
    assert max(float((two[name] - value).abs().max()) for name, value in one.items()) < 4e-3
    for here, there in zip(*(lines(out_of(root, cell)) for root in (matrix.root / "one", matrix.two)), strict=True):
        assert there.get("terms", {}) == pytest.approx(here.get("terms", {}), rel=1e-3, abs=2e-5)


def test_processes_with_different_weights_of_a_network_are_refused(matrix: Matrix) -> None:
    for rank in range(2):
        said = json.loads((matrix.two / f"rank-{rank}.json").read_text())["said"]
        assert "the processes have different weights of a network" in said
        assert "torch.manual_seed(0)" in said


def test_gradients_are_averaged_and_an_unused_parameter_has_none(matrix: Matrix) -> None:
    for rank in range(2):
        found = json.loads((matrix.two / f"rank-{rank}.json").read_text())["means"]
        assert found == [[1.0, 1.0], [2.0, 3.0], None]
