"""``fs.from_diffusers`` against the pipelines of diffusers, which decide what each class's velocity is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from diffusers_cases import CASES, PIPED, ROWS, TEXT, Case, Cond, diffusers, ragged, scheduler_times, unpack
from fewstep.errors import UserError
from fewstep.interop.diffusers_classes import CLASSES
from fewstep.interop.diffusers_networks import CONVENTION, INTERVALS, save_diffusers
from fewstep.networks.adapter import Adapter

MODULES = {name: case.module() for name, case in CASES.items()}
TIMES = torch.tensor([0.1, 0.2, 0.9])
every = pytest.mark.parametrize("name", CASES)
every_pipeline = pytest.mark.parametrize("name", PIPED)


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def worst(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def opened(name: str, **options: Any) -> tuple[Case, Adapter, Tensor, Cond]:
    case = CASES[name]
    return case, fs.from_diffusers(MODULES[name], **options), case.start(), case.cond(7)


def wrong(name: str) -> dict[str, Adapter]:
    """The two mistakes that every parity test must be able to see."""
    kind = CLASSES[name]
    return {
        "time": fs.from_diffusers(MODULES[name], flip_time=not kind.flip_time),
        "sign": fs.from_diffusers(MODULES[name], sign=-kind.sign),
    }


def test_every_declared_class_has_a_case_here() -> None:
    assert CASES.keys() == CLASSES.keys()


@every
def test_the_time_matters_to_the_networks_of_these_tests(name: str) -> None:
    _, net, x, cond = opened(name)
    assert relative(net(x, 1 - TIMES, **cond), net(x, TIMES, **cond)) > 0.05


class Recorder:
    """What a pipeline gives to its scheduler: (noise level, velocity in our direction, latents) of every step."""

    def __init__(self, scheduler: Any, shape: tuple[int, ...]) -> None:
        self.seen: list[tuple[float, Tensor, Tensor]] = []
        self.scheduler, self.step, self.shape = scheduler, scheduler.step, shape
        scheduler.step = self

    def __call__(self, output: Tensor, timestep: Tensor, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((float(timestep) / 1000, -self.plain(output), self.plain(latents)))
        return self.step(output, timestep, latents, *args, **kwargs)

    def plain(self, x: Tensor) -> Tensor:
        return unpack(x, *self.shape[-2:]) if x.ndim == 3 else x


@every_pipeline
def test_the_velocity_is_the_pipelines_own(name: str) -> None:
    case, net, x, cond = opened(name)
    pipe = case.open(MODULES[name])
    recorder = Recorder(pipe.scheduler, case.shape)
    case.sample(pipe, x, 4, cond)
    assert len(recorder.seen) == 4
    for sigma, v, latents in recorder.seen:
        t = torch.full((ROWS,), 1 - sigma, dtype=torch.float64)  # 1000 (1 - t) of a float32 t is off by up to 3e-5
        assert worst(net(latents, t, **cond), v) <= 1e-6
    _, v, latents = recorder.seen[0]
    for mistaken in wrong(name).values():
        assert relative(mistaken(latents, torch.zeros(ROWS), **cond), v) > 0.05


@every_pipeline
@pytest.mark.parametrize("steps", [1, 2, 4, pytest.param(20, marks=pytest.mark.slow)])
def test_euler_is_the_pipelines_call_on_its_grid(name: str, steps: int) -> None:
    case, net, x, cond = opened(name)
    pipe = case.open(MODULES[name])
    theirs = case.sample(pipe, x, steps, cond)
    grid = scheduler_times(pipe.scheduler, steps)
    assert worst(theirs, x) > 0.5
    ours = fs.solve(net, x, solver="euler", grid=grid, cond=cond)
    assert ours.nfe == steps
    assert worst(ours.x, theirs) <= 1e-5
    for mistaken in wrong(name).values():
        assert worst(fs.solve(mistaken, x, solver="euler", grid=grid, cond=cond).x, theirs) > 0.01


@pytest.mark.parametrize("name", ["UNet2DModel", "DiTTransformer2DModel"])
@pytest.mark.parametrize("steps", [1, 4, pytest.param(20, marks=pytest.mark.slow)])
def test_classes_without_a_pipeline_follow_a_plain_loop_over_a_scheduler(name: str, steps: int) -> None:
    _, net, start, cond = opened(name)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    x = start
    for timestep in scheduler.timesteps:
        out = MODULES[name](x, timestep.expand(ROWS), class_labels=cond["label"]).sample
        x = scheduler.step(out, timestep, x).prev_sample
    grid = scheduler_times(scheduler, steps)
    assert worst(fs.solve(net, start, grid=grid, cond=cond).x, x) <= 1e-5
    for mistaken in wrong(name).values():
        assert worst(fs.solve(mistaken, start, grid=grid, cond=cond).x, x) > 0.01


def guided(net: Adapter, negative: Cond, weight: float) -> Any:
    """The guided velocity, by the adapter's own rule."""

    def v(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        with_it, without = net(x, t, **cond), net(x, t, **{**cond, **negative})
        if net.combine is None:
            return without + weight * (with_it - without)
        return net.combine(without, with_it, weight)

    return v


@every_pipeline
def test_guidance_is_the_pipelines_own(name: str) -> None:
    """``scale`` is the pipeline's; our weight is the same, for Z-Image one more."""
    case, net, x, cond = opened(name)
    negative, scale = case.cond(77), 3.0
    pipe = case.open(MODULES[name])
    theirs = case.sample(pipe, x, 3, cond, negative, scale)
    grid = scheduler_times(pipe.scheduler, 3)

    def ours(weight: float) -> Tensor:
        return fs.solve(guided(net, negative, weight), x, grid=grid, cond=cond).x

    assert worst(ours(scale + CLASSES[name].weight_offset), theirs) <= 1e-5
    assert worst(ours(scale + 1 - CLASSES[name].weight_offset), theirs) > 1e-3
    if net.combine is not None:
        net.combine = None
        assert worst(ours(scale), theirs) > 1e-2


@every
def test_weight_one_is_the_conditional_field(name: str) -> None:
    case, net, x, cond = opened(name)
    assert worst(guided(net, case.cond(77), 1.0)(x, TIMES, **cond), net(x, TIMES, **cond)) < 1e-5


def test_a_dit_has_a_null_label_and_keeps_its_labels_in_training_mode() -> None:
    _, net, x, cond = opened("DiTTransformer2DModel")
    assert net.null == {"label": 5}
    assert worst(net(x, TIMES, label=torch.full((ROWS,), 5)), net(x, TIMES, **cond)) > 1e-3
    net.train()
    first = net(x, TIMES, **cond)
    assert all(worst(net(x, TIMES, **cond), first) == 0.0 for _ in range(20))
    MODULES["DiTTransformer2DModel"].train()  # as diffusers trains it, labels are redrawn
    raw = [MODULES["DiTTransformer2DModel"](x, TIMES, cond["label"]).sample for _ in range(20)]
    MODULES["DiTTransformer2DModel"].eval()
    assert any(worst(out, raw[0]) > 1e-3 for out in raw)


@every
def test_the_two_time_form_starts_as_the_velocity(name: str) -> None:
    _, net, x, cond = opened(name)
    two = net.with_interval()
    v, r = net(x, TIMES, **cond), torch.tensor([0.4, 0.2, 1.0])
    assert worst(two(x, TIMES, r, **cond), v) == 0.0
    assert len(two.places) == (3 if name.startswith("DiT") else 1), two.places
    assert two.intervals is not None
    for layer in two.intervals.layers:
        nn.init.normal_(layer.second.weight, std=0.5)
    changed = two(x, TIMES, r, **cond)
    assert relative(changed, v) > 1e-3
    assert worst(changed[0], two(x, TIMES, torch.ones(ROWS), **cond)[0]) > 1e-3, "the end time does not matter"
    assert worst(net(x, TIMES, **cond), v) == 0.0, "the original was changed"


def test_gradients_reach_every_interval_of_a_dit() -> None:
    _, net, x, cond = opened("DiTTransformer2DModel")
    two = net.with_interval()
    with torch.enable_grad():
        two(x, TIMES, torch.ones(ROWS), **cond).square().mean().backward()
    assert two.intervals is not None
    assert all(layer.second.weight.grad.norm() > 0 for layer in two.intervals.layers)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "QwenImageTransformer2DModel"])
