"""A user's mistake gives one paragraph with cause and fix, exit code 2, and writes no files."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.cli.main import main

RECIPE = """
data: {data}
network: {{name: mlp, preset: tiny}}
stages:
  teacher: {{method: flow_matching, samples: 256, batch_size: 128}}
  straight:
    {{method: reflow, teacher: teacher, samples: 256, batch_size: 128, pairs: 100, nfe: 8, tolerance: 9,
      real: independent}}
  onestep:
    {{method: distill, teacher: teacher, samples: 256, batch_size: 128, pairs: 100, nfe: 8, tolerance: 9}}
compare: {{steps: [1], samples: 50}}
"""

Check = Callable[..., str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own current folder with good and bad data files and a recipe ``r.yaml`` for ``good.npy``."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    good = random.normal(size=(100, 2)).astype(np.float32)
    np.save("good.npy", good)
    np.save("short.npy", random.integers(3, size=10))
    np.save("fractions.npy", random.random(100))
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        bad = good.copy()
        bad[3, 1] = value
        np.save(f"{name}.npy", bad)
    np.save("object.npy", np.array([[1, None]], dtype=object), allow_pickle=True)
    np.save("words.npy", np.array(["a", "b"]))
    np.save("vector.npy", good[:, 0])
    np.save("wide.npy", random.normal(size=(100, 3)))
    np.save("few.npy", good[:4])
    np.save("constant.npy", np.ones((100, 2)))
    np.save("deep.npy", np.zeros((10, 2, 2, 2, 2)))
    np.savez("keys.npz", foo=good, bar=good)
    Path("cut.npy").write_bytes(Path("good.npy").read_bytes()[:500])
    Path("junk.npy").write_bytes(b"hello" * 100)
    Path("empty.npy").write_bytes(b"")
    Path("junk.npz").write_bytes(b"PK\x03\x04" + b"x" * 50)
    Path("junk.gz").write_bytes(b"\x1f\x8b" + b"y" * 50)
    Path("cut-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03\0\0\0\5zz"))
    Path("table.csv").write_text("1,2\n", encoding="utf-8")
    Path("file").write_text("x", encoding="utf-8")
    Path("folder").mkdir()
    Path("r.yaml").write_text(RECIPE.format(data="good.npy"), encoding="utf-8")
    return tmp_path


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Run the command line, which must refuse in one paragraph and leave the folder as it was."""

    def check(*arguments: object, words: str | tuple[str, ...] = (), box: bool = False) -> str:
        before = tree(here)
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert code == 2, error
        assert "Traceback" not in error
        if not box:  # tyro's own messages about arguments stand in a box
            assert error.startswith("fewstep: ")
            assert "\n" not in error.strip()
        for word in (words,) if isinstance(words, str) else words:
            assert word in error, error
        assert tree(here) == before
        return error

    return check


DATA = [
    ("nan.npy", "NaN or infinite"),
    ("inf.npy", "[3, 1]"),
    ("object.npy", "dtype object"),
    ("words.npy", "numbers are needed"),
    ("vector.npy", "reshape(-1, 1)"),
    ("deep.npy", "(10, 2, 2, 2, 2)"),
    ("cut.npy", "truncated"),
    ("junk.npy", "not a .npy file"),
    ("empty.npy", "empty"),
    ("keys.npz", "'foo', 'bar'"),
    ("junk.npz", "cannot read 'junk.npz'"),
    ("junk.gz", "cannot read 'junk.gz'"),
    ("cut-idx3-ubyte.gz", "truncated"),
    ("table.csv", ".npy or .npz"),
    ("folder", "no images"),
    ("nope.npy", "no file or folder"),
    ("moon", "did you mean 'moons'?"),
    ("{path: good.npy, labels: short.npy}", "10 labels"),
    ("{path: good.npy, labels: nope.npy}", "no file 'nope.npy'"),
    ("{path: good.npy, labels: fractions.npy}", "whole numbers"),
    ("{pth: good.npy}", "did you mean 'path'?"),
    ("{path: good.npy, scale: rang}", "did you mean 'range'?"),
    ("{name: moons, rows: -1}", "at least 2"),
    ("{}", "'path'"),
    ("[1, 2]", "data must be a built-in name, a path or a mapping"),
    ("5", "data must be"),
    ("null", "data must be"),
    ("few.npy", "at least 6"),
    ("constant.npy", "are equal"),
]


