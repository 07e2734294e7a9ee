"""Features: the perceptual distance, its networks, the stage that trains one, and the use of features as a judge."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import quietly
from fewstep.data.dataset import DataSet
from fewstep.data.load import from_array, load_data
from fewstep.errors import MissingExtra, UserError
from fewstep.flow.couplings import Pair
from fewstep.flow.noise import Draws, generator_for
from fewstep.generator import Config, Generator, load, read_tensors, weights_digest
from fewstep.methods.features import Blur, Denoising, accuracy, denoising_target, shifted
from fewstep.metrics import frechet_distance
from fewstep.metrics.feature_distance import FeatureDistance, LpipsNet, find_features
from fewstep.networks import build, parameter_count, resolve
from fewstep.networks.extractors import CifarResNet, FeatureNet, build_features, cifar_resnet, resolve_features
from fewstep.pipeline.compare import compare, table
from fewstep.pipeline.recipe import make_recipe
from objective_cases import loss_of

RECIPE = """
data: digits
network: {name: mlp, preset: tiny}
stages:
  judge: {method: features, samples: 10_000, network: {widths: [16, 32, 64]}}
  used: {method: features, learn: noise, samples: 1_000, network: {widths: [8, 8]}}
  onestep:
    {method: instaflow, teacher: TEACHER, features: used, adversarial: 0, samples: 500, pairs: 300, nfe: 8,
     tolerance: 9}
