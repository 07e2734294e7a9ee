"""Data of any kind: arrays, tensors, files, torch and Hugging Face data sets, and other row sources, read lazily."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fewstep.data import DataSet, as_data, from_array, load_data
from fewstep.data.lazy import LazyRows
from fewstep.errors import UserError

RNG = np.random.default_rng(3)
N = 60
X = RNG.normal(size=(N, 5)).astype(np.float32)
Y = np.arange(N) % 3
OBS = RNG.normal(size=(N, 2)).astype(np.float32)
SOME = [41, 3, 3, 17]


class Source:
    """A row source that keeps a record of what it was asked for, and takes what HDF5 takes."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.shape, self.dtype, self.asked = rows, rows.shape, rows.dtype, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        if not isinstance(index, slice):
            assert (np.diff(index) > 0).all(), "ascending, without repetition"
        found = self.rows[index]
        self.asked += len(found)
        return found


class Items(Dataset[Any]):
    """A map-style data set of items of a kind."""

    def __init__(self, kind: str) -> None:
        self.kind, self.read = kind, 0

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> Any:
        self.read += 1
        x, obs = torch.from_numpy(X[row]), OBS[row]
        return {
            "tensor": x,
            "pair": (x, int(Y[row])),
            "triple": (x, int(Y[row]), obs),
            "dictionary": {"x": x, "label": int(Y[row]), "obs": obs, "caption": f"row {row}"},
        }[self.kind]


def same(data: DataSet, other: DataSet) -> None:
    """Equal in everything that training sees."""
    assert data.shape == other.shape
    assert data.scaling == other.scaling
    assert torch.equal(data.network_rows(SOME), other.network_rows(SOME))
    assert data.condition_names == other.condition_names
    found, wanted = (one.cond_rows(SOME, one.condition_names) for one in (data, other))
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype
        assert torch.equal(found[name], wanted[name])
    assert data.fingerprint == other.fingerprint


PLAIN = from_array(X)
LABELLED = from_array(X, Y)
FULL = from_array(X, Y, conditions={"obs": OBS})


@pytest.mark.parametrize(
    ("source", "said", "wanted"),
    [
        (X, {}, PLAIN),
        (torch.from_numpy(X), {}, PLAIN),
        (Source(X), {}, PLAIN),
        (X.tolist(), {}, from_array(X.astype(np.float64))),
        (X, {"conditions": {"obs": torch.from_numpy(OBS)}}, from_array(X, conditions={"obs": OBS})),
        (X, {"conditions": {"obs": Source(OBS)}}, from_array(X, conditions={"obs": OBS})),
        ({"x": X, "y": Y}, {}, LABELLED),
        ({"x": X, "y": Y, "obs": Source(OBS)}, {"conditions": ["obs"]}, FULL),
        ({"a": X, "b": Y, "c": OBS}, {"x": "a", "label": "b", "conditions": {"obs": "c"}}, FULL),
        ({"x": X, "y": Y, "obs": OBS}, {"conditions": []}, LABELLED),
        ((X, Y), {}, LABELLED),
        ((X, Y, OBS), {"conditions": ["label", "obs"]}, FULL),
        (TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), {}, LABELLED),
        (Items("tensor"), {}, PLAIN),
        (Items("pair"), {}, LABELLED),
        (Items("triple"), {"conditions": ["label", "obs"]}, FULL),
        (Items("dictionary"), {"conditions": ["obs"]}, FULL),
    ],
)
def test_every_kind_gives_the_data_of_the_plain_array(source: Any, said: dict[str, Any], wanted: DataSet) -> None:
    same(as_data(source, **said), wanted)


def test_a_data_set_is_returned_and_names_and_paths_are_loaded(tmp_path: Path) -> None:
    assert as_data(FULL) is FULL
    np.savez(tmp_path / "a.npz", x=X, y=Y, obs=OBS)
    same(as_data(tmp_path / "a.npz", conditions=["obs"]), FULL)
    same(as_data({"path": str(tmp_path / "a.npz")}, conditions=["obs"], scale="standardise"), FULL)
    assert as_data("moons").fingerprint == load_data("moons").fingerprint
    assert as_data({"name": "moons", "rows": 50}, scale="none").scaling.scale == 1
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    same(as_data(mapped, name="mine"), PLAIN)
    assert isinstance(as_data(mapped).rows, np.memmap)