@pytest.mark.parametrize(("data", "words"), DATA, ids=[data for data, _ in DATA])
def test_bad_data_is_refused_before_a_run_folder_is_made(refused: Check, data: str, words: str) -> None:
    Path("r.yaml").write_text(RECIPE.format(data=data), encoding="utf-8")
    refused("run", "r.yaml", "--out", "out", words=words)


TEXTS = [
    (b"", "is empty"),
    (b"# nothing\n", "is empty"),
    (b"- a\n- b\n", "no recipe"),
    (b"just words", "no recipe"),
    (b"\xff\xfe\x00\x01", "UTF-8"),
    (b"data: !!python/object/apply:os.system ['touch hacked']\n", "!!python/object/apply:os.system"),
    (b"data: !!python/name:os.system\n", "only plain values"),
    (b"data: [unclosed\n", "line 2, column 1"),
    (b"\tdata: x\n", "no tabs"),
    (b"data: a\n---\ndata: b\n", "not valid YAML"),
    (b"data: good.npy\n", "no stages"),
    (b"data: good.npy\nstages: {}\n", "no stages"),
    (b"data: good.npy\nstages: [a]\n", "no stages"),
    (b"stages: {t: flow_matching}\n", "'data' is missing"),
    (b"data: good.npy\nstages: {t: {samples: 5}}\n", "names no method"),
    (b"data: good.npy\nstages: {t: null}\n", "names no method"),
    (b"data: good.npy\nstages: {a/b: flow_matching}\n", "folder's name"),
    (b"data: good.npy\nstages: {compare.md: flow_matching}\n", "choose another"),
    (b"data: good.npy\nstages: {Recipe.yaml: flow_matching}\n", "choose another"),
    (b"data: good.npy\nstages: {t: flow_matching, t: flow_matching}\n", "'t' occurs twice"),
    (b"data: good.npy\ndata: moons\nstages: {t: flow_matching}\n", "'data' occurs twice"),
    (b"data: good.npy\nstags: {t: flow_matching}\n", "did you mean 'stages'?"),
    (b"1: 2\ndata: good.npy\nstages: {t: flow_matching}\n", "recipe key 1"),
    (b"data: good.npy\nseed: 99999999999999999999\nstages: {t: flow_matching}\n", "seed must be less than"),
]


@pytest.mark.parametrize(("text", "words"), TEXTS, ids=[repr(text)[:40] for text, _ in TEXTS])
def test_a_text_that_is_no_recipe_is_refused(refused: Check, text: bytes, words: str) -> None:
    Path("r.yaml").write_bytes(text)
    refused("run", "r.yaml", "--out", "out", words=words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nope.yaml", "there is no recipe 'nope.yaml'"),
        ("digts", "did you mean 'digits'?"),
        ("folder", "is a folder"),
        ("good.npy", "UTF-8"),
        ("", "is a folder"),
        ("x" * 5000, "there is no recipe"),
        ("a\0b", "there is no recipe"),
    ],
)
def test_a_recipe_that_is_not_there_is_refused(refused: Check, name: str, words: str) -> None:
    refused("run", name, "--out", "out", words=words)