compare: {steps: [1], samples: 60, features: judge}
"""
SHAPES = [(1, 8, 8), (3, 28, 28), (3, 17, 9), (2,), (1,), (5, 3, 40), (4, 6)]


def network(shape: tuple[int, ...], outputs: int = 4, **config: Any) -> FeatureNet:
    torch.manual_seed(0)
    return build_features(resolve_features(config, shape, outputs))


def rows(count: int, shape: tuple[int, ...], key: object = "rows") -> Tensor:
    return torch.randn(count, *shape, generator=generator_for(str(key)))


def resnet(blocks: int = 3, key: str = "resnet") -> CifarResNet:
    """A CIFAR ResNet with random weights and random averages in its batch normalisation."""
    net, generator = CifarResNet(blocks), generator_for(key)
    state = {
        name: torch.rand(value.shape, generator=generator) + 0.5
        if "bn" in name
        else torch.randn(value.shape, generator=generator) / math.sqrt(max(1, value[0].numel()))
        for name, value in net.state_dict().items()
        if value.is_floating_point()
    }
    net.load_state_dict(state, strict=False)
    return net.eval()


# --- the networks


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_are_linear_in_the_pooled_features_and_those_are_means_over_positions(shape: tuple[int, ...]) -> None:
    net, x = network(shape), rows(3, shape)
    layers = net.layers(x)
    assert 3 <= len(layers) <= 4
    mean = torch.stack([row.reshape(row.shape[0], -1).mean(1) for row in layers[-1]])
    torch.testing.assert_close(net.pooled(x), mean)
    torch.testing.assert_close(net(x), mean @ net.head.weight.T + net.head.bias)
    assert 100_000 < parameter_count(net) < 300_000
    torch.testing.assert_close(net.train()(x), net.eval()(x), rtol=0, atol=0)
    # one sample knows nothing of the others
    torch.testing.assert_close(net(x)[:1], net(x[:1]), rtol=1e-4, atol=1e-5)


def test_configurations_are_plain_complete_and_checked() -> None:
    config = resolve_features({"widths": [8, 16]}, (1, 8, 8), 10)
    assert config == {"name": "features", "shape": [1, 8, 8], "outputs": 10, "widths": [8, 16]}
    assert resolve_features(config, (1, 8, 8), 10) == config
    with pytest.raises(UserError, match="cannot be a velocity network such as 'mlp'"):
        resolve_features({"name": "mlp"}, (1, 8, 8), 10)
    with pytest.raises(UserError, match="did you mean 'widths'"):
        resolve_features({"width": [8]}, (1, 8, 8), 10)
    with pytest.raises(UserError, match=r"network.shape is \[1, 8, 8\], but the data has \[2\]"):
        resolve_features(config, (2,), 10)
    with pytest.raises(UserError, match="lacks outputs, widths"):
        build_features({"name": "features", "shape": [2]})
    with pytest.raises(UserError, match=r"takes samples of shape \(1, 8, 8\), not \(1, 9, 8\)"):
        build_features(config).pooled(torch.zeros(2, 1, 9, 8))


def plain_resnet(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Logits of a CIFAR ResNet, written out from the names in its state."""

    def norm(h: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{key}"].view(-1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (h - mean) / torch.sqrt(var + 1e-5) * weight + bias

    colours = torch.tensor([[0.485, 0.229], [0.456, 0.224], [0.406, 0.225]])
    h = (255 * (x + 1) / 2 / 255 - colours[:, :1, None]) / colours[:, 1:, None]
    h = norm(F.conv2d(h, state["conv1.weight"], padding=1), "bn1").clamp_min(0)
    for name in [key.removesuffix(".conv1.weight") for key in state if key.endswith("conv1.weight") and "layer" in key]:
        width, before = state[f"{name}.conv1.weight"].shape[:2]
        stride = 1 if width == before else 2
        inner = F.conv2d(h, state[f"{name}.conv1.weight"], stride=stride, padding=1)
        inner = norm(inner, f"{name}.bn1").clamp_min(0)
        inner = norm(F.conv2d(inner, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        if stride == 2:
            none = torch.zeros(len(h), before // 2, *inner.shape[2:])
            h = torch.cat([none, h[:, :, ::2, ::2], none], 1)
        h = (inner + h).clamp_min(0)
    return h.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize(("blocks", "parameters"), [(3, 269_722), (9, 853_018)])
def test_a_cifar_resnet_is_what_its_state_says(blocks: int, parameters: int) -> None:
    net, x = resnet(blocks), rows(2, (3, 32, 32)).clamp(-1, 1)
    assert parameter_count(net) == parameters
    state = net.state_dict()
    assert all("mean" not in key or "running" in key for key in state)
    again = cifar_resnet({f"module.{name}": value for name, value in state.items()})
    assert not again.training
    with torch.no_grad():
        torch.testing.assert_close(again(x), net(x), rtol=0, atol=0)
        torch.testing.assert_close(net(x), plain_resnet(state, x), rtol=1e-4, atol=1e-4 * net(x).abs().max().item())
    assert [layer.shape[1:] for layer in net.layers(x)] == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]


# --- the distance


class Scaled(nn.Module):
    """A network whose activations are multiplied, each layer by its own factor."""

    def __init__(self, net: FeatureNet, factors: list[float]) -> None:
        super().__init__()
        self.net, self.factors = net, factors

    def layers(self, x: Tensor) -> list[Tensor]:
        return [factor * layer for factor, layer in zip(self.factors, self.net.layers(x), strict=True)]

    def pooled(self, x: Tensor) -> Tensor:
        return self.net.pooled(x)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 17, 9), (2,)], ids=str)
def test_distance_is_zero_where_samples_are_equal_symmetric_and_free_of_the_features_scale(
    shape: tuple[int, ...],
) -> None:
    net = network(shape).double()
    d = FeatureDistance(net, shape)
    x, y = rows(5, shape).double(), rows(5, shape, "others").double()
    assert (d(x, x) == 0).all()
    assert (d(x, y) > 0.01).all()
    assert (d(x, x + 1e-5 * y) > 0).all()
    torch.testing.assert_close(d(x, y), d(y, x))
    factors = [3.0, 0.01, 50.0, 7.0][: len(net.stages)]
    torch.testing.assert_close(FeatureDistance(Scaled(net, factors), shape)(x, y), d(x, y))


