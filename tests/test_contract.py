"""The contract of a method, held for every method of the registry: pure losses, owned gradients, kept state.

A method that is registered is covered by that alone (tests/contract_cases.py). The methods' own tests hold what their
losses mean.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from contract_cases import (
    BATCH,
    CASES,
    IMAGE,
    NEEDED,
    SETTINGS,
    STEPS,
    VARIANTS,
    VECTOR,
    Place,
    Planned,
    Turn,
    accepts,
    contents,
    make_place,
    plan_case,
    raw,
    turns_of,
)
from fewstep.errors import UserError
from fewstep.flow.couplings import Facts, Pair
from fewstep.flow.noise import Draws
from fewstep.generator import load, save_model
from fewstep.methods.contract.objective import Networks, Objective
from fewstep.methods.families.distribution import DistributionMatching
from fewstep.methods.registry import METHODS
from fewstep.metrics.sample_distances import energy
from fewstep.pipeline.run import run_recipe
from fewstep.pipeline.train_stage import train_stage
from fewstep.store.tensors import read_tensors
from fewstep.training.checkpoint import Checkpoints, read_checkpoint
from fewstep.training.trainer import Trainer
from fewstep.training.world import LocalWorld
from training_cases import options as small_options

# Parameters that a loss does not depend on, by its form, with the reason.
FREE = {
    ("instaflow", "discriminator", "head.bias"): "the relativistic loss sees differences of scores, and the bias "
    "cancels in them",
}

# Combinations that a method refuses by design, with the words it refuses them in.
REFUSED = {
    ("lagrangian", IMAGE, "dropout"): "derivative: finite_difference subtracts two calls of the network, and dropout",
}

RELATIVE, ABSOLUTE = 0.03, 3e-3  # of a term in bf16: 2^-8 per value, some layers, and squares; data have variance 1


@pytest.fixture(scope="module")
def place_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[int, ...], str], Place]:
    """The data and the teacher of a shape and a setting, made once."""
    made: dict[Any, Place] = {}

    def find(shape: tuple[int, ...], setting: str) -> Place:
        if setting == "bf16":
            return replace(find(shape, "plain"), precision="bf16")
        if (shape, setting) not in made:
            made[shape, setting] = make_place(tmp_path_factory.mktemp("place"), shape, setting)
        return made[shape, setting]

    return find


PlaceOf = Callable[[tuple[int, ...], str], Place]
COMBINATIONS = [
    *(pytest.param(case, VECTOR, setting, id=f"{case}-vector-{setting}") for case in CASES for setting in SETTINGS),
    *(pytest.param(case, IMAGE, setting, id=f"{case}-image-{setting}") for case in METHODS for setting in SETTINGS),
]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_needs_no_options_but_method_and_teacher_or_has_an_entry(method: str) -> None:
    assert accepts(method, None) or accepts(method, "teacher"), (
        f"method {method!r} can be made neither with 'method' alone nor with 'method' and 'teacher': give its options "
        "defaults, or, where there can be none, add an entry to NEEDED in tests/contract_cases.py"
    )


def test_the_tables_name_methods_that_there_are() -> None:
    assert NEEDED.keys() <= METHODS.keys()
    assert {fields["method"] for fields in VARIANTS.values()} <= METHODS.keys()
    assert {key[0] for key in [*FREE, *REFUSED]} <= METHODS.keys()


def method_of(case: str) -> str:
    return str(CASES[case]["method"])


def global_state() -> list[Any]:
    """Of the random numbers that everybody shares."""
    name, keys, *place = np.random.get_state()  # noqa: NPY002
    return [raw(torch.get_rng_state()), name, raw(torch.from_numpy(keys.copy())), place, random.getstate()]


def check_terms(turn: Turn, terms: dict[str, Tensor]) -> None:
    """Scalars, finite, and without a graph but for the loss and what it is made of."""
    for name, value in terms.items():
        assert value.shape == (), f"{turn.role}: term {name!r} has shape {tuple(value.shape)}"
        assert torch.isfinite(value), f"{turn.role}: term {name!r} is {value.item()}"
    assert terms["loss"].requires_grad


def check_gradients(method: str, turn: Turn, known: list[nn.Module], terms: dict[str, Tensor]) -> None:
    """They reach the role's parameters, every one, and no others of all the modules there are."""
    own = dict(turn.objective.modules[turn.role].named_parameters())
    everything = {id(p): p for module in [*known, *turn.objective.modules.values()] for p in module.parameters()}
    assert all(p.grad is None for p in everything.values()), "the loss itself made gradients"
    terms["loss"].backward()
    missing = {
        name
        for name, p in own.items()
        if (p.grad is None or not p.grad.any()) and (method, turn.role, name) not in FREE
    }
    assert not missing, f"no gradient of {turn.role!r} reaches its {sorted(missing)}"
    others = everything.keys() - {id(p) for p in own.values()}
    strayed = [tuple(everything[number].shape) for number in others if everything[number].grad is not None]
    assert not strayed, f"the gradient of {turn.role!r} reaches parameters of others, of shapes {strayed}"
    for p in everything.values():
        p.grad = None


