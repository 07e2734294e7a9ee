"""The adapter of a user's module: two-time form, checkpointing, dtypes, modes and errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.errors import UserError
from fewstep.flow.derivatives import Derivative
from fewstep.networks.adapter import Adapter
from fewstep.networks.foreign import Foreign, Intervals, trainable_copy

WIDTH = 8


class Block(nn.Module):
    """A residual block with a time embedding of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        return h + torch.tanh(self.layer(h) + self.embed(t[:, None].to(h.dtype)))


class Blocks(nn.Module):
    """Two blocks, computed again in the backward pass if ``how`` is given; the second embedding has two names."""

    def __init__(self, how: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(2, WIDTH), nn.ModuleList(), nn.Linear(WIDTH, 2)
        self.blocks.extend([Block(), Block()])
        self.again = self.blocks[1].embed
        self.how = how

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = block(h, t) if self.how is None else checkpoint(block, h, t, **self.how)
        return self.last(h + self.again(t[:, None].to(h.dtype)))


def trained(net: Adapter, seed: int = 1) -> Adapter:
    """A two-time form whose functions of r - t are not zero."""
    torch.manual_seed(seed)
    made = net.with_interval()
    with torch.no_grad():
        for parameter in made.intervals.parameters():
            parameter.normal_(0, 0.5)
    return made


PLACES = ("blocks.0.embed", "blocks.1.embed")


def blocks(how: dict[str, Any] | None = None, dtype: torch.dtype = torch.float64) -> Adapter:
    torch.manual_seed(0)
    return Adapter(Blocks(how).to(dtype), time_embed=PLACES)


def inputs(dtype: torch.dtype = torch.float64, rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, t, r = (torch.rand(rows, *shape, generator=generator, dtype=torch.float64) for shape in ((2,), (), ()))
    return x.to(dtype), t.to(dtype), r.to(dtype)


def truth(net: Adapter, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The two-time form of :class:`Blocks` written out."""
    inner, layers = net.inner, net.intervals.layers
    embeddings = [block.embed(t[:, None]) + layer(r - t) for block, layer in zip(inner.blocks, layers, strict=True)]
    h = inner.first(x)
    for block, embedding in zip(inner.blocks, embeddings, strict=True):
        h = h + torch.tanh(block.layer(h) + embedding)
    return inner.last(h + embeddings[1])


# two times


def test_the_interval_is_added_to_the_embeddings_by_every_name_they_have() -> None:
    net, (x, t, r) = trained(blocks()), inputs()
    net = net.double()
    torch.testing.assert_close(net(x, t, r), truth(net, x, t, r), atol=1e-12, rtol=0)
    assert (net(x, t, r) - net(x, t)).abs().max() > 0.01
    assert len(net.inner._forward_hooks) == len(net.inner.blocks[0].embed._forward_hooks) == 0


def test_an_untrained_two_time_form_is_the_velocity() -> None:
    velocity, (x, t, r) = blocks(), inputs()
    assert torch.equal(velocity.with_interval()(x, t, r), velocity(x, t))
    with pytest.raises(UserError, match="no end time"):
        velocity(x, t, r)


@pytest.mark.parametrize("direction", ["x", "t", "r"])
def test_forward_mode_and_double_backward_are_derivatives_of_the_two_time_form(direction: str) -> None:
    net, (x, t, r) = trained(blocks()).double(), inputs()
    at = {"x": x, "t": t, "r": r}
    tangent = [torch.ones_like(v) if name == direction else torch.zeros_like(v) for name, v in at.items()]
    h = 1e-5
    ahead = net(*[v + h * d for v, d in zip((x, t, r), tangent, strict=True)])
    behind = net(*[v - h * d for v, d in zip((x, t, r), tangent, strict=True)])
    _, found = torch.func.jvp(lambda *at: net(*at), (x, t, r), tuple(tangent))
    torch.testing.assert_close(found, (ahead - behind) / (2 * h), atol=1e-8, rtol=0)

    def slope(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        at = [v.clone().requires_grad_() for v in (x, t, r)]
        first = torch.autograd.grad(function(*at).square().sum(), at["xtr".index(direction)], create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), [*at, *net.parameters()], allow_unused=True)

    for one, two in zip(slope(net), slope(lambda *at: truth(net, *at)), strict=True):
        assert (one is None and two is None) or torch.allclose(one, two, atol=1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_is_computed_again_with_the_interval_of_its_own_call(reentrant: bool) -> None:
    """Gradients equal those without checkpointing, though another interval is passed before the backward pass."""
    plain, again = trained(blocks()).double(), trained(blocks({"use_reentrant": reentrant})).double()
    again.load_state_dict(plain.state_dict())
    x, t, r = inputs()
    found = []
    for net in (plain, again):
        loss = net(x.clone().requires_grad_(), t, r).square().sum()
        other = net(x, t, t + 0.3 * (r - t))
        loss.backward()
        found.append({name: parameter.grad for name, parameter in net.named_parameters()})
        assert other.shape == x.shape
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-12) for name in found[0])
    assert found[0]["intervals.layers.0.first.weight"].abs().max() > 1e-3


def test_a_diffusers_transformer_with_gradient_checkpointing_keeps_its_gradients() -> None:
    """The time is embedded inside the blocks, which are computed again."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'fewstep[diffusers]'")
    torch.manual_seed(0)
    module = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=2, sample_size=4, num_embeds_ada_norm=5
    )
    places = [f"transformer_blocks.{number}.norm1.emb.timestep_embedder" for number in range(2)]
    call = lambda m, x, t, label: -m(x, 1000 * (1 - t), class_labels=label).sample  # noqa: E731
    plain = trained(Adapter(module, call, time_embed=places))
    again = copy.deepcopy(plain)
    again.inner.enable_gradient_checkpointing()
    x, label = torch.randn(3, 1, 4, 4), torch.tensor([0, 3, 1])
    _, t, r = inputs(torch.float32, 3)
    for net in (plain, again):
        net.train()
        net(x, t, r, label=label).square().sum().backward()
    for one, two in zip(plain.parameters(), again.parameters(), strict=True):
        assert (one.grad is None and two.grad is None) or torch.allclose(one.grad, two.grad, atol=1e-5, rtol=1e-4)
    assert all(layer.first.weight.grad.abs().max() > 1e-4 for layer in again.intervals.layers)
    assert (plain(x, t, r, label=label) - plain(x, t, label=label)).abs().max() > 1e-3


class Pairs(nn.Module):
    """Embeds the time in the second entry of a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.both = Both()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rest, embedding = self.both(t)
        return x * embedding.sum(1, keepdim=True) + rest.sum()


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, WIDTH)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t, self.linear(t[:, None])


def test_a_sub_module_may_return_a_tuple() -> None:
    net, (x, t, r) = trained(Adapter(Pairs(), time_embed="both")), inputs(torch.float32)
    with torch.no_grad():
        layer = net.intervals.layers[0]
        expected = x * (net.inner.both.linear(t[:, None]) + layer(r - t)).sum(1, keepdim=True) + t.sum()
    torch.testing.assert_close(net(x, t, r), expected)


def test_adaptive_norms_of_diffusers_return_tuples() -> None:
    norms = pytest.importorskip("diffusers.models.normalization", reason="needs diffusers")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adaln = norms.AdaLayerNormSingle(2)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            values, embedded = self.adaln(t, batch_size=len(x), hidden_dtype=x.dtype)
            return x + values[:, :2] + embedded

    net, (x, t, r) = trained(Adapter(Net(), time_embed="adaln")), inputs(torch.float32)
    added = net.intervals.layers[0](r - t)[:, :2]
    torch.testing.assert_close(net(x, t, r) - net.inner(x, t), added)


def test_a_place_that_is_not_called_or_is_no_embedding_is_refused() -> None:
    x, t, r = inputs(torch.float32)

    class Unused(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(1, WIDTH)

    with pytest.raises(UserError, match="'spare' was not called"):
        trained(Adapter(Unused(), time_embed="spare"))(x, t, r)
    original = Blocks()
    with pytest.raises(UserError, match=r"'blocks\.0\.embed' was not called"):
        trained(Adapter(original, lambda m, x, t: original(x, t), time_embed="blocks.0.embed"))(x, t, r)

    class Halves(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[0].embed = nn.Sequential(*self.blocks[0].embed, nn.GLU())
            self.blocks[0].layer = nn.Linear(WIDTH, WIDTH // 2)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * self.blocks[0].embed(t[:, None]).sum(1, keepdim=True)

    with pytest.raises(UserError, match=r"output of time_embed='blocks\.0\.embed' \(\(5, 4\)\).*\(B, 8\)"):
        trained(Adapter(Halves(), time_embed="blocks.0.embed"))(x, t, r)


def test_a_copy_shares_nothing_and_a_failed_call_leaves_nothing_behind() -> None:
    net, (x, t, r) = trained(blocks()), inputs()
    before = net(x, t, r)
    other = copy.deepcopy(net)
    with pytest.raises(UserError):
        net(x[:, :1], t, r)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    assert torch.equal(net(x, t, r), before)
    assert not torch.equal(other(x, t, r), before)
    assert all(not module._forward_hooks for module in net.modules())


def test_intervals_of_another_network_can_be_lent() -> None:
    """Roles that share one module pass their own functions of r - t."""
    base, (x, t, r) = blocks(), inputs()
    one, two = trained(base, 1), trained(base, 2)
    assert isinstance(one.intervals, Intervals)
    assert torch.equal(base.evaluate(x, t, r, {}, two.intervals), two(x, t, r))
    assert not torch.equal(base.evaluate(x, t, r, {}, one.intervals), two(x, t, r))


def test_the_two_time_form_can_be_exported_with_any_batch() -> None:
    net = trained(blocks(dtype=torch.float32)).eval()
    rows = torch.export.Dim("rows")
    program = torch.export.export(net, inputs(torch.float32), dynamic_shapes=({0: rows}, {0: rows}, {0: rows}))
    x, t, r = inputs(torch.float32, rows=7)
    torch.testing.assert_close(program.module()(x, t, r), net(x, t, r), atol=1e-6, rtol=0)
    assert set(program.state_dict) == set(net.state_dict())


# dtypes and devices


class Probe(nn.Module):
    """Keeps what it was called with."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.big = nn.Linear(2, 2, dtype=dtype)
        self.norm = nn.Parameter(torch.ones(1))
        self.count = nn.Parameter(torch.tensor([3]), requires_grad=False)
        self.register_buffer("scale", torch.ones(2, dtype=dtype))
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.seen = {"x": x, "t": t, **cond}
        return self.big(x) * self.scale * t[:, None].to(x.dtype) * self.count


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [torch.float32, torch.float64])
def test_rows_get_the_dtype_of_the_weights_and_times_are_not_rounded(weights: torch.dtype, rows: torch.dtype) -> None:
    net, x = Adapter(Probe(weights)), torch.ones(3, 2, dtype=rows)
    t = torch.full((3,), 0.9985, dtype=rows)
    label, mask = torch.tensor([1, 2, 3]), torch.tensor([True, False, True])
    v = net(x, t, label=label, mask=mask, text=torch.ones(3, 4), none=None, null=7)
    seen = net.inner.seen
    assert v.dtype == rows
    assert net.dtype == seen["x"].dtype == seen["text"].dtype == weights
    assert seen["t"].dtype == (torch.float64 if weights == torch.float64 else torch.float32)
    torch.testing.assert_close(seen["t"].double(), t.double(), atol=1e-7, rtol=0)
    if rows == torch.float32:  # a time of more digits than x keeps them
        net(x, t.double())
        assert net.inner.seen["t"].dtype == torch.float64
    assert seen["label"] is label
    assert seen["mask"] is mask
    assert seen["none"] is None
    assert seen["null"] == 7


