"""``fs.adapt``: conventions of other libraries, against closed forms and their own code where it is installed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.errors import UserError
from fewstep.interop.adapt import CONVENTIONS
from fewstep.networks.foreign import trainable_copy

MEAN, STD = 1.5, 0.4  # of the data of the fields in closed form


def truth(x: Tensor, t: Tensor, mean: Tensor | float = MEAN, std: float = STD) -> Tensor:
    """E[x1 - x0 | x_t = x] for data N(mean, std^2), by the formula of linear regression of x1 - x0 on x_t."""
    t = t[:, None]
    variance = (1 - t) ** 2 + (t * std) ** 2
    return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)


def rows(count: int = 6, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, *(shape or (2,)), generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.rand(count, generator=generator, dtype=torch.float64).to(dtype)


def roused(net: Any) -> Any:
    """A two-time form whose functions of r - t are not zero."""
    torch.manual_seed(1)
    made = net.with_interval()
    with torch.no_grad():
        for parameter in made.intervals.parameters():
            parameter.normal_(0, 0.5)
    return made


def is_two_time(net: Any, **cond: Tensor) -> None:
    """The two-time form equals the velocity before training, and depends on r afterwards."""
    x, t = (cond.pop("x"), cond.pop("t")) if "x" in cond else rows()
    r = (t + 0.3).clamp(max=1)
    v = net(x, t, **cond)
    assert torch.equal(net.with_interval()(x, t, r, **cond), v)
    assert (roused(net)(x, t, r, **cond) - v).abs().max() > 1e-4


# torchcfm


def unet(classes: int | None = 11) -> Any:
    """A class-conditional U-Net of torchcfm for 8 x 8 images; the layers that are zero at first get other weights."""
    models = pytest.importorskip(
        "torchcfm.models.unet", reason="needs torchcfm: pip install --no-deps torchcfm", exc_type=ImportError
    )
    torch.manual_seed(0)
    made = models.UNetModel(
        dim=(1, 8, 8), num_channels=64, num_res_blocks=1, channel_mult=(1, 2),
        **({} if classes is None else {"class_cond": True, "num_classes": classes}),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return made.eval()


def test_torchcfm_unets_are_called_with_time_first_and_the_label_as_y() -> None:
    module, (x, t) = unet(), rows(4, 1, 8, 8)
    label = torch.tensor([0, 3, 10, 9])
    net = fs.adapt(module, "torchcfm", null={"label": 10})
    assert net.inner is module
    assert net.null == {"label": 10}
    assert net.places == ("time_embed",)
    assert torch.equal(net(x, t, label=label), module(t, x, y=label))
    assert (module(t, x, y=label) - module(1 - t, x, y=label)).abs().max() > 1e-3  # it does see the time
    is_two_time(net, x=x, t=t, label=label)
    plain = unet(None)
    assert torch.equal(fs.adapt(plain, "torchcfm")(x, t), plain(t, x))


def test_a_null_label_of_torchcfm_must_be_in_the_table_and_is_never_guessed() -> None:
    assert fs.adapt(unet(10), "torchcfm").null == {}
    with pytest.raises(UserError, match="label 10, and the module's table 'label_emb' has rows for the labels 0 to 9"):
        fs.adapt(unet(10), "torchcfm", null={"label": 10})
    assert fs.adapt(unet(11), "torchcfm", null={"label": 10}).null == {"label": 10}


def test_guidance_on_a_torchcfm_unet_is_that_of_its_two_calls() -> None:
    module, (x, t) = unet(), rows(4, 1, 8, 8)
    label, null = torch.tensor([0, 3, 7, 9]), torch.full((4,), 10)
    net = fs.adapt(module, "torchcfm", null={"label": 10})
    guided = fs.Guided(net, 2.0, null={"label": null})
    expected = 2 * module(t, x, y=label) - module(t, x, y=null)
    torch.testing.assert_close(guided(x, t, label=label), expected, atol=1e-5, rtol=1e-4)


def test_the_order_of_torchcfm_is_told_when_it_is_not_declared() -> None:
    x, t = rows(4, 1, 8, 8)
    label = torch.arange(4)
    with pytest.raises(UserError, match=r"module\(x, t, label=label\).*'torchcfm'"):
        fs.adapt(unet())(x, t, label=label)
    with pytest.raises(UserError, match="must specify y if and only if the model is class-conditional"):
        fs.adapt(unet(), "torchcfm")(x, t)
    with pytest.raises(UserError, match=r"call\(module, x, t, label=label\)"):
        fs.adapt(unet(None), "torchcfm")(x, t, label=label)


class Field(nn.Module):
    """The exact field as a network on [x, t], the form of torchcfm's MLP."""

    def forward(self, x: Tensor) -> Tensor:
        return truth(x[:, :-1], x[:, -1])


