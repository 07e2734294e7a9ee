"""Streams: the rows of a loader in order, pass after pass, without held-out rows, resumed and in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fewstep as fs
from fewstep.data import Scaling, as_data, from_array
from fewstep.data.dataset import held_out_mask
from fewstep.data.plain_state import NotPlain, to_plain
from fewstep.data.stream_rows import row_hashes
from fewstep.errors import UserError

N, R, BATCH = 230, 100, 16
X = np.random.default_rng(5).normal(3.0, 2.0, (N, 4)).astype(np.float32)
OBS = np.arange(N, dtype=np.float32)[:, None]
Y = np.arange(N) % 3
HELD = np.flatnonzero(held_out_mask(R))
KEPT = np.delete(np.arange(N), HELD)  # the rows of one pass that training sees


class Batches:
    """An iterable of batches that counts how often it was started and how many rows it gave."""

    def __init__(self, rows: int = N) -> None:
        self.rows, self.starts, self.given = rows, 0, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.starts += 1
        for start in range(0, self.rows, BATCH):
            chosen = slice(start, min(start + BATCH, self.rows))
            self.given += len(X[chosen])
            yield {"x": torch.from_numpy(X[chosen]), "obs": torch.from_numpy(OBS[chosen]), "y": torch.tensor(Y[chosen])}


def made(loader: Any = None, **said: Any) -> Any:
    said = {"conditions": ["obs"], "reservoir": R, **said}
    return fs.stream(Batches() if loader is None else loader, **said)


def numbers(stream: Any, start: int, count: int) -> list[int]:
    """Which rows of the data those of the stream are, by their condition."""
    found: list[int] = stream.rows(start, count)[1]["obs"][:, 0].long().tolist()
    return found


def expected(start: int, count: int) -> list[int]:
    return [int(KEPT[row % len(KEPT)]) for row in range(start, start + count)]


# --- order -------------------------------------------------------------------------------------------


def test_rows_come_in_order_in_network_units_with_their_conditions() -> None:
    stream = made()
    plain = from_array(X[:R], Y[:R], conditions={"obs": OBS[:R]})
    assert stream.reservoir.fingerprint == plain.fingerprint
    assert stream.scaling == plain.scaling
    for start in range(0, 3 * N, 37):
        x, cond = stream.rows(start, 37)
        rows = expected(start, 37)
        assert x.dtype == torch.float32
        assert torch.equal(x, plain.scaling.to_network(X[rows]))
        assert cond["obs"][:, 0].tolist() == rows
        assert cond["label"].tolist() == Y[rows].tolist()
        assert list(cond) == ["label", "obs"]
    assert (stream.shape, stream.name, stream.position) == ((4,), "stream", 37 * 19)


@pytest.mark.parametrize("reservoir", [2, BATCH, R, N, 10 * N])
def test_every_size_of_reservoir_gives_whole_passes(reservoir: int) -> None:
    stream = made(reservoir=reservoir, classes=3)
    assert len(stream.reservoir) == min(reservoir, N)
    kept = np.flatnonzero(~held_out_mask(len(stream.reservoir)))
    one_pass = [*kept.tolist(), *range(len(stream.reservoir), N)]
    assert numbers(stream, 0, 2 * len(one_pass)) == one_pass * 2


def test_ahead_is_skipped_and_back_is_started_again() -> None:
    loader = Batches()
    stream = made(loader)
    assert numbers(stream, 150, 5) == expected(150, 5)
    assert loader.starts == 1
    assert numbers(stream, 500, 30) == expected(500, 30)
    starts = loader.starts
    assert numbers(stream, 140, 30) == expected(140, 30)
    assert loader.starts == starts + 1
    assert numbers(stream, 0, 3) == expected(0, 3)


def test_no_more_than_a_batch_is_read_ahead() -> None:
    loader = Batches()
    stream = made(loader)
    assert loader.given == -(-R // BATCH) * BATCH  # the batches of the reservoir
    stream.rows(0, 5)
    assert loader.given == -(-R // BATCH) * BATCH
    stream.rows(5, 110)
    assert loader.given <= 115 + len(HELD) + BATCH


KINDS: dict[str, Any] = {
    "function": lambda: iter(Batches()),
    "tuples": lambda: ((batch["x"], batch["y"], batch["obs"]) for batch in Batches()),
    "loader": DataLoader(
        TensorDataset(torch.from_numpy(X), torch.from_numpy(Y), torch.from_numpy(OBS)), batch_size=BATCH
    ),
    "arrays": lambda: ({"x": batch["x"].numpy(), "y": batch["y"].tolist(), "obs": batch["obs"]} for batch in Batches()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_loader_gives_the_same(kind: str) -> None:
    names = ["label", "obs"] if kind in ("tuples", "loader") else ["obs"]
    stream, other = made(KINDS[kind], conditions=names), made()
    for start in (0, 90, 400):
        (x, cond), (y, wanted) = stream.rows(start, 50), other.rows(start, 50)
        assert torch.equal(x, y)
        assert {name: value.tolist() for name, value in cond.items()} == {n: v.tolist() for n, v in wanted.items()}


class Rows(IterableDataset[Any]):
    """Rows one by one, without a batch axis."""

    def __iter__(self) -> Iterator[Any]:
        yield from ({"x": x, "obs": obs} for x, obs in zip(X, OBS, strict=True))


def test_single_rows_are_taken_when_said() -> None:
    assert numbers(made(Rows(), batched=False), 60, 300) == expected(60, 300)
    assert numbers(made(DataLoader(Rows(), batch_size=7)), 60, 300) == expected(60, 300)
    with pytest.raises(UserError, match=r"item at row 0 is no batch: .*'x': \(4,\).*say batched=False"):
        made(Rows())


# --- held-out rows -----------------------------------------------------------------------------------


def shuffled(**said: Any) -> DataLoader[Any]:
    pairs = TensorDataset(torch.from_numpy(X), torch.from_numpy(OBS))
    return DataLoader(pairs, batch_size=BATCH, shuffle=True, **said)


def test_held_out_rows_never_come_back_in_another_order() -> None:
    stream = made(shuffled())
    held = set(stream.reservoir.conditions["obs"][stream.reservoir.held_out, 0].astype(int))
    assert len(held) >= 5
    seen = numbers(stream, 0, 6 * N)
    assert not held & set(seen)
    assert len(set(seen)) == N - len(held)


def test_held_out_places_are_skipped_where_values_change_at_random() -> None:
    """Augmentation in a fixed order: no row equals one of the reservoir, and the places tell."""
    rng = np.random.default_rng(1)
    stream = made(lambda: ({**batch, "x": batch["x"] + rng.normal()} for batch in Batches()))
    assert numbers(stream, 0, 700) == expected(0, 700)


def test_repeated_rows_of_the_data_stay() -> None:
    """Of data with few different rows, every row equals a held-out one."""
    few = torch.tensor([[0.0], [1.0]]).repeat(100, 1)
    stream = fs.stream(lambda: iter(few.split(20)), reservoir=100, scale="none")
    x, _ = stream.rows(0, 500)
    assert 0.3 < x.mean() < 0.7


def test_row_hashes_tell_rows_apart() -> None:
    x = torch.from_numpy(X)
    assert len(np.unique(row_hashes(x))) == N
    assert np.array_equal(row_hashes(x[[5, 5, 9]]), row_hashes(x)[[5, 5, 9]])
    changed = x.clone()
    changed[:, 3] = torch.nextafter(changed[:, 3], torch.tensor(9.0))
    assert not np.isin(row_hashes(changed), row_hashes(x)).any()
    assert not np.isin(row_hashes(x.flip(1)), row_hashes(x)).any()


# --- starting again, and resumption ------------------------------------------------------------------


def test_an_iterator_gives_one_pass() -> None:
    stream = made(iter(Batches()))
    assert numbers(stream, 0, len(KEPT)) == expected(0, len(KEPT))
    with pytest.raises(UserError, match="the stream 'stream' is an iterator, which ends and cannot be started again"):
        stream.rows(len(KEPT), 1)
    assert not stream.exact_resume
    assert "a stopped run needs a new iterator" in stream.promise
    early = made(iter(Batches()))
    early.rows(0, 150)
    with pytest.raises(UserError, match=r"cannot be started again\. Give what makes it: .* or restart=function"):
        early.rows(140, 30)
    again = made(iter(Batches()), restart=lambda: iter(Batches()))
    assert numbers(again, 0, 500) == expected(0, 500)
    assert numbers(again, 120, 50) == expected(120, 50)
    short = made(iter(Batches(40)))
    assert len(short.reservoir) == 40


class Epochs:
    """Batches in an order that is a function of the epoch that it was told."""

    def __init__(self) -> None:
        self.epoch, self.told = 0, list[int]()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.told.append(epoch)

    def __iter__(self) -> Iterator[Any]:
        order = np.random.default_rng(self.epoch).permutation(N)
        return ((X[rows], OBS[rows]) for rows in np.split(order, range(BATCH, N, BATCH)))


def test_the_epoch_is_told_to_what_takes_it() -> None:
    loader = Epochs()
    stream = made(loader)
    first = numbers(stream, 0, 600)
    assert loader.told == [0, 1, 2]
    assert first[:200] != first[len(KEPT) : len(KEPT) + 200]
    assert numbers(stream, 0, 600) == first
    inner = Epochs()
    inner.__class__ = type("Sampler", (Epochs,), {"__len__": lambda self: N, "__iter__": lambda self: iter(range(N))})
    pairs = TensorDataset(torch.from_numpy(X), torch.from_numpy(OBS))
    numbers(made(DataLoader(pairs, batch_size=BATCH, sampler=inner)), 0, 300)  # type: ignore[arg-type]
    assert inner.told == [0, 1]


def test_a_seeded_shuffle_repeats_its_rows_in_this_run_and_the_next() -> None:
    def new() -> Any:
        return made(shuffled(generator=torch.Generator().manual_seed(4)))

    stream = new()
    assert stream.exact_resume
    first = [numbers(stream, start, 50) for start in range(0, 800, 50)]
    assert sorted(first[0] + first[1]) != first[0] + first[1]
    assert numbers(stream, 450, 50) == first[9]  # started again
    resumed = new()
    resumed.restore(stream.state(), 700)
    assert numbers(resumed, 700, 50) == first[14]


@pytest.mark.parametrize(
    ("loader", "exact", "reason"),
    [
        (DataLoader(TensorDataset(torch.from_numpy(X)), batch_size=9), True, "its order is that of the data set"),
        (shuffled(generator=torch.Generator()), True, "drawn by the generator that it was given"),
        (shuffled(), False, "it shuffles with a new seed in every run; give DataLoader a generator="),
        (DataLoader(Rows(), batch_size=9), False, "the order of its iterable data set cannot be told"),
        (lambda: iter(Batches()), False, "cannot be told from outside"),
    ],
)
def test_exact_resumption_is_promised_only_where_it_is_known(loader: Any, exact: bool, reason: str) -> None:
    stream = made(loader, conditions=[])
    assert stream.exact_resume == exact
    assert ("gets the same rows bit for bit" if exact else "may get other rows") in stream.promise
    assert reason in stream.promise
    assert "\n" not in stream.promise
    assert made(loader, conditions=[], repeatable=True).exact_resume


def test_without_a_state_rows_are_skipped() -> None:
    stream = made()
    numbers(stream, 0, 333)
    assert stream.state() is None
    resumed = made()
    resumed.restore(None, 333)
    assert resumed.position == 333
    assert numbers(resumed, 333, 70) == expected(333, 70)


class Stateful(Batches):
    """Batches with a state of their own, which begin there again in every pass, as iterable data sets may."""

    def __init__(self) -> None:
        super().__init__()
        self.at, self.first = 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "more": (np.float32(1.5), b"\0\1", torch.arange(3))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert isinstance(state["more"], tuple)
        assert state["more"][1:2] == (b"\0\1",)
        assert torch.equal(state["more"][2], torch.arange(3))
        self.first = state["at"]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.at = self.first
        for number, batch in enumerate(super().__iter__()):
            if number >= self.first:
                self.at = number + 1
                yield batch


@pytest.mark.parametrize("position", [120, 128, 213, 214, 215, 500, 2 * len(KEPT)])
def test_a_state_of_its_own_saves_the_skipping(position: int) -> None:
    stream = made(Stateful())
    numbers(stream, 0, position)
    state = json.loads(json.dumps(stream.state()))
    assert state["position"] == position
    loader = Stateful()
    resumed = made(loader)
    loader.given = 0
    resumed.restore(state, position)
    assert numbers(resumed, position, 500) == expected(position, 500)
    assert numbers(resumed, 130, 300) == expected(130, 300)  # and back to the true start
    other = made(Stateful())
    other.restore(state, position + 3)  # a state of another place is not used
    assert numbers(other, position + 3, 50) == expected(position + 3, 50)


def test_states_without_a_form_in_json_are_skipped() -> None:
    class Odd(Stateful):
        def state_dict(self) -> dict[str, Any]:
            return {"at": object()}

    stream = made(Odd())
    numbers(stream, 0, 150)
    assert stream.state() is None
    with pytest.raises(NotPlain):
        to_plain({1: 2})


def test_torchdata_loaders_go_on_by_their_state() -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    pairs = TensorDataset(torch.from_numpy(X), torch.from_numpy(OBS))

    def new(**said: Any) -> Any:
        return made(stateful.StatefulDataLoader(pairs, batch_size=BATCH, **said))

    stream = new()
    numbers(stream, 0, 300)
    state = json.loads(json.dumps(stream.state()))
    assert state is not None
    resumed = new()
    resumed.restore(state, 300)
    assert numbers(resumed, 300, 500) == expected(300, 500)
    assert numbers(resumed, 130, 300) == expected(130, 300)
    # its state does not bring back the draws of later passes, so a seeded shuffle is skipped through
    stream = new(shuffle=True, generator=torch.Generator().manual_seed(1))
    numbers(stream, 0, 300)
    assert stream.state() is None
    resumed = new(shuffle=True, generator=torch.Generator().manual_seed(1))
    resumed.restore(None, 300)
    assert numbers(resumed, 300, 500) == numbers(stream, 300, 500)


def test_hugging_face_streams_go_on_by_their_state() -> None:
    datasets = pytest.importorskip("datasets")
    held = datasets.Dataset.from_dict({"x": X.tolist(), "obs": OBS.tolist()})

    def new() -> Any:
        return made(held.to_iterable_dataset().with_format("numpy").batch(BATCH))

    stream = new()
    assert numbers(stream, 0, 300) == expected(0, 300)
    state = json.loads(json.dumps(stream.state()))
    assert state is not None
    resumed = new()
    resumed.restore(state, 300)
    assert numbers(resumed, 300, 500) == expected(300, 500)
    assert numbers(resumed, 130, 300) == expected(130, 300)


def test_webdatasets(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "a.tar")) as sink:
        for row in range(N):
            sink.write({"__key__": f"{row:04}", "x.npy": X[row], "obs.npy": OBS[row]})
    loader = wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode().to_tuple("x.npy", "obs.npy")
    assert numbers(made(loader.batched(BATCH)), 60, 300) == expected(60, 300)


# --- contents ----------------------------------------------------------------------------------------


def test_layouts_and_masks_are_those_of_arrays() -> None:
    flags = np.arange(6) < (1 + np.arange(N) % 6)[:, None]
    rows = np.where(flags[..., None], np.random.default_rng(0).normal(5, 3, (N, 6, 2)), np.nan)
    stream = fs.stream(
        lambda: ({"x": rows[i : i + 9], "m": flags[i : i + 9]} for i in range(0, N, 9)),
        conditions=["m"], mask="m", layout="sequence", reservoir=R,
    )  # fmt: skip
    plain = from_array(rows[:R], conditions={"m": flags[:R]}, mask="m", layout="sequence")
    assert stream.scaling == plain.scaling
    x, cond = stream.rows(0, 400)
    assert (x[~cond["m"]] == 0).all()
    assert x.isfinite().all()
    assert x[cond["m"]].std().item() == pytest.approx(1, abs=0.1)
    pixels = np.random.default_rng(0).integers(0, 256, (N, 9, 7, 3), dtype=np.uint8)
    photos = fs.stream(lambda: iter(np.split(pixels, 23)), reservoir=R)
    assert (photos.shape, photos.reservoir.data_shape) == ((3, 9, 7), (9, 7, 3))
    one_pass = photos.rows(0, len(KEPT))[0]
    assert np.allclose(one_pass.numpy(), pixels[KEPT].transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)


def test_labels_keep_their_numbers() -> None:
    def new(labels: np.ndarray, **said: Any) -> Any:
        return fs.stream(lambda: ((X[i : i + 9], labels[i : i + 9]) for i in range(0, N, 9)), reservoir=R, **said)

    stream = new(Y * 5 + 2)
    assert stream.reservoir.label_names == (2, 7, 12)
    assert stream.rows(0, 300)[1]["label"].tolist() == [int(Y[row]) for row in expected(0, 300)]
    late = np.where(np.arange(N) > 150, 4, Y)
    with pytest.raises(
        UserError, match=r"batch at row 144 of pass 1, has the label 4, .* among the 3 labels.*classes="
    ):
        new(late).rows(0, 200)
    known = new(late, classes=6)
    assert known.reservoir.classes == 6
    assert known.rows(0, 200)[1]["label"].tolist() == [int(late[row]) for row in expected(0, 200)]
    with pytest.raises(UserError, match="label 2, and classes=2 allows 0 to 1"):
        new(Y, classes=2)


BROKEN = X.copy()
BROKEN[170, 1] = np.nan


@pytest.mark.parametrize(
    ("late", "message"),
    [
        ({"x": BROKEN[160:180], "obs": OBS[160:180]}, r"at row 160 of pass 1, holds a value .*, in its row 10"),
        ({"x": X[:20, :3], "obs": OBS[:20]}, r"has rows of shape \(3,\), and earlier ones had \(4,\)"),
        ({"x": X[:20], "obs": X[:20]}, r"has condition 'obs' of shape \(4,\); earlier ones had \(1,\)"),
        ({"x": X[:20], "obs": OBS[:19]}, "the item at row 160 is no batch"),
        ({"x": X[:20], "obs": np.full((20, 1), np.inf)}, "condition 'obs' of .* holds 20 value"),
        ({"x": X[:20]}, "the item at row 160 has no part 'obs'; earlier ones had it"),
        (None, "gave no rows in pass 2"),
    ],
)
def test_later_batches_are_checked_like_the_first(late: Any, message: str) -> None:
    passes = iter([[{"x": X[:160], "obs": OBS[:160]}, *([] if late is None else [late])], []])
    stream = made(lambda: iter(next(passes)))
    assert numbers(stream, 0, 100) == expected(0, 100)
    with pytest.raises(UserError, match=message):
        stream.rows(100, 80)


@pytest.mark.parametrize(
    ("loader", "said", "message"),
    [
        (5, {}, "the stream 'stream' is a int, which cannot be iterated"),
        (list, {}, "gave no rows. Give a loader"),
        (Batches(), {"conditions": None}, r"also gives 'obs', and training would not see it"),
        (Batches(), {"conditions": ["obz"]}, "unknown column of the stream 'stream': 'obz'"),
        (Batches(), {"reservoir": 1}, "reservoir must be a whole number of at least 2, got 1"),
        (Batches(), {"mask": "msk"}, "unknown condition 'msk'"),
        (lambda: ["text"], {}, "gives 'text'. Give items that are dictionaries, tuples or tensors"),
        (lambda: iter([X[:9], X[9:18, :2]]), {}, "batches have rows of different shapes"),
    ],
)
def test_loaders_that_cannot_be_used_are_refused(loader: Any, said: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(loader, **{"conditions": ["obs"] if isinstance(loader, Batches) else [], **said})


def test_what_needs_chosen_rows_is_refused_with_the_reason() -> None:
    stream = made(name="mine")
    with pytest.raises(
        UserError, match=r"^pairs of real rows need chosen rows, and the stream 'mine' gives rows in its"
    ):
        stream.refuse("pairs of real rows")
    with pytest.raises(UserError, match=r"data=stream\.reservoir"):
        as_data(stream)
    assert as_data(stream.reservoir) is stream.reservoir


def test_the_scaling_of_an_earlier_run_is_taken() -> None:
    stream = made(shuffled())
    stream.rows(0, 150)
    stream.use_scaling(Scaling(1.0, 4.0, shape=(4,)))
    x, cond = stream.rows(0, 500)
    assert torch.equal(x, Scaling(1.0, 4.0, shape=(4,)).to_network(X[cond["obs"][:, 0].long()]))
    held = stream.reservoir.conditions["obs"][stream.reservoir.held_out, 0]
    assert not set(held) & set(cond["obs"][:, 0].tolist())
    with pytest.raises(UserError, match=r"rows of shape \(4,\), and the scaling is for \(5,\)"):
        stream.use_scaling(Scaling(shape=(5,)))


def test_the_fingerprint_is_that_of_the_rows_where_they_repeat() -> None:
    assert made(repeatable=True).fingerprint == made().reservoir.fingerprint
    assert made(shuffled()).fingerprint == made(shuffled()).fingerprint != made(shuffled(), conditions=[]).fingerprint


def test_the_reservoir_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.data.stream.MAX_RESERVOIR_BYTES", 1000)
    monkeypatch.setattr("fewstep.data.stream.LEAST_RESERVOIR", 20)
    assert len(made(reservoir=None).reservoir) == 1000 // (4 * 4 + 4 + 8)
    monkeypatch.setattr("fewstep.data.stream.LEAST_RESERVOIR", 60)
    assert len(made(reservoir=None).reservoir) == 60
    assert len(made(reservoir=90).reservoir) == 90


# --- memory ------------------------------------------------------------------------------------------

LONG = """
import sys
import numpy as np, torch
import fewstep as fs
torch.set_num_threads(1)