def test_a_trainable_copy_is_in_float32_and_keeps_integers() -> None:
    net = Adapter(Probe(torch.bfloat16))
    with torch.no_grad():
        x, t, _ = inputs(torch.float32)
        before = net(x, t)
    made = trainable_copy(net)
    inner = made.inner
    assert {p.dtype for p in (inner.big.weight, inner.big.bias, inner.norm, inner.scale)} == {torch.float32}
    assert inner.count.dtype == torch.int64
    assert [name for name, p in made.named_parameters() if not p.requires_grad] == ["wrapped.count"]
    assert net.inner.big.weight.dtype == torch.bfloat16
    torch.testing.assert_close(made(x, t), before, atol=0.02, rtol=0.02)


def test_the_two_time_form_of_half_precision_weights_keeps_its_intervals_in_float32() -> None:
    velocity, (x, t, r) = blocks(dtype=torch.bfloat16), inputs(torch.float32)
    made = velocity.with_interval()
    assert {p.dtype for p in made.intervals.parameters()} == {torch.float32}
    assert torch.equal(made(x, t, r), velocity(x, t))
    student = trainable_copy(velocity, two_time=True)
    assert isinstance(student, Foreign)
    assert student.two_time
    student(x, t, r).square().sum().backward()
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_a_module_on_another_device_is_named() -> None:
    with pytest.raises(UserError, match="rows are on cpu and the weights on meta"):
        Adapter(Blocks().to("meta"))(*inputs(torch.float32)[:2])