@pytest.mark.parametrize("weighted", [False, True])
def test_distance_is_the_plain_sum_over_layers_positions_and_channels(weighted: bool) -> None:
    shape = (1, 8, 8)
    net = network(shape, widths=[4, 8, 6]).double()
    weights = [rows(1, (width,), width)[0].abs().double() for width in (4, 8, 6)] if weighted else None
    x, y = rows(3, shape).double(), rows(3, shape, "others").double()
    expected = []
    for i in range(3):
        total = 0.0
        for k, (f, g) in enumerate(zip(net.layers(x[i : i + 1]), net.layers(y[i : i + 1]), strict=True)):
            f, g = f[0].detach().numpy(), g[0].detach().numpy()
            w = np.ones(len(f)) if weights is None else weights[k].numpy()
            height, width = f.shape[1:]
            for a in range(height):
                for b in range(width):
                    u, v = f[:, a, b], g[:, a, b]
                    difference = u / math.sqrt((u * u).sum()) - v / math.sqrt((v * v).sum())
                    total += float((w * difference**2).sum()) / (height * width)
        expected.append(total)
    found = FeatureDistance(net, shape, weights=weights)(x, y)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_gradients_reach_both_samples_and_no_feature_weight() -> None:
    shape = (1, 6, 5)
    net = network(shape, widths=[4, 4]).double()
    d = FeatureDistance(net, shape)
    x, y = (rows(2, shape, key).double().requires_grad_() for key in "xy")
    assert torch.autograd.gradcheck(d, (x, y), atol=1e-6)
    student = nn.Linear(30, 30).double()
    d(student(x.flatten(1)).view(x.shape), y.detach()).mean().backward()
    assert student.weight.grad is not None
    assert float(student.weight.grad.abs().max()) > 1e-6
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    assert not net.training


def test_a_distance_of_other_samples_is_refused() -> None:
    d = FeatureDistance(network((2,)), (2,))
    for x, y in [(torch.zeros(3, 2), torch.zeros(2, 2)), (torch.zeros(3, 3), torch.zeros(3, 3))]:
        with pytest.raises(UserError, match=r"features features@\w{6} compare two batches of samples \(B, \*\(2,\)\)"):
            d(x, y)


# --- training one


def test_shifts_are_whole_pixels_with_edges_repeated() -> None:
    x, most = rows(40, (2, 5, 7)), 2
    u = torch.rand(2, 40, generator=generator_for("shift"))
    found = shifted(x, u, most)
    moves = set()
    for image, moved, a, b in zip(x, found, *u, strict=True):
        down, right = int(a * 5) - 2, int(b * 5) - 2
        moves.add((down, right))
        row = np.clip(np.arange(5) + down, 0, 4)
        column = np.clip(np.arange(7) + right, 0, 6)
        assert torch.equal(moved, image[:, row][:, :, column])
    assert len(moves) > 15
    assert shifted(x, u, 0) is x


def test_denoising_loss_of_the_posterior_mean_is_its_closed_form() -> None:
    """x ~ N(0, I) under noise of deviation s: the mean is y / (1 + s²), its error s² / (1 + s²); s ~ U(0, 1)."""

    class Mean(nn.Module):
        """What a network would know that sees 4000 values of one noise level: the level."""

        def forward(self, y: Tensor) -> Tensor:
            return y / y.square().mean(1, keepdim=True)

    draws = Draws(generator_for("denoise"), 500)
    x = rows(500, (4000,))
    loss = loss_of(Denoising(Mean(), Blur(1.0, 0)), "student", Pair(x, x), draws)["loss"]
    assert float(loss) == pytest.approx(1 - math.pi / 4, abs=0.02)


