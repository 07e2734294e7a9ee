"""Every shipped recipe can be read and planned, and begins with a comment."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from conftest import quietly
from fewstep.data.builtin import DATA
from fewstep.pipeline import dry
from fewstep.pipeline.recipe import load_recipe, shipped_recipes

RECIPES = shipped_recipes()


def small_idx(path: Path, count: int = 60) -> Path:
    """An idx file of noise images, 28 x 28."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(count, 28, 28), dtype=np.uint8)
    path.write_bytes(struct.pack(">IIII", 0x803, count, 28, 28) + pixels.tobytes())
    return path


def test_the_shipped_recipes_are_those_in_the_checkout() -> None:
    folder = Path(__file__).parents[1] / "recipes"
    assert set(RECIPES) == {path.stem for path in folder.glob("*.yaml")}
    assert {"digits", "digits_conditional", "fashion_mnist", "toy2d"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_is_read_and_begins_with_a_comment(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.stages
    assert RECIPES[name].read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_is_planned(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry, "TIMING_SECONDS", 0.0)  # one row through every network
    data = load_recipe(name).header.data
    built_in = (data if isinstance(data, str) else data.get("name", "")) in DATA
    change = [] if built_in else ["--set", f"data.path={small_idx(tmp_path / 'x-idx3-ubyte')}"]
    said = quietly("run", name, "--out", tmp_path / "out", "--dry", *change)
    for stage in load_recipe(name).stages:
        assert f"\n{stage} " in said
    assert "minutes on this machine" in said
    assert not (tmp_path / "out").exists()
