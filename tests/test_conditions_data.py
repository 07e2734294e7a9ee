"""Conditions and masks of files and arrays: read when named, refused when not, and padding that never counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.data import from_array, load_data
from fewstep.errors import UserError

RNG = np.random.default_rng(2)
N, T, D = 40, 6, 3
SEQUENCES = RNG.normal([5.0, -2.0, 0.0], [2.0, 0.1, 7.0], (N, T, D))
LENGTHS = 1 + np.arange(N) % T
MASK = (np.arange(T) < LENGTHS[:, None]).astype(np.uint8)
OBS = RNG.normal(size=(N, 4))
TEXT = RNG.normal(size=(N, 5, 2)).astype(np.float16)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    np.savez(tmp_path / "a.npz", x=SEQUENCES, y=np.arange(N) % 3, obs=OBS, mask=MASK, text=TEXT)
    return tmp_path / "a.npz"


def test_named_arrays_of_an_archive_are_conditions(archive: Path) -> None:
    data = load_data({"path": archive, "conditions": ["obs", "mask", "text"], "mask": "mask", "layout": "sequence"})
    assert data.condition_names == ("label", "obs", "mask", "text")
    assert data.mask == "mask"
    rows = [7, 3]
    found = data.cond_rows(rows, data.condition_names)
    assert {name: value.dtype for name, value in found.items()} == {
        "label": torch.int64, "obs": torch.float32, "mask": torch.int64, "text": torch.float32,
    }  # fmt: skip
    assert np.allclose(found["obs"], OBS[rows])
    assert np.array_equal(found["mask"], MASK[rows])
    assert np.array_equal(found["text"], TEXT[rows].astype(np.float32))


@pytest.mark.parametrize(
    ("named", "missing"), [(None, "'obs', 'mask', 'text'"), ([], "'obs', 'mask', 'text'"), (["mask"], "'obs', 'text'")]
)
def test_further_arrays_are_never_dropped(archive: Path, named: list[str] | None, missing: str) -> None:
    fix = ", ".join([*(named or []), *missing.replace("'", "").split(", ")])
    message = rf"also holds {missing}, and training would not see it: name it with 'conditions: \[{fix}\]'.*or save"
    with pytest.raises(UserError, match=message):
        load_data({"path": archive, "conditions": named, "layout": "sequence"})


def test_a_file_of_labels_may_hold_rows_too(archive: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", OBS)
    assert load_data({"path": tmp_path / "x.npy", "labels": archive}).classes == 3


def test_conditions_come_from_files_of_their_own_and_large_ones_are_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", SEQUENCES)
    np.save(tmp_path / "o.npy", OBS)
    spec = {"path": tmp_path / "x.npy", "conditions": {"obs": str(tmp_path / "o.npy")}, "layout": "sequence"}
    small = load_data(spec)
    monkeypatch.setattr("fewstep.data.arrays.MIN_MAPPED_BYTES", 1)
    mapped = load_data(spec)
    assert isinstance(mapped.conditions["obs"], np.memmap)
    assert mapped.fingerprint == small.fingerprint
    assert torch.equal(mapped.cond_rows([3], ["obs"])["obs"], small.cond_rows([3], ["obs"])["obs"])
    assert small.fingerprint != from_array(SEQUENCES, layout="sequence").fingerprint


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"conditions": ["obz", "mask", "text"]}, "unknown array of .*a.npz': 'obz': did you mean 'obs'"),
        ({"conditions": ["label"]}, "'label' is the class label: give it as 'labels'"),
        ({"conditions": ["t"]}, r"'t' has the name of the time in v\(x, t, r, ...\)"),
        ({"conditions": ["my obs"]}, "'my obs' cannot be the name of a network's argument"),
        ({"conditions": ["obs", "obs"]}, "'obs' is named twice"),
        (
            {"conditions": ["obs", "mask", "text"], "mask": "msk"},
            "unknown condition 'msk': did you mean 'mask'.*The mask is one of the conditions",
        ),
        (
            {"conditions": ["obs", "mask", "text"], "mask": "obs"},
            r"the mask 'obs' .* has shape \(40, 4\), and the rows",
        ),
    ],
)
def test_wrong_keys_are_refused(archive: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_data({"path": archive, "layout": "sequence", **keys})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (OBS[:39], r"condition 'obs' of the data 'array' has shape \(39, 4\), and the data 'array' has 40 rows"),
        (np.where(OBS > 1.5, np.nan, OBS), r"condition 'obs' of the data 'array' holds \d+ value\(s\) that are NaN"),
        (np.array(["a"] * N), "condition 'obs' of the data 'array' has dtype <U1"),
        (OBS * 1j, "is complex"),
        ([[1], [2, 3]], "a list cannot be read as one array of numbers"),
    ],
)
def test_conditions_that_no_network_can_take_are_refused(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_array(RNG.normal(size=(N, 2)), conditions={"obs": values})


def test_a_list_names_nothing_in_a_file_of_one_array(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", OBS)
    with pytest.raises(UserError, match=r"there is no file 'nowhere\.npy' for 'obs'"):
        load_data({"path": tmp_path / "x.npy", "conditions": {"obs": "nowhere.npy"}})
    with pytest.raises(UserError, match="'mask' must be the name of a condition, got a ndarray"):
        from_array(OBS, mask=np.ones(N))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"holds none beside the rows.*'conditions: \{obs: obs.npy\}'"):
        load_data({"path": tmp_path / "x.npy", "conditions": ["obs"]})
    for key, value in {"conditions": ["obs"], "mask": "mask"}.items():
        with pytest.raises(UserError, match=f"'{key}' goes with a 'path'; the built-in 'moons'"):
            load_data({"name": "moons", key: value})


# --- masks -------------------------------------------------------------------------------------------


def padded(junk: float) -> np.ndarray:
    return np.where(MASK[..., None] == 1, SEQUENCES, junk)


@pytest.mark.parametrize("junk", [0.0, np.nan, np.inf, -1e300, 12345.0])
@pytest.mark.parametrize("scale", [None, "standardise", "range", "none"])
def test_padding_counts_nowhere(junk: float, scale: str | None) -> None:
    """The scaling is that of the valid entries alone, computed plainly, and padding is zero in network units."""
    data = from_array(padded(junk), conditions={"mask": MASK}, mask="mask", layout="sequence", scale=scale)
    valid = SEQUENCES[MASK == 1]  # (entries, D)
    shift, factor = {
        "none": (np.zeros(D), np.ones(D)),
        "range": ((valid.max(0) + valid.min(0)) / 2, (valid.max(0) - valid.min(0)) / 2),
    }.get(scale or "", (valid.mean(0), valid.std(0)))
    assert np.broadcast_to(data.scaling.shift, (D,)) == pytest.approx(shift)
    assert np.broadcast_to(data.scaling.scale, (D,)) == pytest.approx(factor)
    x = data.network_rows(slice(None)).numpy()
    assert (x[MASK == 0] == 0).all()
    assert np.allclose(x[MASK == 1], (valid - shift) / factor, atol=1e-5)
    assert data.quantum is None


def test_the_statistics_do_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaling() -> Any:
        return from_array(padded(np.nan), conditions={"m": MASK}, mask="m", layout="sequence").scaling

    whole = scaling()
    monkeypatch.setattr("fewstep.data.rules._MAX_CHUNK_VALUES", 7 * T * D)
    pieces = scaling()
    assert pieces.shift == pytest.approx(whole.shift, rel=1e-12)
    assert pieces.scale == pytest.approx(whole.scale, rel=1e-12)


def test_masks_of_all_shapes() -> None:
    whole = np.ones(N, bool)
    data = from_array(SEQUENCES, conditions={"m": whole}, mask="m", layout="sequence")
    assert data.scaling.scale == pytest.approx(from_array(SEQUENCES, layout="sequence").scaling.scale)
    entries = RNG.random((N, T, D)) < 0.7
    entries[:, 0, 0] = True
    rows = np.where(entries, SEQUENCES, np.nan)
    data = from_array(rows, conditions={"m": entries}, mask="m", layout="sequence")
    assert data.scaling.shift == pytest.approx([rows[..., d][entries[..., d]].mean() for d in range(D)])
    assert (data.network_rows(slice(None)).numpy()[~entries] == 0).all()
    # vectors, a feature of which is never valid
    flags = np.ones((N, 4), bool)
    flags[:, 2] = False
    data = from_array(np.where(flags, OBS, np.nan), conditions={"m": flags}, mask="m")
    assert data.network_rows(slice(None))[:, 2].abs().max() == 0
    assert np.asarray(data.scaling.scale)[[0, 1, 3]] == pytest.approx(OBS.std(0)[[0, 1, 3]])


def test_a_mask_of_pictures_is_arranged_as_they_are() -> None:
    pixels = RNG.integers(0, 200, (N, 5, 6)).astype(np.float32)
    inside = RNG.random((N, 5, 6)) < 0.8
    inside[:, 0, 0] = True
    data = from_array(np.where(inside, pixels, np.nan), conditions={"m": inside}, mask="m", layout="image")
    assert data.scaling.clip == (pixels[inside].min(), pixels[inside].max())
    x = data.network_rows(slice(None))
    flags = data.cond_rows(slice(None), ["m"])["m"]
    assert x.shape == flags.shape == (N, 1, 5, 6)
    assert (x[~flags] == 0).all()
    assert np.allclose(data.scaling.to_data(x).numpy()[inside], pixels[inside], atol=1e-4)


@pytest.mark.parametrize("junk", [np.nan, np.inf])
def test_valid_entries_must_be_finite(junk: float) -> None:
    rows = padded(np.nan)
    rows[17, 0, 1] = junk
    message = (
        rf"holds 1 value\(s\) that are NaN or infinite in entries that the mask marks as valid; the first is {junk}"
    )
    with pytest.raises(UserError, match=message + r" at index \[17, 0, 1\]"):
        from_array(rows, conditions={"mask": MASK}, mask="mask", layout="sequence")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((11, 0), "is 0 everywhere in row 11"),
        ((9, 2), "holds 2 in row 9. Values must be 1 for valid entries and 0"),
    ],
)
def test_masks_that_are_none_are_refused(
    change: tuple[int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = MASK.copy()
    mask[change[0]] = change[1]
    for values in (1 << 22, 4 * T):  # also where the row lies in a later piece
        monkeypatch.setattr(
            "fewstep.data.condition_arrays.row_chunks", lambda rows, n=values: range(0, N, max(1, n // T))
        )
        with pytest.raises(UserError, match=message):
            from_array(SEQUENCES, conditions={"mask": mask}, mask="mask", layout="sequence")


def test_the_fingerprint_covers_conditions_and_the_mask() -> None:
    def fingerprint(called: str | None = None, **conditions: Any) -> str:
        return from_array(SEQUENCES, conditions=conditions, mask=called, layout="sequence").fingerprint

    changed = OBS.copy()
    changed[39, 3] += 1e-9
    prints = [fingerprint(), fingerprint(obs=OBS), fingerprint(obs=changed), fingerprint(other=OBS)]
    prints += [fingerprint(mask=MASK), fingerprint("m", m=MASK), fingerprint(m=MASK)]
    assert len(set(prints)) == len(prints)