def check_turn(method: str, planned: Planned, turn: Turn, *, draws: bool) -> None:
    """A loss mutates nothing, does the same twice, and its gradients stay at home."""
    held = (turn.objective, turn.trainer._modules, turn.batch, planned.stage.teacher, turn.trainer.ema.state)
    turn.trainer._networks(turn.role)  # freezes the others, as in training
    before, known = contents(*held)
    first = turn.loss()
    torch.default_generator.manual_seed(7)
    shared = global_state()
    again = turn.loss()
    if not draws:
        assert global_state() == shared, f"{turn.role}: the loss draws from the shared generators"
    after, _ = contents(*held)
    changed = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    assert not changed, f"the loss of {turn.role!r} changes {sorted(changed)}"
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first), "the same draws gave other terms"
    check_terms(turn, first)
    check_gradients(method, turn, known, again)


def check_precision(turn: Turn) -> None:
    """In bfloat16 terms are those of float32, up to its eight bits."""
    half, full = turn.loss(), turn.loss(autocast=False)
    for name, value in full.items():
        assert half[name].item() == pytest.approx(value.item(), rel=RELATIVE, abs=ABSOLUTE), (turn.role, name)


@pytest.mark.parametrize(("case", "shape", "setting"), COMBINATIONS)
def test_a_loss_is_pure_and_its_gradient_reaches_its_role_alone(
    tmp_path: Path, place_of: PlaceOf, case: str, shape: tuple[int, ...], setting: str
) -> None:
    method, place = method_of(case), place_of(shape, setting)
    planned = plan_case(place, case, tmp_path)
    turns = turns_of(planned, done=(0.0, 0.6) if shape == VECTOR else (0.6,))
    refusal = REFUSED.get((method, shape, setting))
    if refusal is not None:
        with pytest.raises(UserError, match=refusal):
            list(turns)
        return
    roles = set()
    for turn in turns:
        roles.add(turn.role)
        check_turn(method, planned, turn, draws=setting == "dropout")
        if setting == "bf16":
            check_precision(turn)
    assert "student" in roles


