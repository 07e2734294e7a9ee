"""fs.compare with networks, conditions, masks, large data and metrics of the user's own, against known truths."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from conftest import cheapen_comparisons
from fewstep.data.dataset import DataSet
from fewstep.data.load import from_array
from fewstep.data.sources import as_data
from fewstep.errors import UserError
from fewstep.flow.noise import integer_rows
from fewstep.generator import Config, Generator
from fewstep.generator.conditions import ROW_DRAW
from fewstep.networks.adapter import Adapter
from fewstep.networks.foreign import trainable_copy
from fewstep.pipeline.compare import GAUSSIAN, TRAINING
from fewstep.pipeline.compare_rows import MAX_ROWS, ReferenceRows, spaced
from fewstep.pipeline.compare_table import measured

SPREAD = 2.0  # of the condition: c ~ N(0, SPREAD^2), and x | c ~ N(c, 1)


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons diagnose on a coarse grid and time once."""
    cheapen_comparisons(monkeypatch)


def gaussian_flow(x: Tensor, t: Tensor, mean: Tensor, variance: float) -> Tensor:
    """E[x1 - x0 | x_t = x] of x0 ~ N(0, 1), x1 ~ N(mean, variance), independent."""
    s = t[:, None]
    return mean + (s * variance - (1 - s)) / (s**2 * variance + (1 - s) ** 2) * (x - s * mean)


class Knows(nn.Module):
    """The exact flow to x | c ~ N(c, 1)."""

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return gaussian_flow(x, t, c, 1.0)


class Ignores(nn.Module):
    """The exact flow to the marginal x ~ N(0, 1 + SPREAD^2), which is given c and does not look at it."""

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return gaussian_flow(x, t, torch.zeros_like(x), 1.0 + SPREAD**2)


class Unaware(nn.Module):
    """The same, without a condition."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return gaussian_flow(x, t, torch.zeros_like(x), 1.0 + SPREAD**2)


class Still(nn.Module):
    """A velocity of zero: its samples are the noise."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0 * x


def conditional_data(num: int = 2200) -> DataSet:
    random = np.random.default_rng(0)
    c = random.normal(size=(num, 2)) * SPREAD
    rows = c + random.normal(size=(num, 2))
    return as_data({"x": rows, "c": c}, conditions=["c"], scale="none", name="pairs")


def distance(x: Tensor, c: Tensor) -> Tensor:
    return (x - c)[:, 0].abs()


MEAN = math.sqrt(2 / math.pi)  # E|N(0, 1)|
IGNORED = math.sqrt(1 + 2 * SPREAD**2) * MEAN  # E|x - c| of independent x and c


def test_a_metric_tells_a_model_that_ignores_its_condition_from_one_with_the_same_energy() -> None:
    models = [Knows(), Ignores(), Unaware()]
    found = fs.compare(models, conditional_data(), steps=[60], samples=1500, metrics={"off": distance}, say=None)
    assert found.result["protocol"]["conditions"] == {"Knows": ["c"], "Ignores": ["c"]}
    scores = {row["model"]: row["scores"] for row in found.rows}
    for name in ("Knows", "Ignores", "Unaware"):
        assert abs(scores[name]["energy"] - scores[name]["energy_floor"]) < 3 * scores[name]["energy_floor_sd"]
    wanted = {"Knows": MEAN, TRAINING: MEAN, "Ignores": IGNORED, "Unaware": IGNORED, GAUSSIAN: IGNORED}
    for name, value in wanted.items():
        error = scores[name]["off_error"]
        assert scores[name]["off"] == pytest.approx(value, abs=4 * error), name
        assert 0 < error < 0.06, name