@pytest.mark.parametrize(
    ("source", "said", "message"),
    [
        (FULL, {"scale": "none"}, "scale='none' was given, and the data is a DataSet, which has its own"),
        ("moons", {"x": "a"}, "x='a' was given, and the data is a name or a path"),
        (X, {"label": "y"}, "label='y' was given, and the data is one array"),
        (X, {"conditions": ["obs"]}, "names columns, and the data is one array"),
        ({"x": X, "obs": OBS, "more": OBS}, {}, r"also gives 'obs', 'more'.*conditions=\['obs', 'more'\]"),
        ({"a": X, "b": OBS}, {}, "gives the columns 'a', 'b', and it is not clear which"),
        ({"x": X}, {"conditions": ["obs"]}, "unknown column of the data 'dict': 'obs'"),
        ((X, Y, OBS), {}, r"parts 1, 2 are not named.*conditions=\['c1', 'c2'\]"),
        ((X, OBS), {"conditions": ["a", "b"]}, r"tuples with 1 part\(s\) beside the rows, and conditions names 2"),
        ((X, OBS), {"label": 5}, "tuples of 2 parts, and 5 is none of 0 to 1"),
        ({"path": "a.npz", "scale": "none"}, {"scale": "range"}, "data key 'scale' is given twice"),
        ("moons", {"name": "mine"}, "'moons' is built-in data, whose name is fixed"),
        (Items("dictionary"), {}, r"also gives 'obs', and training would not see it"),  # not the caption, a text
        (
            DataLoader(TensorDataset(torch.zeros(9, 2))),
            {},
            r"a DataLoader, which gives rows in its own order only.*fs\.",
        ),
        ((row for row in X), {}, "a generator, which gives rows in its own order only"),
        (lambda: X, {}, "a function, which gives rows in its own order only"),
        (object(), {}, "data is a object, which cannot be read. Give a name, a path"),
        (5, {}, "data is a int, which cannot be read"),
        ([[1.0], [1.0, 2.0]], {}, "a list cannot be read as one array"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_fix(source: Any, said: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_data(source, **said)


def test_lazy_rows_are_read_where_they_are_asked_for() -> None:
    source = Source(RNG.integers(0, 256, (500, 6, 7), dtype=np.uint8))
    data = as_data(source)
    assert (data.shape, data.data_shape) == ((1, 6, 7), (6, 7))
    assert source.asked == 0  # 8-bit pixels need no statistics
    plain = from_array(source.rows)
    assert torch.equal(data.network_rows(SOME), plain.network_rows(SOME))
    assert source.asked == len(set(SOME))
    for index in (slice(3, 9), slice(9, 3), slice(8, 2, -2), np.array([-1, 4]), 7, np.arange(500) % 50 == 3, []):
        assert np.array_equal(data.rows[index], plain.rows[index])
    with pytest.raises(IndexError):
        data.network_rows([500])
    assert data.fingerprint == plain.fingerprint
    floats = Source(RNG.normal(size=(500, 3)).astype(">f8"))
    assert as_data(floats).scaling == from_array(floats.rows).scaling
    assert floats.asked == 500  # one pass finds the statistics and looks for NaN


def test_lazy_rows_are_checked_like_arrays() -> None:
    broken = X.copy()
    broken[7, 2] = np.nan
    with pytest.raises(UserError, match=r"1 value\(s\) that are NaN or infinite; the first is nan at index \[7, 2\]"):
        as_data(Source(broken))
    with pytest.raises(UserError, match=r"condition 'obs' .* has shape \(59, 2\), and .* has 60 rows"):
        as_data(Source(X), conditions={"obs": Source(OBS[:59])})
    with pytest.raises(UserError, match="layout: sequence"):
        as_data(Source(RNG.normal(size=(9, 5, 4))))


def test_rows_and_conditions_of_a_batch_cost_one_reading() -> None:
    items = Items("dictionary")
    data = as_data(items, conditions=["obs"])
    items.read = 0
    data.network_rows(SOME)
    data.cond_rows(SOME, ["label", "obs"])
    assert items.read == len(set(SOME))


def test_long_readings_of_items_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.data.sources.KEPT_ROWS", 7)
    same(as_data(Items("dictionary"), conditions=["obs"]), FULL)


class Ragged(Dataset[Any]):
    def __len__(self) -> int:
        return 9

    def __getitem__(self, row: int) -> Any:
        return {"x": torch.zeros(2 + (row == 5)), **({} if row == 6 else {"obs": torch.zeros(1)})}


class Endless(Dataset[Any]):
    def __getitem__(self, row: int) -> Any:
        return torch.zeros(2)


def test_items_that_differ_are_refused() -> None:
    with pytest.raises(UserError, match=r"parts 'x' of its items have different shapes, \(2,\) and \(3,\)\. Pad or"):
        as_data(Ragged(), conditions=["obs"])
    with pytest.raises(UserError, match="an item among rows 0 to 8 has no part 'obs'"):
        as_data(Ragged(), x="obs", conditions=[])
    with pytest.raises(UserError, match="has no length, and rows are read by number"):
        as_data(Endless())


class Photos(Dataset[Any]):
    """Images as torchvision's data sets give them without a transform."""

    pixels = RNG.integers(0, 256, (8, 9, 7, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> Any:
        return Image.fromarray(self.pixels[row]), row % 2


def test_decoded_images_keep_their_layout() -> None:
    data = as_data(Photos())
    assert (data.shape, data.data_shape, data.classes) == ((3, 9, 7), (9, 7, 3), 2)
    assert np.array_equal(data.rows[:], Photos.pixels.transpose(0, 3, 1, 2))
    back = data.scaling.to_data(data.network_rows(slice(None)))
    assert np.abs(back.numpy() - Photos.pixels).max() < 8e-6


# --- Hugging Face ------------------------------------------------------------------------------------


class Columns:
    """The part of the interface of ``datasets.Dataset`` that is used."""

    def __init__(self, columns: dict[str, np.ndarray], chosen: list[str] | None = None) -> None:
        self._columns, self.column_names = columns, chosen or list(columns)

    def with_format(self, type: str | None = None, columns: list[str] | None = None) -> Columns:
        assert type == "numpy"
        return Columns(self._columns, columns)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        assert isinstance(index, (slice, list))
        return {name: self._columns[name][index] for name in self.column_names}


def test_a_source_of_columns_by_format() -> None:
    columns = Columns({"x": X, "label": Y, "obs": OBS, "caption": np.array([f"{row}" for row in range(N)])})
    same(as_data(columns, conditions=["obs"]), FULL)
    assert isinstance(as_data(columns, conditions=["obs"]).rows, LazyRows)
    with pytest.raises(UserError, match=r"also gives 'obs', and training"):
        as_data(columns)
    ragged = np.empty(N, object)
    ragged[:] = [np.zeros(1 + row % 2) for row in range(N)]
    with pytest.raises(UserError, match="rows of column 'obs' have different shapes"):
        as_data(Columns({"x": X, "obs": ragged}), conditions=["obs"])


def test_hugging_face_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = {"x": X.tolist(), "label": Y.tolist(), "obs": OBS.tolist(), "caption": ["a"] * N}
    datasets.Dataset.from_dict(made).save_to_disk(str(tmp_path / "d"))
    source = datasets.load_from_disk(str(tmp_path / "d"))  # memory-mapped
    same(as_data(source, conditions=["obs"]), FULL)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    pictures = datasets.Dataset.from_dict({"image": list(Photos.pixels), "label": [0, 1] * 4}, features=features)
    photos = as_data(pictures)
    assert (photos.shape, photos.data_shape, photos.classes) == ((3, 9, 7), (9, 7, 3), 2)
    assert np.array_equal(photos.rows[:], as_data(Photos()).rows[:])
    with pytest.raises(UserError, match=r"an? IterableDataset, which gives rows in its own order only"):
        as_data(source.to_iterable_dataset())
