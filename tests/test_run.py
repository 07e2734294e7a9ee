"""A run as a whole: what it opens, what it does past a collapse, what it accepts of an older version, and its plan."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from conftest import quietly
from fewstep.cli.main import main
from fewstep.data.load import load_data
from fewstep.errors import UserError
from fewstep.flow.noise import noise_rows
from fewstep.methods.contract.objective import Objective
from fewstep.metrics import evaluate
from fewstep.networks import parameter_count
from fewstep.pipeline import bf16_speed, dry, timing
from fewstep.pipeline.opening import open_run
from fewstep.pipeline.recipe import load_recipe, make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.pipeline.statistics import Statistics
from fewstep.pipeline.timing import TimedNetwork, time_networks
from fewstep.report.curves import loss_curves, read_statistics, smoothed
from fewstep.training.trainer import Trainer
from fewstep.training.world import LocalWorld

PAIRS = "samples: 640, batch_size: 128, pairs: 200, nfe: 4, tolerance: 9"
RECIPE = f"""
data: {{name: moons, rows: 400}}
network: {{name: mlp, preset: tiny}}
stages:
  teacher: {{method: flow_matching, samples: 1_280, batch_size: 128}}
  wild: {{method: flow_matching, samples: 6_400, batch_size: 128, lr: 1.0e+30}}
  lost: {{method: distill, teacher: wild, {PAIRS}}}
  onestep: {{method: distill, teacher: teacher, {PAIRS}}}
compare: {{steps: [1], samples: 50}}
"""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts optimiser steps by stage."""
    counted: Counter[str] = Counter()
    step = Trainer._step

    def counting(self: Trainer, *args: Any) -> None:
        assert self.checkpoints is not None
        counted[self.checkpoints.folder.parent.name] += 1
        step(self, *args)

    monkeypatch.setattr(Trainer, "_step", counting)
    return counted


def still(self: Objective) -> dict[str, Tensor]:
    """Best weights of zero: the velocity is zero, and the samples are the noise."""
    return {name: torch.zeros_like(value) for name, value in self.modules["student"].state_dict().items()}