def test_conditions_are_training_rows_drawn_for_the_seed_and_errors_are_of_the_mean() -> None:
    """What a metric is called with is what the same draw by hand gives, for every model, step count and control."""
    data, calls = conditional_data(300), []

    def watch(x: Tensor, *, c: Tensor) -> Tensor:
        calls.append((x, c))
        return x[:, 1] * c[:, 1]

    found = fs.compare([Knows(), Unaware()], data, steps=[1, 3], samples=100, seed=7, metrics={"w": watch}, say=None)
    rows = data.train[integer_rows(100, len(data.train), seed=7, draw=ROW_DRAW).numpy()]
    c = torch.as_tensor(np.asarray(data.conditions["c"][rows]), dtype=torch.float32)
    gaussian, training, *models = calls
    assert all(torch.equal(given, c) for _, given in (gaussian, *models))
    assert len(models) == 4
    control = {row.tobytes() for row in np.asarray(data.rows).astype(np.float32)}
    assert all(row.tobytes() in control for row in training[0].numpy())
    assert float((training[0] - training[1]).square().mean()) == pytest.approx(1.0, abs=0.3)  # its own conditions
    x = Generator(Knows(), shape=(2,)).draw(100, steps=3, seed=7, cond={"c": c}).x
    assert torch.equal(models[1][0], x)
    for row, (x, given) in zip(found.rows, [*models, gaussian, training], strict=True):
        values = (x[:, 1] * given[:, 1]).double().numpy()
        assert row["scores"]["w"] == pytest.approx(values.mean())
        assert row["scores"]["w_error"] == pytest.approx(values.std(ddof=1) / math.sqrt(100))


def test_timing_and_diagnosis_have_the_same_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.pipeline import compare as module

    data, seen, diagnosed = conditional_data(400), [], []

    class Watched(nn.Module):
        def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            seen.append(c)
            return gaussian_flow(x, t, c, 1.0)

    real = module.diagnose
    monkeypatch.setattr(module, "diagnose", lambda v, x0, cond: diagnosed.append(cond) or real(v, x0, cond=cond))
    fs.compare(Watched(), data, steps=[1], samples=40, seed=3, say=None)
    rows = data.train[integer_rows(256, len(data.train), seed=3, draw=ROW_DRAW).numpy()]
    c = torch.as_tensor(np.asarray(data.conditions["c"][rows]), dtype=torch.float32)
    assert {len(given) for given in seen} >= {40, 64, 256}  # scored, timed, and the draw of the diagnosis
    assert all(torch.equal(given, c[: len(given)]) for given in seen if len(given) in (40, 64, 256))
    assert torch.equal(diagnosed[0]["c"], c)


def test_a_condition_that_the_data_does_not_have_is_refused_with_the_names() -> None:
    with pytest.raises(UserError, match=r"'Knows' takes 'c', and the data 'plain' has no conditions"):
        fs.compare(Knows(), from_array(np.random.default_rng(0).normal(size=(50, 2)), name="plain"), say=None)
    trained = Generator(Knows(), config=Config(shape=(2,), conditions={"obs": (2,)}, method="flow_matching"))
    with pytest.raises(UserError, match=r"'Knows' takes 'obs', and the data 'pairs' has the conditions c"):
        fs.compare(trained, conditional_data(50), say=None)


def labelled_data() -> DataSet:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 300)
    rows = np.stack([labels * 2.0 - 2, labels * 1.0], 1) + random.normal(size=(300, 2)) * 0.3
    return from_array(rows, labels=labels)


