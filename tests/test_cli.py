"""The command line: what each verb writes and says, and that samples are functions of (seed, number)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fewstep
from conftest import quietly
from fewstep.cli.arguments import LISTS
from fewstep.cli.main import main
from fewstep.cli.verbs import VERBS


def draw(model: Path, out: Path, *options: object) -> np.ndarray:
    quietly("sample", model, "--out", out, *options)
    return np.load(out)


def test_help_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from fewstep.cli.main import main\n"
        "codes = [main([verb, '--help']) for verb in "
        f"{list(VERBS)}]\n"
        "assert codes == [0] * len(codes), codes\n"
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(fewstep.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)


def test_help_names_values_not_types(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "sample"]) == 0
    text = capsys.readouterr().out
    assert "None" not in text
    for words in ("--steps K", "--grid GRID", "--out FILE", "(default: the model's)"):
        assert words in text


def test_usage_names_every_verb_and_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main([]) == 2
    text = capsys.readouterr().out
    assert all(f"\n  {verb}" in text for verb in VERBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{fewstep.__version__}\n"


@pytest.mark.parametrize("what", LISTS)
def test_list_names_what_there_is_and_says_where_it_is_used(what: str) -> None:
    names = {
        "methods": "flow_matching reflow distill",
        "solvers": "euler midpoint heun rk4",
        "data": "eight_gaussians moons checkerboard pinwheel digits PATH",
        "networks": "mlp unet",
        "grids": "uniform shift quadratic",
        "recipes": "digits digits_conditional fashion_mnist toy2d",
    }
    lines = quietly("list", what).splitlines()
    assert {*names[what].split()} <= {line.split()[0] for line in lines if line}
    assert lines[-1].startswith("next  ")


def test_doctor_says_what_this_machine_has() -> None:
    said = quietly("doctor")
    for word in ("python", "torch", "device", "cores", "bf16", "next"):
        assert f"{word} " in said


@pytest.mark.parametrize("stage", ["teacher", "straight", "onestep"])
def test_sample_i_depends_on_the_seed_and_i_alone(tiny_run: Path, tmp_path: Path, stage: str) -> None:
    steps = [] if stage == "onestep" else ["--steps", 3]
    model, out = tiny_run / stage, tmp_path / "x.npy"
    x = draw(model, out, "--num", 500, "--seed", 3, *steps)
    assert x.shape == (500, 2)
    assert x.dtype == np.float32
    fewer = draw(model, out, "--num", 37, "--seed", 3, *steps)
    batched = draw(model, out, "--num", 500, "--seed", 3, "--batch-size", 7, *steps)
    np.testing.assert_allclose(fewer, x[:37], atol=1e-5)
    np.testing.assert_allclose(batched, x, atol=1e-5)
    assert np.abs(draw(model, out, "--num", 500, "--seed", 4, *steps) - x).mean() > 0.1


@pytest.mark.usefixtures("quick_comparison")
def test_samples_are_in_the_units_of_the_data(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(300, 2)) * [1.0, 20.0] + [500.0, -300.0]
    np.save(tmp_path / "rows.npy", rows)
    small = ["--set", "stages.teacher.samples=6_000", "--set", "compare.samples=50"]
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"data: {tmp_path / 'rows.npy'}\nnetwork: {{name: mlp, preset: tiny}}\n"
        "stages: {teacher: flow_matching}\ncompare: {steps: 2}\n",
        encoding="utf-8",
    )
    quietly("run", recipe, "--out", tmp_path / "out", *small)
    x = draw(tmp_path / "out/teacher", tmp_path / "x.npy", "--num", 1000, "--steps", 8)
    np.testing.assert_allclose(x.mean(0), [500.0, -300.0], atol=6.0)
    np.testing.assert_allclose(x.std(0), [1.0, 20.0], rtol=0.35)


SHAPES = [(1,), (7,), (1, 12, 12)]  # (2,): the tests above


@pytest.mark.usefixtures("quick_comparison")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_any_shape_go_from_recipe_to_one_step_samples(tmp_path: Path, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(400, *shape)) + 3.0 * random.integers(2, size=(400, *(1,) * len(shape)))
    np.save(tmp_path / "rows.npy", rows.astype(np.float32))
    (tmp_path / "r.yaml").write_text(
        f"data: {tmp_path / 'rows.npy'}\nstages:\n  teacher: {{method: flow_matching}}\n"
        "  straight: {method: reflow, teacher: teacher}\n"
        "  onestep: {method: distill, teacher: teacher, init: straight}\ncompare: {steps: [1]}\n",
        encoding="utf-8",
    )
    changes = ["compare.samples=50"]
    for stage in ("teacher", "straight", "onestep"):
        changes += [f"stages.{stage}.samples=2_000", f"stages.{stage}.batch_size=128"]
    for stage in ("straight", "onestep"):
        changes += [f"stages.{stage}.pairs=300", f"stages.{stage}.nfe=8", f"stages.{stage}.tolerance=9"]
    changes.append("stages.straight.real=independent")
    options = [word for change in changes for word in ("--set", change)]
    said = quietly("run", tmp_path / "r.yaml", "--out", tmp_path / "out", *options)
    assert f"wrote   {tmp_path / 'out'}: teacher, straight, onestep" in said
    for stage in ("teacher", "straight", "onestep"):
        x = draw(tmp_path / "out" / stage, tmp_path / "x.npy", "--num", 500, "--steps", 1, "--seed", 3)
        assert (x.shape, x.dtype) == ((500, *shape), np.float32)
        # barely trained: the samples are near the data (0 or 3, spread 1.8), not in network units around 0
        assert abs(x.mean() - rows.mean()) < 0.6


def test_npz_holds_what_npy_holds_and_png_is_a_picture(tiny_run: Path, tmp_path: Path) -> None:
    wish = ("--num", 20, "--steps", 2)
    x = draw(tiny_run / "straight", tmp_path / "x.npy", *wish)
    said = quietly("sample", tiny_run / "straight", "--out", tmp_path / "new/x.npz", *wish)
    assert f"wrote {tmp_path / 'new/x.npz'}: 20 samples of shape (2,)" in said
    assert "next  fewstep compare" in said
    np.testing.assert_array_equal(np.load(tmp_path / "new/x.npz")["x"], x)
    quietly("sample", tiny_run / "straight", "--out", tmp_path / "x.PNG", *wish)
    with Image.open(tmp_path / "x.PNG") as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10


def test_an_explicit_grid_is_the_named_one_it_spells_out(tiny_run: Path, tmp_path: Path) -> None:
    model, out = tiny_run / "teacher", tmp_path / "x.npy"
    named = draw(model, out, "--num", 30, "--steps", 4)
    np.testing.assert_allclose(draw(model, out, "--num", 30, "--grid", "0,.25,.5,.75,1"), named, atol=1e-6)
    both = draw(model, out, "--num", 30, "--grid", "0,.25,.5,.75,1", "--steps", 4)
    np.testing.assert_allclose(both, named, atol=1e-6)
    other = draw(model, out, "--num", 30, "--grid", "shift:3", "--steps", 4)
    assert np.abs(other - named).max() > 0.01
    default = draw(model, out, "--num", 30)
    np.testing.assert_array_equal(default, draw(model, out, "--num", 30, "--steps", 50, "--solver", "euler"))


def test_labels_choose_the_class_by_the_datas_own_numbers(labelled_run: Path, tmp_path: Path) -> None:
    means = []
    for label in (2, 5, 9):  # around 0, 4 and 8
        x = draw(labelled_run / "teacher", tmp_path / "x.npy", "--num", 300, "--label", label, "--steps", 8)
        means.append(float(x[:, 0].mean()))
    assert means[0] < means[1] - 1 < means[2] - 2


def test_diagnose_prints_a_grid_that_sample_takes(tiny_run: Path, tmp_path: Path) -> None:
    said = quietly("diagnose", tiny_run / "teacher", "--num", 64, "--out", tmp_path / "new")
    found = json.loads((tmp_path / "new/diagnosis.json").read_text(encoding="utf-8"))
    assert found["straightness"] > 0
    last = said.strip().splitlines()[-1]
    assert last.startswith("next  fewstep sample")
    words = last.split()[2:]
    assert quietly(*words[:-1], tmp_path / "x.npy").startswith("wrote")
    assert np.load(tmp_path / "x.npy").shape == (64, 2)


@pytest.mark.usefixtures("quick_comparison")
def test_run_says_what_it_wrote_and_the_same_command_again_leaves_it_alone(tiny_run: Path, tmp_path: Path) -> None:
    said = (tiny_run.parent / "said.txt").read_text(encoding="utf-8")
    for words in (f"wrote   {tiny_run}", "report  ", "next    fewstep sample"):
        assert words in said
    for name in ("recipe.yaml", "run.json", "stats.jsonl", "compare.json", "compare.md", "report.html"):
        assert (tiny_run / name).is_file()
    report = (tiny_run / "report.html").read_text(encoding="utf-8")
    assert "<td>300</td>" in report.replace(" ", "")  # the pairs that the stages learned from
    shutil.copytree(tiny_run, tmp_path / "out")
    weights = [path.read_bytes() for path in sorted(tiny_run.glob("*/model.safetensors"))]
    # the recipe that the run wrote down, every default filled in, is the same run
    shutil.copy(tiny_run / "recipe.yaml", tmp_path / "again.yaml")
    again = quietly("run", tmp_path / "again.yaml", "--out", tmp_path / "out")
    assert again.count("finished before") == 3
    assert [path.read_bytes() for path in sorted((tmp_path / "out").glob("*/model.safetensors"))] == weights
    assert (tmp_path / "out/recipe.yaml").read_text() == (tiny_run / "recipe.yaml").read_text()


def test_dry_shows_the_stages_and_writes_nothing(tiny_run: Path, tmp_path: Path) -> None:
    recipe = tiny_run.parent / "tiny.yaml"
    said = quietly("run", recipe, "--out", tmp_path / "out", "--dry")
    assert not (tmp_path / "out").exists()
    for words in ("teacher", "flow_matching", "12,000", "minutes", "4,800", "next"):  # 600 pairs of 8 calls
        assert words in said
    assert quietly("run", recipe, "--out", tiny_run, "--dry").count(" done") == 3


@pytest.mark.usefixtures("quick_comparison")
def test_a_run_from_data_to_data_starts_from_the_other_data(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "data: {name: eight_gaussians, rows: 500}\nbase: {name: moons, rows: 400}\n"
        "network: {name: mlp, preset: tiny}\n"
        "stages: {bridge: {method: flow_matching, samples: 4_000, batch_size: 128}}\n"
        "compare: {steps: [2], samples: 50}\n",
        encoding="utf-8",
    )
    quietly("run", tmp_path / "r.yaml", "--out", tmp_path / "out")
    model = fewstep.load(tmp_path / "out/bridge")
    starts = model.draw(300, steps=2, seed=1).x0
    # the base in its own network units: every start is one of its 400 rows, none is Gaussian noise
    from fewstep.data.load import load_data

    rows = load_data({"name": "moons", "rows": 400}).train_rows()
    assert float((starts[:, None] - rows[None]).abs().sum(-1).min(1).values.max()) < 1e-6
    x = draw(tmp_path / "out/bridge", tmp_path / "x.npy", "--num", 300, "--seed", 1, "--steps", 2)
    np.testing.assert_allclose(x, model.sample(300, steps=2, seed=1).numpy(), atol=1e-6)
    assert x.std(0).min() > 1.5  # carried out to the ring of radius 4


def test_text_that_the_terminal_cannot_show_does_not_end_a_verb(tiny_run: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(fewstep.__file__).parents[1]),
        "PYTHONIOENCODING": "ascii",
    }
    done = subprocess.run(
        [sys.executable, "-m", "fewstep.cli.main", "diagnose", str(tiny_run / "teacher"), "--num", "16"],
        capture_output=True, env=environment, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "straightness" in done.stdout