CHANGES = [
    ("x", "is not KEY=VALUE"),
    ("=3", "is not KEY=VALUE"),
    ("a..b=3", "is not KEY=VALUE"),
    ("sed=3", "did you mean 'seed'?"),
    ("dat.path=x", "did you mean 'data'?"),
    ("stages.teachr.samples=3", "did you mean 'teacher'?"),
    ("stages.teacher.x.y=3", "has no 'stages.teacher.x'"),
    ("seed=", "seed must be"),
    ("seed=abc", "seed must be a valid integer"),
    ("seed=-1", "greater than or equal to 0"),
    ("seed={", "--set seed is not valid YAML"),
    ("seed=!!python/name:os.system", "only plain values"),
    ("stages=3", "no stages"),
    ("stages.teacher.sampels=3", "did you mean 'samples'?"),
    ("stages.teacher.samples=-1", "samples must be greater than 0 (got -1)"),
    ("stages.teacher.samples=1.5", "samples must be a valid integer"),
    ("stages.teacher.batch_size=0", "batch_size must be greater than 0"),
    ("stages.teacher.lr=.nan", "lr must be"),
    ("stages.teacher.lr=.inf", "lr must be"),
    ("stages.teacher.warmup=2", "warmup must be less than 1"),
    ("stages.teacher.method=flow_machting", "did you mean 'flow_matching'?"),
    ("stages.teacher.method=3", "unknown method 3"),
    ("stages.teacher.coupling=otx", "coupling must be 'independent'"),
    ("stages.teacher.path=liner", "did you mean 'linear'?"),
    ("stages.teacher.time=unifrm", "did you mean 'uniform'?"),
    ("stages.teacher.time=logit_normal:0,-1", "must be positive"),
    ("stages.teacher.loss=l3", "loss must be 'l2'"),
    ("stages.teacher.ot_batch_size=4", "coupling: ot"),
    ("stages.straight.solver=midpont", "did you mean 'midpoint'?"),
    ("stages.straight.solver=auto", "name one, such as 'rk4'"),
    ("stages.straight.solver=ddim:1", "adds noise, so a noise has no single endpoint"),
    ("stages.straight.solver=rk45", "chooses its own steps"),
    ("stages.straight.grid=0,0.5,1", "has a fixed number of steps, and pairs are solved with several"),
    ("stages.straight.grid=dp", "is made from a model"),
    ("stages.straight.nfe=7", "multiple of the 4 calls"),
    ("stages.straight.pairs=0", "pairs must be greater than 0"),
    ("stages.straight.mix=1.5", "probabilities in (0, 1]"),
    ("stages.straight.mix=[0.1,0.2,0.3]", "3 values for 1 rounds"),
    ("stages.straight.mix=[]", "probabilities in (0, 1]"),
    ("stages.straight.mix=abc", "mix.0 must be a valid number"),
    ("stages.straight.real=invrted", "real must be 'inverted'"),
    ("stages.straight.time=unifrm", "did you mean 'uniform'?"),
    ("stages.straight.teacher=techer", "did you mean 'teacher'?"),
    ("stages.straight.teacher=onestep", "comes later"),
    ("stages.straight.teacher=", "add 'teacher: STAGE'"),
    ("stages.straight.teacher=folder", "unknown teacher 'folder'"),
    ("stages.onestep.init=nope", "unknown init 'nope'"),
    ("stages.onestep.real=inverted", "unknown option of stage 'onestep'"),
    ("stages.straight.guidance=2", "guidance 2 needs labels"),
    ("network=mlpx", "did you mean 'mlp'?"),
    ("network=5", "network must be a network's name or a mapping"),
    ("network.name=unet", "takes images"),
    ("network.preset=smal", "did you mean 'small'?"),
    ("network.widht=3", "did you mean 'width'?"),
    ("network.width=abc", "network.width is 'abc'"),
    ("stages.teacher.network.width=-3", "network.width is -3"),
    ("base=gausian", "did you mean 'gaussian'?"),
    ("base=digits", "(1, 8, 8)"),
    ("base=wide.npy", "they must agree"),
    ("base={path: nan.npy}", "NaN or infinite"),
    ("base=3", "base must be 'gaussian'"),
    ("conditional=true", "has no labels"),
    ("conditional=maybe", "conditional must be a valid boolean"),
    ("dequantise=-1", "dequantise must be"),
    ("dequantise=.inf", "dequantise must be"),
    ("compare=5", "compare must be a mapping"),
    ("compare.stps=3", "did you mean 'compare.steps'?"),
    ("compare.steps=[0]", "must be greater than 0"),
    ("compare.steps=[]", "a list of step counts"),
    ("compare.samples=3", "compare.samples must be greater than 5"),
    ("data.labels=short.npy", "10 labels"),
    ("data.path=nope.npy", "no file or folder 'nope.npy'"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=[change for change, _ in CHANGES])
def test_a_wrong_value_in_a_recipe_is_refused(refused: Check, change: str, words: str) -> None:
    refused("run", "r.yaml", "--out", "out", "--set", change, words=words)


def test_set_on_a_recipe_that_is_a_list_is_refused(refused: Check) -> None:
    Path("r.yaml").write_text("- a\n", encoding="utf-8")
    refused("run", "r.yaml", "--set", "seed=3", words="--set seed")


def test_a_one_step_map_is_refused_as_a_teacher(refused: Check, tiny_run: Path) -> None:
    change = f"stages.straight.teacher={tiny_run / 'onestep'}"
    refused("run", "r.yaml", "--out", "out", "--set", change, words="one-step map")


def test_a_stage_that_is_a_one_step_map_is_refused_as_a_teacher(refused: Check) -> None:
    Path("r.yaml").write_text(
        "data: good.npy\nstages:\n  a: flow_matching\n  b: {method: distill, teacher: a}\n"
        "  c: {method: reflow, teacher: b}\n",
        encoding="utf-8",
    )
    refused("run", "r.yaml", "--out", "out", words=("'b'", "one-step map"))


def test_an_outside_teacher_of_another_shape_is_refused_before_anything_trains(refused: Check, tiny_run: Path) -> None:
    changes = ("data=wide.npy", f"stages.straight.teacher={tiny_run / 'teacher'}")
    refused("run", "r.yaml", "--out", "out", "--set", changes[0], "--set", changes[1], words="(2,)")


def test_guidance_on_top_of_guidance_is_refused(refused: Check) -> None:
    Path("r.yaml").write_text(
        "data: moons\nconditional: true\nstages:\n  a: flow_matching\n"
        "  b: {method: reflow, teacher: a, guidance: 2}\n  c: {method: distill, teacher: b, guidance: 3}\n",
        encoding="utf-8",
    )
    refused("run", "r.yaml", "--out", "out", words=("guiding twice", "'b'"))


def test_a_folder_begun_with_another_recipe_is_refused_and_left_alone(
    here: Path, refused: Check, tiny_run: Path
) -> None:
    shutil.copytree(tiny_run, "out")
    recipe = tiny_run.parent / "tiny.yaml"
    before = Path("out/recipe.yaml").read_text(encoding="utf-8")
    refused("run", recipe, "--out", "out", "--set", "stages.straight.samples=999", words=("samples", "--out"))
    assert Path("out/recipe.yaml").read_text(encoding="utf-8") == before


SAMPLE = [
    (["--num", "0"], "at least 1, got 0"),
    (["--num", "-5"], "at least 1, got -5"),
    (["--num", "10000000000000"], "GiB"),
    (["--steps", "0"], "at least 1, got 0"),
    (["--steps", "-1"], "at least 1, got -1"),
    (["--steps", "2", "--grid", "0,0.2,0.5,1"], "contradict each other"),
    (["--grid", "0,0.7,0.3,1"], "turns round"),
    (["--grid", "1,0"], "runs from 0 (noise) to 1 (data)"),
    (["--grid", "0.2,0.5"], "from 0.2 to 0.5"),
    (["--grid", ".5,1"], "from 0.5 to 1"),
    (["--grid", "0"], "at least two times"),
    (["--grid", "0,nan,1"], "[0, 1]"),
    (["--grid=-1,0,1"], "[0, 1]"),
    (["--grid", "unifrm"], "did you mean 'uniform'?"),
    (["--grid", ""], "unknown grid ''"),
    (["--grid", "shift:x"], "'x' is not a number"),
    (["--grid", "shift:-1"], "positive"),
    (["--solver", "eulr"], "did you mean 'euler'?"),
    (["--solver", ""], "unknown solver ''"),
    (["--label", "1"], "takes no labels"),
    (["--guidance", "2"], "takes no labels"),
    (["--guidance", "nan"], "finite"),
    (["--batch-size", "0"], "at least 1, got 0"),
]


@pytest.mark.parametrize(("options", "words"), SAMPLE, ids=[" ".join(options) for options, _ in SAMPLE])
def test_wrong_sampling_options_are_refused(refused: Check, tiny_run: Path, options: list[str], words: str) -> None:
    number = [] if options[0] == "--num" else ["--num", "4"]
    refused("sample", tiny_run / "teacher", *number, *options, "--out", "new/x.npy", words=words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "2"], "was made for 1 step(s), not 2"),
        (["--steps", "0"], "was made for 1 step(s), not 0"),
        (["--solver", "heun"], "its own sampler"),
        (["--grid", "shift:3"], "its own sampler"),
    ],
)
def test_a_map_refuses_another_sampler(refused: Check, tiny_run: Path, options: list[str], words: str) -> None:
    refused("sample", tiny_run / "onestep", "--num", "4", *options, "--out", "x.npy", words=words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--label", "3"], "unknown label '3': Known: 2, 5, 9"),
        (["--label", "-1"], "unknown label '-1'"),
        (["--label", "cat"], "unknown label 'cat'"),
    ],
)
def test_a_label_that_is_not_in_the_data_is_refused(
    refused: Check, labelled_run: Path, options: list[str], words: str
) -> None:
    refused("sample", labelled_run / "teacher", "--num", "4", *options, "--out", "x.npy", words=words)