class Full(nn.Module):
    """A network that computes in float32 whatever is around it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return self.network(*args, **kwargs)


@pytest.mark.parametrize("case", CASES)
def test_targets_and_differences_are_taken_in_float32(tmp_path: Path, place_of: PlaceOf, case: str) -> None:
    """With the trained networks in float32, autocast changes no bit: nothing else is computed in bfloat16.

    That holds for teachers, for averages, for flows of earlier phases, and for differences of networks.
    """
    for turn in turns_of(plan_case(place_of(VECTOR, "bf16"), case, tmp_path)):
        nets = {name: Full(module) for name, module in turn.trainer._networks(turn.role).items()}
        half, full = turn.loss(nets=nets), turn.loss(autocast=False)
        assert {name: value.item() for name, value in half.items()} == {k: v.item() for k, v in full.items()}


@pytest.mark.parametrize("setting", ["plain", "labels", "dropout", "bf16"])
@pytest.mark.parametrize("case", [case for case in CASES if method_of(case) in ("fgm", "sid", "dmd", "realuid")])
def test_the_gap_of_equal_networks_is_exactly_zero(tmp_path: Path, place_of: PlaceOf, case: str, setting: str) -> None:
    """The online model begins as the teacher: in bf16 and with dropout too, the two do not differ by one bit.

    An online model of several calls is asked for some rows at a time, and float32 products of fewer rows may round
    otherwise; bfloat16 would leave 1e-5.
    """
    found, least = 0, 0.0 if "steps" not in CASES[case] else 1e-12
    for turn in turns_of(plan_case(place_of(VECTOR, setting), case, tmp_path), stirred=False):
        if isinstance(turn.objective, DistributionMatching) and turn.role == "student":
            assert turn.loss()["gap"].item() <= least
            found += 1
    assert found


@pytest.mark.parametrize("case", ["distill, progressive", "slimflow", "piecewise", "instaflow"])
def test_frozen_flows_have_no_dropout(tmp_path: Path, place_of: PlaceOf, case: str) -> None:
    """With the student's own dropout off, a loss does not depend on what the shared generators would draw."""
    checked = 0
    for turn in turns_of(plan_case(place_of(VECTOR, "dropout"), case, tmp_path)):
        assert not torch.equal(turn.loss(seed=1)["loss"], turn.loss(seed=2)["loss"]) or turn.role != "student"
        turn.objective.modules["student"].eval()
        one, two = turn.loss(seed=1), turn.loss(seed=2)
        turn.objective.modules["student"].train()
        assert all(torch.equal(one[name], two[name]) for name in one)
        checked += 1
    assert checked


class StopError(Exception):
    """The run was stopped."""


def train_case(place: Place, case: str, out: Path, stops: list[int], monkeypatch: pytest.MonkeyPatch) -> Planned:
    """Train a case to its end; at each of the steps ``stops`` its state is saved and everything is made anew."""
    step, taken = Trainer._step, 0

    def stopping(self: Trainer, *arguments: Any) -> None:
        nonlocal taken
        if taken in stops:
            stops.remove(taken)
            self.save()
            raise StopError
        step(self, *arguments)
        taken += 1

    monkeypatch.setattr(Trainer, "_step", stopping)
    try:
        while True:
            planned = plan_case(place, case, out)
            begun = json.loads((out / "stage/stage.json").read_text())
            (out / "stage/stage.json").write_text(json.dumps({**begun, "done": False}))  # it has only been planned
            try:
                train_stage(planned.run, planned.stage, planned.options, planned.plan, planned.config)
            except StopError:
                continue
            return planned
    finally:
        monkeypatch.setattr(Trainer, "_step", step)


