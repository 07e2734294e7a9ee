"""What the trainer does for objectives: groups of rows, rows beside the batch, state, modes, random streams."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.flow.couplings import Facts, Pair
from fewstep.flow.noise import Draws
from fewstep.methods.contract.objective import Learning, Networks, Objective, Terms
from fewstep.methods.training_pairs.batches import GroupedOrder
from fewstep.training.sharding import check_groups, local_pair, process_rows
from training_cases import BATCH, Net, Noise, Regression, TwoPlayers, start


class Processes:
    """One of several processes, as far as the sharing of rows asks."""

    device = torch.device("cpu")

    def __init__(self, size: int, rank: int = 0) -> None:
        self.size, self.rank = size, rank


@pytest.mark.parametrize(
    ("batch", "group", "size", "least"), [(8, 3, 1, 3), (8, 16, 1, 16), (12, 4, 2, 8), (8, 8, 2, 16), (6, 2, 2, 4)]
)
def test_a_batch_that_would_split_a_group_is_refused(batch: int, group: int, size: int, least: int) -> None:
    with pytest.raises(UserError, match=rf"batch_size {batch} does not divide into groups of {group}.*of {least}\."):
        check_groups(Processes(size), batch, group)  # type: ignore[arg-type]


def test_the_trainer_checks_the_groups_of_an_objective_before_it_trains() -> None:
    class Grouped(Regression):
        group = 3

    student = Net()
    run = start(student)
    with pytest.raises(UserError, match="make it a multiple of 3"):
        run.trainer.train(0, BATCH, Grouped(student), Noise(), "test")
    assert run.trainer.position.step == 0


@pytest.mark.parametrize(("batch", "group", "size"), [(8, 4, 2), (24, 3, 4), (16, 1, 2), (8, 8, 1), (12, 6, 2)])
def test_groups_stay_whole_on_every_process(batch: int, group: int, size: int) -> None:
    number = torch.arange(batch) // group
    pair = Pair(number[:, None].float(), number[:, None].float())
    shares = []
    for rank in range(size):
        world: Any = Processes(size, rank)
        check_groups(world, batch, group)
        own = local_pair(pair, process_rows(world, batch), batch, world.device)
        _, counts = own.x0[:, 0].unique(return_counts=True)
        assert counts.tolist() == [group] * (batch // size // group)
        shares.append(own.x0)
    assert torch.equal(torch.cat(shares), pair.x0)


@pytest.mark.parametrize("beside", [0, 1, 3, 8, 13, 40])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_beside_the_batch_are_shared_out_and_draws_go_with_them(size: int, beside: int) -> None:
    """Every row has one process, in order, shares differ by one row at most, and draws are cut as the rows are."""
    pair = Pair(torch.zeros(BATCH, 1), torch.zeros(BATCH, 1), beside={"real": torch.arange(beside)})
    whole = Draws(torch.Generator().manual_seed(3), BATCH).of(beside)
    uniform, normal = whole.uniform(), whole.normal((2,))
    parts, found = [], []
    for rank in range(size):
        world: Any = Processes(size, rank)
        rows = process_rows(world, BATCH)
        own = local_pair(pair, rows, BATCH, world.device).beside["real"]
        draws = Draws(torch.Generator().manual_seed(3), BATCH, rows).of(beside)
        assert draws.batch == beside
        mine = draws.uniform(), draws.normal((2,))
        assert torch.equal(mine[0], uniform[own])
        assert torch.equal(mine[1], normal[own])
        parts.append(own)
        found.append(len(own))
    assert torch.equal(torch.cat(parts), torch.arange(beside))
    assert max(found) - min(found) <= 1


LABELS = torch.tensor([2] * 37 + [0] * 12 + [5] * 3 + [1] * 8)[
    torch.randperm(60, generator=torch.Generator().manual_seed(0))
]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_groups_have_one_class_and_epochs_hold_every_row(size: int) -> None:
    order = GroupedOrder(LABELS, size, (0, "key"))
    counts = torch.bincount(LABELS)
    epoch = int(sum(-(-int(count) // size) for count in counts)) * size
    for number in range(3):
        rows = order.indices(number * epoch, epoch)
        kinds = LABELS[rows].view(-1, size)
        assert (kinds == kinds[:, :1]).all()
        assert torch.equal(rows.unique(), torch.arange(60))  # every row, and those that fill a last group again
        found = torch.bincount(LABELS[rows], minlength=len(counts))
        assert torch.equal(found, -(-counts // size) * size)  # shares of the classes, up to one group


def test_the_order_of_groups_is_a_function_of_its_arguments() -> None:
    def order(key: tuple[int | str, ...] = (0, "key")) -> GroupedOrder:
        return GroupedOrder(LABELS, 4, key)

    whole = order().indices(0, 400)
    used = order()
    for first, count in ((200, 16), (0, 4), (60, 12), (64, 240), (396, 4)):  # within epochs, and over their ends
        assert torch.equal(used.indices(first, count), whole[first : first + count])
        assert torch.equal(order().indices(first, count), whole[first : first + count])
    assert not torch.equal(whole[:68], whole[68:136])  # epochs of 68 rows
    assert not torch.equal(order((1, "key")).indices(0, 400), whole)


@pytest.mark.parametrize(("first", "count"), [(2, 4), (4, 6), (1, 1)])
def test_an_order_of_groups_hands_out_whole_groups_alone(first: int, count: int) -> None:
    with pytest.raises(UserError, match="whole groups of 4"):
        GroupedOrder(LABELS, 4, (0, "key")).indices(first, count)


class Stateful(Regression):
    """Proposes the number of its call as the next value of its state, and notes what happens after steps."""

    def __init__(self, student: nn.Module, bad: set[int]) -> None:
        super().__init__(student, lambda step: math.nan if step in bad else None)
        self.state = {"last": torch.tensor(-1.0)}
        self.seen: list[float] = []
        self.after: list[tuple[str, int]] = []

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        self.seen.append(self.state["last"].item())
        return {**super().loss(role, nets, batch, draws, done), "last": torch.tensor(float(self.step))}

    def after_step(self, role: str) -> None:
        self.after.append((role, self.step))


def test_a_term_named_as_state_is_stored_after_an_accepted_update_alone() -> None:
    """A step whose loss is not finite leaves the state, the averages and the weights as they are."""
    student, bad = Net(), {0, 3, 4}
    objective, run = Stateful(student, bad), start(student)
    run.trainer.train(0, 7 * BATCH, objective, Noise(), "test")
    assert objective.seen == [-1, -1, 1, 2, 2, 2, 5]
    assert objective.state["last"].item() == 6
    assert objective.after == [("student", step) for step in (1, 2, 5, 6)]
    assert run.trainer.ema.updates == 4
    assert all("last" not in line["terms"] for line in run.lines)  # it is state, and no term to be logged


def test_after_step_is_called_once_per_accepted_update_of_its_role() -> None:
    class Noted(TwoPlayers):
        def after_step(self, role: str) -> None:
            calls.append((self.step, role))

    calls: list[tuple[int, str]] = []
    bad = {(2, "student"), (3, "discriminator")}
    student = Net()
    game = Noted(student, lambda step, role: math.inf if (step, role) in bad else None)
    start(student).trainer.train(0, 6 * BATCH, game, Noise(), "test")
    turns = [(step, role) for step in range(6) for role in game.turns(step)]
    assert bad < set(turns)
    assert calls == [turn for turn in turns if turn not in bad]


@pytest.mark.parametrize("dropout", [True, False])
def test_a_role_without_dropout_is_in_eval_mode_in_its_own_turn_and_in_others(dropout: bool) -> None:
    class Seen(TwoPlayers):
        def loss(self, role: str, nets: Networks, *rest: Any) -> Terms:
            modes.append((role, nets["student"].training, nets["discriminator"].training))
            return super().loss(role, nets, *rest)

    modes: list[tuple[str, bool, bool]] = []
    student = Net()
    game = Seen(student)
    game.learning = {"discriminator": Learning(dropout=dropout)}
    start(student).trainer.train(0, 2 * BATCH, game, Noise(), "test")
    assert {role for role, _, _ in modes} == {"student", "discriminator"}
    assert {(own, other) for _, own, other in modes} == {(True, dropout)}


class Listening(Objective):
    """Keeps the first numbers of the step's generator and of the one that modules draw from."""

    def __init__(self, student: nn.Module) -> None:
        self.modules = {"student": student}
        self.data: list[Tensor] = []
        self.own: list[Tensor] = []

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        self.data.append(batch.x0)
        self.own.append(torch.rand(64))
        return {"loss": nets["student"](batch.x0[:BATCH, None].expand(-1, 2), draws.uniform()).square().mean()}


class FirstDraws:
    """The first numbers of the step's generator."""

    facts = Facts(independent=False, deterministic=True)

    def batch(self, start: int, count: int, generator: torch.Generator) -> Pair:
        rows = torch.rand(64, generator=generator)
        return Pair(rows, rows)


def test_modules_and_data_draw_from_different_streams() -> None:
    """With one seed for both, a dropout mask would be a function of the batch's own noise."""
    student = Net()
    objective = Listening(student)
    start(student, batch_size=BATCH).trainer.train(0, 5 * BATCH, objective, FirstDraws(), "test")
    data, own = torch.stack(objective.data), torch.stack(objective.own)
    assert not (data[:, :, None] == own.flatten()).any()  # no number of one stream occurs in the other
    assert len(data.unique(dim=0)) == len(own.unique(dim=0)) == 5  # every step has new ones


def test_objectives_that_say_nothing_have_no_groups_no_state_and_learn_as_the_options_say() -> None:
    found: tuple[Mapping[str, Any], ...] = Regression(Net()).state, Regression(Net()).learning
    assert found == ({}, {})
    assert Regression(Net()).group == 1