@pytest.mark.usefixtures("quick_comparison")
def test_past_a_collapse_the_run_goes_on_and_compares_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steps: Counter[str]
) -> None:
    monkeypatch.setattr(Objective, "best", still)
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(RECIPE, encoding="utf-8")
    assert main(["run", str(recipe), "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert f"wrote   {out}: teacher, onestep" in said
    assert "failed  wild: training of 'student' diverged" in said
    assert "failed  lost: stage 'lost' is not trained: its teacher 'wild' has no finished model." in said
    assert set(steps) == {"teacher", "wild", "onestep"}

    result = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert [row["model"] for row in result["rows"][:3]] == ["teacher", "wild (best)", "onestep"]
    assert [(failure["stage"], failure["compared"]) for failure in result["failures"]] == [
        ("wild", True),
        ("lost", False),
    ]
    data = load_data({"name": "moons", "rows": 400})
    noise = noise_rows(50, data.shape, seed=0)
    assert result["rows"][1]["scores"]["energy"] == pytest.approx(evaluate(noise, data.train_rows()).energy, rel=1e-5)
    table = (out / "compare.md").read_text(encoding="utf-8")
    assert "(best): a stage that collapsed" in table
    page = (out / "report.html").read_text(encoding="utf-8")
    top = page[: page.index('<div class="headline">')]
    assert "not complete: 2 stage(s)" in top
    assert "<b>wild</b>: training of" in top

    # the same command again trains nothing, and says the same
    steps.clear()
    assert main(["run", str(recipe), "--out", str(out)]) == 1
    again = capsys.readouterr().out
    assert not steps
    assert again.count("finished before") == 2
    assert "wild: collapsed before" in again
    assert [line for line in again.splitlines() if line.startswith("failed")] == [
        line for line in said.splitlines() if line.startswith("failed")
    ]

    # without the stage's folder it is trained again, now as it should be, and what depends on it too
    shutil.rmtree(out / "wild")
    assert len(run_recipe(load_recipe(recipe, ["stages.wild.lr=1e-3"]), out, LocalWorld(quiet=True))) == 4
    assert set(steps) == {"wild", "lost"}


def test_a_run_without_any_model_says_so_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = RECIPE.replace("  teacher: {method: flow_matching, samples: 1_280, batch_size: 128}\n", "")
    (tmp_path / "r.yaml").write_text(text[: text.index("  onestep")], encoding="utf-8")
    assert main(["run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out/report.html").exists()
    assert "failed  lost" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_comparison")
def test_data_and_models_of_a_run_are_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", load_data({"name": "moons", "rows": 400}).rows)
    stages = f"""
  teacher: {{method: flow_matching, samples: 1_280, batch_size: 128}}
  straight: {{method: reflow, teacher: teacher, {PAIRS}}}
  onestep: {{method: distill, teacher: teacher, init: straight, {PAIRS}}}
compare: {{steps: [1], samples: 50}}
"""
    head = f"data: {tmp_path / 'x.npy'}\nnetwork: {{name: mlp, preset: tiny}}\nstages:"
    (tmp_path / "first.yaml").write_text(head + stages, encoding="utf-8")
    (tmp_path / "second.yaml").write_text(
        f"{head}\n  other: {{method: distill, teacher: {tmp_path / 'first/teacher'}, {PAIRS}}}\n"
        f"  more: {{method: reflow, teacher: {tmp_path / 'first/teacher'}, {PAIRS}}}\n"
        "compare: {steps: [1], samples: 50}\n",
        encoding="utf-8",
    )
    opened: Counter[str] = Counter()
    load_file, load_array = safetensors.torch.load_file, np.load

    def reading(path: Path) -> dict[str, Tensor]:
        if Path(path).name == "model.safetensors":  # pairs are not models
            opened[str(Path(path).relative_to(tmp_path))] += 1
        return load_file(path)

    def loading(file: Any, *args: Any, **options: Any) -> Any:
        opened["data"] += str(file).endswith("x.npy")
        return load_array(file, *args, **options)

    monkeypatch.setattr(safetensors.torch, "load_file", reading)
    monkeypatch.setattr(np, "load", loading)
    quietly("run", tmp_path / "first.yaml", "--out", tmp_path / "first")
    models = [f"first/{name}/model.safetensors" for name in ("teacher", "straight", "onestep")]
    assert opened == {"data": 1, **dict.fromkeys(models, 1)}
    opened.clear()
    quietly("run", tmp_path / "second.yaml", "--out", tmp_path / "second")
    models = ["first/teacher/model.safetensors", *(f"second/{name}/model.safetensors" for name in ("other", "more"))]
    assert opened == {"data": 1, **dict.fromkeys(models, 1)}


def small(**options: Any) -> Any:
    stages = {"teacher": {"method": "flow_matching", "samples": 256, **options}}
    return make_recipe({"data": {"name": "moons", "rows": 300}, "network": "mlp", "stages": stages}, "recipe")


def test_options_added_since_a_stage_was_made_count_as_their_defaults(tmp_path: Path, steps: Counter[str]) -> None:
    world = LocalWorld(quiet=True)
    run_recipe(small(), tmp_path, world)
    path, weights = tmp_path / "teacher/stage.json", (tmp_path / "teacher/model.safetensors").read_bytes()
    stage = json.loads(path.read_text(encoding="utf-8"))
    for option in ("clip", "teacher", "network", "coupling"):
        del stage["inputs"]["options"][option]  # as if this version had brought them
    path.write_text(json.dumps(stage), encoding="utf-8")
    steps.clear()
    run_recipe(small(), tmp_path, world)
    assert not steps
    assert (tmp_path / "teacher/model.safetensors").read_bytes() == weights
    with pytest.raises(UserError, match=r"begun with options\.clip = 1\.0, and the recipe now says 0\.5"):
        run_recipe(small(clip=0.5), tmp_path, world)
    with pytest.raises(UserError, match=r"begun with network\.width = 128, and the recipe now says 16"):
        run_recipe(small(network={"name": "mlp", "width": 16}), tmp_path, world)


def test_an_option_that_there_is_no_more_is_named(tmp_path: Path) -> None:
    run_recipe(small(), tmp_path, LocalWorld(quiet=True))
    path = tmp_path / "teacher/stage.json"
    stage = json.loads(path.read_text(encoding="utf-8"))
    stage["inputs"]["options"]["momentum"] = 0.9
    path.write_text(json.dumps(stage), encoding="utf-8")
    message = r"options\.momentum = 0\.9, an option that method 'flow_matching' of this version .* does not have"
    with pytest.raises(UserError, match=message):
        run_recipe(small(), tmp_path, LocalWorld(quiet=True))


def test_statistics_are_strict_json_and_the_report_reads_their_nulls(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    statistics = Statistics(path, "a", writes=True)
    losses = [3.0, math.nan, 2.0, math.inf, *np.linspace(1.0, 0.1, 30)]
    for k, loss in enumerate(losses):
        statistics.write({"samples": 256 * k, "step": k, "phase": 0, "terms": {"loss": loss}})
    statistics.write({"samples": 1, "check": {"energy": math.nan}})

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["terms"]["loss"] for line in lines[:4]] == [3.0, None, 2.0, None]
    assert lines[-1]["check"] == {"energy": None}
    assert len(read_statistics(path)["a"]) == len(losses)
    picture = loss_curves(path, {"a": "#2b6cb0"})
    assert picture is not None
    finite = tmp_path / "finite.jsonl"
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if "null" not in line]
    finite.write_text("\n".join(kept) + "\n", encoding="utf-8")
    assert picture.png != loss_curves(finite, {"a": "#2b6cb0"}).png  # type: ignore[union-attr]
    np.testing.assert_array_equal(smoothed(np.array([1.0, np.nan, 3.0])), [1.0, 2.0, 3.0])


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """A device where bf16 takes ten times as long; lists the precisions that were timed."""
    probed: list[torch.dtype] = []

    def seconds(dtype: torch.dtype, device: str) -> float:
        probed.append(dtype)
        return 10.0 if dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(bf16_speed, "_seconds", seconds)
    bf16_speed.bf16_slowdown.cache_clear()
    yield probed
    bf16_speed.bf16_slowdown.cache_clear()


def test_a_run_in_slow_bf16_is_told_once_with_the_fix(
    tmp_path: Path, emulated: list[torch.dtype], capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe(small(precision="bf16"), tmp_path / "one")
    said = capsys.readouterr().out
    assert said.count("10.0 times as long in bf16 as in fp32") == 1
    assert "--set stages.teacher.precision=fp32" in said
    run_recipe(small(precision="bf16"), tmp_path / "one")  # finished: nothing is left to be slow
    run_recipe(small(), tmp_path / "two")
    assert "bf16 as in" not in capsys.readouterr().out
    run_recipe(small(precision="bf16"), tmp_path / "three")
    assert sorted(map(str, emulated)) == ["torch.bfloat16", "torch.float32"]  # probed once per process


def test_a_plan_times_fp32_where_bf16_is_slow_and_says_so(tmp_path: Path, emulated: list[torch.dtype]) -> None:
    plan = dry.show_plan(small(precision="bf16"), tmp_path / "out")
    assert "--set stages.teacher.precision=fp32" in plan
    assert "minutes are those of fp32" in plan
    run = open_run(small(precision="bf16"), tmp_path / "out", LocalWorld(quiet=True))
    timed: list[TimedNetwork] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            TimedNetwork, "measure", lambda self, seconds: timed.append(self) or timing.Timing((1,), (1.0,), 1.0)
        )
        assert dry.stage_minutes(run) == {"teacher": pytest.approx(256 * dry.OVERHEAD / 60)}
    assert [work.bf16 for work in timed] == [False]


def no_conditions(count: int) -> dict[str, Tensor]:
    return {}


class Slow(nn.Module):
    """A network whose call takes ``fixed + each * rows`` seconds of a clock that the test owns."""

    def __init__(self, clock: SimpleNamespace, fixed: float, each: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.clock, self.fixed, self.each = clock, fixed, each
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.clock.now += self.fixed + self.each * len(x)
        self.rows.append(len(x))
        return x * self.weight


@pytest.mark.parametrize(("fixed", "each"), [(1e-3, 1e-5), (0.0, 2e-3), (1e-4, 0.02), (0.0, 0.3)])
def test_timing_keeps_its_budget_and_extrapolates_to_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch, fixed: float, each: float
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now, process_time=lambda: clock.now))
    nets = [Slow(clock, fixed, each) for _ in range(3)]
    waiting = iter(nets)
    cpu = torch.device("cpu")
    works = {
        str(k): TimedNetwork(lambda: next(waiting), no_conditions, (2,), 256, timed=True, device=cpu, bf16=False)
        for k in range(3)
    }
    found = time_networks(works, 2.5)
    assert clock.now <= 2.5 + fixed + each  # at most one smallest batch longer
    for found_one, net in zip(found.values(), nets, strict=True):
        assert found_one.trained(256) == pytest.approx(
            (fixed + each * 256) / 256, rel=1e-6 if len(set(net.rows)) > 1 else 1
        )
        assert max(net.rows) <= 256
    assert max(nets[0].rows) == (256 if each < 1e-3 else max(nets[0].rows))


def test_what_the_first_step_sets_up_is_not_taken_for_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now, process_time=lambda: clock.now))

    class First(Slow):
        """Takes a second more in its first call."""

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            clock.now += 0.0 if self.rows else 1.0
            return super().forward(x, t)

    cpu = torch.device("cpu")
    build = lambda: First(clock, 1e-3, 1e-5)  # noqa: E731
    work = TimedNetwork(build, no_conditions, (2,), 256, timed=True, device=cpu, bf16=False)
    assert work.measure(0.5).trained(1) == pytest.approx(1e-3 + 1e-5, rel=1e-6)


