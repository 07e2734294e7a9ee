"""Pairs on disk and how they are made: bytes, refusals, gates, with a closed-form teacher."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.data.dataset import DataSet
from fewstep.data.load import from_array
from fewstep.errors import UserError
from fewstep.flow.closed_form import gaussian
from fewstep.flow.couplings import EmpiricalSource, GaussianSource
from fewstep.methods.contract.options import PairOptions
from fewstep.methods.contract.stage import Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.training_pairs import generate as making
from fewstep.methods.training_pairs.generate import PairRequest, build_pairs, has_base_law, noise_law, relative_error
from fewstep.store import pairs as storing
from fewstep.store.pairs import PairStore, held_out_mask
from fewstep.training.world import LocalWorld

MEAN, STD = torch.tensor([0.5, -1.0]), torch.tensor([0.4, 1.5])
FLOW = gaussian(MEAN, STD)


class Calls:
    """A velocity that counts the rows it is asked for, and may be killed."""

    def __init__(self, flow: Any = FLOW, kill_at: int | None = None) -> None:
        self.flow, self.kill_at, self.calls = flow, kill_at, 0

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.calls += 1
        if self.calls == self.kill_at:
            raise KeyboardInterrupt
        return self.flow.velocity(x.double(), t.double()).to(x)


class PartOfAWorld:
    """One of two processes, run one after the other."""

    size = 2
    device = torch.device("cpu")

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.progress = LocalWorld(quiet=True).progress

    def barrier(self) -> None: ...

    def say(self, message: str) -> None: ...


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "SHARD_ROWS", 256)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def data(std: Tensor = STD, rows: int = 1200) -> DataSet:
    x = MEAN + std * torch.randn(rows, 2, generator=torch.Generator().manual_seed(5))
    return from_array(x.numpy(), scale="none")


def stage(folder: Path, **fields: Any) -> Stage:
    made = Stage(
        name="straight",
        folder=folder,
        data=data(),
        source=GaussianSource((2,)),
        seed=7,
        conditions=(),
        network={},
        build=lambda: torch.nn.Identity(),
        teacher=None,
        dequantise=0.0,
        world=LocalWorld(quiet=True),
    )
    return replace(made, **fields)


def request(direction: Any = "generated", velocity: Any = None, rows: int = 700, **fields: Any) -> PairRequest:
    options = PairOptions(method="test", teacher="teacher", **fields)
    return PairRequest(direction, rows, options, Teacher(velocity or Calls(), "abc"), "round-1")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("direction", ["generated", "inverted"])
def test_pairs_lie_on_the_closed_form_flow(tmp_path: Path, direction: str) -> None:
    store = build_pairs(stage(tmp_path), request(direction))
    rows = store.training_rows()
    pair = rows.columns(torch.arange(len(rows)))
    expected = MEAN + STD * pair["x0"]  # the flow map of a Gaussian
    assert relative_error(pair["x1"], expected) < store.manifest["request"]["tolerance"]
    assert store.manifest["checks"]["relative_error"] < 1e-3
    assert store.manifest["request"]["nfe"] == 16  # the gate's first try is good enough for so smooth a flow
    if direction == "generated":
        assert pair["x0"].mean().item() == pytest.approx(0.0, abs=0.1)
        assert pair["x0"].var().item() == pytest.approx(1.0, abs=0.1)
    else:
        training = data().train_rows()
        assert all(any(torch.equal(x, y) for y in training) for x in pair["x1"][:20])


@pytest.mark.parametrize("direction", ["generated", "inverted"])
def test_a_killed_generation_and_two_processes_give_the_same_bytes(tmp_path: Path, direction: str) -> None:
    whole = Calls()
    build_pairs(stage(tmp_path / "whole"), request(direction, whole, nfe=32))
    cut = Calls(kill_at=50)  # 32 calls for each of three shards, so in the second one
    with pytest.raises(KeyboardInterrupt):
        build_pairs(stage(tmp_path / "cut"), request(direction, cut, nfe=32))
    again = Calls()
    build_pairs(stage(tmp_path / "cut"), request(direction, again, nfe=32))
    assert whole.calls - again.calls == 32  # the finished shard is not made again
    # the first process makes shards 0 and 2 and stops at the check, where shard 1 is missing
    for rank, missing in ((0, True), (1, False)):
        there = stage(tmp_path / "two", world=PartOfAWorld(rank))
        if missing:
            with pytest.raises(UserError, match="00001"):
                build_pairs(there, request(direction, nfe=32))
        else:
            build_pairs(there, request(direction, nfe=32))
    build_pairs(stage(tmp_path / "two"), request(direction, nfe=32))
    truth = contents(tmp_path / "whole")
    assert len(truth) == 4
    assert contents(tmp_path / "cut") == truth
    assert contents(tmp_path / "two") == truth


def test_rows_do_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    few = build_pairs(stage(tmp_path / "few"), request(rows=300, nfe=16))
    many = build_pairs(stage(tmp_path / "many"), request(rows=512, nfe=16))
    assert few.shard_path(0).read_bytes() == many.shard_path(0).read_bytes()
    for name, column in load_file(few.shard_path(1)).items():
        torch.testing.assert_close(column, load_file(many.shard_path(1))[name][:44], atol=1e-6, rtol=1e-6)


def test_rounds_and_stages_have_their_own_noise_and_the_seed_decides_it(tmp_path: Path) -> None:
    first = build_pairs(stage(tmp_path / "a"), request(nfe=16))
    same = build_pairs(stage(tmp_path / "b"), request(nfe=16))
    seed = build_pairs(stage(tmp_path / "c", seed=8), request(nfe=16))
    later = build_pairs(stage(tmp_path / "a"), replace(request(nfe=16), tag="round-2"))
    x0 = [load_file(store.shard_path(0))["x0"] for store in (first, same, seed, later)]
    assert torch.equal(x0[0], x0[1])
    assert not torch.isin(x0[0], x0[2]).any()
    assert not torch.isin(x0[0], x0[3]).any()


def test_a_finished_store_is_used_without_a_network_call(tmp_path: Path) -> None:
    build_pairs(stage(tmp_path), request())
    silent = Calls()
    build_pairs(stage(tmp_path), request(velocity=silent))
    assert silent.calls == 0


def test_another_teachers_pairs_are_refused(tmp_path: Path) -> None:
    build_pairs(stage(tmp_path), request())
    other = replace(request(), teacher=Teacher(Calls(), "def"))
    with pytest.raises(UserError, match=r"made with teacher = 'abc', and 'def' is wanted now: delete that folder"):
        build_pairs(stage(tmp_path), other)
    with pytest.raises(UserError, match=r"made with guidance = 1\.0, and 2\.0 is wanted"):
        PairStore(
            tmp_path / "pairs/round-1/generated",
            {**load_request(tmp_path), "guidance": 2.0},
            700,
        ).open()
    with pytest.raises(UserError, match="made with rows = 700, and 800 is wanted"):
        build_pairs(stage(tmp_path), request(rows=800))


def load_request(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "pairs/round-1/generated/manifest.json").read_text())["request"]
    return {key: value for key, value in found.items() if key != "rows"}


def test_a_damaged_shard_is_named_and_made_again_once_deleted(tmp_path: Path) -> None:
    store = build_pairs(stage(tmp_path), request())
    truth = contents(tmp_path)
    store.shard_path(1).write_bytes(store.shard_path(1).read_bytes()[:500])
    with pytest.raises(UserError, match=r"00001\.safetensors cannot be read .*delete it, and the same command"):
        store.training_rows()
    store.shard_path(1).unlink()
    assert not store.complete
    build_pairs(stage(tmp_path), request())
    assert contents(tmp_path) == truth
    save_file({name: column[:9] for name, column in load_file(store.shard_path(2)).items()}, store.shard_path(2))
    with pytest.raises(UserError, match="does not hold x0 and x1 of 188 rows"):
        store.training_rows()


@pytest.mark.parametrize("direction", ["generated", "inverted"])
@pytest.mark.parametrize("shard", [0, 2])
def test_swapped_pairs_are_refused(tmp_path: Path, direction: str, shard: int) -> None:
    store = build_pairs(stage(tmp_path), request(direction))
    for number in range(store.shards) if shard == 0 else [shard]:
        columns = load_file(store.shard_path(number))
        save_file({"x0": columns["x1"], "x1": columns["x0"]}, store.shard_path(number))
    manifest = store.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    what = "have x0 and x1 swapped" if shard == 0 else "are not what the teacher makes"
    with pytest.raises(UserError, match=rf"{direction} {what}.*delete that folder"):
        build_pairs(stage(tmp_path), request(direction))


def test_the_error_gate_refuses_a_fixed_number_of_calls_that_is_too_small(tmp_path: Path) -> None:
    class Stiff:
        """A narrow Gaussian, whose flow four calls of Euler miss."""

        velocity = gaussian(torch.tensor([3.0, 0.0]), torch.tensor([0.05, 0.05])).velocity

    bad = request(velocity=Calls(Stiff), solver="euler", nfe=2, tolerance=0.05)
    with pytest.raises(UserError, match=r"off by .* of their spread .*tolerance is 0\.05: raise nfe \(now 2 calls"):
        build_pairs(stage(tmp_path / "bad"), bad)
    free = request(velocity=Calls(Stiff), solver="rk4", tolerance=0.05)
    store = build_pairs(stage(tmp_path / "good"), free)
    assert store.manifest["checks"]["relative_error"] <= 0.05
    with pytest.raises(ValueError, match="nfe = 6 is no multiple of the 4 calls"):
        build_pairs(stage(tmp_path / "odd"), request(nfe=6))


def test_a_teacher_that_ends_in_nan_is_refused(tmp_path: Path) -> None:
    class Broken:
        @staticmethod
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return torch.where(x > 2.5, torch.nan, x)

    for nfe in (None, 16):
        with pytest.raises(UserError, match="'straight': the flow of 'teacher' ends in NaN"):
            build_pairs(stage(tmp_path / str(nfe)), request(velocity=Calls(Broken), nfe=nfe))


def test_inverted_data_have_the_law_of_the_base(tmp_path: Path) -> None:
    store = build_pairs(stage(tmp_path), request("inverted", rows=1000))
    law = store.manifest["checks"]["noise_law"]
    assert law["mean_square"] == pytest.approx(1.0, abs=0.1)
    assert law["worst_mean"] < 0.15
    assert law["worst_variance"] == pytest.approx(1.0, abs=0.15)
    assert abs(law["neighbour_correlation"]) < 0.1


def test_a_teacher_of_another_scale_is_refused_by_the_law_of_its_noise(tmp_path: Path) -> None:
    wrong = stage(tmp_path, data=data(STD * 2.0))  # inverted noise has standard deviation 2
    with pytest.raises(UserError, match=r"noise of mean square .* instead of 1: the teacher was trained on other data"):
        build_pairs(wrong, request("inverted"))


def test_noise_too_small_for_the_base_is_found_and_does_not_stop_the_run(tmp_path: Path) -> None:
    narrow = stage(tmp_path, data=data(STD * 0.5))  # as data that the teacher has memorised
    store = build_pairs(narrow, request("inverted"))
    assert store.manifest["checks"]["noise_law"]["mean_square"] == pytest.approx(0.25, rel=0.15)
    assert not has_base_law(store)
    assert has_base_law(build_pairs(stage(tmp_path / "right"), request("inverted")))


def test_coordinates_that_hardly_vary_have_no_say_in_the_law(tmp_path: Path) -> None:
    x1 = torch.randn(256, 3, generator=torch.Generator().manual_seed(0))
    x0 = torch.randn(256, 3, generator=torch.Generator().manual_seed(1))
    x1[:, 1] *= 0.01
    x0[:, 1] = 0.0
    store = PairStore(tmp_path / "pairs", {}, 256)
    store.open(dict)
    store.write_shard(0, {"x0": x0, "x1": x1})
    law = noise_law(store.training_rows())
    assert law["mean_square"] == pytest.approx(1.0, abs=0.15)
    assert law["worst_variance"] == pytest.approx(1.0, abs=0.25)


def test_an_empirical_base_gives_its_own_rows(tmp_path: Path) -> None:
    rows = torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    store = build_pairs(stage(tmp_path, source=EmpiricalSource(rows)), request(nfe=16))
    x0 = store.training_rows().columns(torch.arange(100))["x0"]
    assert all(any(torch.equal(x, row) for row in rows) for x in x0)


def test_labels_travel_with_their_pairs(tmp_path: Path) -> None:
    class Shift:
        """Every class goes its own way: x1 = x0 + label."""

        def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            return label.to(x)[:, None].expand_as(x)

    label = np.arange(400) % 3
    x = np.random.default_rng(0).normal(size=(400, 2)) + label[:, None]
    labelled = from_array(x.astype(np.float32), label, scale="none")
    there = stage(tmp_path, data=labelled, conditions=("label",))
    for direction in ("generated", "inverted"):
        store = build_pairs(there, request(direction, Shift()))
        pair = store.training_rows().columns(torch.arange(600))
        torch.testing.assert_close(pair["x1"] - pair["x0"], pair["label"][:, None].expand(-1, 2).float())
        assert torch.bincount(pair["label"], minlength=3).min() > 150


def test_memory_mapped_rows_equal_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = build_pairs(stage(tmp_path), request())
    chosen = torch.randint(600, (500,), generator=torch.Generator().manual_seed(0))
    parts = store.training_rows(), store.held_out_rows()
    monkeypatch.setattr(storing, "MAX_MEMORY_BYTES", 0)
    mapped = store.training_rows(), store.held_out_rows()
    for memory, disk, rows in ((parts[0], mapped[0], chosen), (parts[1], mapped[1], torch.arange(10))):
        assert len(memory) == len(disk)
        for name, column in memory.columns(rows).items():
            assert torch.equal(column, disk.columns(rows)[name])


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 1000, 20_000])
def test_the_held_out_rows_are_fixed_and_about_one_in_32(rows: int) -> None:
    mask = held_out_mask(rows)
    assert np.array_equal(mask, held_out_mask(50_000)[:rows])
    assert not mask[0]
    assert mask.sum() == pytest.approx(rows / 32, abs=2 + 0.05 * rows / 32)
    assert np.flatnonzero(held_out_mask(200)).tolist() == np.flatnonzero(mask[:200]).tolist() or rows < 200


def test_training_and_held_out_rows_share_nothing_and_leave_out_nothing(tmp_path: Path) -> None:
    store = build_pairs(stage(tmp_path), request())
    training, held_out = store.training_rows(), store.held_out_rows()
    assert sorted([*training.index.tolist(), *held_out.index.tolist()]) == list(range(700))
    assert held_out.index.tolist() == np.flatnonzero(held_out_mask(700)).tolist()
    x = torch.cat([load_file(store.shard_path(n))["x0"] for n in range(3)])
    assert torch.equal(held_out.columns(torch.arange(len(held_out)))["x0"], x[held_out.index])


def test_relative_error_is_the_shift_over_the_spread_and_forgives_one_row_in_twenty() -> None:
    y = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * 2.0
    spread = y.double().var(0, correction=0).mean().sqrt().item()
    assert relative_error(y + 0.1, y) == pytest.approx(0.1 / spread, rel=1e-4)
    torn = y + 0.1
    torn[:50] += 100.0
    assert relative_error(torn, y) == pytest.approx(0.1 / spread, rel=1e-4)
    torn[50] += 100.0
    assert relative_error(torn, y) > 0.5


def test_the_gate_stops_at_the_first_rung_within_the_tolerance(tmp_path: Path) -> None:
    stiff = gaussian(torch.tensor([3.0, 0.0]), torch.tensor([0.02, 0.02]))

    class Stiff:
        velocity = stiff.velocity

    store = build_pairs(stage(tmp_path), request(velocity=Calls(Stiff), solver="euler", tolerance=0.1, rows=256))
    x = load_file(store.shard_path(0))["x0"]
    ends = {nfe: making.solve(Calls(Stiff), x, solver="euler", steps=nfe).x for nfe in (16, 32, 64, 128, 256)}
    within = [nfe for nfe in (16, 32, 64, 128) if relative_error(ends[nfe], ends[2 * nfe]) <= 0.1]
    assert store.manifest["request"]["nfe"] == within[0] > 16
