"""Batches as functions of (seed, samples seen): orders, mixtures, couplings of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.data.dataset import DataSet
from fewstep.data.load import from_array
from fewstep.flow.couplings import Facts, GaussianSource, Independent, Pair
from fewstep.flow.noise import generator_for
from fewstep.methods.reflow import share_law
from fewstep.methods.training_pairs.batches import DataBatches, EpochOrder, MixedBatches, StoredBatches
from fewstep.store.pairs import PairStore


@pytest.mark.parametrize(("rows", "size"), [(10, 3), (7, 7), (5, 12), (1, 4), (100, 64)])
def test_every_row_is_visited_once_per_epoch(rows: int, size: int) -> None:
    order = EpochOrder(rows, (0, "key"))
    seen = torch.cat([order.indices(start, size) for start in range(0, 6 * rows * size, size)])
    for epoch in range(6):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))


def test_the_order_is_a_function_of_key_and_samples_seen() -> None:
    order = EpochOrder(50, (3, "stage"))
    run = torch.cat([order.indices(start, 8) for start in range(0, 400, 8)])
    for start, count in ((0, 5), (333, 60), (45, 10), (120, 1)):  # in any sequence of calls
        assert torch.equal(EpochOrder(50, (3, "stage")).indices(start, count), run[start : start + count])
        assert torch.equal(order.indices(start, count), run[start : start + count])
    assert not torch.equal(run[:50], run[50:100])
    for key in ((4, "stage"), (3, "other")):
        assert not torch.equal(EpochOrder(50, key).indices(0, 50), run[:50])


def labelled(rows: int = 60) -> tuple[Tensor, Tensor, DataSet]:
    x = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    data = from_array(x, np.arange(rows) % 4, scale="none")
    return torch.from_numpy(x), torch.arange(rows) % 4, data


@pytest.mark.parametrize("cache", [0, 1 << 30])
def test_data_batches_hold_training_rows_with_their_labels(cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataBatches, "CACHE_BYTES", cache)
    x, labels, data = labelled()
    batches = DataBatches(data, Independent(GaussianSource((3,))), ("label",), 0.0, (0, "s"))
    train = sorted(data.train.tolist())
    pair = batches.batch(0, len(train), generator_for(0))
    rows = [int((x == row).all(1).nonzero()) for row in pair.x1]
    assert sorted(rows) == train  # one epoch, and no held-out row
    assert torch.equal(pair.cond["label"], labels[rows])
    # drawn again, at once or in two halves: the same rows
    half = len(train) // 2
    again = [
        batches.batch(0, half, generator_for(0)).x1,
        batches.batch(half, len(train) - half, generator_for(0)).x1,
    ]
    assert torch.equal(torch.cat(again), pair.x1)


def test_dequantisation_adds_noise_of_its_standard_deviation() -> None:
    _, _, data = labelled(2000)
    plain = DataBatches(data, Independent(GaussianSource((3,))), (), 0.0, (0, "s")).batch(0, 1500, generator_for(1))
    noisy = DataBatches(data, Independent(GaussianSource((3,))), (), 0.2, (0, "s")).batch(0, 1500, generator_for(1))
    difference = noisy.x1 - plain.x1
    assert difference.std().item() == pytest.approx(0.2, rel=0.03)
    assert difference.mean().item() == pytest.approx(0.0, abs=0.01)
    assert (difference * noisy.x0).mean().item() == pytest.approx(0.0, abs=0.01)  # noise and x0 are different draws
    assert plain.cond == {}


class Marked:
    """Pairs that carry a mark and the row number."""

    def __init__(self, mark: float) -> None:
        self.mark, self.facts = mark, Facts(independent=False, deterministic=True)

    def batch(self, start: int, count: int, generator: torch.Generator) -> Pair:
        number = torch.arange(start, start + count).float()
        noise = torch.randn(count, generator=generator)
        x = torch.stack([torch.full((count,), self.mark), number, noise], 1)
        return Pair(x, x + 100.0, {"label": (number + 1000 * self.mark).long()})


def mixed(share: Callable[[int], float]) -> MixedBatches:
    return MixedBatches(Marked(1.0), Marked(0.0), share, Facts(independent=False, deterministic=True))


@pytest.mark.parametrize("p", [0.1, 0.4, 0.9, 1.0])
def test_a_mixture_has_its_share_of_synthetic_pairs_and_keeps_rows_whole(p: float) -> None:
    count, batches = 2000, mixed(lambda seen: p)
    pairs = [batches.batch(start, count, generator_for(start)) for start in range(0, 10 * count, count)]
    marks = torch.cat([pair.x0[:, 0] for pair in pairs])
    assert marks.mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / len(marks)) ** 0.5)
    for start, pair in zip(range(0, 10 * count, count), pairs, strict=True):
        assert torch.equal(pair.x1, pair.x0 + 100.0)
        assert torch.equal(pair.cond["label"], (pair.x0[:, 1] + 1000 * pair.x0[:, 0]).long())
        assert torch.equal(pair.x0[:, 1], torch.arange(start, start + count).float())


def test_what_one_side_draws_does_not_depend_on_the_share() -> None:
    few, many = (mixed(lambda seen, p=p: p).batch(0, 500, generator_for(3)) for p in (0.2, 0.8))
    same = few.x0[:, 0] == many.x0[:, 0]
    assert torch.equal(few.x0[same], many.x0[same])
    assert torch.all(many.x0[few.x0[:, 0] == 1.0][:, 0] == 1.0)  # the same rows first


def test_the_share_is_asked_at_the_samples_seen() -> None:
    asked: list[int] = []
    batches = mixed(lambda seen: asked.append(seen) or 0.5)
    for start in (0, 64, 4096):
        batches.batch(start, 64, generator_for(0))
    assert asked == [0, 64, 4096]


@pytest.mark.parametrize(
    ("seen", "expected"), [(0, 0.4), (599, 0.4), (600, 0.4), (650, 0.55), (700, 0.7), (800, 1.0), (1000, 1.0)]
)
def test_the_annealed_share_rises_to_one_between_60_and_80_per_cent(seen: int, expected: float) -> None:
    assert share_law(0.4, 1000, anneal=True)(seen) == pytest.approx(expected, abs=2e-3)
    assert share_law(0.4, 1000, anneal=False)(seen) == 0.4


def test_stored_batches_visit_every_training_pair_once_per_epoch(tmp_path: Path) -> None:
    store = PairStore(tmp_path, {"teacher": "abc"}, 100)
    store.open()
    x0 = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    store.write_shard(0, {"x0": x0, "x1": 2 * x0, "label": torch.arange(100)})
    batches = StoredBatches(store, Facts(independent=False, deterministic=True), (0, "s"))
    index = store.training_rows().index
    assert 90 < len(index) < 100
    pair = batches.batch(0, len(index), generator_for(0))
    assert sorted(pair.cond["label"].tolist()) == index.tolist()
    assert torch.equal(pair.x0, x0[pair.cond["label"]])
    assert torch.equal(pair.x1, 2 * pair.x0)