def peak_memory():
    # in MiB; ru_maxrss would include the memory of the process that started this one
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10

def batches():
    for number in range(200_000 // 500):
        rng = np.random.default_rng(number)
        yield {"x": rng.normal(size=(500, 64)).astype("f4"), "text": rng.normal(size=(500, 40, 32)).astype("f4")}

stream = fs.stream(batches, conditions=["text"])
before = peak_memory()
total = 0
for start in range(0, 199_000, 256):
    x, cond = stream.rows(start, 256)
    total += len(x)
    assert cond["text"].shape == (256, 40, 32)
peak = peak_memory()
print(total, round(before), round(peak))
"""


@pytest.mark.slow
def test_two_hundred_thousand_rows_stay_under_a_gigabyte() -> None:
    """Rows of 64 values with conditions of 1,280: 1.1 GB in all, of which the reservoir keeps its part alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    total, before, peak = map(int, done.stdout.split())
    assert total >= 199_000
    assert peak < 1000, f"{peak} MB at the most, {before} MB with the reservoir"
    assert peak < before + 100, "rows are not gathered"


class Aged(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> Any:
        return X[row], OBS[row]


@pytest.mark.slow
def test_loaders_with_worker_processes() -> None:
    stream = made(DataLoader(Aged(), batch_size=BATCH, num_workers=1))
    assert stream.exact_resume
    assert numbers(stream, 0, 300) == expected(0, 300)
    assert numbers(stream, 120, 40) == expected(120, 40)