def test_five_tokens_in_a_batch_of_five(name: str) -> None:
    """Rows are independent of each other, and every condition can be cut row by row."""
    case = CASES[name]
    net, x = fs.from_diffusers(MODULES[name]), case.start(rows=5)
    many = [case.cond(seed) for seed in (1, 2)]
    cond = {key: torch.cat([part[key] for part in many])[:5] for key in many[0]}
    cond = {key: rows[:, :5] if rows.shape[1] == 6 else rows for key, rows in cond.items()}
    assert cond[TEXT].shape[:2] == (5, 5)
    t = torch.linspace(0.1, 0.9, 5)
    whole = net(x, t, **cond)
    for i in range(5):
        alone = net(x[i : i + 1], t[i : i + 1], **{key: rows[i : i + 1] for key, rows in cond.items()})
        assert worst(alone[0], whole[i]) < 1e-5


def test_the_guidance_input_of_flux() -> None:
    _, net, x, cond = opened("FluxTransformer2DModel")
    other = fs.from_diffusers(MODULES["FluxTransformer2DModel"], guidance_embed=1.0)
    assert worst(other(x, TIMES, **cond), net(x, TIMES, **cond)) > 1e-3  # 3.5 equals the pipeline's, above
    plain = CASES["FluxTransformer2DModel"].module(guidance_embeds=False)
    assert fs.from_diffusers(plain)(x, TIMES, **cond).isfinite().all()


