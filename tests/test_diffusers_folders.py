"""Folders of diffusers as models: in recipes, in every verb, and back into a folder of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep as fs
from conftest import cheapen_comparisons, quietly
from diffusers_cases import CASES, diffusers
from fewstep.cli.main import main
from fewstep.errors import UserError
from fewstep.interop.diffusers_folders import is_diffusers_folder, read_network_config
from fewstep.interop.diffusers_networks import rebuilt, save_diffusers
from fewstep.interop.open_model import folder_kind
from fewstep.networks.adapter import Adapter
from fewstep.pipeline import recipe as recipes

UNET: dict[str, Any] = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4,
    "block_out_channels": (8,), "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
}  # fmt: skip
SMALL = "samples: 256, batch_size: 32"
PAIRS = "pairs: 64, nfe: 4, tolerance: 100"


def unet(**changes: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = diffusers.UNet2DModel(**{**UNET, **changes}).eval()
        for parameter in module.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved UNet2DModel, one with ten classes and a null class, and a saved pipeline."""
    place = tmp_path_factory.mktemp("diffusers")
    unet().save_pretrained(place / "unet")
    unet(num_class_embeds=11).save_pretrained(place / "labelled")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    diffusers.DDPMPipeline(unet(), scheduler).save_pretrained(place / "pipeline")
    (place / "pipeline/scheduler/scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000})
    )
    return place


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A recipe's run on the saved network. Do not write to it."""
    (folder / "r.yaml").write_text(
        f"data: digits\nstages:\n"
        f"  onestep: {{method: distill, teacher: {folder / 'unet'}, {SMALL}, {PAIRS}}}\n"
        f"  mean: {{method: meanflow, init: {folder / 'unet'}, {SMALL}}}\n"
        f"  more: {{method: distill, teacher: {folder / 'pipeline'}, {SMALL}, {PAIRS}}}\n"
        "compare: {steps: [1], samples: 40}\n",
        encoding="utf-8",
    )
    with pytest.MonkeyPatch.context() as patch:
        cheapen_comparisons(patch)
        quietly("run", folder / "r.yaml", "--out", folder / "out")
    return folder / "out"


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_folders_are_told_apart_without_reading_weights(folder: Path, run: Path, tmp_path: Path) -> None:
    assert is_diffusers_folder(folder / "unet")
    assert is_diffusers_folder(folder / "pipeline")
    assert not is_diffusers_folder(run / "onestep")
    assert not is_diffusers_folder(tmp_path)
    for name in ("unet", "labelled"):  # the configuration alone
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((folder / name / "config.json").read_bytes())
        assert read_network_config(tmp_path / name)[0] == "UNet2DModel"
        kind = folder_kind(tmp_path / name)
        assert (kind.kind, kind.guidance, kind.labels) == ("velocity", None, name == "labelled")
    assert folder_kind(run / "onestep").kind == "map"
    with pytest.raises(UserError, match="no model"):
        folder_kind(tmp_path / "nothing")


def test_a_recipe_is_checked_without_opening_the_teacher(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "unet/config.json").read_bytes())
    stages = {"one": {"method": "distill", "teacher": str(tmp_path)}}
    recipes.make_recipe({"data": "digits", "stages": stages}, "here")  # there are no weights to read


