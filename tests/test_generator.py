"""Generators: draws against solving by hand, labels, guidance, saving and loading, foreign modules."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.data.scaling import Scaling
from fewstep.errors import UserError
from fewstep.flow.couplings import Coupling, Facts, Inpainting, Pair, SuperResolution
from fewstep.flow.noise import generator_for, noise_rows
from fewstep.generator import BaseRows, Config, read_config, weights_digest
from fewstep.metrics.feature_distance import find_features
from fewstep.solvers.maps import SampleRule

ASSETS = Path(__file__).parent.parent / "benchmarks" / "assets"


class Affine(nn.Module):
    """v(x, t, label) = a x + b + label: a module that fewstep did not build. It counts its rows."""

    def __init__(self, size: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5, dtype=dtype))
        self.b = nn.Parameter(torch.full((size,), 2.0, dtype=dtype))
        self.rows = 0

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.rows += len(x)
        assert t.dtype == x.dtype
        shift = torch.zeros(len(x)) if label is None else label
        return self.a * x + self.b + shift.to(x)[:, None]


def labelled(weights: Sequence[float] = (0.7, 0.2, 0.1), **config: Any) -> fs.Generator:
    return fs.Generator(Affine(), config=Config(shape=(2,), class_weights=tuple(weights), **config))


def test_samples_are_the_solution_from_the_seeds_noise() -> None:
    net = Affine()
    gen = fs.Generator(net, shape=(2,))
    x0 = noise_rows(700, (2,), seed=5)
    for options in ({"solver": "heun", "steps": 4}, {"steps": 3, "grid": "shift:3"}, {"grid": "0,0.1,1"}):
        by_hand = fs.solve(net, x0, **options).x
        torch.testing.assert_close(gen.sample(700, seed=5, **options), by_hand)
        torch.testing.assert_close(gen.sample(noise=x0, **options), by_hand)
        torch.testing.assert_close(gen.sample(700, seed=5, batch_size=99, **options), by_hand)
    default = fs.solve(net, x0, solver="euler", steps=50).x
    torch.testing.assert_close(gen.sample(700, seed=5), default)
    # the exact flow: x1 = e^a x0 + b (e^a - 1) / a
    exact = np.exp(0.5) * x0 + 4.0 * (np.exp(0.5) - 1.0)
    torch.testing.assert_close(gen.sample(noise=x0, solver="rk4", steps=40), exact, rtol=1e-5, atol=1e-5)


def test_the_scaling_takes_samples_to_the_datas_units() -> None:
    scaling = Scaling(shift=10.0, scale=4.0, clip=(0.0, 20.0), shape=(2,))
    plain, scaled = (
        fs.Generator(Affine(), config=Config(shape=(2,), scaling=fields)) for fields in (None, scaling.as_dict())
    )
    torch.testing.assert_close(
        scaled.sample(50, seed=1, steps=3), (plain.sample(50, seed=1, steps=3) * 4 + 10).clamp(0, 20)
    )


def test_the_network_is_called_in_its_own_precision() -> None:
    gen = fs.Generator(Affine(dtype=torch.float64), shape=(2,))
    x = gen.sample(20, steps=5, seed=2)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, fs.Generator(Affine(), shape=(2,)).sample(20, steps=5, seed=2))
    noise = noise_rows(20, (2,), seed=2, dtype=torch.float64)
    torch.testing.assert_close(fs.Generator(Affine(), shape=(2,)).sample(noise=noise, steps=5), x)


def test_labels_are_drawn_as_often_as_in_the_data_and_belong_to_sample_i() -> None:
    gen = labelled()
    draw = gen.draw(20_000, steps=1, seed=4)
    assert draw.label is not None
    shares = torch.bincount(draw.label, minlength=3) / 20_000
    # three standard errors of a share of 0.7 are 0.0097
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1]), atol=0.01, rtol=0)
    fewer = gen.draw(100, steps=1, seed=4, batch_size=7)
    assert fewer.label is not None
    assert torch.equal(fewer.label, draw.label[:100])
    torch.testing.assert_close(fewer.x, draw.x[:100])
    other = gen.draw(100, steps=1, seed=5).label
    assert other is not None
    assert not torch.equal(other, fewer.label)
    # labels and noise come from different tables of draws
    assert abs(float(torch.corrcoef(torch.stack([draw.label.float(), draw.x0[:, 0]]))[0, 1])) < 0.03


def test_labels_are_given_one_for_all_or_one_each_by_number_or_name() -> None:
    gen = labelled()
    per_sample = gen.draw(4, steps=1, label=[0, 2, 1, 2])
    for k, label in enumerate([0, 2, 1, 2]):
        torch.testing.assert_close(per_sample.x[k], gen.draw(4, steps=1, label=label).x[k])
    assert gen.draw(3, steps=1, label=torch.tensor([2, 0, 1])).label.tolist() == [2, 0, 1]  # type: ignore[union-attr]
    assert gen.draw(2, steps=1, label="1").label.tolist() == [1, 1]  # type: ignore[union-attr]
    numbers = labelled(label_names=(2, 5, 9))
    assert numbers.draw(2, steps=1, label=[9, 2]).label.tolist() == [2, 0]  # type: ignore[union-attr]
    names = labelled(label_names=("cat", "dog", "emu"))
    assert names.draw(2, steps=1, label=["emu", "cat"]).label.tolist() == [2, 0]  # type: ignore[union-attr]
    assert names.draw(2, steps=1, label="dog").label.tolist() == [1, 1]  # type: ignore[union-attr]
    assert names.draw(2, steps=1, label=2).label.tolist() == [2, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("names", "label", "words"),
    [
        (None, 3, r"label 3 is out of range.*0 … 2"),
        (None, -1, "label -1 is out of range"),
        (None, [0, -7], "label -7"),
        (None, 1.0, "whole numbers"),
        (None, True, "whole numbers"),
        (None, [0, 1, 2], "3 labels for 2 samples"),
        (None, "cat", "are numbers"),
        ((2, 5, 9), 0, "unknown label 0"),
        (("cat", "dog", "emu"), "cta", "did you mean 'cat'"),
        (("cat", "dog", "emu"), 3, "unknown label 3"),
    ],
)
def test_labels_that_are_not_there_are_refused(names: Any, label: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        labelled(label_names=names).draw(2, steps=1, label=label)


def test_guidance_counts_two_calls_and_extrapolates() -> None:
    gen = labelled()
    plain, guided = gen.draw(8, steps=3, label=2), gen.draw(8, steps=3, label=2, guidance=3.0)
    assert (plain.nfe, guided.nfe) == (3, 6)
    assert gen.draw(8, steps=3, label=2, guidance=1.0).nfe == 3
    assert gen.draw(8, steps=3, solver="rk4", label=2, guidance=3.0).nfe == 24
    # v is linear in the label, so weight 3 on label 2 is label 6
    by_hand = fs.solve(gen.module, plain.x0, steps=3, cond={"label": torch.full((8,), 6)}).x
    torch.testing.assert_close(guided.x, by_hand)


def test_a_generator_is_the_same_after_save_and_load(labelled_run: Path, tmp_path: Path) -> None:
    before = fs.load(labelled_run / "teacher")
    before.save(tmp_path / "new/copy")
    after = fs.load(tmp_path / "new/copy")
    assert after.config == before.config
    assert weights_digest(after.module.state_dict()) == weights_digest(before.module.state_dict())
    torch.testing.assert_close(after.sample(64, steps=4, seed=1), before.sample(64, steps=4, seed=1), rtol=0, atol=0)
    assert {path.name for path in (tmp_path / "new/copy").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    # equal models are equal files: nothing that varies between equal runs is in them
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "new/copy" / name).read_bytes() == (labelled_run / "teacher" / name).read_bytes()


def test_loading_leaves_the_global_random_state_alone(tiny_run: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    fs.load(tiny_run / "teacher").sample(3, steps=1)
    assert torch.equal(torch.rand(3), expected)


def test_a_foreign_module_is_saved_as_weights_and_restored_into_a_module(tmp_path: Path) -> None:
    net = Affine()
    with torch.no_grad():
        net.b.copy_(torch.tensor([3.0, -1.0]))
    fs.Generator(net, shape=(2,)).save(tmp_path / "out")
    with pytest.raises(UserError, match=r"module=net"):
        fs.load(tmp_path / "out")
    back = fs.load(tmp_path / "out", module=Affine())
    x = fs.Generator(net, shape=(2,)).sample(10, steps=2)
    torch.testing.assert_close(back.sample(10, steps=2), x)
    assert "module=net" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="do not fit the network: size mismatch for b"):
        fs.load(tmp_path / "out", module=Affine(size=3))


def test_tensors_that_share_storage_are_saved(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(2, 2)
            self.two = nn.Linear(2, 2)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.two(self.one(x))

    net = Tied()
    fs.Generator(net, shape=(2,)).save(tmp_path)
    again = fs.load(tmp_path, module=Tied())
    torch.testing.assert_close(again.sample(5, steps=2), fs.Generator(net, shape=(2,)).sample(5, steps=2))


def test_an_empirical_base_is_kept_with_the_model(tmp_path: Path) -> None:
    rows = torch.arange(20.0).reshape(10, 2)
    gen = fs.Generator(Affine(), config=Config(shape=(2,), base="empirical"), base_rows=rows)
    gen.save(tmp_path / "out")
    draw = fs.load(tmp_path / "out", module=Affine()).draw(3000, steps=1, seed=2)
    counts = (draw.x0[:, None] == rows[None]).all(-1).sum(0)
    assert int(counts.sum()) == 3000
    assert float(((counts - 300) ** 2 / 300).sum()) < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    torch.testing.assert_close(draw.x, 1.5 * draw.x0 + 2.0)
    with pytest.raises(UserError, match="base rows are missing"):
        fs.Generator(Affine(), config=Config(shape=(2,), base="empirical")).sample(3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fs.Generator(Affine()), "needs the shape"),
        (lambda: fs.Generator(Affine(), shape=(2,), config=Config(shape=(3,))), "needs the shape"),
        (lambda: fs.Generator(Affine(), shape=2), r"got 2"),
        (lambda: fs.Generator(Affine(), shape=(0,)), r"\(0,\)"),
        (lambda: fs.Generator(Affine(), shape=()), r"got \(\)"),
        (lambda: fs.Generator(lambda x, t: x, shape=(2,)), "needs a torch.nn.Module, got function"),
        (lambda: fs.Generator(Affine(), shape=(2,)).sample(), "at least 1, got None"),
        (lambda: fs.Generator(Affine(), shape=(2,)).sample(2.5), "at least 1, got 2.5"),
        (lambda: fs.Generator(Affine(), shape=(2,)).sample(noise=torch.zeros(4, 3)), r"rows of shape \(3,\)"),
        (lambda: fs.Generator(Affine(), shape=(2,)).sample(5, noise=torch.zeros(4, 2)), "contradict"),
        (lambda: fs.Generator(Affine(), shape=(2,)).sample(noise=torch.full((4, 2), np.nan)), "NaN"),
        (lambda: labelled(guidance=2.0).sample(4, guidance=2.0), "baked into its weights"),
    ],
)
def test_wrong_generators_and_wishes_are_refused(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


def test_samples_that_are_not_finite_are_refused() -> None:
    gen = fs.Generator(Affine(), shape=(2,))
    with torch.no_grad():
        gen.module.a.fill_(1e30)  # type: ignore[operator, union-attr]
    with pytest.raises(UserError, match="7 of 7 samples of 'Affine' are NaN or infinite"):
        gen.sample(7, steps=4)


def test_config_json_holds_every_field_and_reads_back_equal(tmp_path: Path) -> None:
    config = Config(
        shape=(2,),
        rule=SampleRule("map", steps=(1, 2), default_steps=1),
        class_weights=(0.25, 0.75),
        label_names=("a", "b"),
        guidance=1.5,
        coupling=Facts(independent=False, deterministic=True),
        method="distill",
        stage="s",
        data={"name": "moons"},
    )
    fs.Generator(Affine(), config=config).save(tmp_path)
    assert read_config(tmp_path) == config
    assert set(json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))) == {
        "format",
        *vars(config),
    }
    assert "Guidance 1.5 is baked" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["fashion_mnist_teacher", "fashion_mnist_features"])
def test_a_folder_of_format_1_is_read_and_written_as_format_2(name: str, tmp_path: Path) -> None:
    old = json.loads((ASSETS / name / "config.json").read_text(encoding="utf-8"))
    assert old["format"] == 1
    config = read_config(ASSETS / name)
    assert config.rule == SampleRule(kind=old["kind"], default_steps=old["default_steps"])
    # format 1 has an empty mapping where the facts are not known
    assert config.coupling == (Facts(**old["coupling"]) if old["coupling"] else None)
    new = json.loads(json.dumps({"format": 2, **dataclasses.asdict(config)}))
    moved = {field.name for field in dataclasses.fields(SampleRule)}
    assert {key: new[key] for key in old.keys() - moved - {"format", "coupling"}} == {
        key: value for key, value in old.items() if key not in moved | {"format", "coupling"}
    }
    (tmp_path / "config.json").write_text(json.dumps(new), encoding="utf-8")
    assert read_config(tmp_path) == config


def test_models_of_format_1_are_loaded() -> None:
    assert fs.load(ASSETS / "fashion_mnist_teacher").sample(2, steps=1).shape == (2, 28, 28)
    assert find_features(ASSETS / "fashion_mnist_features", (1, 28, 28)).name == "features@c623ed"
    with pytest.raises(UserError, match="model of kind 'velocity', which has no features"):
        find_features(ASSETS / "fashion_mnist_teacher", (1, 28, 28))


def test_a_map_of_format_1_keeps_how_it_is_sampled(tmp_path: Path) -> None:
    rule = {"kind": "map", "steps": [1, 2], "multiple": True, "default_steps": 2, "sampler": "chain"}
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "shape": [2], **rule, "coupling": {}}))
    config = read_config(tmp_path)
    assert config.rule == SampleRule("map", (1, 2), 2, multiple=True, sampler="chain")
    assert config.coupling is None


# --- starts made from data ----------------------------------------------------------------------------------------

KEPT = 16


class Drift(nn.Module):
    """v(x, t, context) = the mean of the context: the end point shows start and context."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return torch.zeros_like(x) + context.flatten(1).mean(1).reshape(-1, *(1,) * (x.ndim - 1))


