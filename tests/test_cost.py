"""Network rows of diagnoses and tunings: counted against what is spent, limited, and reported on the way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep as fs
from conftest import quietly
from fewstep.cli import estimates
from fewstep.cli.main import main
from fewstep.diagnostics import cost
from fewstep.diagnostics.cost import Allowance, Cost, RowCount, Speed, measure_speed, most_that_fits
from fewstep.diagnostics.pick import distinct, scan, scan_rows
from fewstep.diagnostics.pilot import Pilot, reference_rows
from fewstep.errors import UserError
from fewstep.flow import closed_form
from fewstep.flow.field import CountedField, Guided

FLOW = closed_form.mixture(
    torch.tensor([0.4, 0.6]), torch.tensor([[-1.2, 0.3], [0.9, -0.5]]), torch.tensor([0.25, 0.4])
)


def gaussian(*stds: float) -> closed_form.Gaussian:
    s = torch.tensor(stds, dtype=torch.float64)
    return closed_form.gaussian(torch.zeros_like(s), s)


SMOOTH, SHARP = gaussian(0.3, 1.0), gaussian(0.01, 1.0)


class Rows:
    """A velocity that counts the rows it is called with."""

    def __init__(self, velocity: Any, autograd: bool = True) -> None:
        self.velocity, self.autograd, self.rows = velocity, autograd, 0

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.rows += len(x)
        return self.velocity(x, t, **cond) if self.autograd else self.velocity(x.detach(), t.detach(), **cond)


def noise(num: int, *shape: int) -> Tensor:
    return torch.randn(num, *(shape or (2,)), dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num", [3, 20, 90])
@pytest.mark.parametrize(
    "options",
    [{}, {"adaptive": False}, {"sensitivity": False}, {"stiffness": False}, {"nodes": 16}, {"nodes": 32}],
    ids=str,
)
def test_a_diagnosis_of_a_smooth_flow_takes_exactly_the_rows_that_were_counted_before(
    num: int, options: dict[str, Any]
) -> None:
    v = Rows(SMOOTH.velocity)
    d = fs.diagnose(v, noise(num), **options)
    assert v.rows == fs.diagnosis_cost((num, 2), **options).rows
    assert d.nfe == round(v.rows / num)


def test_derivatives_of_large_samples_are_counted_for_the_few_that_have_them() -> None:
    flow = closed_form.gaussian(torch.zeros(600), torch.full((600,), 0.5))
    v = Rows(flow.velocity)
    d = fs.diagnose(v, noise(80, 600).float(), nodes=16)
    assert (d.derivative_samples, d.stiffness_samples) == (64, 16)
    assert v.rows == fs.diagnosis_cost((80, 600), nodes=16).rows


def test_guidance_doubles_every_row() -> None:
    v = Rows(lambda x, t, label: -x if label is None else SMOOTH.velocity(x, t))
    fs.diagnose(Guided(v, 1.5), noise(40), cond={"label": torch.zeros(40)}, nodes=16)
    assert v.rows == fs.diagnosis_cost((40, 2), nodes=16, evaluations=2).rows


@pytest.mark.parametrize("velocity", [SMOOTH.velocity, SHARP.velocity], ids=["smooth", "sharp"])
def test_progress_tells_the_rows_spent_and_once_the_nodes_are_placed_all_rows_to_come(velocity: Any) -> None:
    v, seen, x0 = Rows(velocity), list[tuple[int, int]](), noise(64)
    plain = fs.diagnose(velocity, x0)
    d = fs.diagnose(v, x0, progress=lambda done, total: seen.append((done, total)))
    for name, value in plain.as_dict().items():
        assert d.as_dict()[name] == value, name
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == totals[-1] == v.rows
    assert all(part <= total for part, total in seen)
    assert sum(total == v.rows for total in totals) > 0.5 * len(totals)  # the pilot is the first fifth of the rows
    assert (totals[0] == v.rows) == (velocity == SMOOTH.velocity) or abs(totals[0] / v.rows - 1) < 0.3


@pytest.mark.parametrize("velocity", [SMOOTH.velocity, SHARP.velocity, FLOW.velocity], ids=["smooth", "sharp", "mix"])
@pytest.mark.parametrize("autograd", [True, False], ids=["autograd", "differences"])
@pytest.mark.parametrize("limit", [8_000, 40_000, 90_000])
def test_a_limited_diagnosis_stays_within_its_rows_and_says_what_it_reduced(
    velocity: Any, autograd: bool, limit: int
) -> None:
    v = Rows(velocity, autograd)
    d = fs.diagnose(v, noise(200), max_rows=limit)
    assert 0.5 * limit < v.rows <= limit
    assert d.samples < 200
    assert f"{d.samples} of 200 noises were measured" in " ".join(d.notes)
    assert all(note.endswith(f"to stay within {limit:,} network rows") for note in d.notes)
    assert ("instead of 64 nodes" in " ".join(d.notes)) == (len(d.times) < 65)
    assert d.derivatives == ("forward" if autograd else "finite_difference")
    if velocity is SMOOTH.velocity and limit == 90_000:
        assert d.straightness == pytest.approx(SMOOTH.straightness(), rel=4 * d.straightness_error / d.straightness)


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    x0 = noise(64)
    free, limited = fs.diagnose(FLOW.velocity, x0), fs.diagnose(FLOW.velocity, x0, max_rows=10**7)
    for name, value in free.as_dict().items():
        if name != "nfe":  # the way to take derivatives is tried before
            assert limited.as_dict()[name] == value, name
    assert limited.notes == ()


@pytest.mark.parametrize("limit", [0, -3, 2.5, True, 600])
def test_limits_that_cannot_be_kept_are_refused(limit: Any) -> None:
    with pytest.raises(UserError, match="max_rows" if limit == 600 else "max_rows must be a whole number"):
        fs.diagnose(SMOOTH.velocity, noise(64), max_rows=limit)
    with pytest.raises(UserError, match="max_rows" if limit == 600 else "max_rows must be a whole number"):
        fs.tune(SMOOTH.velocity, noise(64), calls=2, max_rows=limit)


@pytest.mark.parametrize("shape", [(5,), (0, 2), (4, 2.0), ()])
def test_shapes_of_no_noises_are_refused(shape: Any) -> None:
    for count in (fs.diagnosis_cost, lambda given: fs.tuning_cost(given, calls=2)):
        with pytest.raises(UserError, match="shape of the noises"):
            count(shape)


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("velocity", [SMOOTH.velocity, FLOW.velocity], ids=["smooth", "mix"])
def test_a_tuning_takes_at_most_the_rows_that_were_counted_before_and_not_many_fewer(calls: int, velocity: Any) -> None:
    v = Rows(velocity)
    fs.tune(v, noise(160), calls=calls)
    assert 0.9 * fs.tuning_cost((160, 2), calls=calls).rows <= v.rows <= fs.tuning_cost((160, 2), calls=calls).rows


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_a_fit_takes_at_most_the_rows_that_were_counted_before(calls: int) -> None:
    v = Rows(FLOW.velocity)
    fs.tune(v, noise(160), calls=calls, kind="fitted")
    most = fs.tuning_cost((160, 2), calls=calls, kind="fitted").rows
    assert 0.5 * most <= v.rows <= most


def test_references_and_the_first_round_are_counted_exactly() -> None:
    for flow, steps in ((SMOOTH, 16), (gaussian(0.005, 1.0), 64)):
        v = Rows(flow.velocity)
        assert Pilot(v, noise(300)).steps == steps
        assert v.rows == reference_rows(steps, 300)
    v = Rows(FLOW.velocity)
    pilot = Pilot(v, noise(64), steps=16)
    before = v.rows
    assert len(scan(pilot, 4)) == len(distinct(4))
    assert v.rows - before == scan_rows(64, 4)


@pytest.mark.parametrize("kind", ["auto", "fitted"])
@pytest.mark.parametrize("velocity", [SMOOTH.velocity, gaussian(0.005, 1.0).velocity], ids=["smooth", "sharp"])
def test_a_limited_tuning_stays_within_its_rows_and_says_what_it_reduced(kind: str, velocity: Any) -> None:
    least = fs.tuning_cost((64, 2), calls=4, kind=kind).rows
    for limit in (least + 1, 2 * least):
        v = Rows(velocity)
        choice = fs.tune(v, noise(512), calls=4, kind=kind, max_rows=limit)
        assert v.rows <= limit
        assert "of 512 noises were used" in choice.notes[0]
        coarse = "the reference was not refined beyond 16 RK4 steps" in " ".join(choice.notes)
        assert coarse == (velocity != SMOOTH.velocity and limit == least + 1)
        assert choice.error < choice.euler
    with pytest.raises(UserError, match=f"max_rows={least} is less than the {least + 1} network rows"):
        fs.tune(velocity, noise(512), calls=4, kind=kind, max_rows=least)


def test_progress_and_a_wide_limit_leave_a_tuning_as_it_is() -> None:
    seen = list[tuple[int, int]]()
    free = fs.tune(FLOW.velocity, noise(128), calls=4)
    watched = fs.tune(FLOW.velocity, noise(128), calls=4, progress=lambda *now: seen.append(now))
    limited = fs.tune(FLOW.velocity, noise(128), calls=4, max_rows=10**7)
    assert free.as_dict() == watched.as_dict() == limited.as_dict()
    assert seen[-1][0] == seen[-1][1]
    assert all(part <= total for part, total in seen)
    assert seen[0][1] == fs.tuning_cost((128, 2), calls=4).rows + 1  # and one row to see what an evaluation takes


def test_most_that_fits_is_the_largest() -> None:
    for limit in range(1, 60):
        found = most_that_fits(2, 20, lambda n: n * n // 4, limit)
        fitting = [n for n in range(2, 21) if n * n // 4 <= limit]
        assert found == (max(fitting) if fitting else None)


def test_speed_is_the_time_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that runs with the rows: 2 ms for a row, whichever way it is evaluated."""
    v = Rows(lambda x, t: SMOOTH.velocity(x, t))
    monkeypatch.setattr(cost.time, "perf_counter", lambda: 0.002 * v.rows)
    speed = measure_speed(CountedField(v), noise(300), {})
    assert (speed.velocity, speed.derivative) == pytest.approx((0.002, 0.002))
    assert speed.seconds(Cost(100, 50)) == pytest.approx(0.3)
    guided = Guided(lambda x, t, label: v(x, t), 3.0)
    half = measure_speed(guided, noise(10), {"label": torch.zeros(10)}, derivatives=False)
    assert (half.velocity, half.derivative) == (pytest.approx(0.002), 0.0)
    assert Cost(3, 1) * 2 == Cost(6, 2)