def test_what_is_asked_for_of_a_large_image_is_its_mean_over_blocks() -> None:
    x = rows(2, (3, 64, 32))
    blocks = x.view(2, 3, 16, 4, 16, 2).mean((3, 5)).flatten(1)
    torch.testing.assert_close(denoising_target(x), blocks)
    assert denoising_target(rows(2, (1, 8, 8))).shape == (2, 64)
    assert denoising_target(rows(2, (3, 2, 50))).shape == (2, 300)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: DataSet) -> Path:
    """A run with two stages of features, of which one is in the loss of the last stage. Do not write to it.

    The teacher beside it stands still: its velocity is zero.
    """
    folder = tmp_path_factory.mktemp("features")
    net = resolve({"name": "mlp", "preset": "tiny"}, digits.shape)
    config = Config(shape=digits.shape, network=net, scaling=digits.scaling.as_dict(), stage="teacher")
    teacher = Generator(build(net), config=config).save(folder / "teacher")
    (folder / "r.yaml").write_text(RECIPE.replace("TEACHER", str(teacher)), encoding="utf-8")
    said = quietly("run", folder / "r.yaml", "--out", folder / "out")
    (folder / "said.txt").write_text(said, encoding="utf-8")
    return folder / "out"


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load_data("digits")


def test_a_classifier_stage_learns_the_labels_of_an_unconditional_recipe(run: Path, digits: DataSet) -> None:
    d = find_features(run / "judge", digits.shape, scaling=digits.scaling.as_dict())
    net = network(digits.shape, 10, widths=[16, 32, 64])
    state = read_tensors(run / "judge" / "model.safetensors")
    net.load_state_dict(state)
    assert accuracy(net, digits) >= 0.9
    assert d.digest == weights_digest(state)
    assert d.name == f"features@{d.digest[:6]}"
    x = digits.held_out_rows()
    with torch.no_grad():
        torch.testing.assert_close(d.pooled(x), net.pooled(x))
    # alike are those of one class: by these features, the nearest training row has the same digit
    features, labels = d.pooled(digits.train_rows()), digits.label_rows(digits.train)
    nearest = torch.cdist(d.pooled(x), features).argmin(1)
    assert labels is not None
    assert float((labels[nearest] == digits.label_rows(digits.held_out)).float().mean()) > 0.9


def test_a_stage_without_labels_learns_to_take_noise_out(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(4000, 4)).astype(np.float32))
    recipe.write_text(f"data: {tmp_path / 'x.npy'}\nstages: {{f: {{method: features, samples: 60_000}}}}")
    said = quietly("run", recipe, "--out", tmp_path / "out")
    assert "f (features)" in said
    assert "--features" in said
    net = build_features(resolve_features({}, (4,), 4))
    net.load_state_dict(read_tensors(tmp_path / "out" / "f" / "model.safetensors"))
    x = rows(20_000, (4,))
    with torch.no_grad():
        loss = loss_of(Denoising(net, Blur(1.0, 0)), "student", Pair(x, x), Draws(generator_for("d"), len(x)))["loss"]
    # between the floor of one who knows the noise's size and the best linear guess, 1 / (1 + 1/3) of what is seen
    assert 1 - math.pi / 4 < float(loss) < 0.25
    assert not (tmp_path / "out" / "compare.json").exists()


def test_a_feature_stage_is_planned_with_its_own_network(run: Path) -> None:
    said = quietly("run", run.parent / "r.yaml", "--out", run, "--dry")
    parameters = parameter_count(network((1, 8, 8), 10, widths=[16, 32, 64]))
    line = next(line for line in said.splitlines() if line.startswith("judge"))
    assert f"{parameters:,}" in line
    assert line.endswith("done")


# --- judging


def test_the_frechet_distance_of_a_comparison_is_that_of_the_judges_features(run: Path, digits: DataSet) -> None:
    judge = find_features(run / "judge", digits.shape)
    models = [load(run / "onestep")]
    result = compare(models, digits, steps=[1], samples=60, features=judge, say=None).result
    name = f"FD-{judge.name}"
    for row, model in zip(result["rows"], models, strict=False):
        fake = judge.pooled(model.draw(60, steps=1, seed=0).x)
        expected = frechet_distance(fake, judge.pooled(digits.train_rows()))
        assert row["scores"][name] == pytest.approx(expected.value, rel=1e-5)
        assert row["scores"][f"{name}_percent"] == pytest.approx(expected.percent, rel=1e-5)
    assert result["protocol"]["features"] == {"name": judge.name, "digest": judge.digest}
    text = table(result)
    assert f"| {name} % |" in text
    assert "pixels" not in text
    # the pipeline did the same, and shows it wherever it shows the number
    assert f"| {name} % |" in (run / "compare.md").read_text(encoding="utf-8")
    report = (run / "report.html").read_text(encoding="utf-8")
    assert f"{name} %" in report
    assert "FD-pixels" not in report
    said = (run.parent / "said.txt").read_text(encoding="utf-8")
    assert f"| {name} % |" in said
    assert "\n| judge" not in said