def test_guidance_on_a_model_that_has_it_baked_in_is_refused(refused: Check, labelled_run: Path) -> None:
    arguments = ("sample", labelled_run / "onestep", "--num", "4", "--guidance", "3", "--out", "x.npy")
    refused(*arguments, words=("guidance 2.0 baked", "Leave guidance out"))


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("x.txt", ".npy, .npz or .png"),
        ("x", ".npy, .npz or .png"),
        ("folder", "is a folder"),
        (".", "is a folder"),
        ("file/x.npy", "'file' is a file"),
        ("file/a/b.npz", "'file' is a file"),
        ("r.yaml/x.png", "'r.yaml' is a file"),
    ],
)
def test_an_unusable_file_for_samples_is_refused(refused: Check, tiny_run: Path, out: str, words: str) -> None:
    refused("sample", tiny_run / "teacher", "--num", "4", "--out", out, words=words)


@pytest.mark.parametrize("out", ["file", "file/x", "file/x/y"])
@pytest.mark.parametrize("verb", ["run", "diagnose", "compare"])
def test_an_out_folder_below_a_file_is_refused(refused: Check, tiny_run: Path, verb: str, out: str) -> None:
    first: dict[str, list[Any]] = {
        "run": ["r.yaml"],
        "diagnose": [tiny_run / "teacher"],
        "compare": [tiny_run / "teacher", "--data", "moons"],
    }
    refused(verb, *first[verb], "--out", out, words="'file' is a file")


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_an_unwritable_folder_is_refused(refused: Check, tiny_run: Path) -> None:
    Path("folder").chmod(0o500)
    refused("sample", tiny_run / "teacher", "--num", "4", "--out", "folder/x.npy", words="permission")


