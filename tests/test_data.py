"""Units, split and fingerprint of a data set, and the built-in sets against their definitions."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.data import DATA, DataSet, Scaling, from_array, load_data
from fewstep.data import rules as rules_module
from fewstep.data.dataset import held_out_mask, splitmix64
from fewstep.errors import UserError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (40, 5, 6), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (40, 3, 5, 6), dtype=np.uint8)


# --- scaling -----------------------------------------------------------------------------------------


def test_scaling_is_the_affine_map_and_its_inverse_with_clipping_only_in_data_units() -> None:
    scaling = Scaling(shift=(1.0, -2.0), scale=(2.0, 0.5), clip=(-3.0, 3.0), shape=(2,))
    x = scaling.to_network(np.array([[3.0, -2.0], [9.0, 0.0]]))
    assert torch.equal(x, torch.tensor([[1.0, 0.0], [4.0, 4.0]]))
    assert x.dtype == torch.float32
    assert torch.equal(scaling.to_data(x), torch.tensor([[3.0, -2.0], [3.0, 0.0]]))


@pytest.mark.parametrize(
    ("scaling", "data_shape"),
    [
        (Scaling(shape=(1, 2, 3), layout="HW"), (2, 3)),
        (Scaling(shape=(3, 2, 5), layout="HWC"), (2, 5, 3)),
        (Scaling(shape=(3, 2, 5)), (3, 2, 5)),
        (Scaling(shape=(4,)), (4,)),
    ],
)
def test_layouts_round_trip_and_both_shapes_are_taken(scaling: Scaling, data_shape: tuple[int, ...]) -> None:
    rows = np.arange(7 * math.prod(data_shape)).reshape(7, *data_shape)
    x = scaling.to_network(rows)
    assert scaling.data_shape == data_shape
    assert tuple(x.shape[1:]) == scaling.shape
    assert np.array_equal(scaling.to_data(x).numpy(), rows)
    assert torch.equal(scaling.to_network(x), x)
    if scaling.layout == "HWC":
        assert x[3, 2, 1, 4] == rows[3, 1, 4, 2]


def test_square_colour_images_keep_their_file_layout() -> None:
    scaling = Scaling(shape=(3, 3, 3), layout="HWC")
    rows = np.arange(54.0).reshape(2, 3, 3, 3)
    assert np.array_equal(scaling.to_network(rows).numpy(), rows.transpose(0, 3, 1, 2))
    data = DataSet("a", np.ascontiguousarray(rows.transpose(0, 3, 1, 2)), scaling)
    assert np.array_equal(data.network_rows([0, 1]).numpy(), rows.transpose(0, 3, 1, 2))


def test_a_large_shift_costs_no_precision() -> None:
    rows = 1e9 + np.arange(10.0)[:, None]
    scaling = Scaling(1e9, 4.0, shape=(1,))
    assert np.array_equal(scaling.to_network(rows).numpy()[:, 0], np.arange(10) / 4)


def test_scaling_takes_any_float_tensor_and_gives_float32_on_the_cpu() -> None:
    scaling = Scaling(8.0, 8.0, (0.0, 16.0), (1, 2, 2), "HW")
    x = torch.full((3, 1, 2, 2), 0.5, dtype=torch.bfloat16, requires_grad=True)
    out = scaling.to_data(x)
    assert out.dtype == torch.float32
    assert not out.requires_grad
    assert torch.equal(out, torch.full((3, 2, 2), 12.0))
    assert torch.equal(scaling.to_network(out.bfloat16()), torch.full((3, 1, 2, 2), 0.5))
    assert torch.equal(Scaling().to_data(torch.ones(2, 3)), torch.ones(2, 3))


def test_long_inputs_are_converted_in_equal_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = Scaling(127.5, 127.5, (0, 255), (1, 5, 6), "HW")
    whole = scaling.to_network(GREY)
    monkeypatch.setattr("fewstep.data.scaling._MAX_CHUNK_VALUES", 7 * 30)
    assert torch.equal(scaling.to_network(GREY), whole)
    assert np.array_equal(scaling.to_data(whole).round().numpy(), GREY)


def test_scaling_survives_json() -> None:
    scaling = Scaling((0.1, 1 / 3), (2.0, 1e-7), (-1.0, 1.0), (2,))
    assert Scaling.from_dict(json.loads(json.dumps(scaling.as_dict()))) == scaling
    picture = Scaling(127.5, 127.5, (0, 255), (1, 2, 2), "HW")
    assert Scaling.from_dict(json.loads(json.dumps(picture.as_dict()))) == picture


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": 0}, "scale must be greater than 0, got 0"),
        ({"scale": [1.0, -1.0], "shape": [2]}, "scale must be greater than 0"),
        ({"shift": float("nan")}, "shift must be finite"),
        ({"shift": "a"}, "shift must be a number or a flat list"),
        ({"shift": [[1.0]]}, "shift must be a number or a flat list"),
        ({"clip": [1, 0]}, r"clip must be \[lowest, highest\]"),
        ({"clip": 3}, r"clip must be \[lowest, highest\]"),
        ({"shift": [0, 0, 0], "shape": [2]}, r"shift has 3 numbers, and the rows have shape \(2,\)"),
        ({"layout": "HW", "shape": [3, 2, 2]}, "layout HW has one channel"),
        ({"layout": "HWC", "shape": [3]}, r"layout HWC needs a shape \(C, H, W\)"),
        ({"layout": "CHW"}, "unknown layout of rows 'CHW'"),
        ({"shape": 5}, "shape must be a list of positive whole numbers, got 5"),
        ({"shape": "ab"}, "shape must be a list of positive whole numbers, got 'ab'"),
        ({"shape": [1.5]}, r"shape must be a list of positive whole numbers, got \[1\.5\]"),
        ({"shape": [2, None]}, r"shape must be a list of positive whole numbers, got \[2, None\]"),
        ({"shape": [2, -1]}, r"shape must be a list of positive whole numbers, got \[2, -1\]"),
        ({"shape": []}, r"shape must be a list of positive whole numbers, got \[\]"),
        ({"shfit": 1}, "unknown scaling key 'shfit': did you mean 'shift'"),
    ],
)
def test_wrong_scalings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Scaling.from_dict(fields)


def test_rows_of_another_shape_are_refused() -> None:
    scaling = Scaling(shape=(1, 2, 2), layout="HW")
    with pytest.raises(UserError, match=r"rows have shape \(3, 2\).* rows of shape \(2, 2\) \(inside the net"):
        scaling.to_network(np.zeros((5, 3, 2)))
    with pytest.raises(UserError, match=r"the rows have shape \(2, 2\), and the data has rows of shape \(1, 2, 2\)"):
        scaling.to_data(torch.zeros(5, 2, 2))
    with pytest.raises(UserError, match=r"rows have shape \(3,\).* rows of shape \(2,\)\."):
        Scaling(shape=(2,)).to_network(np.zeros((5, 3)))


# --- choice of the scaling --------------------------------------------------------------------------


def test_vectors_are_standardised_per_feature_and_constant_features_stay() -> None:
    rows = RNG.normal([5.0, -300.0, 0.1], [1e-3, 40.0, 0.0], (3000, 3))
    rows[:, 2] = 0.1
    data = from_array(rows)
    x = data.network_rows(np.arange(3000)).double()
    assert torch.allclose(x.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(x.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]).double(), atol=1e-6)
    assert np.allclose(data.scaling.to_data(x).numpy(), rows, rtol=1e-6)
    assert data.quantum is None
    assert data.scaling.clip is None


def test_the_statistics_do_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = RNG.normal(1e6, 1.0, (1000, 2))
    monkeypatch.setattr(rules_module, "_MAX_CHUNK_VALUES", 2 * 33)
    scaling = from_array(rows).scaling
    assert scaling.shift == pytest.approx(rows.mean(0), rel=1e-14)
    assert scaling.scale == pytest.approx(rows.std(0), rel=1e-9)


@pytest.mark.parametrize("rows", [GREY, COLOUR])
def test_uint8_images_map_to_minus_one_and_one(rows: np.ndarray) -> None:
    data = from_array(rows)
    assert data.scaling.as_dict() == {
        "shift": 127.5,
        "scale": 127.5,
        "clip": [0.0, 255.0],
        "shape": [rows.shape[1] if rows.ndim == 4 else 1, 5, 6],
        "layout": "same" if rows.ndim == 4 else "HW",
    }
    assert data.quantum == 2 / 255
    assert data.rows.dtype == np.uint8
    x = data.scaling.to_network(rows)
    assert np.allclose(x.numpy().reshape(rows.shape), rows / 127.5 - 1, atol=1e-7)
    back = data.scaling.to_data(x).numpy()
    assert back.shape == rows.shape
    assert np.abs(back - rows).max() < 8e-6
    assert data.scaling.to_data(torch.full((1, *data.shape), -9.0)).max() == 0
    values = np.unique(data.network_rows(np.arange(40)).numpy())
    assert np.allclose(np.diff(values) / data.quantum, np.rint(np.diff(values) / data.quantum), atol=1e-4)


def test_images_of_small_whole_numbers_span_minus_one_to_one() -> None:
    rows = RNG.integers(-2, 7, (50, 4, 4)).astype(np.float64)
    data = from_array(rows)
    assert data.scaling == Scaling(2.0, 4.0, (-2.0, 6.0), (1, 4, 4), "HW")
    assert data.quantum == 0.25
    assert np.array_equal(data.scaling.to_data(data.scaling.to_network(rows)).numpy(), rows)
    flags = from_array(RNG.integers(0, 2, (50, 4, 4)).astype(bool))
    assert flags.quantum == 2.0
    assert set(flags.train_rows().unique().tolist()) == {-1.0, 1.0}


def test_float_images_have_one_mean_and_std_one_half() -> None:
    rows = RNG.normal([[[3.0]], [[7.0]]], 2.0, (400, 2, 3, 3)).astype(np.float32)
    data = from_array(rows)
    x = data.network_rows(slice(None)).double()
    assert x.mean().item() == pytest.approx(0, abs=1e-6)
    assert x.std(correction=0).item() == pytest.approx(0.5, abs=1e-6)
    assert isinstance(data.scaling.scale, float)
    assert data.quantum is None
    assert x[:, 1].mean() > x[:, 0].mean() + 0.3  # channels keep their difference


def test_vectors_of_pixels_share_one_scale_and_have_a_quantum() -> None:
    rows = RNG.integers(0, 17, (2000, 8)).astype(np.float64)
    data = from_array(rows)
    scale = math.sqrt(rows.var(0).mean())
    assert data.scaling.scale == pytest.approx(scale)
    assert data.quantum == pytest.approx(1 / scale)
    x = data.network_rows(slice(None)).double()
    assert x.var(0, correction=0).mean().item() == pytest.approx(1, abs=1e-5)


def test_a_table_of_whole_numbers_is_standardised_per_column() -> None:
    rows = np.stack([RNG.integers(0, 2, 500), RNG.integers(0, 100, 500)], axis=1)
    data = from_array(rows)
    assert data.scaling.scale == pytest.approx(rows.std(0))
    assert data.quantum is None


@pytest.mark.parametrize(
    ("rows", "scale", "shift", "factor", "clip", "quantum"),
    [
        (GREY, "none", 0.0, 1.0, None, 1.0),
        (GREY, "standardise", GREY.mean(), 2 * GREY.std(), None, 0.5 / GREY.std()),
        (GREY, "range", 127.5, 127.5, (0, 255), 2 / 255),
        (np.array([[1.5, 10.0], [2.5, 30.0]]), "range", (2.0, 20.0), (0.5, 10.0), None, None),
        (np.array([[1.5], [2.5]]), "range", 2.0, 0.5, (1.5, 2.5), None),
        (np.array([[0, 4], [10, 0]]), "range", (5.0, 2.0), (5.0, 2.0), None, None),
        (np.array([[0, 6], [10, 0]]), "range", 5.0, 5.0, (0, 10), 0.2),
        (np.array([[0, 5], [10, 0]]), "standardise", (5.0, 2.5), (5.0, 2.5), None, None),
        (np.array([[0.25, 0.5], [1.0, 0.0]]), "none", 0.0, 1.0, None, None),
        (np.full((3, 2), 7.25), None, 7.25, 1.0, None, None),
    ],
)
def test_the_scale_key_chooses(
    rows: np.ndarray, scale: str | None, shift: Any, factor: Any, clip: Any, quantum: Any
) -> None:
    data = from_array(rows, scale=scale)
    assert data.scaling.shift == pytest.approx(shift)
    assert data.scaling.scale == pytest.approx(factor)
    assert data.scaling.clip == clip
    assert data.quantum == pytest.approx(quantum)


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(UserError, match="unknown data key 'scale' 'standardize': did you mean 'standardise'"):
        from_array(np.eye(3), scale="standardize")


def test_values_too_large_to_scale_are_refused() -> None:
    with pytest.raises(UserError, match=r"holds values up to 1e\+200, too large to scale"):
        from_array(np.array([[1e200], [-1e200]]))


# --- the data set ------------------------------------------------------------------------------------


def test_splitmix64_gives_its_published_first_outputs() -> None:
    assert splitmix64(np.array([0, 1234567])).tolist() == [0xE220A8397B1DCDAF, 6457827717110365317]


def test_the_held_out_rows_are_fixed() -> None:
    assert np.flatnonzero(held_out_mask(100)).tolist() == [10, 18, 21, 41, 48, 68, 82, 83]
    assert np.array_equal(held_out_mask(2000)[:100], held_out_mask(100))
    assert held_out_mask(100_000).mean() == pytest.approx(0.1, abs=0.003)
    assert all(1 <= held_out_mask(num).sum() < num for num in range(2, 40))


def test_train_and_held_out_partition_the_rows_whatever_the_seed() -> None:
    first, second = load_data("moons", seed=0), load_data("moons", seed=1)
    assert np.array_equal(first.held_out, second.held_out)
    assert np.array_equal(np.sort(np.concatenate([first.train, first.held_out])), np.arange(20_000))
    assert torch.equal(first.train_rows(), first.network_rows(first.train))
    assert len(first.held_out_rows()) == len(first.held_out)


def test_rows_and_labels_are_picked_by_any_kind_of_index() -> None:
    data = from_array(np.arange(10.0)[:, None], np.arange(10) % 3, scale="none")
    for index in ([4, 2], np.array([4, 2]), torch.tensor([4, 2])):
        assert data.network_rows(index).tolist() == [[4.0], [2.0]]
        labels = data.label_rows(index)
        assert labels is not None
        assert labels.dtype == torch.int64
        assert labels.tolist() == [1, 2]
    assert data.network_rows([]).shape == (0, 1)
    with pytest.raises(IndexError):
        data.network_rows([10])
    assert from_array(np.eye(3)).label_rows([0]) is None


def test_the_fingerprint_tells_content_dtype_shape_and_labels_apart() -> None:
    rows = RNG.normal(size=(20, 4)).astype(np.float32)
    labels = np.arange(20) % 2
    changed = rows.copy()
    changed[19, 3] = np.nextafter(changed[19, 3], 10)
    prints = [
        from_array(rows).fingerprint,
        from_array(changed).fingerprint,
        from_array(rows.astype(np.float64)).fingerprint,
        from_array(rows.reshape(20, 2, 2), layout="raw").fingerprint,
        from_array(rows[::-1]).fingerprint,
        from_array(rows, labels).fingerprint,
        from_array(rows, 1 - labels).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert from_array(np.asfortranarray(rows), scale="range", name="other").fingerprint == prints[0]
    assert from_array(rows.astype(">f4")).fingerprint == prints[0]


def test_the_fingerprint_of_fifty_megabytes_takes_less_than_a_second() -> None:
    data = from_array(np.zeros((1000, 1, 224, 224), np.uint8))
    start = time.process_time()
    assert len(data.fingerprint) == 64
    assert time.process_time() - start < 1


# --- built-in sets -----------------------------------------------------------------------------------


def test_the_registry_names_the_built_in_sets() -> None:
    assert list(DATA) == ["eight_gaussians", "moons", "checkerboard", "pinwheel", "digits"]


@pytest.mark.parametrize("name", [name for name in DATA if DATA[name].rows])
def test_2d_sets_are_fixed_standardised_and_of_the_requested_size(name: str) -> None:
    data = load_data(name)
    assert data.rows.shape == (20_000, 2)
    assert data.name == name
    assert data.data_shape == (2,)
    assert np.array_equal(data.rows, load_data({"name": name}).rows)
    assert not np.array_equal(data.rows, load_data(name, seed=1).rows)
    assert len(load_data({"name": name, "rows": 500.0})) == 500
    x = data.network_rows(slice(None)).double()
    assert torch.allclose(x.mean(0), torch.zeros(2).double(), atol=1e-6)
    assert torch.allclose(x.std(0, correction=0), torch.ones(2).double(), atol=1e-6)


def test_eight_gaussians_have_their_centres_weights_and_widths() -> None:
    data = load_data("eight_gaussians")
    assert data.labels is not None
    assert data.classes == 8
    for k in range(8):
        rows = data.rows[data.labels == k]
        centre = [4 * math.cos(k * math.pi / 4), 4 * math.sin(k * math.pi / 4)]
        assert len(rows) == pytest.approx(2500, abs=4 * 47)
        assert rows.mean(0) == pytest.approx(centre, abs=4 * 0.4 / 50)
        assert np.cov(rows.T) == pytest.approx(0.16 * np.eye(2), abs=0.02)


def test_moons_are_half_circles_with_noise() -> None:
    data = load_data("moons")
    assert data.labels is not None
    assert data.classes == 2
    for moon, (centre, sign) in enumerate([((0.0, 0.0), 1), ((1.0, 0.5), -1)]):
        rows = data.rows[data.labels == moon] - centre
        radius = np.linalg.norm(rows, axis=1)
        assert radius.mean() == pytest.approx(1 + 0.1**2 / 2, abs=4 * 0.1 / 100)
        assert radius.std() == pytest.approx(0.1, rel=0.05)
        assert rows.mean(0) == pytest.approx([0, sign * 2 / math.pi], abs=0.03)


def test_checkerboard_fills_its_eight_squares_evenly() -> None:
    data = load_data("checkerboard")
    assert data.labels is None
    assert data.classes == 0
    assert data.rows.min() >= -4
    assert data.rows.max() <= 4
    cell = np.floor(data.rows / 2).astype(int)
    assert (cell.sum(1) % 2 == 0).all()
    _, counts = np.unique(cell, axis=0, return_counts=True)
    assert len(counts) == 8
    assert counts == pytest.approx(np.full(8, 2500), abs=4 * 47)
    assert (data.rows / 2 - cell).mean(0) == pytest.approx([0.5, 0.5], abs=4 * 0.29 / 141)


def test_pinwheel_unrolls_to_a_gaussian_in_every_arm() -> None:
    data = load_data("pinwheel")
    assert data.labels is not None
    assert data.classes == 5
    x, y = (data.rows / 2).T
    # the arm's frame: turning by an angle that depends on the radial part; found by fixed-point iteration
    radial = np.hypot(x, y)
    for _ in range(60):
        angle = data.labels * (2 * math.pi / 5) + 0.25 * np.exp(radial)
        radial = 0.5 * radial + 0.5 * (x * np.cos(angle) + y * np.sin(angle))
    tangential = -x * np.sin(angle) + y * np.cos(angle)
    assert np.median(radial) == pytest.approx(1.0, abs=0.02)
    assert np.quantile(radial, 0.8413) == pytest.approx(1.3, abs=0.02)
    assert np.median(tangential) == pytest.approx(0.0, abs=0.01)
    assert np.quantile(tangential, 0.8413) == pytest.approx(0.1, abs=0.01)


def test_digits_are_eighths_between_minus_one_and_one() -> None:
    data = load_data("digits")
    assert (len(data), data.shape, data.data_shape, data.classes) == (1797, (1, 8, 8), (8, 8), 10)
    assert data.quantum == 1 / 8
    assert data.scaling == Scaling(8.0, 8.0, (0.0, 16.0), (1, 8, 8), "HW")
    from sklearn.datasets import load_digits

    images, target = load_digits(return_X_y=True)
    x = data.network_rows(slice(None))
    assert np.array_equal(x.numpy().reshape(1797, 64), images / 8 - 1)
    assert np.array_equal(data.scaling.to_data(x).numpy().reshape(1797, 64), images)
    assert data.labels is not None
    assert np.array_equal(data.labels, target)


def test_digits_take_another_scale() -> None:
    data = load_data({"name": "digits", "scale": "standardise"})
    assert data.network_rows(slice(None)).std(correction=0).item() == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("moon", "unknown data 'moon': did you mean 'moons'.* Or give the path of a .npy"),
        ("nothing/here.npy", "there is no file or folder 'nothing/here.npy'. Give a built-in name"),
        ({"name": "digitz"}, "unknown data 'digitz': did you mean 'digits'.* Or give 'path'"),
        ({"name": ["a"]}, "unknown data"),
        ({"pth": "a.npy"}, "unknown data key 'pth': did you mean 'path'"),
        ({}, "data needs a 'path', or a 'name' out of checkerboard, digits"),
        ({"name": "digits", "rows": 100}, "'digits' is a fixed set"),
        ({"name": "moons", "rows": 1}, "must be a whole number of at least 2, got 1"),
        ({"name": "moons", "rows": 10.5}, "must be a whole number of at least 2, got 10.5"),
        ({"name": "moons", "rows": True}, "must be a whole number"),
        ({"name": "moons", "labels": "y.npy"}, "the built-in 'moons' brings its own"),
        ({"path": "a.npy", "rows": 5}, "'rows' is for built-in data"),
        ({"path": 3}, "data key 'path' must be a path, got 3"),
        (3, "data must be a built-in name, a path or a mapping with 'path' or 'name', got 3"),
    ],
)
def test_wrong_specifications_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_data(spec)


# --- real data, if available ------------------------------------------------------------------------


def fashion_mnist() -> Path:
    """The folder in FEWSTEP_DATA, or a data folder beside the checkout."""
    beside = sorted(Path(__file__).resolve().parents[2].glob("*/data"))
    for root in (Path(os.environ["FEWSTEP_DATA"]),) if "FEWSTEP_DATA" in os.environ else beside:
        if (root / "fashion_mnist" / "t10k-images-idx3-ubyte.gz").is_file():
            return root / "fashion_mnist"
    pytest.skip("Fashion-MNIST is not here: set FEWSTEP_DATA to the folder that holds fashion_mnist/*.gz")


def test_fashion_mnist_is_read_as_published() -> None:
    folder = fashion_mnist()
    data = load_data({"path": folder / "t10k-images-idx3-ubyte.gz", "labels": folder / "t10k-labels-idx1-ubyte.gz"})
    assert (data.rows.shape, data.data_shape, data.classes) == ((10_000, 1, 28, 28), (28, 28), 10)
    assert data.labels is not None
    assert data.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert np.bincount(data.labels).tolist() == [1000] * 10
    x = data.network_rows(np.arange(256))
    assert x.min() == -1
    assert x.max() == 1
    assert np.abs(data.scaling.to_data(x).numpy() - data.rows[:256, 0]).max() < 8e-6


def test_the_former_key_samples_is_read_as_rows_with_a_message() -> None:
    with pytest.warns(FutureWarning, match="data key 'samples' is now called 'rows'"):
        assert len(load_data({"name": "moons", "samples": 100})) == 100
    with pytest.raises(UserError, match="unknown data key 'samples'"):
        load_data({"name": "moons", "samples": 100, "rows": 100})