def test_nothing_is_reported_before_there_is_a_total() -> None:
    seen = list[tuple[int, int]]()
    field = RowCount(CountedField(SMOOTH.velocity))
    allowance = Allowance(field, None, lambda *now: seen.append(now))
    x, t = noise(4), torch.zeros(4, dtype=torch.float64)
    field(x, t)
    assert seen == []
    allowance.expect(4)
    field(x, t)
    field(x, t)  # more than expected
    assert seen == [(8, 8), (12, 12)]


@pytest.fixture
def teacher(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run / "teacher", tmp_path / "teacher"))


def test_what_a_piece_of_work_leaves_of_the_users_minutes_is_shared_among_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pieces of 300, 100 and 200 estimated seconds, and 5 minutes for them; the first takes 200 seconds."""
    clock = [1000.0]
    monkeypatch.setattr(estimates.time, "monotonic", lambda: clock[0])
    made = estimates.Estimates(Speed(0.1, 0.5), 5.0)
    for label, given in (("a", Cost(500, 500)), ("b", Cost(1000)), ("c", Cost(0, 400))):
        made.add(label, given, Cost(10))
    assert str(made).startswith("about 2,400 network rows (a 1,000, b 1,000, c 400), 10.0 minutes; reduced where")
    made.start()
    # of 300 seconds a half, as for all; then a third of the 100 that are left; then all of the 67 after that
    for took, rows in ((200.0, 500), (33.0, 333), (500.0, 134)):
        with made.next() as limits:
            assert limits["max_rows"] == pytest.approx(rows, abs=1)
            clock[0] += took
    late = estimates.Estimates(Speed(0.1, 0.1), 1.0)
    late.add("a", Cost(10**6), Cost(100))
    late.start()
    clock[0] += 100
    with late.next() as limits:
        assert limits["max_rows"] == 100 + estimates.SPARE_ROWS  # the least, where no time is left


def test_diagnose_prints_its_cost_first_and_keeps_to_minutes(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a network of one millisecond a row, and a clock that stands still, minutes are rows."""
    monkeypatch.setattr(estimates, "measure_speed", lambda *_, **__: Speed(0.001, 0.001))
    monkeypatch.setattr(estimates.time, "monotonic", lambda: 0.0)
    first, second = fs.diagnosis_cost((48, 2)).rows, fs.tuning_cost((2048, 2), calls=2).rows
    said = quietly("diagnose", teacher, "--num", 48, "--calls", "2", "--minutes", 1.5)
    lines = said.splitlines()
    cost_line = f"about {first + second:,} network rows (diagnosis {first:,}, best of 2 calls {second:,})"
    assert lines[1].startswith(f"cost             {cost_line}, {(first + second) / 60000:.1f} minutes; reduced where")
    spent = [int(line.split(":")[1].split()[0].replace(",", "")) for line in lines if "network rows, 0.0 s" in line]
    share = 90_000 * first / (first + second)
    assert 0.8 * share < spent[0] <= share
    assert 0.8 * 90_000 < spent[1] <= 90_000
    assert len(spent) == 2  # the end of each progress display
    assert "of 2048 noises were used, to stay within" in said
    assert "of 48 noises were measured from a grid of" in said
    assert f"instead of 64 nodes, to stay within {int(share):,} network rows" in said
    stored = fs.load(teacher).known_sampler(2)
    assert stored is not None
    assert stored.notes
    fs.load(teacher).sample(4, steps=2, solver="auto")  # samples with it as it is
    assert fs.load(teacher).known_sampler(2).notes == stored.notes  # type: ignore[union-attr]
    assert fs.load(teacher).tune(2).notes == ()  # found again, without a limit
    assert fs.load(teacher).known_sampler(2).notes == ()  # type: ignore[union-attr]


@pytest.mark.parametrize(("minutes", "words"), [("0.000001", "is too little"), ("-1", "positive"), ("nan", "positive")])
def test_minutes_that_do_not_suffice_are_refused_before_anything_runs(
    tiny_run: Path, capsys: pytest.CaptureFixture[str], minutes: str, words: str
) -> None:
    assert main(["diagnose", str(tiny_run / "teacher"), "--num", "48", "--minutes", minutes]) == 2
    assert words in capsys.readouterr().err


def test_sample_prints_the_cost_of_finding_a_sampler_once(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ("sample", teacher, "--num", 4, "--steps", 2, "--solver", "auto", "--out", tmp_path / "x.npy")
    first = quietly(*how)
    most = fs.tuning_cost((2048, 2), calls=2).rows
    assert first.startswith(f"cost  about {most:,} network rows, ")
    assert "best of 2 calls: " in first
    assert quietly(*how).startswith("wrote")
    assert main([*map(str, how[:6]), "--solver", "heun", "--minutes", "1", "--out", str(tmp_path / "x.npy")]) == 2
    assert "--minutes limits the search" in capsys.readouterr().err
    assert main([*map(str, how), "--grid", "uniform"]) == 2
    assert "finds its own grid" in capsys.readouterr().err