@pytest.mark.parametrize("name", ["folder", "nope", "file", "good.npy"])
@pytest.mark.parametrize("verb", ["sample", "diagnose", "compare"])
def test_what_is_no_model_folder_is_refused(refused: Check, verb: str, name: str) -> None:
    more = {
        "sample": ["--num", "4", "--out", "x.npy"],
        "diagnose": ["--out", "new"],
        "compare": ["--data", "moons", "--out", "new"],
    }
    refused(verb, name, *more[verb], words=("is no model", "config.json" if name == "folder" else "folder"))


CONFIGS: list[tuple[str, Any, str]] = [
    ("format", 3, "newer version"),
    ("foo", 1, "unknown key 'foo'"),
    ("guidence", 1.5, "did you mean 'guidance'?"),
    ("rule", {"kid": "velocity"}, "did you mean 'rule.kind'?"),
    ("coupling", {"independant": True}, "did you mean 'coupling.independent'?"),
    ("shape", "two", "'shape' must be"),
    ("shape", 2, "'shape' must be"),
    ("shape", [], "no shape of a sample"),
    ("shape", [3], "samples of shape [2]"),
    ("rule", {"kind": "velocty"}, "'rule.kind' must be 'velocity', 'map' or 'features'"),
    ("rule", {"steps": "abc"}, "'rule.steps' must be"),
    ("rule", {"default_steps": 0}, "at least 1"),
    ("coupling", {"deterministic": "maybe"}, "'coupling.deterministic' must be"),
    ("network", [3], "'network' must be"),
    ("network", {"name": "mlpx"}, "did you mean 'mlp'?"),
    ("network", None, "module=net"),
    ("scaling", {"a": 1}, "scaling key 'a'"),
    ("scaling", {"shape": [5]}, "another shape"),
    ("class_weights", "ab", "'class_weights' must be"),
    ("class_weights", [0.5, 0.5], "class_weights 2"),
    ("base", "emp", "'base' must be"),
    ("base", "empirical", "base.safetensors"),
    ("solver", "eulr", "did you mean 'euler'?"),
]