def test_no_model_is_judged_by_the_features_in_its_loss(run: Path, digits: DataSet) -> None:
    used = find_features(run / "used", digits.shape)
    model = load(run / "onestep")
    assert model.config.features == used.digest
    assert used.digest in (run / "onestep" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=rf"{used.name} were in the loss of 'onestep'"):
        compare([load(run.parent / "teacher"), model], digits, features=used)
    assert load(run.parent / "teacher").config.features is None
    model.config = replace(model.config, features=find_features(run / "judge", digits.shape).digest)
    compare([model], digits, samples=20, features=used, say=lambda line: None)


def test_features_are_no_model(run: Path) -> None:
    with pytest.raises(UserError, match=r"judge holds features .*not a generator"):
        load(run / "judge")
    said = quietly(
        *("compare", run / "judge", run / "onestep", "--data", "digits", "--samples", 20),
        *("--features", run / "judge"),
    )
    assert f"{run / 'judge'} holds features" in said
    assert "FD-features@" in said
    assert "\n| judge" not in said


def recipe(**stages: dict[str, Any]) -> dict[str, Any]:
    return {"data": "digits", "stages": {"t": {"method": "flow_matching"}, "f": {"method": "features"}, **stages}}


@pytest.mark.parametrize(
    ("stages", "judge", "words"),
    [
        ({"s": {"method": "reflow", "teacher": "f"}}, None, "teacher 'f' is a feature network, not a velocity field"),
        ({"s": {"method": "distill", "teacher": "t", "init": "f"}}, None, "init 'f' is a feature network"),
        ({"s": {"method": "features", "teacher": "t"}}, None, "learned from data, from scratch"),
        ({"s": {"method": "features", "init": "f"}}, None, "learned from data, from scratch"),
        ({"s": {"method": "features", "learn": "noise", "noise": 0}}, None, "takes noise out"),
        ({"s": {"method": "instaflow", "teacher": "t", "features": "t"}}, None, "'t' are a stage of method 'flow_mat"),
        ({"s": {"method": "instaflow", "teacher": "t", "features": "ff"}}, None, "no features 'ff': did you mean 'f'"),
        ({"s": {"method": "instaflow", "teacher": "t", "features": "lpips:vg"}}, None, "did you mean 'vgg'"),
        (
            {"s": {"method": "instaflow", "teacher": "t", "features": "g"}, "g": {"method": "features"}},
            None,
            "features 'g' come later",
        ),
        ({"s": {"method": "instaflow", "teacher": "t", "features": "f"}}, "f", "compare.features: 'f' are in the loss"),
        ({}, "t", "compare.features: the features 't' are a stage of method 'flow_matching'"),
        ({}, "nowhere", "compare.features: there are no features 'nowhere'"),
    ],
)
def test_recipes_that_misname_features_are_refused(stages: dict[str, Any], judge: str | None, words: str) -> None:
    fields = recipe(**stages)
    if judge is not None:
        fields["compare"] = {"features": judge}
    with pytest.raises(UserError, match=words):
        make_recipe(fields, "here")


def test_a_recipe_may_judge_by_a_stage() -> None:
    assert make_recipe({**recipe(), "compare": {"features": "f"}}, "here").header.compare.features == "f"


# --- features by name