@every
def test_weights_of_half_precision_take_float32_and_a_float32_time(name: str, tmp_path: Path) -> None:
    """Wan keeps some weights in float32 when diffusers loads it: the first parameter does not tell the dtype."""
    case, net, x, cond = opened(name)
    MODULES[name].save_pretrained(tmp_path)
    half = fs.from_diffusers(tmp_path, dtype=torch.bfloat16)
    times: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        times.append(args[1] if name.startswith("ZImage") else kwargs["timestep"])

    half.inner.register_forward_pre_hook(keep, with_kwargs=True)
    assert torch.bfloat16 in {parameter.dtype for parameter in half.inner.parameters()}
    v = half(x, TIMES, **cond)
    assert v.dtype == torch.float32
    assert relative(v, net(x, TIMES, **cond)) < (
        0.5 if name.startswith("Flux") else 0.1
    )  # Flux rounds its times itself
    assert [t.dtype for t in times] == [torch.float32]
    assert case.shape == v.shape[1:]


def test_times_are_not_rounded_to_whole_ones() -> None:
    _, net, x, cond = opened("UNet2DModel")
    a, b = (net(x, torch.full((ROWS,), t), **cond) for t in (0.5000, 0.5004))
    assert worst(a, b) > 1e-4
    raw = [MODULES["UNet2DModel"](x, 1000 * (1 - t), cond["label"]).sample for t in (0.4996, 0.4992)]
    assert worst(*raw) == 0.0  # which diffusers does to plain numbers


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "SanaTransformer2DModel"])
def test_a_learned_variance_is_left_out(name: str) -> None:
    case = CASES[name]
    module = case.module(out_channels=2 * case.shape[0])
    net, x, cond = fs.from_diffusers(module), case.start(), case.cond(7)
    v = net(x, TIMES, **cond)
    assert v.shape == x.shape
    if name.startswith("DiT"):
        assert worst(v, -module(x, 1000 * (1 - TIMES), cond["label"]).sample[:, : case.shape[0]]) < 1e-6
        return
    pipe = case.open(module)
    theirs = case.sample(pipe, x, 2, cond)
    assert worst(fs.solve(net, x, grid=scheduler_times(pipe.scheduler, 2), cond=cond).x, theirs) <= 1e-5