@pytest.mark.parametrize(("key", "value", "words"), CONFIGS, ids=[f"{k}={v!r}" for k, v, _ in CONFIGS])
def test_a_damaged_config_is_refused(refused: Check, tiny_run: Path, key: str, value: Any, words: str) -> None:
    copy_model(tiny_run)
    fields = json.loads(Path("model/config.json").read_text(encoding="utf-8"))
    nested = key in ("network", "rule", "coupling") and isinstance(value, dict)
    fields[key] = {**fields[key], **value} if nested else value
    Path("model/config.json").write_text(json.dumps(fields), encoding="utf-8")
    refused("sample", "model", "--num", "4", "--out", "x.npy", words=words)


def copy_model(run: Path) -> None:
    shutil.copytree(run / "teacher", "model", ignore=shutil.ignore_patterns("checkpoints", "pairs"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b'{"shape": [2', "truncated"),
        (b"[1]", "not a fewstep model's config"),
        (b'{"_class_name": "UNet2DModel"}', "'in_channels' is missing"),
        (b'{"_class_name": "Path"}', "no class of diffusers"),
        (b'{"format": 1}', "'shape' is missing"),
        (b'{"format": 2}', "'shape' is missing"),
        (b'{"format": 3}', "newer version"),
        (b"\xff\xfe\0", "not complete JSON"),
    ],
)
def test_a_config_that_is_none_is_refused(refused: Check, tiny_run: Path, content: bytes, words: str) -> None:
    copy_model(tiny_run)
    Path("model/config.json").write_bytes(content)
    refused("sample", "model", "--num", "4", "--out", "x.npy", words=words)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:700])


def drop_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


def add_nan(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "truncated"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.unlink(), "is missing"),
        (drop_a_tensor, "do not fit the network"),
        (add_nan, "NaN or infinite"),
    ],
    ids=["cut", "empty", "missing", "a tensor less", "NaN"],
)
def test_damaged_weights_are_refused(
    refused: Check, tiny_run: Path, damage: Callable[[Path], object], words: str
) -> None:
    copy_model(tiny_run)
    damage(Path("model/model.safetensors"))
    refused("sample", "model", "--num", "4", "--out", "x.npy", words=words)


def test_a_truncated_checkpoint_is_refused_and_named(here: Path, refused: Check, tiny_run: Path) -> None:
    shutil.copytree(tiny_run, "out")
    begun = json.loads(Path("out/onestep/stage.json").read_text(encoding="utf-8"))
    Path("out/onestep/stage.json").write_text(json.dumps({**begun, "done": False}), encoding="utf-8")
    checkpoint = max(Path("out/onestep/checkpoints").glob("*.safetensors"))
    cut(checkpoint)
    recipe = tiny_run.parent / "tiny.yaml"
    refused("run", recipe, "--out", "out", words=(checkpoint.name, "delete that file"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "digits"], "(1, 8, 8)"),
        (["--data", "moon"], "did you mean 'moons'?"),
        (["--data", "few.npy"], "at least 6"),
        (["--data", "moons", "--steps", "0"], "at least 1"),
        (["--data", "moons", "--steps", "1,,2"], "whole numbers"),
        (["--data", "moons", "--samples", "0"], "at least 1"),
        (["--data", "moons", "--samples", "3"], "at least 6"),
    ],
    ids=" ".join,
)
def test_a_comparison_that_cannot_be_is_refused(refused: Check, tiny_run: Path, options: list[str], words: str) -> None:
    refused("compare", tiny_run / "teacher", *options, "--out", "new", words=words)