class TimeFirst(nn.Module):
    """The same as a network of (t, x), the form of torchcfm's solvers."""

    def forward(self, t: Tensor, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return truth(x, t)


class torch_wrapper(nn.Module):
    """The form of ``torchcfm.utils.torch_wrapper``, which takes one time for all rows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, t: Tensor, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.model(torch.cat([x, t.repeat(x.shape[0])[:, None]], 1))


@pytest.mark.parametrize("module", [Field(), TimeFirst(), torch_wrapper(Field())], ids=["joined", "first", "wrapped"])
def test_torchcfm_networks_of_vectors_have_a_time_for_every_row(module: nn.Module) -> None:
    x, t = rows(dtype=torch.float64)
    net = fs.adapt(module, "torchcfm")
    torch.testing.assert_close(net(x, t), truth(x, t).to(x), atol=1e-6, rtol=0)
    start = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    ends = fs.solve(net, start, solver="heun", steps=50).x
    torch.testing.assert_close(ends, MEAN + STD * start, atol=1e-3, rtol=0)  # t = 1 is the data


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_mlp_of_torchcfm_is_made_two_time_at_its_first_layer(wrapped: bool) -> None:
    models = pytest.importorskip("torchcfm.models", reason="needs torchcfm", exc_type=ImportError)
    torch.manual_seed(0)
    mlp = models.MLP(dim=2, time_varying=True)
    net = fs.adapt(torch_wrapper(mlp) if wrapped else mlp, "torchcfm")
    x, t = rows()
    assert torch.equal(net(x, t), mlp(torch.cat([x, t[:, None]], 1)))
    assert net.places == ("model.net.0" if wrapped else "net.0",)
    is_two_time(net)


def test_a_network_of_the_torchcfm_loop_learns_and_gives_back_its_own_weights() -> None:
    """Their coupling and their loss, one step; a copy is trained and loaded into the user's own class."""
    flow = pytest.importorskip("torchcfm", reason="needs torchcfm", exc_type=ImportError)
    torch.manual_seed(0)
    mlp = pytest.importorskip("torchcfm.models").MLP(dim=2, time_varying=True)
    x0, x1 = torch.randn(2, 64, 2)
    t, x, u = flow.ConditionalFlowMatcher(sigma=0.0).sample_location_and_conditional_flow(x0, x1)
    net = fs.adapt(mlp, "torchcfm")
    copy = trainable_copy(net)
    theirs = (mlp(torch.cat([x, t[:, None]], 1)) - u).square().mean()
    ours = (copy(x, t) - u).square().mean()
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    torch.optim.SGD(copy.parameters(), 0.1).step()
    other = type(mlp)(dim=2, time_varying=True)
    other.load_state_dict(copy.inner.state_dict())
    assert torch.equal(other(torch.cat([x, t[:, None]], 1)), copy(x, t))
    assert not torch.equal(copy(x, t), net(x, t))


# flow_matching and rectified_flow: not installed, so classes of the same documented form


class ModelWrapper(nn.Module):
    """The documented form of ``flow_matching.utils.ModelWrapper``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        return self.model(x=x, t=t, **extras)


class Conditional(nn.Module):
    """A small network of x, t and a label under any name; it has a time embedding under any name."""

    def __init__(self, label: str, embed: str) -> None:
        super().__init__()
        self.add_module(embed, nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 8)))
        self.table, self.out = nn.Embedding(4, 8), nn.Linear(10, 2)
        self.label, self.embed = label, embed

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        assert set(cond) == {self.label}
        embedding = self.get_submodule(self.embed)(t[:, None])
        return self.out(torch.cat([x, torch.tanh(embedding + self.table(cond[self.label]))], 1))


def test_flow_matching_wrappers_are_called_with_their_extras() -> None:
    torch.manual_seed(0)
    module, (x, t) = ModelWrapper(Conditional("label", "time_embed")), rows()
    label = torch.tensor([0, 1, 2, 3, 0, 1])
    net = fs.adapt(module, "flow_matching")
    assert torch.equal(net(x, t, label=label), module.model(x, t, label=label))
    assert net.places == ("model.time_embed",)
    is_two_time(net, label=label)


def test_rectified_flow_networks_get_a_label_as_y() -> None:
    torch.manual_seed(0)
    module, (x, t) = Conditional("y", "t_embedder"), rows()
    label = torch.tensor([0, 1, 2, 3, 0, 1])
    net = fs.adapt(module, "rectified_flow")
    assert torch.equal(net(x, t, label=label), module(x, t, y=label))
    assert net.places == ("t_embedder",)
    is_two_time(net, label=label)
    by_name = Conditional("labels", "time")  # as their MLP calls it
    assert torch.equal(fs.adapt(by_name, "rectified_flow")(x, t, labels=label), by_name(x, t, labels=label))


class Direct(nn.Module):
    """The exact field as v(x, t): in both libraries t = 1 is the data."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return truth(x, t)


@pytest.mark.parametrize("name", ["flow_matching", "rectified_flow"])
def test_their_time_and_sign_are_ours(name: str) -> None:
    module = ModelWrapper(Direct()) if name == "flow_matching" else Direct()
    start = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    ends = fs.solve(fs.adapt(module, name), start, solver="heun", steps=50).x
    torch.testing.assert_close(ends, MEAN + STD * start, atol=1e-3, rtol=0)


# sbi


class FlowMatchingEstimator(nn.Module):
    """The form of sbi's estimator: ``forward(input, condition, time)``, time 1 is noise, the output noise - data.

    Like that of sbi 0.26, it standardises its input by the moments of theta_t, and its network returns the
    standardised velocity.
    """

    compose_enabled = False

    def __init__(self, net: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.net, self.input_shape, self.condition_shape = net, torch.Size([2]), torch.Size([3])
        self.register_buffer("mean_0", torch.full((2,), mean))
        self.register_buffer("std_0", torch.full((2,), std))

    def forward(self, input: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        assert input.shape[-1:] == self.input_shape
        assert condition.shape[-1:] == self.condition_shape
        s = time[:, None]
        spread = (((1 - s) * self.std_0) ** 2 + s**2 + 1e-6).sqrt()
        out = self.net((input - (1 - s) * self.mean_0) / spread, condition, time)
        return out * (1 + self.std_0**2).sqrt() - self.mean_0


class Posterior(nn.Module):
    """The standardised field of theta | x ~ N(mean of x, STD^2), derived from sbi's path (1 - s) theta + s noise."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, z: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        s = time[:, None]
        theta = z * (((1 - s) * self.std) ** 2 + s**2 + 1e-6).sqrt() + (1 - s) * self.mean
        centre = condition.mean(1, keepdim=True)
        slope = (s - (1 - s) * STD**2) / (s**2 + ((1 - s) * STD) ** 2)  # of E[noise - theta | theta_s]
        field = -centre + slope * (theta - (1 - s) * centre)
        return (field + self.mean) / math.sqrt(1 + self.std**2)


def ends_of(net: Callable[..., Tensor], condition: Tensor) -> Tensor:
    """Posterior samples from fixed noise, whose exact values are mean of x + STD noise."""
    noise = torch.randn(len(condition), 2, generator=torch.Generator().manual_seed(0))
    return fs.solve(net, noise, solver="heun", steps=50, cond={"condition": condition}).x - STD * noise


def test_an_sbi_estimator_of_an_exact_posterior_is_sampled_exactly() -> None:
    estimator = FlowMatchingEstimator(Posterior(0.3, 1.2), 0.3, 1.2)
    condition = torch.randn(50, 3, generator=torch.Generator().manual_seed(1)) + 2
    exact = condition.mean(1, keepdim=True).expand(50, 2)
    net = fs.adapt(estimator, "sbi")
    torch.testing.assert_close(ends_of(net, condition), exact, atol=2e-3, rtol=0)
    x, t = rows(50)
    torch.testing.assert_close(net(x, t, condition=condition), truth(x, t, exact), atol=1e-4, rtol=1e-3)
    wrong = [
        lambda m, x, t, condition: -m(x, condition, t),
        lambda m, x, t, condition: m(x, condition, 1 - t),
        lambda m, x, t, condition: m(x, condition, t),
    ]
    for call in wrong:
        assert (ends_of(fs.adapt(estimator, call), condition) - exact).abs().max() > 0.5
    with pytest.raises(UserError, match="unexpected keyword argument 'obs'"):
        net(x, t, obs=condition)


def test_sbi_estimators_of_another_kind_are_refused() -> None:
    class ConditionalScoreEstimator(nn.Module):
        pass

    class VEScoreEstimator(ConditionalScoreEstimator):
        pass

    with pytest.raises(UserError, match="VEScoreEstimator is a score estimator"):
        fs.adapt(VEScoreEstimator(), "sbi")
    composed = FlowMatchingEstimator(Posterior(0, 1), 0, 1)
    composed.compose_enabled = True
    with pytest.raises(UserError, match=r"estimator\.to_z"):
        fs.adapt(composed, "sbi")


@pytest.mark.slow
@pytest.mark.parametrize("net", ["mlp", "ada_mlp"])
def test_an_estimator_that_sbi_trained_is_sampled_by_fs_solve(net: str) -> None:
    """Their own loss on a Gaussian posterior: theta ~ N(0, 1), x = theta + N(0, 1/4)."""
    builders = pytest.importorskip(
        "sbi.neural_nets.net_builders.vector_field_nets", reason="needs sbi", exc_type=ImportError
    )
    torch.manual_seed(0)
    theta = torch.randn(2000, 2)
    x = theta + 0.5 * torch.randn(2000, 2)
    estimator = builders.build_vector_field_estimator(
        theta, x, estimator_type="flow", z_score_x="independent", z_score_y="independent", hidden_features=32,
        num_layers=2, net=net, **({"condition_emb_dim": 16} if net == "ada_mlp" else {}),
    )  # fmt: skip
    optimiser = torch.optim.Adam(estimator.parameters(), 3e-3)
    for _ in range(600):
        some = torch.randint(2000, (256,))
        optimiser.zero_grad()
        estimator.loss(theta[some], x[some]).mean().backward()
        optimiser.step()
    adapted = fs.adapt(estimator, "sbi")
    seen = torch.tensor([[1.0, -1.0]]).expand(1000, 2)
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    ends = fs.solve(adapted, noise, solver="heun", steps=20, cond={"condition": seen}).x
    torch.testing.assert_close(ends.mean(0), torch.tensor([0.8, -0.8]), atol=0.12, rtol=0)  # x / (1 + 1/4)
    torch.testing.assert_close(ends.std(0), torch.full((2,), math.sqrt(0.2)), atol=0.1, rtol=0)
    points, t = rows(1000)
    is_two_time(adapted, x=points, t=t, condition=seen)


# calls of one's own


class Policy(nn.Module):
    """The exact field as a policy network: (timestep, sample, obs), time from 1000, noise, to 0, and noise - data."""

    def forward(self, timestep: Tensor, sample: Tensor, obs: Tensor) -> Tensor:
        assert sample.ndim == 2
        return -truth(sample, 1 - timestep / 1000, obs)


def test_a_policy_of_another_order_scale_direction_and_sign_is_adapted_in_one_call() -> None:
    obs = torch.randn(100, 2, generator=torch.Generator().manual_seed(2))
    net = fs.adapt(Policy(), lambda m, x, t, obs: -m(1000 * (1 - t), x, obs))
    noise = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    ends = fs.solve(net, noise, solver="heun", steps=50, cond={"obs": obs}).x
    torch.testing.assert_close(ends, obs + STD * noise, atol=1e-3, rtol=0)
    with pytest.raises(UserError, match=r"module\(x, t, obs=obs\)"):
        fs.adapt(Policy())(noise, torch.rand(100), obs=obs)


class Mine(nn.Module):
    """A network of (timestep, x, obs) with a time embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 16))
        self.out = nn.Linear(2 + 16 + 3, 2)

    def forward(self, timestep: Tensor, x: Tensor, obs: Tensor) -> Tensor:
        return self.out(torch.cat([x, torch.tanh(self.time_embed(timestep[:, None] / 1000)), obs], 1))


def test_the_example_of_the_design_works() -> None:
    torch.manual_seed(0)
    mine, (x, t) = Mine(), rows()
    obs = torch.randn(6, 3)
    net = fs.adapt(mine, lambda m, x, t, obs: -m(1000 * (1 - t), x, obs), time_embed="time_embed")
    assert torch.equal(net(x, t, obs=obs), -mine(1000 * (1 - t), x, obs))
    assert net.describe()["time_embed"] == ["time_embed"]
    is_two_time(net, obs=obs)


def test_without_a_call_the_module_is_called_with_x_t_and_the_conditions() -> None:
    torch.manual_seed(0)
    module, (x, t) = Conditional("label", "time"), rows()
    label = torch.zeros(6, dtype=torch.long)
    assert torch.equal(fs.adapt(module)(x, t, label=label), module(x, t, label=label))


# refusals


def test_unknown_conventions_and_what_is_no_call_are_refused() -> None:
    with pytest.raises(UserError, match="unknown convention 'torchfm': did you mean 'torchcfm'"):
        fs.adapt(Direct(), "torchfm")
    with pytest.raises(UserError, match="got int"):
        fs.adapt(Direct(), 3)  # type: ignore[arg-type]
    for name in CONVENTIONS:
        with pytest.raises(UserError, match=r"needs a torch\.nn\.Module, got function"):
            fs.adapt(truth, name)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown sub-module 'time_embd'"):
        fs.adapt(Mine(), time_embed="time_embd")


GLOBAL = Direct()


def test_a_call_that_uses_the_module_itself_is_refused() -> None:
    """A copy of such a network would call the original, and its own weights would not be trained."""
    net, field = Direct(), Direct()
    with pytest.raises(UserError, match=r"the call uses 'net'"):
        fs.adapt(net, lambda m, x, t: net(x, t))
    with pytest.raises(UserError, match=r"the call uses 'GLOBAL'"):
        fs.adapt(GLOBAL, lambda m, x, t: GLOBAL(x, t))
    x, t = rows()
    assert torch.equal(fs.adapt(net, lambda m, x, t: m(x, t) + 0 * field(x, t))(x, t), truth(x, t))
    inside = ModelWrapper(Direct())
    inside.GLOBAL = GLOBAL
    assert torch.equal(fs.adapt(inside, lambda m, x, t: m.GLOBAL(x, t))(x, t), truth(x, t))
