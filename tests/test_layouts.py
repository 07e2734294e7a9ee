"""What the axes of an array are taken for, the scaling of every layout, and networks on rows of any shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.data import Scaling, from_array, load_data
from fewstep.errors import UserError
from fewstep.networks import build, resolve

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 6, 5), dtype=np.uint8)


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        (PIXELS, (1, 6, 5)),
        (PIXELS.astype(np.int64), (1, 6, 5)),
        (PIXELS.astype(np.float32), (1, 6, 5)),  # whole numbers, whatever the dtype
        (PIXELS > 100, (1, 6, 5)),
        (RNG.random((5, 28, 28)), (1, 28, 28)),  # real numbers, but square
        (RNG.random((5, 8, 8)), (1, 8, 8)),
        (RNG.random((5, 3, 9, 4)), (3, 9, 4)),
        (RNG.random((5, 7)), (7,)),
    ],
)
def test_pictures_and_vectors_need_no_layout(rows: np.ndarray, shape: tuple[int, ...]) -> None:
    assert from_array(rows).shape == shape


@pytest.mark.parametrize("size", [(64, 16), (128, 3), (16, 17), (7, 7), (28, 20)])
def test_real_numbers_with_three_axes_are_not_guessed(size: tuple[int, int]) -> None:
    rows = RNG.random((4, *size))
    message = (
        rf"rows of {size[0]} x {size[1]} real numbers .* 'layout: sequence' for {size[0]} positions with {size[1]}"
    )
    with pytest.raises(UserError, match=message):
        from_array(rows)
    assert from_array(rows, layout="sequence").shape == size
    assert from_array(rows, layout="image").shape == (1, *size)
    assert from_array(rows, layout="raw").shape == size


def test_whole_numbers_with_a_large_range_are_not_pixels() -> None:
    with pytest.raises(UserError, match="layout: sequence"):
        from_array(RNG.integers(0, 300, (400, 6, 5)))
    with pytest.raises(UserError, match="layout: sequence"):
        from_array(np.full((4, 6, 5), np.nan))


@pytest.mark.parametrize(
    ("rows", "layout", "message"),
    [
        (np.zeros((4, 3)), "image", r"layout 'image' is for \(N, H, W\) or \(N, C, H, W\)\. Leave layout out"),
        (np.zeros((4, 3)), "sequence", r"layout 'sequence' is for \(N, T, D\)\. Leave layout out"),
        (np.zeros((4, 3, 2, 2)), "sequence", r"is for \(N, T, D\)\. layout 'raw' keeps any shape"),
        (np.zeros((4, 3, 2, 2, 2)), "image", "layout 'raw' keeps any shape"),
        (np.zeros((4, 3, 2, 2, 2)), None, "rows with 4 axes mean is not known. Say 'layout: raw'"),
        (np.zeros((4, 3, 2)), "sequnce", "unknown data key 'layout' 'sequnce': did you mean 'sequence'"),
        (np.zeros(4), "raw", r"use x\.reshape\(-1, 1\)"),
    ],
)
def test_wrong_layouts_are_refused(rows: np.ndarray, layout: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_array(rows, layout=layout)


def test_layout_is_a_data_key_and_folders_refuse_another(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", RNG.random((6, 16, 4)))
    data = load_data({"path": tmp_path / "a.npy", "layout": "sequence"})
    assert (data.shape, data.data_shape) == ((16, 4), (16, 4))
    with pytest.raises(UserError, match="is a folder of images, not 'sequence'"):
        load_data({"path": tmp_path, "layout": "sequence"})
    with pytest.raises(UserError, match="'layout' goes with a 'path'; the built-in 'moons'"):
        load_data({"name": "moons", "layout": "raw"})


# --- scaling -----------------------------------------------------------------------------------------


def test_sequences_have_one_scale_per_feature_at_all_positions() -> None:
    rows = RNG.normal([3.0, -50.0, 0.5], [1e-2, 20.0, 0.0], (500, 7, 3)) + np.arange(7)[:, None] * [1, 0, 0]
    rows[:, :, 2] = 0.5
    data = from_array(rows, layout="sequence")
    assert data.scaling.shift == pytest.approx(rows.mean((0, 1)))
    assert data.scaling.scale == pytest.approx([*rows.std((0, 1))[:2], 1.0])
    x = data.network_rows(slice(None)).double()
    assert x[:, 6, 0].mean() > x[:, 0, 0].mean() + 1  # positions keep their difference
    assert np.allclose(data.scaling.to_data(x).numpy(), rows, rtol=1e-5)
    assert np.allclose(x.numpy(), (rows - rows.mean((0, 1))) / data.scaling.scale, atol=1e-5)
    assert Scaling.from_dict(json.loads(json.dumps(data.scaling.as_dict()))) == data.scaling
    ranged = from_array(rows, layout="sequence", scale="range").network_rows(slice(None))
    assert torch.allclose(ranged[..., :2].amax((0, 1)), torch.ones(2))
    assert torch.allclose(ranged[..., :2].amin((0, 1)), -torch.ones(2))


def test_raw_rows_have_one_mean_and_std_one() -> None:
    rows = RNG.normal(4.0, 3.0, (60, 2, 3, 4, 5)).astype(np.float32)
    data = from_array(rows, layout="raw")
    x = data.network_rows(slice(None)).double()
    assert x.mean().item() == pytest.approx(0, abs=1e-6)
    assert x.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert isinstance(data.scaling.scale, float)
    assert data.shape == data.data_shape == (2, 3, 4, 5)
    video = from_array(RNG.integers(0, 256, (4, 3, 2, 6, 6), dtype=np.uint8), layout="raw")
    assert (video.scaling.shift, video.scaling.clip, video.quantum) == (127.5, (0.0, 255.0), 2 / 255)
    vectors = RNG.normal(size=(50, 3))
    assert from_array(vectors, layout="raw").scaling == from_array(vectors).scaling


@pytest.mark.parametrize("count", [3, 6])
def test_a_scale_has_one_number_per_entry_or_per_last_axis(count: int) -> None:
    scaling = Scaling(tuple(range(count)), tuple(range(1, count + 1)), shape=(2, 3))
    rows = RNG.normal(size=(4, 2, 3))
    shift = np.arange(count).reshape(-1, 3)
    assert np.allclose(scaling.to_network(rows).numpy(), (rows - shift) / (shift + 1), atol=1e-6)
    assert np.allclose(scaling.to_data(scaling.to_network(rows)).numpy(), rows, atol=1e-6)
    with pytest.raises(UserError, match="shift has 2 numbers"):
        Scaling((1.0, 2.0), shape=(2, 3))


# --- networks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 4), (2, 3, 4, 5), (5,), (1, 8, 8), (3, 2, 2, 2, 2)])
def test_the_mlp_takes_rows_of_any_shape_with_a_context(shape: tuple[int, ...]) -> None:
    net: Any = build(resolve({"name": "mlp", "preset": "tiny"}, shape, classes=2, context=2))
    torch.nn.init.normal_(net.output.weight, generator=torch.Generator().manual_seed(0))
    x, t = torch.randn(3, *shape), torch.rand(3)
    context = torch.randn(3, 2, *shape[1:])
    with torch.no_grad():
        one, other = net(x, t, context=context), net(x, t, context=context + 1)
    assert one.shape == x.shape
    assert not torch.allclose(one, other)
    assert resolve({}, shape)["name"] == "mlp"