def test_masks_of_any_number_type_mean_the_same() -> None:
    for name in ("QwenImageTransformer2DModel", "Lumina2Transformer2DModel", "ZImageTransformer2DModel"):
        _, net, x, cond = opened(name)
        mask = next(key for key in cond if key.endswith("mask"))
        v = net(x, TIMES, **cond)
        for given in (ragged().bool(), ragged().float(), ragged()):
            assert worst(net(x, TIMES, **{**cond, mask: given}), v) == 0.0
        del cond[mask]
        assert worst(net(x, TIMES, **cond), v) > 1e-4, "without a mask all of the text counts"


# -- from folders and back


@every
def test_a_saved_network_is_loaded_and_saved_again(name: str, tmp_path: Path) -> None:
    _, net, x, cond = opened(name)
    MODULES[name].save_pretrained(tmp_path / "theirs")
    loaded = fs.from_diffusers(tmp_path / "theirs")
    assert type(loaded.inner) is type(MODULES[name])
    assert worst(loaded(x, TIMES, **cond), net(x, TIMES, **cond)) == 0.0
    assert save_diffusers(loaded, tmp_path / "ours") == tmp_path / "ours"
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == names, "nothing of ours is added"
    again = getattr(diffusers, name).from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[key], value) for key, value in MODULES[name].state_dict().items())


def test_a_convention_of_ones_own_travels_with_the_weights(tmp_path: Path) -> None:
    module, case = MODULES["UNet2DModel"], CASES["UNet2DModel"]
    x, cond = case.start(), case.cond(7)
    own = fs.from_diffusers(module, time_scale=50.0, flip_time=False, sign=1.0)
    assert worst(own(x, TIMES, **cond), module(x, 50 * TIMES, cond["label"]).sample) < 1e-6
    save_diffusers(own, tmp_path)
    assert worst(fs.from_diffusers(tmp_path)(x, TIMES, **cond), own(x, TIMES, **cond)) == 0.0
    assert worst(fs.from_diffusers(tmp_path, sign=-1.0)(x, TIMES, **cond), -own(x, TIMES, **cond)) == 0.0
    save_diffusers(fs.from_diffusers(module), tmp_path)
    assert not (tmp_path / CONVENTION).exists()


def test_a_two_time_network_is_restored(tmp_path: Path) -> None:
    _, net, x, cond = opened("SD3Transformer2DModel")
    two = net.with_interval()
    assert two.intervals is not None
    nn.init.normal_(two.intervals.layers[0].second.weight)
    save_diffusers(two, tmp_path)
    before = torch.get_rng_state()
    loaded = fs.from_diffusers(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.two_time
    r = torch.ones(ROWS)
    assert worst(loaded(x, TIMES, r, **cond), two(x, TIMES, r, **cond)) == 0.0
    save_diffusers(net, tmp_path)
    assert not (tmp_path / INTERVALS).exists()
    assert not fs.from_diffusers(tmp_path).two_time


def test_a_pipeline_and_its_folder(tmp_path: Path) -> None:
    unet, case = MODULES["UNet2DModel"], CASES["UNet2DModel"]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=200)
    pipe = diffusers.DDPMPipeline(unet, scheduler)
    x, cond = case.start(), case.cond(7)
    expected = -unet(x, 200 * (1 - TIMES), cond["label"]).sample  # the scheduler's times go to 200
    assert worst(fs.from_diffusers(pipe)(x, TIMES, **cond), expected) < 1e-6
    pipe.save_pretrained(tmp_path / "theirs")
    net = fs.from_diffusers(tmp_path / "theirs")
    assert worst(net(x, TIMES, **cond), expected) < 1e-6
    net.inner.conv_out.bias.add_(1.0)  # type: ignore[union-attr, operator]
    assert save_diffusers(net, tmp_path / "ours", pipeline=pipe) == tmp_path / "ours" / "unet"
    assert pipe.unet is unet
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
    assert torch.equal(again.unet.conv_out.bias, unet.conv_out.bias + 1.0)
    assert again.scheduler.config.num_train_timesteps == 200
    assert worst(fs.from_diffusers(tmp_path / "ours")(x, TIMES, **cond), net(x, TIMES, **cond)) == 0.0


