"""Networks of the user's own on the command line: --module, saved models, conditions, and every dead end."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import fewstep as fs
from conftest import quietly
from fewstep.cli.main import main
from fewstep.cli.user_module import PRIVATE, call_made, foreign_of, is_code
from fewstep.errors import UserError
from fewstep.networks.adapter import Adapter

CODE = '''
import torch
from torch import nn
import fewstep as fs
from widths import WIDTH


class Policy(nn.Module):
    """Arguments (timestep, sample, obs), time from 1000 to 0, and the opposite sign."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.embed = nn.Linear(1, width)
        self.net = nn.Sequential(nn.Linear(2 + 3 + width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, timestep, sample, obs):
        h = torch.cat([obs, self.embed(timestep[:, None] / 1000)], 1)[:, None].expand(-1, sample.shape[1], -1)
        return self.net(torch.cat([sample, h], 2))


def adapted(net):
    return fs.adapt(net, lambda m, x, t, obs, mask: -m(1000 * (1 - t), x, obs), time_embed="embed", mask="mask")


def make():
    return adapted(Policy())


def make_wide():
    return adapted(Policy(WIDTH + 1))


def make_swapped():
    return fs.adapt(Policy(), lambda m, x, t, obs, mask: m(x, t, obs), time_embed="embed", mask="mask")


class Exact(nn.Module):
    """The velocity between two standard normal laws, (2 t - 1) / (t^2 + (1 - t)^2) x."""

    def __init__(self, sign=1.0):
        super().__init__()
        self.sign = nn.Parameter(torch.tensor(sign))

    def forward(self, x, t):
        return self.sign * ((2 * t - 1) / (t**2 + (1 - t) ** 2)).reshape(-1, *(1,) * (x.ndim - 1)) * x


def make_exact():
    return Exact()


def make_opposite():
    return Exact(-1.0)


def make_ready():
    return fs.Generator(Exact(), shape=(2,))


def make_nothing():
    Exact()


def make_broken():
    width = 3
    raise RuntimeError("the width is wrong")


NUMBER = 3
'''


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's file, data with an observation and a mask, and a normal sample."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text(CODE, encoding="utf-8")
    (folder / "widths.py").write_text("WIDTH = 16\n", encoding="utf-8")
    random = np.random.default_rng(0)
    obs, mask = random.normal(size=(400, 3)), np.arange(6)[None] < random.integers(2, 7, 400)[:, None]
    x = random.normal(size=(400, 6, 2)) * 0.2 + obs[:, None, :2]
    np.savez(folder / "rows.npz", x=x.astype("f4"), obs=obs.astype("f4"), mask=mask)
    np.save(folder / "normal.npy", random.normal(size=(4000, 2)).astype("f4"))
    return folder


def policy_data(mine: Path) -> str:
    return f"{{path: {mine / 'rows.npz'}, conditions: [obs, mask], mask: mask, layout: sequence, scale: none}}"


@pytest.fixture(scope="module")
def run(mine: Path) -> Path:
    """A run whose stages train the user's network. Do not write to it."""
    small = "samples: 512, batch_size: 64"
    (mine / "r.yaml").write_text(
        f"data: {policy_data(mine)}\nstages:\n"
        f"  teacher: {{method: flow_matching, {small}}}\n"
        f"  onestep: {{method: distill, teacher: teacher, {small}, pairs: 128, nfe: 8, tolerance: 100}}\n"
        f"  mean: {{method: meanflow, teacher: teacher, {small}}}\n"
        "compare: {steps: [1], samples: 40}\n",
        encoding="utf-8",
    )
    from conftest import cheapen_comparisons

    with pytest.MonkeyPatch.context() as patch:
        cheapen_comparisons(patch)
        quietly("run", mine / "r.yaml", "--out", mine / "out", "--module", f"{mine}/mine.py:make")
    return mine / "out"


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message of a command that must end with exit code 2."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fewstep: ")
    assert "Traceback" not in said
    return said


MISTAKES = {
    "mine.py": ("no function", "mine.py:make"),
    "mine.py:mak": ("no function 'mak'", "did you mean 'make'?"),
    "mien.py:make": ("there is no file", "did you mean 'mine.py'?"),
    "mine": ("must be a file and a function", "file.py:make"),
    "mine.py:NUMBER": ("'NUMBER' is a int", "def make()"),
    "mine.py:make_nothing": ("returned nothing (None)", "return net"),
    "mine.py:make_broken": ("raise RuntimeError", "RuntimeError: the width is wrong"),
    "mine.py:Policy2": ("no function 'Policy2'", "It defines make"),
}


@pytest.mark.parametrize("named", MISTAKES)
def test_a_mistake_in_what_is_named_says_the_fix(
    mine: Path, run: Path, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = ("sample", run / "teacher", "--num", 2, "--out", mine / "x.npy", "--module")
    said = refused(capsys, *sample, f"{mine}/{named}")
    for words in MISTAKES[named]:
        assert words in said
    if named == "mine.py:make_broken":
        line = CODE.splitlines().index('    raise RuntimeError("the width is wrong")') + 1
        assert f"line {line}" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [("def make(:\n", "line 1: SyntaxError"), ("import not_there\n", "line 1: import not_there: ModuleNotFoundError")],
)
def test_a_file_that_cannot_be_imported_says_where(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "bad.py").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        call_made(f"{tmp_path}/bad.py:make")


def test_the_made_network_is_the_same_at_every_call_and_random_numbers_go_on(mine: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = call_made(f"{mine}/mine.py:make")
    assert torch.equal(torch.rand(3), expected)
    torch.rand(7)
    other = call_made(f"{mine}/mine.py:make")
    assert isinstance(one, Adapter)
    assert isinstance(other, Adapter)
    assert one.name == "mine.Policy"  # not the private name under which the file is imported
    assert type(one.inner).__module__.startswith(PRIVATE)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert foreign_of(call_made(f"{mine}/mine.py:make_exact")).describe()["module"] == "mine.Exact"
    assert is_code("a/b.py:make")
    assert not is_code(mine)


def test_a_run_with_module_is_the_training_of_the_python_call(mine: Path, run: Path, tmp_path: Path) -> None:
    from fewstep.data.load import load_data

    data = load_data(
        {"path": str(mine / "rows.npz"), "conditions": ["obs", "mask"], "mask": "mask", "layout": "sequence",
         "scale": "none"}
    )  # fmt: skip
    net = call_made(f"{mine}/mine.py:make")
    assert isinstance(net, Adapter)
    options = {"samples": 512, "batch_size": 64}
    fs.train("flow_matching", network=net, data=data, out=tmp_path / "teacher", quiet=True, **options)
    files = [folder / "teacher/model.safetensors" for folder in (tmp_path, run)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.usefixtures("quick_comparison")
def test_the_same_command_again_leaves_the_stages_alone(mine: Path, run: Path) -> None:
    said = quietly("run", mine / "r.yaml", "--out", run, "--module", f"{mine}/mine.py:make")
    assert said.count("finished before") == 3


def test_dry_counts_and_times_the_users_network(mine: Path, tmp_path: Path, run: Path) -> None:
    said = quietly("run", mine / "r.yaml", "--out", tmp_path / "new", "--module", f"{mine}/mine.py:make", "--dry")
    plain = sum(p.numel() for p in call_made(f"{mine}/mine.py:make").parameters())  # type: ignore[union-attr]
    two_time = sum(
        v.numel() for v in fs.load(run / "mean", module=call_made(f"{mine}/mine.py:make")).module.parameters()
    )  # type: ignore[arg-type]
    counts = {line.split()[0]: line.split()[2] for line in said.splitlines() if line[:3] in ("tea", "one", "mea")}
    assert counts == {"teacher": f"{plain:,}", "onestep": f"{plain:,}", "mean": f"{two_time:,}"}
    assert two_time > plain
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("stage", ["teacher", "onestep", "mean"])
def test_sample_takes_and_writes_conditions(mine: Path, run: Path, tmp_path: Path, stage: str) -> None:
    module = ("--module", f"{mine}/mine.py:make")
    out, again = tmp_path / "x.npz", tmp_path / "again.npz"
    quietly("sample", run / stage, "--num", 5, "--steps", 1, "--out", out, *module)
    drawn = np.load(out)
    assert drawn["obs"].shape == (5, 3)
    assert drawn["mask"].dtype == bool
    assert not drawn["x"][~drawn["mask"]].any()
    rows = np.load(mine / "rows.npz")
    for row in drawn["obs"]:  # a row of the data
        assert np.abs(rows["obs"] - row).sum(1).min() < 1e-6
    quietly("sample", run / stage, "--num", 5, "--steps", 1, "--out", again, "--cond", out, *module)
    np.testing.assert_array_equal(np.load(again)["x"], drawn["x"])
    one = {"obs": rows["obs"][:1], "mask": np.ones((1, 6), bool)}
    np.savez(tmp_path / "one.npz", **one)
    quietly("sample", run / stage, "--num", 5, "--steps", 1, "--out", again, "--cond", tmp_path / "one.npz", *module)
    model = fs.load(run / stage, module=call_made(module[1]))  # type: ignore[arg-type]
    expected = model.sample(5, steps=1, cond={name: torch.as_tensor(value) for name, value in one.items()})
    np.testing.assert_array_equal(np.load(again)["x"], expected.numpy())
    np.testing.assert_array_equal(np.load(again)["obs"], np.repeat(one["obs"], 5, 0))


def test_conditions_of_labelled_models_have_the_datas_own_labels(labelled_run: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", label=np.array([9, 2, 5]))
    out = tmp_path / "x.npz"
    quietly("sample", labelled_run / "teacher", "--num", 3, "--steps", 2, "--out", out, "--cond", tmp_path / "c.npz")
    assert np.load(out)["label"].tolist() == [9, 2, 5]
    expected = fs.load(labelled_run / "teacher").sample(3, steps=2, label=[9, 2, 5])
    np.testing.assert_array_equal(np.load(out)["x"], expected.numpy())


def test_a_file_of_conditions_that_cannot_be_used_says_why(
    mine: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "words.npz", obs=np.array(["a"]))
    np.savez(tmp_path / "part.npz", obs=np.zeros((5, 3), "f4"))
    np.savez(tmp_path / "more.npz", obs=np.zeros((5, 3), "f4"), mask=np.ones((5, 6)), wind=np.zeros(5))
    np.save(tmp_path / "rows.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive", encoding="utf-8")
    causes = {
        "none.npz": "there is no such file",
        "words.npz": "arrays of numbers",
        "part.npz": "'mask' is missing",
        "more.npz": "takes no condition 'wind'",
        "rows.npy": "one array without a name",
        "text.npz": "cannot be read",
    }
    for file, words in causes.items():
        wish = ("--num", 5, "--out", tmp_path / "x.npy", "--module", f"{mine}/mine.py:make", "--cond", tmp_path / file)
        assert words in refused(capsys, "sample", run / "teacher", *wish)


def test_diagnose_gives_the_likelihood_of_rows_with_their_conditions(mine: Path, run: Path) -> None:
    from fewstep.data.load import load_data
    from fewstep.pipeline.recipe_text import parse_yaml

    module = f"{mine}/mine.py:make"
    said = quietly(
        "diagnose", run / "teacher", "--num", 8, "--calls", "none", "--data", policy_data(mine), "--module", module
    )
    data = load_data(parse_yaml(policy_data(mine), "here"))
    model = fs.load(run / "teacher", module=call_made(module))  # type: ignore[arg-type]
    cond = data.cond_rows(data.held_out, ("obs", "mask"))
    found = fs.log_likelihood(model.module, data.network_rows(data.held_out), cond=cond, mask="mask", seed=0)
    assert f"log-likelihood   {float(found.nats_per_dim.mean()):.4f}" in said


DEAD_ENDS = [
    ("sample", "--num", 2, "--out", "x.npy"),
    ("diagnose", "--num", 4),
    ("compare", "--data", "DATA"),
    ("check", "--data", "DATA"),
]


@pytest.mark.parametrize("words", DEAD_ENDS, ids=lambda words: str(words[0]))
def test_a_saved_foreign_model_without_its_module_says_how_to_name_it(
    mine: Path, run: Path, words: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *rest = (policy_data(mine) if word == "DATA" else word for word in words)
    said = refused(capsys, verb, run / "teacher", *rest)
    assert "--module file.py:make" in said
    assert "mine.Policy" in said
    other = refused(capsys, verb, run / "teacher", *rest, "--module", f"{mine}/mine.py:make_wide")
    assert "makes another network" in other
    assert "parameters" in other


def test_run_without_the_module_says_how_to_name_it(
    mine: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(
        f"data: {policy_data(mine)}\nstages: {{one: {{method: distill, teacher: {run / 'teacher'}}}}}\n",
        encoding="utf-8",
    )
    for extra in ((), ("--dry",)):
        said = refused(capsys, "run", tmp_path / "r.yaml", "--out", tmp_path / "out", *extra)
        assert "--module file.py:make" in said
        wide = refused(
            capsys, "run", tmp_path / "r.yaml", "--out", tmp_path / "out", *extra, "--module",
            f"{mine}/mine.py:make_wide",
        )  # fmt: skip
        assert "another form" in wide
    with pytest.raises(UserError, match=r"--module file\.py:make"):
        fs.load(run / "teacher")


def test_labels_and_guidance_that_a_foreign_model_cannot_take_say_the_fix(
    mine: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wish = ("sample", run / "teacher", "--num", 2, "--out", mine / "x.npy", "--module", f"{mine}/mine.py:make")
    assert "takes no labels" in refused(capsys, *wish, "--label", 3)
    assert "null=" in refused(capsys, *wish, "--guidance", 2)
    model = fs.load(run / "teacher", module=call_made(f"{mine}/mine.py:make"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="takes no labels"):
        model.sample(2, label=3)
    with pytest.raises(UserError, match="null="):
        model.sample(2, guidance=2)
    plain = fs.Generator(call_made(f"{mine}/mine.py:make_exact"), shape=(2,))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="takes no labels"):
        plain.sample(2, label=3)
    with pytest.raises(UserError, match="takes no labels"):
        plain.sample(2, guidance=2)


def test_arguments_in_the_wrong_order_say_how_to_exchange_them(
    mine: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = ("--module", f"{mine}/mine.py:make_swapped")
    for verb in (("sample", "--num", 2, "--out", mine / "x.npy"), ("diagnose", "--num", 4, "--calls", "none")):
        said = refused(capsys, verb[0], run / "teacher", *verb[1:], *swapped)
        assert ": m(t, x, " in said
    capsys.readouterr()
    assert main(["check", str(run / "teacher"), "--data", policy_data(mine), *swapped]) == 1
    said = capsys.readouterr().out
    assert "argument" in said, said


def test_the_wrong_order_of_a_torchcfm_network_ends_in_the_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchcfm", reason="needs torchcfm")
    code = """
        import fewstep as fs
        from torchcfm.models.unet import UNetModel

        def net():
            return UNetModel(dim=(1, 8, 8), num_channels=32, num_res_blocks=1, channel_mult=(1,))

        def make():
            return fs.adapt(net())

        def make_right():
            return fs.adapt(net(), "torchcfm")
    """
    (tmp_path / "cfm.py").write_text(textwrap.dedent(code), encoding="utf-8")
    wrong = call_made(f"{tmp_path}/cfm.py:make")
    assert isinstance(wrong, Adapter)
    fs.Generator(wrong, shape=(1, 8, 8)).save(tmp_path / "model")
    wish = ("sample", tmp_path / "model", "--num", 2, "--steps", 1, "--out", tmp_path / "x.npy", "--module")
    assert "torchcfm" in refused(capsys, *wish, f"{tmp_path}/cfm.py:make")
    with pytest.raises(UserError, match="m\\(t, x\\)"):
        fs.Generator(wrong, shape=(1, 8, 8)).sample(2, steps=1)
    quietly("sample", tmp_path / "model", "--num", 2, "--steps", 1, "--out", tmp_path / "x.npy", "--module",
            f"{tmp_path}/cfm.py:make_right")  # fmt: skip
    assert np.load(tmp_path / "x.npy").shape == (2, 1, 8, 8)


def test_check_ends_in_0_1_or_2(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", f"{{path: {mine / 'normal.npy'}, scale: none}}")
    fs.Generator(call_made(f"{mine}/mine.py:make_exact"), shape=(2,)).save(tmp_path / "exact")  # type: ignore[arg-type]
    module = ("--module", f"{mine}/mine.py:make_exact")
    assert "no fault found" in quietly("check", tmp_path / "exact", *data, *module)
    assert "no fault found" in quietly("check", f"{mine}/mine.py:make_exact", *data)
    assert "no fault found" in quietly("check", f"{mine}/mine.py:make_ready", *data)
    capsys.readouterr()
    assert main(["check", f"{mine}/mine.py:make_opposite", *data]) == 1
    said = capsys.readouterr().out
    assert "fault" in said
    assert "sign" in said
    said = refused(capsys, "check", f"{mine}/mine.py:make_ready", "--data", "digits")
    assert "give the data that it was trained on" in said


def test_check_refuses_maps_and_other_data(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "one-step map" in refused(capsys, "check", tiny_run / "onestep", "--data", "moons")
    assert "give the data that it was trained on" in refused(capsys, "check", tiny_run / "teacher", "--data", "digits")


def test_code_as_model_is_sampled_and_compared(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quietly("sample", f"{mine}/mine.py:make_ready", "--num", 3, "--steps", 2, "--out", tmp_path / "x.npy")
    made = call_made(f"{mine}/mine.py:make_ready")
    assert isinstance(made, fs.Generator)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), made.sample(3, steps=2).numpy())
    said = refused(capsys, "sample", f"{mine}/mine.py:make_exact", "--num", 3, "--out", tmp_path / "x.npy")
    assert "shape=" in said


def test_a_module_that_no_model_needs_is_refused(
    mine: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = ("--module", f"{mine}/mine.py:make")
    said = refused(capsys, "sample", tiny_run / "teacher", "--num", 2, "--out", tmp_path / "x.npy", *module)
    assert "leave --module out" in said
    recipe = tiny_run.parent / "tiny.yaml"
    said = refused(capsys, "run", recipe, "--out", tmp_path / "out", *module)
    assert "no stage" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "place", ["module: mine.py:make\n", "network: {module: mine.py:make}\n", "STAGE"], ids=["top", "network", "stage"]
)
def test_a_recipe_alone_runs_no_code(
    mine: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "touch.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    stage = "{method: flow_matching, module: touch.py:make}" if place == "STAGE" else "flow_matching"
    text = "" if place == "STAGE" else place.replace("mine.py", str(tmp_path / "touch.py"))
    (tmp_path / "r.yaml").write_text(f"data: moons\n{text}stages: {{one: {stage}}}\n", encoding="utf-8")
    said = refused(capsys, "run", tmp_path / "r.yaml", "--out", tmp_path / "out")
    assert "never runs code" in said
    assert "--module file.py:make" in said
    assert not (tmp_path / "ran").exists()


def test_paths_are_drawn_from_the_pairs_with_the_conditions_of_their_rows(mine: Path, run: Path) -> None:
    """The pairs hold numbers of data rows; their ends and conditions are those that the data have at these rows."""
    from fewstep.data.load import load_data
    from fewstep.pipeline.finish import last_pairs
    from fewstep.pipeline.recipe_text import parse_yaml
    from fewstep.report.trajectories import LINES, STEPS, follow, open_pairs

    data = load_data(parse_yaml(policy_data(mine), "here"))
    model = fs.load(run / "teacher", module=call_made(f"{mine}/mine.py:make"))  # type: ignore[arg-type]
    store = last_pairs(run / "onestep")
    assert store is not None
    states, chord = follow(model, 0, store, data)
    raw = open_pairs(store).training_rows().columns(torch.arange(LINES))
    assert torch.equal(chord, torch.stack([raw["x0"], raw["x1"]]))
    cond = data.cond_rows(raw["row"], ("obs", "mask"))
    expected = fs.solve(model.module, raw["x0"], solver="rk4", steps=STEPS, cond=cond).x
    torch.testing.assert_close(states[-1], expected)
    others = {name: rows.roll(1, 0) for name, rows in cond.items()}
    assert (fs.solve(model.module, raw["x0"], solver="rk4", steps=STEPS, cond=others).x - expected).abs().max() > 1e-3


def test_models_of_a_report_are_shown_under_the_same_conditions(mine: Path, run: Path) -> None:
    from fewstep.data.load import load_data
    from fewstep.pipeline.recipe_text import parse_yaml
    from fewstep.report.samples import classes_of, column_arguments, shared_rows

    data = load_data(parse_yaml(policy_data(mine), "here"))
    module = f"{mine}/mine.py:make"
    models = {name: fs.load(run / name, module=call_made(module)) for name in ("teacher", "onestep")}  # type: ignore[arg-type]
    rows = shared_rows(models, data, 7, seed=1)
    assert rows is not None
    assert classes_of(models, data, rows) is None
    for model in models.values():
        model.kept = {}  # what is kept with a model does not decide
        draw = model.draw(7, steps=1, seed=1, **column_arguments(model, data, None, rows))
        np.testing.assert_array_equal(draw.cond["obs"].numpy(), data.conditions["obs"][rows])
    assert shared_rows({}, data, 7, seed=1) is None


def test_a_network_that_was_saved_without_its_conditions_takes_those_of_the_data(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fewstep.cli.named_data import named_data
    from fewstep.cli.open_models import condition_names, open_model

    module = f"{mine}/mine.py:make"
    fs.Generator(call_made(module), shape=(6, 2)).save(tmp_path / "saved")  # type: ignore[arg-type]
    data = named_data(policy_data(mine))
    for place in (tmp_path / "saved", Path(module)):
        model = open_model(place, None if place == Path(module) else module, data)
        assert set(condition_names(model, data)) == {"obs", "mask"}
        draw = model.draw(5, steps=1)
        assert draw.cond["obs"].shape == (5, 3)
        assert not draw.x[~draw.cond["mask"]].any()
    wish = ("sample", tmp_path / "saved", "--num", 2, "--steps", 1, "--out", tmp_path / "x.npy", "--module", module)
    assert "--cond FILE.npz" in refused(capsys, *wish)
    rows = np.load(mine / "rows.npz")
    np.savez(tmp_path / "mask.npz", mask=rows["mask"][:1])
    said = refused(capsys, *wish, "--cond", tmp_path / "mask.npz")
    assert "missing" in said
    assert "'obs'" in said
    assert "--cond FILE.npz" in said
    np.savez(tmp_path / "cond.npz", obs=rows["obs"][:2], mask=rows["mask"][:1])
    quietly(*wish, "--cond", tmp_path / "cond.npz")
    without = f"{{path: {mine / 'rows.npz'}, conditions: [mask], mask: mask, layout: sequence, scale: none}}"
    assert "'obs'" in refused(capsys, "check", tmp_path / "saved", "--data", without, "--module", module)


def test_the_next_command_names_data_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data given in Python as an array have a name that is no file: no command can name them."""
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)
    named = {"network": "mlp", "samples": 256, "batch_size": 64, "quiet": True}
    fs.train("flow_matching", data=rows, out="array", **named)
    fs.train("flow_matching", data="moons", out="moons", **named)
    assert "--data DATA\n" in quietly("sample", "array", "--num", 2, "--out", "x.npy")
    assert "--data moons\n" in quietly("sample", "moons", "--num", 2, "--out", "x.npy")