def test_files_of_cifar_resnets_are_found(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    net = resnet()
    state = {name: value for name, value in net.state_dict().items() if "num_batches" not in name}
    torch.save({"best_prec1": 91.7, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.th")
    torch.save(state, tmp_path / "b.pt")
    save_file(state, tmp_path / "c.safetensors")
    found = [find_features(tmp_path / name, (3, 32, 32)) for name in ("a.th", "b.pt", "c.safetensors")]
    assert len({d.digest for d in found}) == 1
    assert found[0].name == f"resnet20@{found[0].digest[:6]}"
    assert found[0].digest != FeatureDistance(resnet(key="other"), (3, 32, 32)).digest
    x = rows(3, (3, 32, 32))
    with torch.no_grad():
        torch.testing.assert_close(found[0].pooled(x), net.pooled(x))
    with pytest.raises(UserError, match=r"needs samples of shape \(3, 32, 32\), and the data has \(1, 28, 28\)"):
        find_features(tmp_path / "a.th", (1, 28, 28))


class Runs:
    """An object whose unpickling writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    shape = (3, 32, 32)
    torch.save({"state_dict": Runs(tmp_path / "ran")}, tmp_path / "code.pt")
    with pytest.raises(UserError, match="is damaged, or holds more than tensors"):
        find_features(tmp_path / "code.pt", shape)
    assert not (tmp_path / "ran").exists()
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(UserError, match="not the weights of a CIFAR ResNet"):
        find_features(tmp_path / "linear.pt", shape)
    torch.save({"a": 1}, tmp_path / "number.pt")
    with pytest.raises(UserError, match="does not hold a state dict"):
        find_features(tmp_path / "number.pt", shape)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "linear.pt").read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        find_features(tmp_path / "cut.pt", shape)
    (tmp_path / "notes.txt").write_text("no weights", encoding="utf-8")
    with pytest.raises(UserError, match=r"does not end in \.th"):
        find_features(tmp_path / "notes.txt", shape)
    for missing, words in [("nowhere", "it does not exist"), ("", "has no config.json")]:
        with pytest.raises(UserError, match=words):
            find_features(tmp_path / missing, shape)


def test_folders_that_do_not_fit_are_refused(run: Path, digits: DataSet) -> None:
    with pytest.raises(UserError, match=r"model of kind 'velocity', which has no features"):
        find_features(run.parent / "teacher", digits.shape)
    with pytest.raises(UserError, match=r"samples of shape \(1, 8, 8\), and the data has \(1, 28, 28\)"):
        find_features(run / "judge", (1, 28, 28))
    other = from_array(np.random.default_rng(0).normal(size=(20, 8, 8)), name="other")
    with pytest.raises(UserError, match="data with another scaling"):
        find_features(run / "judge", other.shape, scaling=other.scaling.as_dict())


@pytest.mark.skipif(importlib.util.find_spec("lpips") is not None, reason="lpips is installed")
def test_lpips_names_its_extra() -> None:
    with pytest.raises(MissingExtra, match=r"fewstep\[perceptual\]"):
        find_features("lpips:vgg", (3, 32, 32))


def test_lpips_refuses_samples_that_are_not_grey_or_rgb_images() -> None:
    with pytest.raises(UserError, match="did you mean 'alex'"):
        find_features("lpips:alexnet", (3, 32, 32))
    for shape in [(2,), (4, 32, 32)]:
        with pytest.raises(UserError, match="need grey or RGB images"):
            find_features("lpips:alex", shape)


def test_lpips_sees_small_and_grey_images_enlarged_and_in_colour() -> None:
    class Parts(nn.Module):
        """Parts of the right names: no scaling, and a network with its input as its activations."""

        def __init__(self) -> None:
            super().__init__()
            self.scaling_layer, self.net = nn.Identity(), nn.Flatten(0, 0)

    net, x = LpipsNet(Parts()), rows(2, (1, 28, 14))
    seen = torch.stack(net.layers(x))
    assert seen.shape == (2, 3, 128, 64)
    torch.testing.assert_close(seen, F.interpolate(x, scale_factor=64 / 14, mode="bilinear").expand(-1, 3, -1, -1))
    large = rows(2, (3, 70, 66))
    assert torch.equal(torch.stack(net.layers(large)), large)