# -- refusals


def refused(source: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        fs.from_diffusers(source, **options)
    return str(caught.value)


def test_unknown_sources_are_refused_with_the_fix(tmp_path: Path) -> None:
    assert "fs.adapt" in refused(nn.Linear(2, 2))
    assert "downloads nothing" in refused("black-forest-labs/FLUX.1-dev")
    assert "config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"network": {}}')
    assert "fs.load" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer3DModel"}')
    assert "did you mean 'FluxTransformer2DModel'" in refused(tmp_path)
    with pytest.raises(UserError, match="from_diffusers made"):
        save_diffusers(Adapter(nn.Linear(2, 2)), tmp_path)


def test_loading_runs_no_code_and_reads_no_pickles(tmp_path: Path) -> None:
    module = MODULES["DiTTransformer2DModel"]
    module.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert list((tmp_path / "pickled").glob("*.bin"))
    assert "cannot load" in refused(tmp_path / "pickled")
    module.save_pretrained(tmp_path / "pipe" / "transformer")
    spy = tmp_path / "pipe" / "transformer" / "mine.py"
    spy.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass DiTTransformer2DModel: pass\n")
    index = {"_class_name": ["pipeline", "Mine"], "transformer": ["mine", "DiTTransformer2DModel"]}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    assert type(fs.from_diffusers(tmp_path / "pipe").inner) is type(module)
    assert not (tmp_path / "ran").exists()


def test_networks_that_are_no_velocity_of_their_state_are_refused(tmp_path: Path) -> None:
    noise = diffusers.DDPMPipeline(MODULES["UNet2DModel"], diffusers.DDPMScheduler())
    assert "epsilon" in refused(noise)
    noise.save_pretrained(tmp_path)
    assert "DDPMScheduler" in refused(tmp_path)
    assert "takes 9 channels and returns 4" in refused(CASES["WanTransformer3DModel"].module(in_channels=9))
    assert "SANA-Sprint" in refused(CASES["SanaTransformer2DModel"].module(guidance_embeds=True))
    learned = {"time_embedding_type": "learned", "num_train_timesteps": 10}
    assert "whole times" in refused(CASES["UNet2DModel"].module(**learned))


def test_two_networks_of_one_pipeline_are_not_one_velocity() -> None:
    pipe = CASES["WanTransformer3DModel"].open(MODULES["WanTransformer3DModel"])
    pipe.register_modules(transformer_2=MODULES["WanTransformer3DModel"])
    assert "transformer_2" in refused(pipe)
    assert fs.from_diffusers(pipe, component="transformer_2").inner is MODULES["WanTransformer3DModel"]
    assert "no part 'unet'" in refused(pipe, component="unet")


def test_wrong_calls_are_refused_with_the_fix() -> None:
    _, net, x, cond = opened("FluxTransformer2DModel")
    with pytest.raises(UserError, match="needs the condition 'pooled_projections'"):
        net(x, TIMES, **{TEXT: cond[TEXT]})
    with pytest.raises(UserError, match="did you mean 'encoder_hidden_states'"):
        net(x, TIMES, **cond, encoder_states=cond[TEXT])
    with pytest.raises(UserError, match="packed into tokens"):
        net(x.flatten(2), TIMES, **cond)
    with pytest.raises(UserError, match="odd"):
        net(x[..., :5], TIMES, **cond)
    _, unet, x, cond = opened("UNet2DModel")
    with pytest.raises(UserError, match="'label'"):
        unet(x, TIMES)
    plain = fs.from_diffusers(CASES["UNet2DModel"].module(num_class_embeds=None))
    with pytest.raises(UserError, match="takes no conditions"):
        plain(x, TIMES, **cond)
    assert plain(x, TIMES).shape == x.shape
