"""Networks that are a share of another one: parameter counts, shapes that stay buildable, refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fewstep as fs
from fewstep.errors import UserError
from fewstep.generator import load, read_config
from fewstep.networks import build, parameter_count, resolve
from fewstep.networks.sizes import read_size, shrink
from fewstep.pipeline.opening import open_run
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.training.world import LocalWorld

LARGE = [("mlp", preset, shape) for preset in ("compact", "small", "medium") for shape in ((2,), (64,), (1, 8, 8))]
LARGE += [("unet", preset, (3, 32, 32)) for preset in ("tiny", "small", "base")]


@pytest.mark.parametrize("size", ["1/2", "1/4", 0.125])
@pytest.mark.parametrize(("name", "preset", "shape"), LARGE, ids=str)
def test_a_size_is_the_share_of_parameters(name: str, preset: str, shape: tuple[int, ...], size: float | str) -> None:
    large = resolve({"name": name, "preset": preset}, shape, classes=3)
    small = shrink(large, size)
    share = parameter_count(build(small)) / parameter_count(build(large))
    assert share == pytest.approx(read_size(size), rel=0.1)
    deep = ("blocks", "middle", "patch", "attention", "name", "shape", "classes", "context")
    assert [small[key] for key in deep if key in small] == [large[key] for key in deep if key in large]
    assert resolve(small, shape, classes=3) == small


@pytest.mark.parametrize("name", ["mlp", "unet"])
def test_sizes_rise_with_the_share_never_above_the_whole_and_end_at_a_least_width(name: str) -> None:
    large = resolve({"name": name, "preset": "small"}, (1, 8, 8))
    shares = (1e-6, 0.01, 0.1, 0.3, 0.5, 0.8, 0.999, 1)
    found = [shrink(large, share) for share in shares]
    counts = [parameter_count(build(one)) for one in found]
    assert counts == sorted(counts)
    assert found[-1] == large
    least = found[0]["width"] if name == "mlp" else min(found[0]["widths"])
    assert least == 8
    x = torch.randn(2, 1, 8, 8)
    assert build(found[0])(x, torch.tensor([0.0, 0.5])).shape == x.shape


def test_normalisation_and_attention_keep_their_groups() -> None:
    large = resolve({"name": "unet", "preset": "small"}, (3, 32, 32))
    for number in range(1, 10):
        widths = shrink(large, number / 10)["widths"]
        groups = [nn.GroupNorm(math.gcd(width, max(1, width // 16)), width).num_groups for width in widths]
        assert max(width / count for width, count in zip(widths, groups, strict=True)) <= 42
        low = build(shrink(large, number / 10)).attention  # type: ignore[union-attr]
        assert widths[-1] / low.heads <= 84  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    "size", [0, 0.0, -0.5, 1.5, "5/4", "1/0", "half", True, None, [0.5], float("nan"), float("inf")]
)
def test_a_size_that_is_no_share_is_refused(size: Any) -> None:
    with pytest.raises(UserError, match=r"network.size is .* in \(0, 1\]"):
        read_size(size)


def networks(stages: dict[str, Any], tmp_path: Path, **header: Any) -> dict[str, dict[str, Any]]:
    """The networks of a recipe's stages."""

    fields = {"data": {"name": "moons", "rows": 500}, "stages": stages, **header}
    run = open_run(make_recipe(fields, "test"), tmp_path / "run", LocalWorld(quiet=True))
    return {name: run.network(name) for name in run.recipe.stages}


def test_a_stage_shares_the_network_of_its_own_teacher(tmp_path: Path, tiny_run: Path) -> None:
    stages: dict[str, Any] = {
        "teacher": {"method": "flow_matching", "network": {"name": "mlp", "preset": "medium"}},
        "straight": {"method": "reflow", "teacher": "teacher", "network": {"size": "1/2"}},
        "onestep": {"method": "distill", "teacher": "straight", "network": {"size": 0.5}},
        "slim": {"method": "slimflow", "teacher": "teacher"},
        "outside": {"method": "distill", "teacher": str(tiny_run / "teacher"), "network": {"size": 0.25}},
    }
    found = networks(stages, tmp_path, network={"name": "mlp", "preset": "tiny"})
    counts = {name: parameter_count(build(config)) for name, config in found.items()}
    assert counts["straight"] / counts["teacher"] == pytest.approx(1 / 2, rel=0.05)
    assert counts["onestep"] / counts["teacher"] == pytest.approx(1 / 4, rel=0.05)
    assert found["slim"] == shrink(found["teacher"], 0.25)
    assert found["outside"] == shrink(read_config(tiny_run / "teacher").network or {}, 0.25)


def test_a_size_without_a_teacher_beside_other_keys_or_of_a_foreign_module_is_refused(
    tmp_path: Path, tiny_run: Path
) -> None:
    with pytest.raises(UserError, match="'flow_matching' has no teacher"):
        networks({"teacher": {"method": "flow_matching", "network": {"size": 0.5}}}, tmp_path)
    teacher = str(tiny_run / "teacher")
    stages = {"onestep": {"method": "distill", "teacher": teacher, "network": {"size": 0.5, "width": 32}}}
    with pytest.raises(UserError, match="'size' and 'width'"):
        networks(stages, tmp_path)
    stages = {"onestep": {"method": "distill", "teacher": teacher, "network": {"size": 2}}}
    recipe = make_recipe({"data": {"name": "moons", "rows": 500}, "stages": stages}, "test")
    with pytest.raises(UserError, match=r"stage 'onestep': network.size is 2"):
        run_recipe(recipe, tmp_path / "run", LocalWorld(quiet=True))
    foreign = fs.Generator(load(tiny_run / "teacher").module, shape=(2,)).save(tmp_path / "foreign")
    stages = {"slim": {"method": "slimflow", "teacher": str(foreign)}}
    with pytest.raises(UserError, match="fewstep did not build"):
        networks(stages, tmp_path)


def test_a_kind_of_network_without_sizes_is_refused(tmp_path: Path, tiny_run: Path) -> None:
    shutil.copytree(tiny_run / "teacher", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["network"]["name"] = "other"
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    stages = {"onestep": {"method": "distill", "teacher": str(tmp_path / "other"), "network": {"size": 0.5}}}
    with pytest.raises(UserError, match="'other' has no sizes"):
        networks(stages, tmp_path)
