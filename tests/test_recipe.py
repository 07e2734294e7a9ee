"""Recipes: numbers read leniently, dotted changes, and the resolved recipe that is itself one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fewstep.errors import UserError
from fewstep.methods.reflow import ReflowOptions
from fewstep.pipeline.recipe import apply_change, find_recipe, load_recipe, make_recipe
from fewstep.pipeline.recipe_text import parse_yaml

FIELDS = {
    "data": "moons",
    "network": {"name": "mlp", "preset": "small"},
    "stages": {
        "teacher": "flow_matching",
        "straight": {"method": "reflow", "teacher": "teacher", "rounds": 2, "mix": [0.4, 0.9]},
    },
}


def changed(*changes: str, data: object = "moons") -> dict[str, object]:
    fields = parse_yaml(yaml.safe_dump({**FIELDS, "data": data}, sort_keys=False), "here")
    for change in changes:
        apply_change(fields, change)
    return fields


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        ("1_000_000", 1_000_000),
        ("1e", "1e"),
        ("e5", "e5"),
        ("2e4x", "2e4x"),
        ("digits", "digits"),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, value: object) -> None:
    found = parse_yaml(text, "here")
    assert found == value
    assert type(found) is type(value)


def test_equal_keys_and_merge_keys() -> None:
    with pytest.raises(UserError, match=r"'a' occurs twice .*line 1"):
        parse_yaml("{a: 1, b: 2, a: 3}", "here")
    assert parse_yaml("base: &b {x: 1, y: 2}\nuse: {<<: *b, y: 3}", "here")["use"] == {"x": 1, "y": 3}


def test_a_stage_may_be_only_its_method_and_options_have_the_papers_defaults() -> None:
    recipe = make_recipe(FIELDS, "here")
    assert recipe.stages["teacher"].samples == 1_000_000
    straight = recipe.stages["straight"]
    assert isinstance(straight, ReflowOptions)
    assert straight.shares() == [0.4, 0.9]
    assert recipe.conditional is False


def test_labels_named_in_the_recipe_make_it_conditional_unless_it_says_otherwise() -> None:
    data = {"path": "x.npy", "labels": "y.npy"}
    assert make_recipe({**FIELDS, "data": data}, "here").conditional is True
    assert make_recipe({**FIELDS, "data": data, "conditional": False}, "here").conditional is False
    assert make_recipe({**FIELDS, "conditional": True}, "here").conditional is True


@pytest.mark.parametrize(
    ("change", "data", "result"),
    [
        ("data=digits", "moons", "digits"),
        ("data.path=x.npy", "moons", {"path": "x.npy"}),
        ("data.path=x.npy", {"path": "a.gz", "name": "fashion"}, {"path": "x.npy", "name": "fashion"}),
        ("data.rows=100", "moons", {"name": "moons", "rows": 100}),
        ("data.labels=y.npy", "x.npy", {"path": "x.npy", "labels": "y.npy"}),
        ("data.scale=none", {"path": "x.npy"}, {"path": "x.npy", "scale": "none"}),
    ],
)
def test_set_reaches_into_data_whatever_its_form(change: str, data: object, result: object) -> None:
    assert changed(change, data=data)["data"] == result


def test_set_reaches_stages_networks_and_keys_that_are_not_there_yet() -> None:
    recipe = make_recipe(
        changed(
            "stages.teacher.samples=5",
            "stages.straight.mix=0.7",
            "stages.straight.network.width=32",
            "network.preset=tiny",
            "compare.steps=4",
            "base.samples=50",
            "seed=7",
            data="digits",
        )
        | {"base": "gaussian"},
        "here",
    )
    assert recipe.stages["teacher"].samples == 5
    assert recipe.stages["straight"].mix == (0.7,)  # type: ignore[attr-defined]
    # a stage's network begins as a copy of the shared one
    assert recipe.stages["straight"].network == {"name": "mlp", "preset": "small", "width": 32}
    assert recipe.header.network == {"name": "mlp", "preset": "tiny"}
    assert recipe.header.compare.steps == (4,)
    assert recipe.header.seed == 7


def test_the_resolved_recipe_is_a_recipe_and_resolves_to_itself() -> None:
    for fields in (
        FIELDS,
        changed("data.rows=100", "base=moons", "compare.samples=50", "stages.teacher.lr=1e-4"),
    ):
        resolved = make_recipe(fields, "here").as_dict()
        text = yaml.safe_dump(resolved, sort_keys=False)
        again = make_recipe(parse_yaml(text, "there"), "there")
        assert again.as_dict() == resolved
        assert list(again.stages) == ["teacher", "straight"]


def test_a_shipped_name_goes_before_a_file_of_that_name_and_a_path_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text("not a recipe", encoding="utf-8")
    assert find_recipe("digits").suffix == ".yaml"
    assert find_recipe("digits.yaml") == find_recipe("digits") == find_recipe("recipes/digits.yaml")
    assert find_recipe("./digits") == Path("digits")
    Path("digits.yaml").write_text("data: moons\nstages: {t: flow_matching}\n", encoding="utf-8")
    assert load_recipe("digits.yaml").header.data == "moons"


def test_an_error_shows_only_the_beginning_of_a_long_value() -> None:
    with pytest.raises(UserError) as caught:
        make_recipe({**FIELDS, "seed": list(range(100_000))}, "here")
    assert len(str(caught.value)) < 300


def test_every_fault_of_a_stage_is_named_at_once() -> None:
    stages = {"t": {"method": "flow_matching", "samples": -1, "lr": 0, "loss": "l3"}}
    with pytest.raises(UserError, match=r"stage 't': samples must be.*; .*lr must be.*; .*loss must be"):
        make_recipe({"data": "moons", "stages": stages}, "here")


def test_guidance_may_be_asked_once_along_a_chain_of_stages() -> None:
    stages = {
        "a": "flow_matching",
        "b": {"method": "reflow", "teacher": "a", "guidance": 2},
        "c": {"method": "distill", "teacher": "b"},
    }
    make_recipe({"data": "moons", "conditional": True, "stages": stages}, "here")
    # the baked guidance is inherited: c learned from b, so guiding c's pairs again is guiding twice
    again = {**stages, "d": {"method": "reflow", "teacher": "a", "guidance": 3}}
    make_recipe({"data": "moons", "conditional": True, "stages": again}, "here")
    twice = {
        **stages,
        "c": {"method": "reflow", "teacher": "b"},
        "d": {"method": "distill", "teacher": "c", "guidance": 2},
    }
    with pytest.raises(UserError, match="'c', which has guidance 2 baked in"):
        make_recipe({"data": "moons", "conditional": True, "stages": twice}, "here")