@pytest.mark.parametrize("name", ["onestep", "mean", "more"])
def test_a_student_goes_back_into_the_format_of_diffusers(run: Path, tmp_path: Path, name: str) -> None:
    model = fs.load(run / name)  # its network is built again from what config.json records
    assert type(model.inner) is diffusers.UNet2DModel
    assert isinstance(model.module, Adapter)
    x0 = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    save_diffusers(model.module, tmp_path)
    again = fs.from_diffusers(tmp_path)
    t = torch.tensor([0.0, 0.3, 0.9, 0.5])
    for one, other in zip(again.state_dict().values(), model.module.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        torch.testing.assert_close(again(x0, t), model.module(x0, t))
        if name == "mean":
            r = torch.tensor([1.0, 0.7, 1.0, 0.5])
            torch.testing.assert_close(again(x0, t, r), model.module(x0, t, r))
            assert (again(x0, t, r) - again(x0, t)).abs().max() > 1e-6
    torch.testing.assert_close(fs.load(tmp_path).draw(noise=x0, steps=1).x, fs.solve(again, x0, steps=1).x)
    if name != "mean":
        torch.testing.assert_close(fs.solve(again, x0, steps=1).x, model.draw(noise=x0, steps=1).x)
    plain = diffusers.UNet2DModel.from_pretrained(tmp_path)
    assert plain.state_dict().keys() == unet().state_dict().keys()


def test_the_student_starts_from_the_teachers_weights(folder: Path, tmp_path: Path) -> None:
    """With a learning rate of nearly zero it stays there; the pipeline's network is the same one."""
    for teacher in ("unet", "pipeline"):
        few = fs.train(
            "distill", teacher=folder / teacher, data="digits", out=tmp_path / teacher, samples=32, batch_size=32,
            pairs=64, nfe=4, tolerance=100, lr=1e-12, quiet=True,
        )  # fmt: skip
        for name, value in few.inner.state_dict().items():
            assert torch.allclose(value, unet().state_dict()[name], atol=1e-6), name


@pytest.mark.usefixtures("quick_comparison")
def test_every_verb_takes_the_folder(folder: Path, run: Path, tmp_path: Path) -> None:
    for name in ("unet", "pipeline"):
        quietly("sample", folder / name, "--num", 3, "--steps", 2, "--out", tmp_path / "x.npy")
        x = np.load(tmp_path / "x.npy")
        expected = fs.Generator(fs.from_diffusers(unet()), shape=(1, 8, 8)).sample(3, steps=2)
        np.testing.assert_allclose(x, expected.numpy(), atol=1e-5)
    said = quietly("compare", folder / "unet", run / "onestep", "--data", "digits", "--steps", 1, "--samples", 40)
    assert "| unet" in said
    assert "| onestep" in said
    assert main(["check", str(folder / "unet"), "--data", "digits"]) in (0, 1)  # a network that was not trained


@pytest.mark.usefixtures("quick_comparison")
def test_the_python_comparison_takes_the_folder_too(folder: Path, run: Path) -> None:
    found = fs.compare([folder / "unet", run / "onestep"], "digits", steps=[1], samples=40, say=None)
    assert [row["model"] for row in found.rows][:2] == ["UNet2DModel", "onestep"]
    said = quietly("compare", folder / "unet", "--data", "digits", "--steps", 1, "--samples", 40)
    assert f"{found.rows[0]['scores']['energy']:.4f}" in said  # in the units of the data's network in both


@pytest.mark.slow
def test_diagnose_takes_the_folder(folder: Path) -> None:
    assert "straightness" in quietly("diagnose", folder / "unet", "--num", 2, "--calls", "none")


@pytest.mark.slow
def test_check_finds_a_wrong_sign_in_a_folder(folder: Path, run: Path, tmp_path: Path) -> None:
    """The same saved weights, once as they were trained and once with the opposite sign."""
    few = fs.train(
        "flow_matching", network=fs.from_diffusers(unet()), data="digits", out=tmp_path / "teacher", samples=30_000,
        batch_size=128, lr=2e-3, quiet=True,
    )  # fmt: skip
    assert isinstance(few.module, Adapter)
    save_diffusers(few.module, tmp_path / "right")
    save_diffusers(fs.from_diffusers(few.inner, sign=1.0), tmp_path / "wrong")
    said = quietly("check", tmp_path / "right", "--data", "digits")
    assert "no fault found" in said
    assert main(["check", str(tmp_path / "wrong"), "--data", "digits"]) == 1


def test_labels_of_a_network_and_of_a_recipe_must_agree(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, conditional, words in (("labelled", False, "takes labels"), ("unet", True, "takes no labels")):
        (tmp_path / "r.yaml").write_text(
            f"data: digits\nconditional: {str(conditional).lower()}\n"
            f"stages: {{one: {{method: distill, teacher: {folder / name}}}}}\n",
            encoding="utf-8",
        )
        assert words in refused(capsys, "run", tmp_path / "r.yaml", "--out", tmp_path / "out")
    quietly("sample", folder / "labelled", "--num", 2, "--steps", 1, "--label", 3, "--out", tmp_path / "x.npz")
    assert np.load(tmp_path / "x.npz")["label"].tolist() == [3, 3]


def test_a_labelled_network_distils_with_the_classes_of_the_data(folder: Path, tmp_path: Path) -> None:
    few = fs.train(
        "distill", teacher=folder / "labelled", data="digits", out=tmp_path / "few", samples=64, batch_size=32,
        pairs=64, nfe=4, tolerance=100, quiet=True,
    )  # fmt: skip
    assert len(few.config.class_weights) == 10
    assert few.sample(2, label=7).shape == (2, 8, 8)


def test_the_record_builds_the_network_again(folder: Path, run: Path) -> None:
    for name in ("UNet2DModel", "DiTTransformer2DModel", "SD3Transformer2DModel"):
        net = fs.from_diffusers(CASES[name].module())
        description = json.loads(json.dumps(net.describe()))
        assert description == net.describe()
        again = rebuilt(description)
        assert again is not None
        assert again.describe() == net.describe()
        again.load_state_dict(net.state_dict())
        x, cond, t = CASES[name].start(), CASES[name].cond(7), torch.tensor([0.1, 0.2, 0.9])
        with torch.no_grad():
            assert torch.equal(again(x, t, **cond), net(x, t, **cond))
    other = fs.from_diffusers(unet(), sign=1.0, time_scale=1.0).describe()
    again = rebuilt(other)
    assert again is not None
    assert again.describe() == other
    assert rebuilt({"name": "mlp"}) is None
    assert rebuilt({**other, "lora": {"rank": 2}}) is None  # the base is not in the folder
    with pytest.raises(UserError, match="no class of diffusers"):
        rebuilt({"diffusers": {"call": {"kind": "Path"}, "config": {}}})


def test_text_conditions_come_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES["SD3Transformer2DModel"]
    case.module().save_pretrained(tmp_path / "sd3")
    cond = case.cond(7)
    np.savez(tmp_path / "cond.npz", **{name: rows.numpy() for name, rows in cond.items()})
    wish = ("sample", tmp_path / "sd3", "--num", len(case.start()), "--steps", 2, "--out", tmp_path / "x.npz")
    assert "--cond FILE.npz" in refused(capsys, *wish)
    quietly(*wish, "--cond", tmp_path / "cond.npz")
    expected = fs.load(tmp_path / "sd3").sample(len(case.start()), steps=2, cond=cond)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npz")["x"], expected.numpy())


def test_a_module_for_a_folder_of_diffusers_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="leave the module out"):
        fs.load(folder / "unet", module=torch.nn.Identity())
