from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fewstep.errors import UserError
from fewstep.metrics import (
    Scores,
    data_rows,
    energy,
    energy_floor,
    evaluate,
    frechet_distance,
    moment_matched_gaussian,
    nearest_neighbour_check,
    prdc,
    sample_count,
    sliced_w2,
)

DIGITS = (load_digits().data / 8 - 1).astype(np.float32).reshape(-1, 1, 8, 8)
ORDER = np.random.default_rng(0).permutation(len(DIGITS))
TRAIN, HELD_OUT = DIGITS[ORDER[180:]], DIGITS[ORDER[:180]]


@pytest.fixture(scope="module")
def gaussian() -> Scores:
    return evaluate(moment_matched_gaussian(TRAIN, len(TRAIN)), TRAIN, HELD_OUT)


def test_the_gaussian_control_on_digits_has_a_good_energy_and_no_precision(gaussian: Scores) -> None:
    assert gaussian.energy < 0.02  # as good as a trained model (energy about .016), and ...
    assert gaussian.precision < 0.15  # ... nearly none of its samples looks like a digit
    assert gaussian.fd_percent < 1.0
    assert gaussian.memorised_flag is False
    assert gaussian.energy_floor == pytest.approx(0.0075, rel=0.05)


def test_the_training_data_score_best_and_are_flagged() -> None:
    scores = evaluate(data_rows(TRAIN, len(TRAIN)), TRAIN, HELD_OUT)
    assert scores.energy == pytest.approx(0.0, abs=1e-9)
    assert scores.fd == pytest.approx(0.0, abs=1e-9)
    assert (scores.precision, scores.recall, scores.coverage) == (1.0, 1.0, 1.0)
    assert scores.density == pytest.approx(1.0, abs=0.02)
    assert scores.copied == pytest.approx(1.0)
    assert scores.memorised_flag is True


def test_real_data_that_were_not_seen_score_their_floors() -> None:
    half = len(TRAIN) // 2
    scores = evaluate(TRAIN[:half], TRAIN[half:], HELD_OUT)
    assert abs(scores.energy - scores.energy_floor) < 3 * scores.energy_floor_sd
    assert scores.energy_held_out is not None
    assert scores.energy_held_out_floor is not None
    assert scores.energy_held_out == pytest.approx(scores.energy_held_out_floor, rel=0.3)
    assert scores.sliced_w2 == pytest.approx(scores.sliced_w2_floor, rel=0.1)
    assert scores.coverage == pytest.approx(scores.coverage_floor, abs=0.02)
    assert scores.memorised_flag is False


def test_each_score_is_that_of_its_own_function(gaussian: Scores) -> None:
    fake = moment_matched_gaussian(TRAIN, len(TRAIN))
    whole, held = energy(fake, TRAIN), energy(fake, HELD_OUT)
    assert (gaussian.energy, gaussian.energy_se) == pytest.approx((whole.value, whole.standard_error))
    assert (gaussian.energy_held_out, gaussian.energy_held_out_se) == pytest.approx((held.value, held.standard_error))
    assert gaussian.energy_floor == pytest.approx(energy_floor(TRAIN, len(TRAIN)).value)
    assert gaussian.energy_held_out_floor == pytest.approx(energy_floor(TRAIN, len(TRAIN), 180).value)
    assert gaussian.sliced_w2 == sliced_w2(fake, TRAIN)
    assert gaussian.fd == frechet_distance(fake, TRAIN).value
    assert gaussian.recall == prdc(TRAIN, fake).recall
    assert gaussian.copied == nearest_neighbour_check(fake, TRAIN, HELD_OUT).copied.value


def test_scores_travel_as_json_under_the_name_of_their_features(gaussian: Scores) -> None:
    row = gaussian.as_dict()
    assert json.loads(json.dumps(row)) == row
    assert row["FD-pixels"] == gaussian.fd
    assert "fd" not in row
    assert row["n_generated"] == row["n_reference"] == len(TRAIN)


def test_features_are_named_and_used_for_the_frechet_distance() -> None:
    def pooled(x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1:] == (1, 8, 8)
        assert len(x) <= 500
        return torch.nn.functional.avg_pool2d(x, 2).flatten(1)

    fake = moment_matched_gaussian(TRAIN, 700)
    scores = evaluate(fake, TRAIN, features=pooled, features_name="pool4", neighbours_in="features")
    a, b = (torch.nn.functional.avg_pool2d(torch.as_tensor(t), 2).flatten(1) for t in (fake, TRAIN))
    assert scores.as_dict()["FD-pool4"] == pytest.approx(frechet_distance(a, b).value)
    assert scores.precision == prdc(b, a).precision
    assert scores.neighbours_in == "pool4"
    in_pixels = evaluate(fake, TRAIN, features=pooled, features_name="pool4")
    assert in_pixels.precision == prdc(TRAIN, fake).precision
    assert in_pixels.neighbours_in == "pixels"


def test_sizes_follow_the_protocol() -> None:
    assert [sample_count(n) for n in (10, 4000, 60000)] == [10, 4000, 4000]
    train = torch.randn(10500, 2, generator=torch.Generator().manual_seed(0))
    fake = torch.randn(4100, 2, generator=torch.Generator().manual_seed(1))
    scores = evaluate(fake, train)
    assert (scores.n_generated, scores.n_reference, scores.n_held_out) == (4000, 10000, 0)
    assert scores.memorised is None
    assert scores.energy_held_out is None
    assert scores.energy == pytest.approx(energy(data_rows(fake, 4000), data_rows(train, 10000)).value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": torch.nn.Identity()}, "features and features_name go together"),
        ({"features_name": "cnn"}, "features and features_name go together"),
        ({"neighbours_in": "features"}, "needs an extractor"),
        ({"neighbours_in": "pixel"}, "did you mean 'pixels'"),
        ({"held_out": torch.zeros(5, 3)}, "held_out has 3"),
        ({"features": lambda x: x[:1], "features_name": "bad"}, "features gave .* rows for 50 samples"),
    ],
)
def test_wrong_arguments_are_refused_with_the_fix(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(TRAIN[:50], TRAIN[:100], **arguments)  # type: ignore[arg-type]


def test_more_rows_than_are_scored_are_drawn_from_and_not_cut_off() -> None:
    """The rows of a sorted file have their own law; its first 4000 of 9000 have another one."""
    rows = torch.randn(9000, 2, generator=torch.Generator().manual_seed(3))
    rows = rows[rows[:, 0].argsort()]
    scores, mixed = (
        evaluate(rows, rows),
        evaluate(rows[torch.randperm(9000, generator=torch.Generator().manual_seed(4))], rows),
    )
    assert scores.energy < scores.energy_floor + 4 * scores.energy_floor_sd
    assert scores.fd < 10 * mixed.fd + 1e-3
