"""Options: former names, robust losses where targets are noisy, and combinations that would be another method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.data.load import load_data
from fewstep.errors import UserError
from fewstep.flow.noise import generator_for
from fewstep.methods.registry import METHODS
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.training.world import LocalWorld

FORMER = [(method, old, new) for method, spec in METHODS.items() for old, new in spec.options.old_names.items()]
VALUES = {"guided": 0.5, "share": 0.4, "stages": 3, "steps": "euler", "real": "both"}


def recipe_of(stage: dict[str, Any], data: Any = "moons") -> Any:
    stages = {"flow": {"method": "flow_matching"}, "stage": stage}
    return make_recipe({"data": data, "stages": stages}, "x")


@pytest.mark.parametrize(("method", "old", "new"), FORMER)
def test_a_former_name_is_read_with_a_message_that_names_the_present_one(method: str, old: str, new: str) -> None:
    stage = {"method": method, "teacher": "flow", old: VALUES[old]}
    with pytest.warns(FutureWarning, match=f"option '{old}' is now called '{new}'"):
        options = recipe_of(stage).stages["stage"]
    assert options.model_dump()[new] == VALUES[old]
    with pytest.raises(UserError, match=f"{old} is the former name of {new}, and both are given"):
        recipe_of({**stage, new: VALUES[old]})


def test_no_word_names_two_things_in_the_options_of_methods() -> None:
    """The words that had several meanings: each is left with one."""
    users = {word: [m for m, spec in METHODS.items() if word in spec.options.model_fields] for word in VALUES}
    assert users["guided"] == users["stages"] == []
    assert users["real"] == ["reflow"]
    assert users["share"] == ["slimflow"]
    for method in users["steps"]:  # calls of the student
        assert METHODS[method].options.model_fields["steps"].annotation is int


NOISY = {
    "flow matching": {"method": "flow_matching"},
    "transport in the batch": {"method": "flow_matching", "coupling": "ot"},
    "reflow": {"method": "reflow", "teacher": "flow", "real": "independent"},
    "annealed reflow": {"method": "reflow", "teacher": "flow", "real": "anneal"},
}
SINGLE = {
    "semidiscrete": {"method": "flow_matching", "coupling": "semidiscrete"},
    "inverted": {"method": "reflow", "teacher": "flow"},
    "synthetic alone": {"method": "reflow", "teacher": "flow", "real": "independent", "mix": 1.0},
}


def network_of(stage: dict[str, Any], data: Any) -> dict[str, Any]:
    options = recipe_of(stage, data).stages["stage"]
    return METHODS[options.method].network(options, load_data(data), {}, 0)


@pytest.mark.parametrize("loss", ["l1", "huber"])
@pytest.mark.parametrize("case", NOISY)
def test_a_robust_loss_on_noisy_targets_is_refused_in_few_dimensions(case: str, loss: str) -> None:
    with pytest.raises(UserError, match=f"'loss: {loss}' has its minimum at a median"):
        network_of({**NOISY[case], "loss": loss}, {"name": "moons", "rows": 200})
    assert network_of({**NOISY[case], "loss": loss}, "digits")


@pytest.mark.parametrize("case", SINGLE)
def test_a_robust_loss_is_allowed_where_a_noise_has_one_target(case: str) -> None:
    assert network_of({**SINGLE[case], "loss": "l1"}, {"name": "moons", "rows": 200})


def test_l1_learns_a_smaller_share_of_a_rare_mode() -> None:
    """Why it is refused: two points of shares .2 and .8, the median of the targets in place of their mean."""
    steps, rows = 200, 20_000
    x = torch.randn(rows, generator=generator_for("l1"), dtype=torch.float64)
    for k in range(steps):
        t = k / steps
        logits = -0.5 * ((x[:, None] - t * torch.tensor([1.0, -1.0])) / (1 - t)) ** 2
        likely = torch.softmax(logits + torch.tensor([0.2, 0.8]).log(), 1)[:, 0]
        # of two targets the median is the likelier one
        target = torch.where(likely > 0.5, 1.0, -1.0)
        x = x + (target - x) / (1 - t) / steps
    share = float((x > 0).double().mean())
    assert 0.02 < share < 0.15


def test_the_note_on_a_robust_loss_is_said_once_for_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = {"method": "flow_matching", "loss": "huber", "samples": 256}
    recipe = make_recipe({"data": "digits", "network": {"preset": "tiny"}, "stages": {"flow": stage}}, "x")
    run_recipe(recipe, tmp_path, LocalWorld())
    assert capsys.readouterr().out.count("note: 'loss: huber' on noisy targets weights rows by their error") == 1


@pytest.mark.parametrize(("segments", "gap"), [(20, 0.05), (4, 0.25), (2, 0.6)])
def test_segments_shorter_than_the_gap_are_refused(segments: int, gap: float) -> None:
    with pytest.raises(UserError, match="which is flow matching"):
        recipe_of({"method": "consistency_fm", "segments": segments, "gap": gap})
    assert recipe_of({"method": "consistency_fm", "segments": segments, "gap": 0.9 / segments})


def test_features_alone_can_follow_the_regression(tmp_path: Path) -> None:
    """InstaFlow as published: the loss of the second phase is the weighted distance of features alone."""
    with pytest.raises(UserError, match="'reconstruction: 0' leaves the features' distance alone, and no features"):
        recipe_of({"method": "instaflow", "teacher": "flow", "reconstruction": 0})
    np.save(tmp_path / "rows.npy", torch.randn(300, 4, generator=generator_for("rows")).numpy())
    quick = {"samples": 2560, "batch_size": 128}
    stages = {
        "look": {"method": "features", **quick},
        "flow": {"method": "flow_matching", **quick},
        "onestep": {
            "method": "instaflow", "teacher": "flow", "features": "look", "reconstruction": 0, "shares": [1, 1, 0],
            "pairs": 256, "nfe": 4, "tolerance": 5, **quick,
        },
    }  # fmt: skip
    header = {"data": {"path": str(tmp_path / "rows.npy")}, "network": {"name": "mlp", "preset": "tiny"}}
    run_recipe(make_recipe({**header, "stages": stages}, "x"), tmp_path / "out", LocalWorld(quiet=True))
    lines = [json.loads(line) for line in (tmp_path / "out" / "stats.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["stage"] == "onestep" and "terms" in line]
    assert {line["phase"] for line in own} == {0, 1}
    assert all(set(line["terms"]) == {"loss"} for line in own)