class Pull(nn.Module):
    """A field towards a point of the class."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        centre = torch.stack([label.float() * 2 - 2, label.float()], 1)
        return (centre - x) * 0.9 + 0.1 * t[:, None]


def test_models_with_labels_alone_score_as_before() -> None:
    """Numbers of the version that gave no model conditions from rows, on the same data and seed."""
    data = labelled_data()
    config = Config(shape=(2,), class_weights=(0.3, 0.3, 0.4), scaling=data.scaling.as_dict(), stage="pull")
    found = fs.compare([Generator(Pull(), config=config)], data, steps=(1, 3), samples=90, seed=5, say=None)
    wanted = [
        ("pull", 0.6718745858110431, 0.7831141843605337, 0.18888888888888888, 0.003663003663003663),
        ("pull", 0.3717724490652987, 0.5965176790119466, 0.6555555555555556, 0.7142857142857143),
        (GAUSSIAN, 0.05189265451367153, 0.28657339747062704, 0.8555555555555555, 0.9816849816849816),
        (TRAINING, 0.018120340552860492, 0.2000267821014412, 1.0, 0.9926739926739927),
    ]
    for row, (name, *values) in zip(found.rows, wanted, strict=True):
        keys = ("energy", "sliced_w2", "precision", "recall")
        assert (row["model"], *(row["scores"][key] for key in keys)) == (name, *map(pytest.approx, values))
    assert found.result["protocol"]["conditions"] == {}
    assert found.result["protocol"]["reference"] == "array, training split of 273 rows"


def test_metrics_of_a_model_with_labels_alone_get_the_labels_that_it_drew() -> None:
    data, seen = labelled_data(), []
    config = Config(shape=(2,), class_weights=(0.0, 0.0, 1.0), scaling=data.scaling.as_dict(), stage="pull")
    last = Generator(Pull(), config=config)
    metrics = {"share": lambda x, label: seen.append(label) or (label == 2).float()}
    found = fs.compare(last, data, steps=[1], samples=60, metrics=metrics, say=None)
    share = {row["model"]: row["scores"]["share"] for row in found.rows}
    assert share["pull"] == 1.0
    assert share[TRAINING] < 0.6
    assert all(label.dtype == torch.int64 and label.shape == (60,) for label in seen)


def test_labels_of_rows_reach_a_model_by_the_names_of_the_data() -> None:
    """Classes 3 and 7 of a model that also takes another condition: a model knows them by name, a network by number."""
    random = np.random.default_rng(0)
    labels = random.choice([3, 7], 200)
    data = as_data(
        {"x": random.normal(size=(200, 2)), "y": labels, "c": random.normal(size=(200, 2))},
        conditions=["c"], scale="none",
    )  # fmt: skip

    class Both(nn.Module):
        def forward(self, x: Tensor, t: Tensor, label: Tensor, c: Tensor) -> Tensor:
            return (10.0 * label[:, None] + c) - x

    config = Config(shape=(2,), conditions={"c": (2,)}, class_weights=(0.5, 0.5), label_names=(3, 7), stage="named")
    off = {"off": lambda x, label, c: (x - 10.0 * label[:, None] - c).abs().amax(1)}
    found = fs.compare([Generator(Both(), config=config), Both()], data, steps=[1], samples=50, metrics=off, say=None)
    assert found.result["protocol"]["conditions"] == {"named": ["label", "c"], "Both": ["label", "c"]}
    assert [row["scores"]["off"] < 1e-5 for row in found.rows] == [True, True, False, False]


def padded(junk: float, scale: str | None) -> DataSet:
    """Sequences of 2 to 6 steps with an observation; ``junk`` stands in their padding."""
    random = np.random.default_rng(0)
    mask = np.arange(6)[None] < random.integers(2, 7, 400)[:, None]
    obs = random.normal(size=(400, 3)).astype("f4")
    x = (random.normal(size=(400, 6, 2)) + obs[:, None, :2]).astype("f4")
    x[~mask] = junk
    named = {"x": x, "obs": obs, "mask": mask}
    return as_data(named, conditions=["obs", "mask"], mask="mask", layout="sequence", scale=scale)


class Policy(nn.Module):
    """Moves every step to the observation, and pads with 5 whatever it is given there."""

    def forward(self, x: Tensor, t: Tensor, obs: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask[:, :, None], obs[:, None, :2] - 0.1 * x, 5.0)


@pytest.mark.parametrize("scale", ["none", "standardise"])
def test_junk_in_padding_changes_no_score(scale: str) -> None:
    """Neither junk in the file nor junk that a network without a mask writes there."""
    metrics = {"mean": lambda x: x.mean((1, 2)), "length": lambda x, mask: mask.float().sum(1)}
    scores = []
    for junk in (0.0, 1e6):
        data = padded(junk, scale)
        unmasked = Generator(Policy(), config=Config(shape=(6, 2), scaling=data.scaling.as_dict(), stage="unmasked"))
        masked = Adapter(Policy(), lambda m, x, t, obs, mask: m(x, t, obs, mask), mask="mask")
        found = fs.compare([unmasked, masked], data, steps=[1, 2], samples=120, metrics=metrics, say=None)
        assert all(math.isfinite(d["straightness"]) for d in found.result["diagnosis"].values())
        scores.append([row["scores"] for row in found.rows])
    assert scores[0] == scores[1]
    for k in (0, 1):  # padding alone tells the two networks apart, and it does not count
        assert scores[0][k] == scores[0][k + 2]
    lengths = padded(0.0, scale).conditions["mask"][:].sum(1)
    assert scores[0][0]["length"] == pytest.approx(lengths.mean(), abs=4 * scores[0][0]["length_error"])


def test_samples_in_other_units_have_the_same_padding() -> None:
    """Zero in a model's network units is not zero in the data's, where the scalings differ."""
    data, seen = padded(0.0, "standardise"), []
    own = {"shift": 3.0, "scale": 2.0, "shape": [6, 2]}
    masked = Adapter(Policy(), lambda m, x, t, obs, mask: m(x, t, obs, mask), mask="mask")
    model = Generator(masked, config=Config(shape=(6, 2), scaling=own, network=masked.describe()))
    metrics = {"m": lambda x, mask: seen.append(x[~mask]) or 0.0}
    fs.compare(model, data, steps=[1], samples=50, metrics=metrics, say=None)
    zero = data.scaling.to_data(torch.zeros(1, 6, 2))[0, 0]
    assert len(seen) == 3
    assert all(len(padding) and torch.equal(padding, zero.expand_as(padding)) for padding in seen)


class Counting:
    """A row source that counts the rows it was asked for; row i is a function of i."""

    def __init__(self, num: int) -> None:
        self.shape, self.dtype, self.asked, self.most = (num, 2), np.dtype(np.float32), 0, 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        rows = np.arange(len(self))[index]
        self.asked, self.most = self.asked + rows.size, max(self.most, rows.size)
        angle = 2.4 * rows.astype(np.float64)
        return np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)


def test_no_more_rows_of_large_data_are_read_than_stated() -> None:
    source = Counting(200_000)
    data = as_data(source, scale="none", name="large")
    opened = source.asked
    found = fs.compare(Still(), data, steps=[1], samples=100, max_rows=500, say=None)
    assert source.asked - opened <= 2 * 500 + 1024 + 1  # both splits, and what is looked at for a value that differs
    about = found.result["protocol"]["reference"]
    assert about == f"large, 500 of the {len(data.train)} rows of the training split, evenly spaced"
    assert found.result["protocol"]["held_out"] == found.result["protocol"]["max_rows"] == 500
    assert found.result["data"]["fingerprint"] is None
    whole = ReferenceRows.read(data, 500)
    assert whole.index[0] == data.train[0]
    assert whole.index[-1] == data.train[-1]
    assert np.ptp(np.diff(np.searchsorted(data.train, whole.index))) <= 1
    assert torch.equal(whole.train, data.network_rows(whole.index))
    assert source.asked > opened


def test_rows_of_the_reference_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.pipeline import compare_rows as module

    source = Counting(30_000)
    data = as_data(source, scale="none")
    real = module.row_chunks
    monkeypatch.setattr(module, "row_chunks", lambda rows: real(rows, 64))
    source.most = 0
    rows = ReferenceRows.read(data, 500)
    assert source.most == 32
    assert torch.equal(rows.train, data.network_rows(rows.index))
    assert torch.equal(rows.held_out, data.network_rows(spaced(data.held_out, 500)))


def test_conditions_beyond_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.pipeline import compare_rows as module

    data = conditional_data(100)
    monkeypatch.setattr(module, "memory", lambda: 256 * 2 * 4)
    fs.compare(Knows(), data, steps=[1], samples=20, say=None)
    monkeypatch.setattr(module, "memory", lambda: 256 * 2 * 4 - 1)
    with pytest.raises(UserError, match="the conditions c of 256 samples take 0 GiB"):
        fs.compare(Knows(), data, steps=[1], samples=20, say=None)
    fs.compare(Unaware(), data, steps=[1], samples=20, say=None)  # it takes none: none are read


def test_parameters_of_a_role_count_its_base() -> None:
    pytest.importorskip("peft")

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.layer(torch.cat([x, t[:, None]], 1))

    base = fs.lora(Linear(), rank=1)
    made = trainable_copy(base)
    found = fs.compare([base, made], conditional_data(100), steps=[1], samples=20, say=None)
    parameters = {row["model"]: row.get("parameters") for row in found.rows}
    layer = 3 * 2 + 2
    assert parameters == {"Linear": layer, "Linear (2)": layer + 3 + 2, GAUSSIAN: None, TRAINING: None}


def test_data_of_up_to_the_stated_number_of_rows_are_read_whole() -> None:
    data = conditional_data(300)
    rows = ReferenceRows.read(data, len(data.train))
    assert rows.whole
    assert torch.equal(rows.train, data.train_rows())
    assert torch.equal(rows.held_out, data.held_out_rows())
    result = fs.compare(Unaware(), data, steps=[1], samples=50, max_rows=len(data.train), say=None)
    assert result.rows[0]["scores"]["n_reference"] == len(data.train)
    assert result.result["data"]["fingerprint"] == data.fingerprint
    assert spaced(np.arange(10), 10).tolist() == list(range(10))
    assert not ReferenceRows.read(data, len(data.train) - 1).whole
    with pytest.raises(UserError, match="max_rows must be a whole number of at least 6"):
        fs.compare(Unaware(), data, max_rows=5, say=None)
    assert MAX_ROWS == 20_000


def test_metrics_may_return_one_number_and_are_called_as_documented() -> None:
    data = conditional_data(60)
    cases: dict[str, tuple[Any, Any]] = {
        "alone": (lambda x: x.sum(), lambda s: "alone_error" not in s),
        "array": (lambda x: x.numpy()[:, 0], lambda s: s["array_error"] > 0),
        "flags": (lambda x, other=None: (x[:, 0] > 0) if other is None else 0 / 0, lambda s: 0 < s["flags"] < 1),
        "all": (lambda x, **cond: 1.0 * (list(cond) == ["c"]), lambda s: s["all"] == 1.0),
        "rest": (lambda *x: float(len(x)), lambda s: s["rest"] == 1.0),
        "listed": (lambda x: [1] * len(x), lambda s: s["listed"] == 1.0 and s["listed_error"] == 0.0),
    }
    metrics = {name: metric for name, (metric, _) in cases.items()}
    found = fs.compare(Still(), data, steps=[1], samples=20, metrics=metrics, say=None)
    for row in found.rows:
        for name, (_, check) in cases.items():
            assert check(row["scores"]), (row["model"], name)

    class Judge(nn.Module):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return (x - c).norm(dim=1)

    assert (
        "judge_error" in fs.compare(Unaware(), data, steps=[1], metrics={"judge": Judge()}, say=None).rows[0]["scores"]
    )


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda x: 1 / 0, "'m' raised ZeroDivisionError for rows of the moment-matched Gaussian"),
        (lambda x: x, r"'m' must return one value per sample, \(20,\), or one number.*\(20, 2\)"),
        (lambda x: torch.full((20,), math.nan), "'m' returned NaN or infinity for 20 of 20"),
        (lambda x: "good", "'m' must return one value per sample"),
        (lambda x: None, "'m' must return one value per sample"),
        (lambda x, speed: x, "'m' takes 'speed', and rows of the moment-matched Gaussian have the conditions c alone"),
        (lambda *, c: c, "'m' has no first parameter"),
        (lambda x, c, /: c, "'m' takes 'c' by position only"),
        ("success", "'m' is a str"),
    ],
)
def test_a_metric_that_fails_is_named(metric: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fs.compare(Unaware(), conditional_data(60), steps=[1], samples=20, metrics={"m": metric}, say=None)


@pytest.mark.parametrize("name", ["energy", "precision", "nfe", "model", "relative_time", "FD-mine", "", "k"])
def test_names_of_other_scores_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="a metric is called"):
        fs.compare(Unaware(), conditional_data(60), metrics={name: distance}, say=None)


def test_a_name_of_a_standard_error_is_refused() -> None:
    with pytest.raises(UserError, match="the standard error of the metric 'm'"):
        fs.compare(Unaware(), conditional_data(60), metrics={"m": distance, "m_error": distance}, say=None)


def test_a_metric_of_a_model_with_labels_alone_cannot_have_other_conditions() -> None:
    random = np.random.default_rng(0)
    named = {"x": random.normal(size=(60, 2)), "y": random.integers(0, 3, 60), "c": random.normal(size=(60, 2))}
    data = as_data(named, conditions=["c"], scale="none")
    model = Generator(Pull(), config=Config(shape=(2,), class_weights=(0.3, 0.3, 0.4), stage="pull"))
    with pytest.raises(UserError, match="takes 'c', and samples of 'pull' have the conditions label alone"):
        fs.compare(model, data, steps=[1], samples=20, metrics={"off": distance}, say=None)


def test_metrics_stand_in_the_table_the_json_and_the_report(tmp_path: Path) -> None:
    from fewstep.pipeline.finish import write_comparison
    from fewstep.report.html_tables import comparison

    data = conditional_data(200)
    metrics = {"success": lambda x: (x[:, 0] > 0).float(), "a_percent": lambda x: 12345.678, "tiny": lambda x: 2e-6}
    found = fs.compare(Unaware(), data, steps=[1], samples=80, metrics=metrics, say=None)
    scores = found.rows[0]["scores"]
    line = found.table.splitlines()[2]
    assert f"{scores['success']:.3f} ± {scores['success_error']:.3f}" in line
    assert "1.23e+04" in line
    assert "2e-06" in line
    heads, lines = comparison(json.loads(json.dumps(found.as_dict(), sort_keys=True)))
    names = [head for head, _ in heads]
    assert names[-4:] == ["success", "a_percent", "tiny", "time"]
    assert "FD-pixels %" in names
    cell = lines[0].cells[names.index("success")]
    assert (float(cell.text), float(cell.small[1:])) == pytest.approx(
        (scores["success"], scores["success_error"]), abs=1e-3
    )
    assert lines[0].cells[names.index("tiny")].small == ""
    report = write_comparison(tmp_path, found.result, found.models, found.data)
    assert "success" in report.read_text(encoding="utf-8")
    assert measured(0.0, 0.0) == "0.000 ± 0.000"


def test_anything_can_be_compared_and_names_differ(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.random.default_rng(0).normal(size=(300, 2)).astype("f4")
    teacher = fs.load(tiny_run / "teacher")
    folder = str(tiny_run / "onestep")
    found = fs.compare([teacher, folder, Still(), Still(), Adapter(Still())], rows, steps=[1], samples=40, say=None)
    assert capsys.readouterr().out == ""
    names = [row["model"] for row in found.rows]
    assert names == ["teacher", "onestep", "Still", "Still (2)", "Still (3)", GAUSSIAN, TRAINING]
    assert [model.name for model in found.models] == names[:5]
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False)) == found.as_dict()
    assert str(found) == found.table
    assert found.rows[2]["parameters"] == 0
    for models in ([teacher, teacher], [folder, Path(folder)]):
        with pytest.raises(UserError, match="given twice"):
            fs.compare(models, rows, say=None)
    fs.compare(teacher, "moons", steps=[1], samples=40)
    assert "teacher at 1 step(s)" in capsys.readouterr().out
    first, second = fs.load(tiny_run / "teacher"), fs.load(tiny_run / "teacher")
    again = fs.compare([first, second], rows, steps=[1], samples=40, say=None)
    assert [row["model"] for row in again.rows][:2] == ["teacher", "teacher (2)"]
    assert (first.name, second.name) == ("teacher", "teacher")
    with pytest.raises(UserError, match="a model to compare is a function"):
        fs.compare([distance], rows, say=None)
    with pytest.raises(UserError, match="steps must be a list of whole numbers"):
        fs.compare(teacher, rows, steps=[0], say=None)


def test_the_units_of_a_network_are_those_of_training() -> None:
    """Arrays as they are; network units of a data set."""
    rows = np.random.default_rng(0).normal(size=(600, 2)) * 5.0 + 20.0

    class Own(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 4.0 * x + 20.0  # Euler's step: x0 -> 5 x0 + 20

    of_array = fs.compare(Own(), rows, steps=[1], samples=300, say=None).rows[0]["scores"]
    of_data = fs.compare(Still(), from_array(rows), steps=[1], samples=300, say=None).rows[0]["scores"]
    assert of_array["energy"] == pytest.approx(of_data["energy"], abs=0.01)
    assert of_data["energy"] < 0.05
    assert fs.compare(Still(), rows, steps=[1], samples=300, say=None).rows[0]["scores"]["energy"] > 1.0


def test_a_stream_is_represented_by_the_rows_that_it_keeps() -> None:
    data = conditional_data(400)
    x, c = np.asarray(data.rows, np.float32), np.asarray(data.conditions["c"][:], np.float32)
    loader = [{"x": x[i : i + 50], "c": c[i : i + 50]} for i in range(0, 400, 50)]
    stream = fs.stream(loader, conditions=["c"], reservoir=300, scale="none", name="flowing")
    found = fs.compare(Knows(), stream, steps=[20], samples=200, metrics={"off": distance}, say=None)
    kept = stream.reservoir
    about = f"flowing, training split of {len(kept.train)} rows, of the 300 rows that the stream keeps"
    assert found.result["protocol"]["reference"] == about
    same = fs.compare(Knows(), kept, steps=[20], samples=200, metrics={"off": distance}, say=None)
    assert [row["scores"] for row in same.rows] == [row["scores"] for row in found.rows]


def test_a_network_is_given_what_its_parameters_name() -> None:
    """All of the data for ``**cond``; labels that it can do without only as a bare network."""
    random = np.random.default_rng(0)
    named = {"x": random.normal(size=(80, 2)), "y": random.integers(0, 2, 80), "c": random.normal(size=(80, 1))}
    data = as_data(named, conditions=["c"], scale="none")

    class Open(nn.Module):
        def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
            return 0 * x

    class Can(nn.Module):
        def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            return 0 * x

    asks = Adapter(Still(), lambda m, x, t, c: m(x, t))
    asks.name = "asks"
    models = [Open(), Can(), Generator(Can(), shape=(2,)), Generator(Can(), shape=(2,), classes=2), asks, Still()]
    found = fs.compare(models, data, steps=[1], samples=20, say=None)
    given = {"Open": ["label", "c"], "Can": ["label"], "Still": ["c"]}
    assert found.result["protocol"]["conditions"] == given