@pytest.mark.parametrize("case", CASES)
def test_a_stage_that_is_stopped_and_made_anew_ends_bit_for_bit_alike(
    tmp_path: Path, place_of: PlaceOf, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Weights of all roles, averages, optimisers and the objective's state: with dropout, in every phase."""
    place, stops = place_of(VECTOR, "dropout"), [STEPS // 5, (4 * STEPS) // 5]
    ends = []
    for name, at in (("whole", []), ("cut", list(stops))):
        planned = train_case(place, case, tmp_path / name, at, monkeypatch)
        assert not at, "it was stopped at every place"
        (kept,) = Checkpoints(planned.stage.folder / "checkpoints").files()
        ends.append(read_checkpoint(kept))
    (whole, position), (cut, resumed) = ends
    assert resumed == position
    assert cut.keys() == whole.keys()
    differs = [name for name, value in whole.items() if not torch.equal(cut[name].nan_to_num(), value.nan_to_num())]
    assert not differs


# How a short training is measured, the largest share of the start's value that may be left, and options. The energy is
# that of samples to the teacher's; chance leaves about .005 of it.
BEATS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "flow_matching": ("energy", 0.25, {"lr": 5e-3}),
    "reflow": ("loss", 0.3, {}),  # its start is the teacher, whose samples cannot be beaten
    "features": ("loss", 0.7, {}),  # it makes no samples
    "slimflow": ("energy", 0.6, {"lr": 1e-2}),
    "piecewise": ("loss", 0.2, {}),  # its start is the teacher, sampled in four steps
    "meanflow": ("energy", 0.6, {}),
    "shortcut": ("energy", 0.4, {}),
    "consistency": ("energy", 0.25, {}),
    "consistency_fm": ("energy", 0.3, {}),
    "imm": ("energy", 0.6, {"particles": 32, "lr": 5e-3}),
    **dict.fromkeys(("fgm", "sid", "dmd", "realuid"), ("energy", 0.35, {"start": 0.0, "lr": 1e-3})),
    **dict.fromkeys(("distill", "instaflow", "lagrangian"), ("energy", 0.2, {})),
}
BEATS_STEPS, BEATS_BATCH = 80, 128


def energy_to_teacher(planned: Planned, place: Place, weights: dict[str, Tensor], folder: Path) -> float:
    """Of a model with these weights, in as few calls as it is made for."""
    teacher = load(place.teacher)
    save_model(folder, weights, planned.config)
    steps = {"velocity": 8}.get(planned.plan.rule.kind, planned.plan.rule.default_steps or 1)
    own, other = load(folder).sample(400, steps=steps, seed=0), teacher.sample(400, steps=16, seed=1)
    return float(energy(own, other))


@pytest.mark.parametrize("method", METHODS)
def test_a_short_training_beats_its_start(tmp_path: Path, place_of: PlaceOf, method: str) -> None:
    measure, share, changes = BEATS.get(method, ("energy", 0.6, {"lr": 1e-2}))
    place, samples = place_of(VECTOR, "plain"), BEATS_STEPS * BEATS_BATCH
    planned = plan_case(place, method, tmp_path, **{"batch_size": BEATS_BATCH, "samples": samples, **changes})
    start = {name: value.clone() for name, value in planned.plan.student.state_dict().items()}
    lines: list[dict[str, Any]] = []
    trainer = planned.trainer()
    trainer.log = lines.append
    for number, (phase, objective, batches) in enumerate(planned.phases()):
        trainer.train(number, phase.samples, objective, batches, phase.name)
    if measure == "energy":
        before, after = (
            energy_to_teacher(planned, place, weights, tmp_path / "model") for weights in (start, trainer.ema.state)
        )
    else:
        values = [line["terms"]["loss"] for line in lines if line.get("terms")]
        before, after = (sum(some) / len(some) for some in (values[:10], values[-10:]))
    assert 0.0 <= after <= share * before, f"{measure} was {before:.4f} and is {after:.4f} (see BEATS)"


SCRIPT = """
import sys
from pathlib import Path
from test_contract import work

work(Path(sys.argv[1]), Path(sys.argv[2]))
"""
SHORT = 4 * BATCH  # samples of a stage


class Numbers:
    """The numbers of the samples, as rows."""

    facts = Facts(independent=False, deterministic=True)

    def batch(self, start: int, count: int, generator: torch.Generator) -> Pair:
        rows = torch.arange(start, start + count, dtype=torch.float32)[:, None]
        return Pair(rows, rows)


class Grouped(Objective):
    """Rows in groups of three; gathers what each process has."""

    group = 3

    def __init__(self, student: nn.Module) -> None:
        self.modules = {"student": student}
        self.gathered: list[list[float]] = []
        self.own: list[list[float]] = []

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> dict[str, Tensor]:
        out = nets["student"](batch.x0)
        rows = LocalWorld(quiet=True).gather(batch.x0 + 0.0 * out)
        assert not rows.requires_grad, "it has no graph"
        self.gathered.append(rows[:, 0].tolist())
        self.own.append(batch.x0[:, 0].tolist())
        return {"loss": out.square().mean()}


def stages_of(place: Place) -> dict[str, dict[str, Any]]:
    """The methods and, without labels, their variants, as stages of one recipe."""
    cases = METHODS if place.header["conditional"] else [*METHODS, *VARIANTS]
    return {case.replace(", ", "-"): place.stage(case, samples=SHORT) for case in cases}


def places_in(folder: Path) -> list[Place]:
    """The two places below a folder, as :func:`make_place` left them."""
    return [Place(json.loads((found / "header.json").read_text()), found / "run/teacher") for found in folder.iterdir()]


def work(out: Path, places: Path) -> None:
    """What one process and what two processes do."""
    torch.set_num_threads(1)
    for place in places_in(places):
        recipe = place.recipe(**stages_of(place))
        run_recipe(recipe, out / ("labels" if recipe.conditional else "plain"), LocalWorld(quiet=True))
    world = LocalWorld(quiet=True)
    grouped = Grouped(nn.Linear(1, 1))
    Trainer(grouped.modules["student"], small_options(batch_size=12), (0, "s"), world).train(
        0, 24, grouped, Numbers(), ""
    )
    told = {"gathered": grouped.gathered, "own": grouped.own}
    (out / f"rank-{world.rank}-of-{world.size}.json").write_text(json.dumps(told))


def launch(folder: Path, out: Path, places: Path) -> None:
    """Do the work in two processes."""
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
    }
    (folder / "script.py").write_text(SCRIPT)
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments += [str(folder / "script.py"), str(out), str(places)]
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process wrote, and what two wrote."""
    folder = tmp_path_factory.mktemp("worlds")
    for setting in ("plain", "labels"):
        place = make_place(folder / "places" / setting, VECTOR, setting)
        (folder / "places" / setting / "header.json").write_text(json.dumps(place.header))
    threads = torch.get_num_threads()
    work(folder / "one", folder / "places")
    torch.set_num_threads(threads)
    launch(folder, folder / "two", folder / "places")
    return folder / "one", folder / "two"


def statistics(out: Path, stage: str) -> list[dict[str, float]]:
    """The terms of a stage, line by line."""
    lines = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    return [line["terms"] for line in lines if line["stage"] == stage and line.get("terms")]


@pytest.mark.parametrize(
    ("setting", "case"), [*(("plain", case) for case in [*METHODS, *VARIANTS]), *(("labels", case) for case in METHODS)]
)
def test_two_processes_learn_as_one(worlds: tuple[Path, Path], case: str, setting: str) -> None:
    """Terms and weights. Differences of nearly equal values, and penalties near zero, have fewer right digits."""
    stage = case.replace(", ", "-")
    one, two = (out / setting for out in worlds)
    here, there = statistics(one, stage), statistics(two, stage)
    assert len(here) == len(there) >= SHORT // BATCH  # a phase that ends within a batch makes one step more
    for own, other in zip(here, there, strict=True):
        assert other == pytest.approx(own, rel=1e-3, abs=5e-5)
    for name, value in read_tensors(one / stage / "model.safetensors").items():
        torch.testing.assert_close(read_tensors(two / stage / "model.safetensors")[name], value, rtol=1e-4, atol=1e-5)


def test_rows_are_gathered_in_the_order_of_the_global_batch_and_groups_stay_whole(worlds: tuple[Path, Path]) -> None:
    one, two = worlds
    alone = json.loads((one / "rank-0-of-1.json").read_text())
    told = [json.loads((two / f"rank-{rank}-of-2.json").read_text()) for rank in range(2)]
    steps = [[float(number) for number in range(12 * step, 12 * step + 12)] for step in range(2)]
    assert alone["gathered"] == told[0]["gathered"] == told[1]["gathered"] == alone["own"] == steps
    for rank, process in enumerate(told):
        assert process["own"] == [rows[6 * rank : 6 * rank + 6] for rows in steps]  # two groups of three