# modes


class Redraws(nn.Module):
    """Replaces labels at random in training mode, beside dropout, a batch norm and a recurrent layer."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.table, self.drop, self.norm = nn.Embedding(11, 2), nn.Dropout(dropout), nn.BatchNorm1d(2)
        self.memory = nn.GRU(2, 2, batch_first=True)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        if self.training:
            label = torch.where(torch.rand(len(label)) < 0.5, 10, label)
        return self.drop(self.norm(self.memory(x[:, None])[0][:, 0] + self.table(label)))


def test_two_calls_in_training_mode_are_equal() -> None:
    torch.manual_seed(0)
    module, label = Redraws(0.0).train(), torch.arange(5)
    x, t, _ = inputs(torch.float32)
    assert not torch.equal(module(x, t, label), module(x, t, label))  # as the module is by itself
    net = Adapter(module).train()
    statistics = module.norm.running_mean.clone()
    assert torch.equal(net(x, t, label=label), net(x, t, label=label))
    assert torch.equal(net(x, t, label=label), net.eval()(x, t, label=label))
    assert torch.equal(module.norm.running_mean, statistics)


def test_dropout_layers_and_recurrent_layers_alone_are_in_training_mode() -> None:
    net = Adapter(Redraws(0.5)).train()
    x, t, _ = inputs(torch.float32)
    label = torch.arange(5)
    assert [name for name, module in net.inner.named_modules() if module.training] == ["drop", "memory"]
    assert not torch.equal(net(x, t, label=label), net(x, t, label=label))
    assert [name for name, module in net.eval().inner.named_modules() if module.training] == []


# errors


class Ordered(nn.Module):
    """Takes (t, x, obs), and refuses another order without a message."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, t: Tensor, x: Tensor, obs: Tensor | None = None) -> Tensor:
        if x.ndim != 2:
            raise AssertionError  # as an assert statement does, which pytest rewrites in this file
        return self.layer(x) * t[:, None]