def test_equal_networks_are_timed_once_and_finished_stages_not_at_all(
    tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[TimedNetwork] = []

    def measure(self: TimedNetwork, seconds: float) -> timing.Timing:
        timed.append(self)
        return timing.Timing((1,), (0.06,), 0.01)

    monkeypatch.setattr(TimedNetwork, "measure", measure)
    recipe = tiny_run.parent / "tiny.yaml"
    said = quietly("run", recipe, "--out", tmp_path / "out", "--dry", "--set", "stages.onestep.network.width=32")
    assert len({parameter_count(work.build()) for work in timed}) == 2
    assert len(timed) == 2  # teacher and straight are equal
    assert f"{12_000 * 0.06 * dry.OVERHEAD / 60:.1f}" in said
    timed.clear()
    quietly("run", recipe, "--out", tiny_run, "--dry")
    assert not timed


def test_a_plan_of_the_largest_network_takes_seconds(tmp_path: Path) -> None:
    """Measured against one small batch on the same machine, which the largest network needs in any case."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, size=(40, 3, 32, 32), dtype=np.uint8))
    stages = {
        "teacher": {"method": "flow_matching", "samples": 1_000_000, "precision": "bf16"},
        "straight": {"method": "reflow", "teacher": "teacher", "samples": 1_000_000, "precision": "bf16"},
    }
    fields = {"data": str(tmp_path / "x.npy"), "network": {"name": "unet", "preset": "large"}, "stages": stages}
    recipe = make_recipe(fields, "recipe")
    net = timing.blank_network({**open_run(recipe, tmp_path, LocalWorld(quiet=True)).network("teacher")})
    timing.fill(net.to_empty(device="cpu"))
    began = time.perf_counter()
    net(torch.zeros(2, 3, 32, 32), torch.zeros(2)).sum().backward()
    batch = time.perf_counter() - began
    began = time.perf_counter()
    plan = dry.show_plan(recipe, tmp_path / "out")
    taken = time.perf_counter() - began
    assert taken < 2 * dry.TIMING_SECONDS + 4 * batch
    assert "36," in plan