def restorer(coupling: Coupling, shape: tuple[int, ...]) -> tuple[fs.Generator, Pair]:
    """A generator that starts from 16 damaged rows, and the rows with what was kept of them."""
    x1 = torch.randn(KEPT, *shape, generator=generator_for("kept"))
    pair = coupling.pair(x1, {}, generator_for("damage", 0))
    generator = fs.Generator(Drift(), config=Config(shape=shape, base="examples"))
    generator.base = BaseRows.of_examples(pair)
    return generator, pair


COUPLINGS = [(Inpainting(), (24,)), (Inpainting(), (2, 4, 4)), (SuperResolution(2, 0.3), (1, 4, 4))]


def examples_of(draw: Any, pair: Pair) -> Tensor:
    """Which kept row each sample started from, told by its context."""
    assert draw.context is not None
    same = (draw.context[:, None] == pair.cond["context"][None]).flatten(2).all(2)
    assert bool((same.sum(1) == 1).all())
    return same.int().argmax(1)


@pytest.mark.parametrize(("coupling", "shape"), COUPLINGS, ids=["vectors", "images", "sharpened"])
def test_samples_from_damaged_data_are_functions_of_seed_and_number(coupling: Any, shape: tuple[int, ...]) -> None:
    generator, pair = restorer(coupling, shape)
    draw = generator.draw(64, steps=1, seed=3)
    assert len(draw.x.unique(dim=0)) == 64
    few = generator.draw(20, steps=1, seed=3, batch_size=7)
    torch.testing.assert_close(few.x, draw.x[:20], rtol=0, atol=0)
    other = generator.draw(64, steps=1, seed=4)
    assert not bool((other.x[:, None] == draw.x[None]).flatten(2).all(2).any())
    rows, others = examples_of(draw, pair), examples_of(other, pair)
    for k in range(4):  # every kept example once before any repeats
        assert sorted(rows[16 * k : 16 * k + 16].tolist()) == list(range(KEPT))
    assert not torch.equal(rows, others)