def test_an_error_in_the_call_says_how_the_module_was_called() -> None:
    x, t, _ = inputs(torch.float32)
    with pytest.raises(UserError) as caught:
        Adapter(Ordered())(x, t, obs=torch.ones(5, 3))
    text = str(caught.value)
    assert "failed with AssertionError: no message (test_adapter.py, line" in text
    assert "raise AssertionError" in text
    assert "module(x, t, obs=obs), here with x (5, 2) float32, t (5,) float32, obs (5, 3) float32" in text
    assert "lambda m, x, t, obs: m(t, x, obs)" in text
    assert isinstance(caught.value.__cause__, AssertionError)
    fixed = Adapter(Ordered(), lambda m, x, t, obs: m(t, x, obs))
    assert fixed(x, t, obs=torch.ones(5, 3)).shape == x.shape


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda m, x, t: m(t, x[:, :1]), RuntimeError, "call(module, x, t)"),
        (lambda m, x, t: m(t, x, label=t), TypeError, "unexpected keyword argument 'label'"),
        (lambda m, x, t: m(t, x.double()), RuntimeError, "cast t"),
        (lambda m, x, t: torch.linspace(0, 1, -1), RuntimeError, "steps"),
        (lambda m, x, t: int("x"), ValueError, "invalid literal"),
    ],
)  # fmt: skip
def test_each_kind_of_error_is_told_with_its_cause(call: Any, kind: type[Exception], says: str) -> None:
    x, t, _ = inputs(torch.float32)
    with pytest.raises(UserError) as caught:
        Adapter(Ordered(), call)(x, t)
    assert says in str(caught.value)
    assert type(caught.value.__cause__) is kind