def test_a_comparison_of_nothing_or_of_one_model_twice_is_refused(refused: Check, tiny_run: Path) -> None:
    refused("compare", "--data", "moons", words="no model to compare")
    teacher = tiny_run / "teacher"
    refused("compare", teacher, teacher, "--data", "moons", words="given twice")


def test_a_comparison_of_models_of_two_shapes_is_refused(refused: Check, tiny_run: Path) -> None:
    copy_model(tiny_run)
    fields = json.loads(Path("model/config.json").read_text(encoding="utf-8"))
    net = torch.nn.Linear(3, 3)
    save_file(net.state_dict(), "model/model.safetensors")
    Path("model/config.json").write_text(
        json.dumps({**fields, "shape": [3], "network": None, "scaling": None}), encoding="utf-8"
    )
    refused("compare", tiny_run / "teacher", "model", "--data", "moons", words="module=net")


def test_diagnosing_a_map_or_one_noise_is_refused(refused: Check, tiny_run: Path) -> None:
    refused("diagnose", tiny_run / "onestep", "--out", "new", words="one-step map")
    refused("diagnose", tiny_run / "teacher", "--num", "1", "--out", "new", words="at least 2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["smaple"], "did you mean 'sample'?"),
        (["--verison"], "did you mean '--version'?"),
        (["--num", "3", "sample"], "A verb comes first"),
        (["list", "methds"], "did you mean 'methods'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_unknown_word_is_answered_with_the_likely_one(refused: Check, arguments: list[str], words: str) -> None:
    refused(*arguments, words=words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample"], ("MODEL", "--num")),
        (["sample", "m", "--num", "abc", "--out", "x.npy"], "'abc' is not a whole number"),
        (["sample", "m", "--num", "1e3", "--out", "x.npy"], "'1e3' is not a whole number"),
        (["sample", "m", "--num", "4", "--seed", "9" * 30, "--out", "x.npy"], "too large"),
        (["sample", "m", "--num", "4", "--guidance", "x", "--out", "x.npy"], "'x' is not a number"),
        (["sample", "m", "--num", "4", "--setps", "3", "--out", "x.npy"], ("--setps", "--steps")),
        (["sample", "m", "more", "--num", "4", "--out", "x.npy"], "more"),
        (["run"], "RECIPE"),
        (["run", "r.yaml", "--dyr"], ("--dyr", "--dry")),
        (["run", "r.yaml", "--set"], "--set"),
        (["list"], "methods"),
        (["doctor", "foo"], "foo"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_arguments_are_named(refused: Check, arguments: list[str], words: str | tuple[str, ...]) -> None:
    refused(*arguments, words=words, box=True)


def command(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(fewstep.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-m", "fewstep.cli.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_a_mistake_ends_the_process_with_2_and_without_a_traceback(here: Path) -> None:
    process = command("run", "r.yaml", "--out", "out", "--set", "stages.teacher.samples=-1")
    said, error = process.communicate()
    assert (process.returncode, said) == (2, "")
    assert error.startswith("fewstep: stage 'teacher': samples must be greater than 0")
    assert not Path("out").exists()


def test_ctrl_c_ends_with_130_and_the_same_command_continues(here: Path) -> None:
    arguments = ("run", "r.yaml", "--out", "out", "--set", "stages.onestep.samples=500_000")
    process = command(*arguments)
    assert process.stdout is not None
    # the line is printed when the pairs are written, before training; iteration ends early only if the process does
    assert any(line.startswith("  onestep: generated pairs") for line in process.stdout), process.communicate()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "fewstep: interrupted; the same command continues" in error
    assert not list(here.rglob(".tmp-*"))
    # the stages that were finished stay, and the rest can be had with fewer samples only in a new folder
    assert json.loads(Path("out/straight/stage.json").read_text(encoding="utf-8"))["done"] is True
    assert main([*map(str, arguments[:-1]), "stages.onestep.samples=256"]) == 2
