"""Arrays, idx files, image folders and labels: contents that are read, and errors for those that are refused."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.data import Scaling, from_array, load_data
from fewstep.errors import UserError

RNG = np.random.default_rng(1)
ROWS = RNG.normal(size=(30, 3)).astype(np.float32)
PIXELS = RNG.integers(0, 256, (30, 4, 5), dtype=np.uint8)
LABELS = np.arange(30) % 3


def idx_bytes(array: np.ndarray, code: int) -> bytes:
    """The idx format, written from its definition."""
    big = array.astype(array.dtype.newbyteorder(">"))
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, code, array.ndim]) + sizes + big.tobytes()


# --- npy and npz -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i1", "u2", "i8", "?"])
def test_npy_keeps_content_and_dtype(tmp_path: Path, dtype: str) -> None:
    rows = RNG.integers(0, 2, (30, 3)).astype(dtype)
    np.save(tmp_path / "a.npy", rows)
    data = load_data(tmp_path / "a.npy")
    assert data.name == "a.npy"
    assert data.shape == (3,)
    assert data.rows.dtype == np.dtype(dtype).newbyteorder("=")
    assert np.array_equal(data.rows, rows)
    back = data.scaling.to_data(data.network_rows(slice(None)))
    assert np.allclose(back.numpy(), rows.astype(np.float32), atol=1e-6)


def test_large_npy_files_are_mapped_and_equal_small_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", PIXELS)
    small = load_data(str(tmp_path / "a.npy"))
    monkeypatch.setattr("fewstep.data.arrays.MIN_MAPPED_BYTES", 1)
    mapped = load_data(tmp_path / "a.npy")
    assert isinstance(mapped.rows, np.memmap)
    assert not isinstance(small.rows, np.memmap)
    assert mapped.fingerprint == small.fingerprint
    assert np.array_equal(mapped.train_rows(), small.train_rows())


@pytest.mark.parametrize(
    ("row_shape", "shape", "data_shape"),
    [((3,), (3,), (3,)), ((4, 5), (1, 4, 5), (4, 5)), ((2, 4, 5), (2, 4, 5), (2, 4, 5))],
)
def test_the_shape_of_rows(
    tmp_path: Path, row_shape: tuple[int, ...], shape: tuple[int, ...], data_shape: tuple[int, ...]
) -> None:
    rows = RNG.normal(size=(6, *row_shape))
    np.save(tmp_path / "a.npy", rows)
    layout = None if row_shape == (3,) else "image"
    data = load_data({"path": tmp_path / "a.npy", "name": "mine", "layout": layout})
    assert (data.name, data.shape, data.data_shape) == ("mine", shape, data_shape)
    back = data.scaling.to_data(data.network_rows(slice(None))).numpy()
    assert back.shape == rows.shape
    assert np.allclose(back, rows, atol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "classes"),
    [
        ({"anything": ROWS}, 0),
        ({"x": ROWS, "y": LABELS}, 3),
        ({"data": ROWS, "labels": LABELS}, 3),
        ({"images": ROWS}, 0),
    ],
)
def test_npz_keys(tmp_path: Path, arrays: dict[str, Any], classes: int) -> None:
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    data = load_data(tmp_path / "a.npz")
    assert np.array_equal(data.rows, ROWS)
    assert data.classes == classes


@pytest.mark.parametrize("keys", [("a", "b"), ("x", "data"), ("x", "y", "labels"), ("y", "z")])
def test_unclear_npz_keys_are_named(tmp_path: Path, keys: tuple[str, ...]) -> None:
    np.savez(tmp_path / "a.npz", **dict.fromkeys(keys, ROWS))
    named = ", ".join(repr(key) for key in keys)
    with pytest.raises(UserError, match=rf"a\.npz' holds the arrays {named}, and it is not clear"):
        load_data(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5), r"has shape \(5,\).* use x\.reshape\(-1, 1\)"),
        (np.float64(3), r"has shape \(\), and rows \(N, features\) or images"),
        (np.zeros(5, int), r"one whole number per row\. If these are labels"),
        (np.zeros((0, 3)), r"is empty: its shape is \(0, 3\)"),
        (np.zeros((3, 0)), r"is empty: its shape is \(3, 0\)"),
        (np.zeros((1, 3)), "has 1 row .* at least 2 are needed"),
        (np.zeros((2, 1, 2, 2, 2)), "what rows with 4 axes mean is not known. Say 'layout: raw'"),
        (np.zeros((2, 8, 8, 3)), r"looks like \(N, H, W, C\).* x\.transpose\(0, 3, 1, 2\)"),
        (np.zeros((3, 2), complex), r"is complex \(complex128\), and a flow needs real numbers"),
        (np.array([["a", "b"]] * 3), "has dtype <U1, and numbers are needed"),
        (np.zeros((3, 2), "M8[s]"), r"has dtype datetime64\[s\], and numbers are needed"),
        (np.array([[1, {}]] * 3, object), r"holds Python objects \(dtype object\)"),
        (np.zeros(3, [("a", "f4")]), r"has dtype .*, and numbers are needed"),
    ],
)
def test_arrays_that_cannot_be_rows_are_refused(tmp_path: Path, array: Any, message: str) -> None:
    np.save(tmp_path / "bad.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=rf"bad\.npy'.*{message}"):
        load_data(tmp_path / "bad.npy")


def test_objects_in_npz_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([[1, {}]] * 3, object))
    with pytest.raises(UserError, match=r"a\.npz', array 'x', holds Python objects"):
        load_data(tmp_path / "a.npz")


def test_nan_and_infinity_are_counted_and_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = RNG.normal(size=(30, 4, 5))
    rows[17, 2, 3], rows[17, 3, 0], rows[29, 0, 0] = np.nan, np.inf, -np.inf
    np.save(tmp_path / "a.npy", rows)
    message = r"a\.npy' holds 3 value\(s\) that are NaN or infinite; the first is nan at index \[17, 2, 3\]"
    spec = {"path": tmp_path / "a.npy", "layout": "image"}
    with pytest.raises(UserError, match=message):
        load_data(spec)
    monkeypatch.setattr("fewstep.data.rules._MAX_CHUNK_VALUES", 100)
    with pytest.raises(UserError, match=message):
        load_data(spec)


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        ("npy", b"", r"is empty \(0 bytes\)"),
        ("npy", b"1,2,3\n4,5,6\n", r"is not a \.npy file: it begins with b'1,2,3"),
        ("npy", b"\x93NUMPY\x01\x00\x76\x00junk", "cannot read"),
        ("npy", b"\x93NUMPY", "cannot read"),
        ("npy", b"\x93NUMPY\x09\x00\x76\x00", r"cannot read .*: version \(9, 0\)"),
        ("npz", b"", r"is empty \(0 bytes\)"),
        ("npz", b"junk", r"is not a \.npz file: it begins with b'ju'"),
        ("npz", b"PK\x03\x04 and no more", "cannot read .*: File is not a zip file"),
        ("csv", b"1,2\n3,4\n", r"has a format that is not supported \(it begins with b'1,2"),
        ("png", b"\x89PNG\r\n", "is one image. Give the folder"),
        ("gz", b"junk", r"is not a gzip file: it begins with b'ju'"),
        ("gz", b"\x1f\x8bjunkjunkjunk", "cannot read"),
        ("gz", gzip.compress(b"1,2\n", mtime=0), "is not an idx file: it begins with b'1,2"),
        ("gz", gzip.compress(b"", mtime=0), "is not an idx file: it begins with b''"),
    ],
)
def test_junk_is_named_with_its_cause(tmp_path: Path, suffix: str, content: bytes, message: str) -> None:
    path = tmp_path / f"junk.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_data(path)
    assert repr(str(path)) in str(caught.value)


def test_truncated_arrays_are_told_by_their_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ROWS)
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-10])
    with pytest.raises(
        UserError,
        match=rf"truncated: .* shape \(30, 3\), {len(whole)} bytes, and {len(whole) - 10} were found",
    ):
        load_data(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", x=ROWS)
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot read '.*a\.npz'"):
        load_data(tmp_path / "a.npz")
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(bytes(damaged))
    with pytest.raises(UserError, match=r"cannot read '.*a\.npz': .*CRC"):
        load_data(tmp_path / "a.npz")


def test_a_header_that_promises_terabytes_allocates_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ROWS)
    content = (tmp_path / "a.npy").read_bytes().replace(b"(30, 3), }         ", b"(30000000000, 300)}")
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"truncated: its header gives shape \(30000000000, 300\)"):
        load_data(tmp_path / "a.npy")


# --- labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (LABELS, None),
        (LABELS.astype(np.float64), None),
        (LABELS * 5 + 2, (2, 7, 12)),
        (LABELS.astype(np.uint8) + 1, (1, 2, 3)),
    ],
)
@pytest.mark.parametrize("form", ["npy", "npz", "array"])
def test_labels_are_mapped_to_zero_to_k(
    tmp_path: Path, given: np.ndarray, names: tuple[int, ...] | None, form: str
) -> None:
    np.save(tmp_path / "x.npy", ROWS)
    source: Any = given.tolist()
    if form != "array":
        source = str(tmp_path / f"y.{form}")
        np.save(source, given) if form == "npy" else np.savez(source, given)
    data = load_data({"path": tmp_path / "x.npy", "labels": source})
    assert data.labels is not None
    assert data.labels.dtype == np.int64
    assert np.array_equal(data.labels, LABELS)
    assert (data.classes, data.label_names) == (3, names)


def test_given_labels_go_before_those_in_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=ROWS, y=LABELS)
    data = load_data({"path": tmp_path / "a.npz", "labels": np.arange(30) % 5})
    assert data.classes == 5


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:29], r"labels of 'd' has 29 labels and the data 'd' has 30 rows"),
        (LABELS[:, None], r"must be one number per row, got shape \(30, 1\)\. Use y\.reshape\(-1\)"),
        (np.eye(3)[LABELS], r"got shape \(30, 3\)\. For one-hot rows use y\.argmax\(axis=1\)"),
        (np.array(["cat"] * 30), r"must be whole numbers, got dtype <U3\. Number the classes: numpy\.unique"),
        (LABELS + 0.5, "must be whole numbers, and 30 are not; the first is 0.5 at index 0"),
        (np.where(LABELS == 2, np.nan, LABELS), "and 10 are not; the first is nan at index 2"),
        (np.where(LABELS == 2, np.inf, LABELS), "and 10 are not; the first is inf at index 2"),
        (LABELS - 1, "must be 0 or more, and 10 are not; the first is -1 at index 0"),
    ],
)
def test_wrong_labels_are_refused(labels: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_array(ROWS, labels, name="d")


def test_labels_of_another_length_name_both_files(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ROWS)
    np.save(tmp_path / "y.npy", LABELS[:7])
    with pytest.raises(UserError, match=r"y\.npy' has 7 labels and '.*x\.npy' has 30 rows"):
        load_data({"path": tmp_path / "x.npy", "labels": tmp_path / "y.npy"})
    with pytest.raises(UserError, match=r"data key 'labels': there is no file 'z\.npy'"):
        load_data({"path": tmp_path / "x.npy", "labels": "z.npy"})


# --- idx ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_idx_images_and_labels_round_trip(tmp_path: Path, packed: bool) -> None:
    pack = gzip.compress if packed else bytes
    suffix = ".gz" if packed else ""
    images, labels = tmp_path / f"images-idx3-ubyte{suffix}", tmp_path / f"labels-idx1-ubyte{suffix}"
    images.write_bytes(pack(idx_bytes(PIXELS, 0x08)))
    labels.write_bytes(pack(idx_bytes(LABELS.astype(np.uint8), 0x08)))
    data = load_data({"path": images, "labels": labels})
    assert data.rows.dtype == np.uint8
    assert np.array_equal(data.rows[:, 0], PIXELS)
    assert data.scaling == Scaling(127.5, 127.5, (0, 255), (1, 4, 5), "HW")
    assert np.array_equal(data.labels, LABELS)
    assert data.fingerprint == from_array(PIXELS, LABELS).fingerprint
    with pytest.raises(UserError, match="If these are labels, give the rows as 'path' and this file as"):
        load_data(labels)


@pytest.mark.parametrize(("dtype", "code"), [("i1", 0x09), ("i2", 0x0B), ("i4", 0x0C), ("f4", 0x0D), ("f8", 0x0E)])
def test_all_types_of_idx_are_read(tmp_path: Path, dtype: str, code: int) -> None:
    rows = RNG.integers(-100, 100, (5, 3)).astype(dtype)
    (tmp_path / "a.idx").write_bytes(idx_bytes(rows, code))
    data = load_data(tmp_path / "a.idx")
    assert data.rows.dtype == np.dtype(dtype)
    assert np.array_equal(data.rows, rows)


@pytest.mark.parametrize("packed", [True, False])
def test_truncated_idx_is_told_by_its_bytes(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "images.gz" if packed else tmp_path / "images.idx"
    whole = idx_bytes(PIXELS, 0x08)
    pack = gzip.compress if packed else bytes
    path.write_bytes(pack(whole[:-100]))
    with pytest.raises(
        UserError,
        match=rf"truncated: .* shape \(30, 4, 5\), {len(whole)} bytes, and {len(whole) - 100} were found",
    ):
        load_data(path)
    path.write_bytes(pack(whole[:9]))
    with pytest.raises(UserError, match="truncated: its header takes 16 bytes, and 9 were found"):
        load_data(path)
    path.write_bytes(pack(whole + b"\0"))
    with pytest.raises(UserError, match=r"is too long: .* the file has more"):
        load_data(path)


def test_a_gzip_stream_cut_off_counts_what_came_out(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    content = gzip.compress(idx_bytes(PIXELS, 0x08))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"images\.gz' is truncated: .* 616 bytes, and \d+ were found"):
        load_data(path)


# --- image folders -----------------------------------------------------------------------------------


def save_image(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)


def test_colour_folders_come_back_in_the_layout_of_the_files(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (12, 4, 6, 3), dtype=np.uint8)
    for number, row in enumerate(pixels):
        save_image(tmp_path / f"{number:02}.png", row)
    (tmp_path / "README.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_bytes(b"not an image")
    data = load_data(tmp_path)
    assert (data.shape, data.data_shape, data.labels) == ((3, 4, 6), (4, 6, 3), None)
    assert data.quantum == 2 / 255
    assert np.array_equal(data.rows.transpose(0, 2, 3, 1), pixels)
    back = data.scaling.to_data(data.network_rows(slice(None)))
    assert np.abs(back.numpy() - pixels).max() < 8e-6


def test_grey_folders_have_one_channel_and_sub_folders_are_classes(tmp_path: Path) -> None:
    for number, (name, row) in enumerate(zip(["dog", "cat", "dog"], PIXELS, strict=False)):
        save_image(tmp_path / name / "deep" / f"{number}.png", row)
    data = load_data(tmp_path)
    assert (data.shape, data.data_shape) == ((1, 4, 5), (4, 5))
    assert np.array_equal(data.rows[:, 0], PIXELS[[1, 0, 2]])  # cat/1, dog/0, dog/2
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 1]
    assert (data.classes, data.label_names) == (2, ("cat", "dog"))


def test_one_colour_image_makes_all_colour_and_a_loose_image_no_classes(tmp_path: Path) -> None:
    save_image(tmp_path / "a" / "0.png", PIXELS[0])
    save_image(tmp_path / "b" / "1.png", PIXELS[1], "RGBA")
    save_image(tmp_path / "2.png", PIXELS[2], "P")
    data = load_data(tmp_path)
    assert data.shape == (3, 4, 5)
    assert data.classes == 0
    assert np.array_equal(data.rows, np.repeat(PIXELS[[2, 0, 1], None], 3, axis=1))


def test_a_single_sub_folder_is_no_class(tmp_path: Path) -> None:
    for number in range(3):
        save_image(tmp_path / "train" / f"{number}.png", PIXELS[number])
    assert load_data(tmp_path).labels is None


def test_folders_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no images \(\.bmp \.gif"):
        load_data(tmp_path)
    save_image(tmp_path / "a.png", PIXELS[0])
    with pytest.raises(UserError, match="holds 1 image, and at least 2"):
        load_data(tmp_path)
    save_image(tmp_path / "b.png", PIXELS[1][:, :4])
    with pytest.raises(UserError, match=r"a\.png' is 5 x 4 and '.*b\.png' is 4 x 4\. Resize or crop"):
        load_data(tmp_path)
    (tmp_path / "b.png").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"cannot read the image '.*b\.png': .*identify"):
        load_data(tmp_path)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) - 30])
    with pytest.raises(UserError, match=r"cannot read the image '.*b\.png'"):
        load_data(tmp_path)
    Image.fromarray(PIXELS[0].astype(np.uint16) * 256).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png' has more than 8 bits a pixel \(mode I"):
        load_data(tmp_path)


def test_labels_for_a_folder_replace_its_classes(tmp_path: Path) -> None:
    for number in range(4):
        save_image(tmp_path / f"class{number % 2}" / f"{number}.png", PIXELS[number])
    data = load_data({"path": tmp_path, "labels": [0, 1, 2, 3]})
    assert (data.classes, data.label_names) == (4, None)