def raising(error: Exception) -> Callable[..., Tensor]:
    def call(module: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        raise error

    return call


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        KeyError("own"),
        UserError("explained"),
    ],
)
def test_other_errors_pass(error: Exception) -> None:
    x, t, _ = inputs(torch.float32)
    with pytest.raises(type(error)) as caught:
        Adapter(Ordered(), raising(error))(x, t)
    assert caught.value is error


class NoForwardMode(torch.autograd.Function):
    """The square, without a forward-mode derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def test_an_error_of_a_transform_is_not_blamed_on_the_call() -> None:
    net = Adapter(nn.Linear(2, 2), lambda m, x, t: NoForwardMode.apply(x))
    x, t, _ = inputs()
    with pytest.raises(RuntimeError) as caught:
        torch.func.jvp(lambda x: net(x, t), (x,), (x,))
    assert not isinstance(caught.value, UserError)
    derivative = Derivative(net)
    _, found = derivative(x.float(), t.float(), x.float())
    assert derivative.used == "double_vjp"
    torch.testing.assert_close(found, 2 * x.float() ** 2)


def test_a_unet_with_attention_falls_back_to_reverse_mode() -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'fewstep[diffusers]'")
    torch.manual_seed(0)
    module = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    net = Adapter(module, lambda m, x, t: m(x, 1000 * (1 - t)).sample, time_embed="time_embedding")
    derivative = Derivative(net)
    x = torch.randn(2, 1, 8, 8)
    v, found = derivative(x, torch.full((2,), 0.5), torch.randn(2, 1, 8, 8))
    assert derivative.used == "double_vjp"
    assert found.shape == v.shape == x.shape


# masks


def test_padding_reaches_neither_the_module_nor_the_result() -> None:
    net = Adapter(nn.Linear(2, 2), lambda m, x, t, mask: m(x) + x.sum(), mask="mask")
    x, t = torch.randn(2, 3, 2), torch.zeros(2)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    other = torch.where(mask[..., None], x, 9.0)
    assert torch.equal(net(x, t, mask=mask), net(other, t, mask=mask))
    assert torch.equal(net(x, t, mask=mask)[~mask], torch.zeros(3, 2))
    with pytest.raises(UserError, match=r"'mask'.*missing"):
        net(x, t)


@pytest.mark.parametrize(("name", "named"), [("sigma_embed", True), ("time_mlp", True), ("body", False)])
def test_the_likely_time_embedding_is_named(name: str, named: bool) -> None:
    module = nn.Module()
    module.add_module(name, nn.Linear(1, 2))
    with pytest.raises(UserError, match=f"one of: {name}" if named else "None of its sub-modules"):
        Adapter(module).with_interval()