def test_the_unknown_part_is_fresh_noise_and_the_known_part_the_examples() -> None:
    generator, pair = restorer(Inpainting(), (24,))
    draw = generator.draw(8000, steps=1, seed=0)
    rows = examples_of(draw, pair)
    mask, known = pair.cond["context"][rows].chunk(2, dim=1)
    torch.testing.assert_close(mask * draw.x0, known, rtol=0, atol=0)
    noise = draw.x0[mask == 0]
    assert abs(float(noise.mean())) < 4 / np.sqrt(len(noise))
    assert float(noise.std()) == pytest.approx(1.0, abs=4 / np.sqrt(2 * len(noise)))
    blurred, kept = restorer(SuperResolution(2, 0.3), (1, 4, 4))
    start = blurred.draw(2000, steps=1, seed=0)
    added = start.x0 - kept.cond["context"][examples_of(start, kept)]
    assert float(added.std()) == pytest.approx(0.3, abs=4 * 0.3 / np.sqrt(2 * added.numel()))


def test_the_damage_is_kept_with_the_model(tmp_path: Path) -> None:
    generator, _ = restorer(Inpainting(), (24,))
    generator.save(tmp_path)
    again = fs.load(tmp_path, module=Drift())
    assert again.distinct_starts is None
    torch.testing.assert_close(again.sample(40, steps=2, seed=5), generator.sample(40, steps=2, seed=5), rtol=0, atol=0)


def test_complete_starts_of_older_folders_are_chosen_by_the_seed_and_repeats_are_told(tmp_path: Path) -> None:
    _, pair = restorer(Inpainting(), (24,))
    old = Config(shape=(24,), base="examples")
    fs.Generator(Drift(), config=old, base_rows=pair.x0, base_context=pair.cond["context"]).save(tmp_path)
    with pytest.warns(UserWarning, match="at most 16 samples differ"):
        generator = fs.load(tmp_path, module=Drift())
    assert generator.distinct_starts == KEPT
    one, two = (generator.draw(KEPT, steps=1, seed=seed) for seed in (0, 1))
    assert len(one.x.unique(dim=0)) == KEPT
    assert not torch.equal(one.x, two.x)
    torch.testing.assert_close(one.x0, pair.x0[examples_of(one, pair)], rtol=0, atol=0)
    with pytest.warns(UserWarning, match="of 64 samples, only 16 differ"):
        many = generator.draw(64, steps=1, seed=0)
    torch.testing.assert_close(many.x[:KEPT], one.x, rtol=0, atol=0)
