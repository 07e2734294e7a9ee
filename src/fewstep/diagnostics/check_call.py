"""How a network from outside can be called: arguments, their order, and what it returns.

The call ``net(x, t, **cond)`` is tried first. Where it fails, other calls are tried; one of them that returns a tensor
of the shape of x is the likely fix, and the rest of the check goes on with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from fewstep.diagnostics.check_report import Finding
from fewstep.diagnostics.check_rows import Network, Rows
from fewstep.errors import UserError
from fewstep.flow.noise import isolated_rng

TRIED = 5  # rows of a trial call, more where a sample has this dimension
REDRAWS, SHORT_REDRAWS = 48, 12  # rows whose output is compared in training mode, .1 of them redrawn by most networks
SAME = (
    1e-3  # two calls with equal arguments differ by at most so much of the output's size; kernels on GPUs vary by 1e-6
)


Called = Callable[[Callable[..., Any], Tensor, Tensor, Mapping[str, Tensor]], Any]


@final
@dataclass(frozen=True)
class Plain:
    """A call of a network that works.

    Args:
        form: ``form(net, x, t, cond)``.
        two_time: whether ``r = t`` is given where there is no other end time.
        bare: whether it is called without its conditions.
    """

    form: Called
    two_time: bool
    bare: bool = False

    def network(self, net: Callable[..., Any], device: torch.device) -> Network:
        """The network called so, its rows counted."""

        def call(x: Tensor, t: Tensor, **cond: Tensor) -> Any:
            return self.form(net, x, t, {"r": t, **cond} if self.two_time else cond)

        return Network(call, device)


@final
@dataclass(frozen=True)
class Form:
    """One way of calling a network.

    Args:
        name: of the finding, if this way works and the plain one does not.
        words: the call as source text.
        text: what it means.
        fix: what to do.
        call: ``call(net, x, t, cond)``.
    """

    name: str
    words: str
    text: str
    fix: str
    call: Called


def _unwrapped(net: Callable[..., Any], x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Any:
    """The tensor inside an output object: its only or first member, or its attribute ``sample``."""
    out = net(x, t, **cond)
    if isinstance(out, Tensor):
        return out
    if isinstance(out, Mapping):
        return next(iter(out.values()))
    return out[0] if isinstance(out, (tuple, list)) else out.sample


def _cast(net: Callable[..., Any], x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Any:
    dtype = weight_dtype(net)
    moved = {name: value.to(dtype) if value.is_floating_point() else value for name, value in cond.items()}
    return net(x.to(dtype), t, **moved)


ORDER = "The first argument must be the state x and the second the time t."
FORMS = (
    Form(
        "argument_order", "net(t, x, **cond)", "The network takes the time first: net(t, x, **cond) is a velocity.",
        f"{ORDER} Adapt it: fs.adapt(net, lambda m, x, t, **cond: m(t, x, **cond)), or wrap it in a function.",
        lambda net, x, t, cond: net(t, x, **cond),
    ),
    Form(
        "argument_order", "net(t, x, *cond)", "The network takes the time first and its conditions by position: "
        "net(t, x, condition, ...) returns a velocity.",
        f"{ORDER} Adapt it: fs.adapt(net, lambda m, x, t, label: m(t, x, label)), with your conditions by name.",
        lambda net, x, t, cond: net(t, x, *cond.values()),
    ),
    Form(
        "condition_names", "net(x, t, *cond)", "The network has other names for its conditions: by position, "
        "net(x, t, condition, ...), it returns a velocity.",
        "Name the conditions as the network does, or adapt it: fs.adapt(net, lambda m, x, t, label: m(x, t, label)).",
        lambda net, x, t, cond: net(x, t, *cond.values()),
    ),
    Form(
        "output_type", "net(x, t, **cond).sample", "The network returns an object that holds the velocity.",
        "Take the tensor out: fs.adapt(net, lambda m, x, t, **cond: m(x, t, **cond).sample) (or [0]).",
        _unwrapped,
    ),
    Form(
        "time_shape", "net(x, t[:, None], **cond)", "The network wants times of shape (B, 1); this library gives (B,).",
        "Adapt it: fs.adapt(net, lambda m, x, t, **cond: m(x, t[:, None], **cond)).",
        lambda net, x, t, cond: net(x, t[:, None], **cond),
    ),
    Form(
        "dtype", "net(x.to(dtype), t, **cond)", "The network computes in the dtype of its weights and refuses float32.",
        "fs.adapt(net) casts the arguments and the result.",
        _cast,
    ),
    Form(
        "unused_condition", "net(x, t)", "The network takes none of the conditions: it is called without them.",
        "Pass conditions={} to the check, or give the network its conditions.",
        lambda net, x, t, cond: net(x, t),
    ),
)  # fmt: skip


def weight_dtype(net: Callable[..., Any]) -> torch.dtype:
    """Dtype of the floating-point weights of a module; float32 for any other callable."""
    weights = net.parameters() if isinstance(net, nn.Module) else ()
    return next((p.dtype for p in weights if p.dtype.is_floating_point), torch.float32)


def device_of(net: Callable[..., Any]) -> torch.device:
    """Device of the first weight of a module; the CPU for any other callable."""
    weights = net.parameters() if isinstance(net, nn.Module) else iter(())
    return next((p.device for p in weights), torch.device("cpu"))


def trial_rows(rows: Rows) -> Rows:
    """A few rows, in a number that is no dimension of a sample: mixed-up arguments do not fit by chance."""
    sizes = set(rows.x.shape[1:])
    return rows.first(next(count for count in range(TRIED, TRIED + len(sizes) + 1) if count not in sizes))


def find_call(
    net: Callable[..., Any], rows: Rows, two_time: bool, device: torch.device, optional: bool
) -> tuple[Plain | None, list[Finding]]:
    """The way to call the network, and what was found on the way.

    Args:
        net: the network.
        rows: states to call it on.
        two_time: whether it takes an end time ``r``.
        device: of the network.
        optional: whether the conditions were not given by the user, so that a network may do without them.

    Returns:
        The call, None if no way works; and findings.
    """
    trial = trial_rows(rows)
    plain = Plain(lambda net, x, t, cond: net(x, t, **cond), two_time)
    first = _outcome(plain.network(net, device), trial)
    if first is None:
        return plain, []
    for form in _applicable(bool(trial.cond), optional):
        call = Plain(form.call, two_time, form.name == "unused_condition")
        if _outcome(call.network(net, device), trial) is None:
            kind: Literal["fault", "note"] = "note" if call.bare else "fault"
            return call, [Finding(form.name, f"{form.text} As given: {first[1]}.", form.fix, kind=kind)]
    return None, [Finding(first[0], f"net(x, t{_names(trial.cond)}): {first[1]}. {_signature(net)}", first[2])]


def _applicable(conditions: bool, optional: bool) -> list[Form]:
    """The forms to try; a call without conditions comes first, and only where the user did not give them."""
    forms = [form for form in FORMS if conditions or "*cond)" not in form.words or "**cond)" in form.words]
    bare = [form for form in forms if form.name == "unused_condition" and conditions and optional]
    return [*bare, *(form for form in forms if form.name != "unused_condition")]


def _names(cond: Mapping[str, Tensor]) -> str:
    return "".join(f", {name}=" for name in cond)


def _outcome(network: Network, rows: Rows) -> tuple[str, str, str] | None:
    """None if the call returns a tensor of the shape of x; else the finding's name, what happened, and the fix."""
    try:
        out = network.once(rows.x, rows.t, **rows.cond)
    except Exception as error:  # a network may raise anything
        if isinstance(error, UserError):  # an adapter's message, which says what to do
            return "call_fails", str(error), ""
        words = " ".join(str(error).split())[:300]
        fix = (
            "The network must take x (B, ...), t (B,) and its conditions as keywords: "
            "fs.adapt(net, lambda m, x, t, **cond: ...) says how to call it."
        )
        return "call_fails", f"{type(error).__name__}: {words}", fix
    if not isinstance(out, Tensor):
        return "output_type", f"it returned {type(out).__name__}", "Return the velocity as a tensor like x."
    if out.shape != rows.x.shape:
        text = f"it returned shape {tuple(out.shape)} for x of shape {tuple(rows.x.shape)}"
        return "output_shape", text, "Return the velocity with the shape of x: as many channels as x has, no other."
    if not out.is_floating_point():
        return "output_type", f"it returned {out.dtype}", "Return the velocity as floating-point numbers."
    return None


def _signature(net: Callable[..., Any]) -> str:
    try:
        given = inspect.signature(net.forward if isinstance(net, nn.Module) else net)
    except (TypeError, ValueError):
        return ""
    return f"Its arguments are {given}."


@contextmanager
def mode(net: Callable[..., Any], training: bool) -> Iterator[None]:
    """Put a module into training mode, its dropout layers excepted, or evaluation mode; restored afterwards."""
    if not isinstance(net, nn.Module):
        yield
        return
    before = [(module, module.training) for module in net.modules()]
    try:
        net.train(training)
        for module in net.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.training = False
        yield
    finally:
        for module, flag in before:
            module.training = flag


def find_redraws(net: Callable[..., Any], network: Network, rows: Rows, short: bool) -> list[Finding]:
    """Whether two calls with equal arguments differ, in evaluation mode and in training mode."""
    few, many = rows.first(4), rows.first(SHORT_REDRAWS if short else REDRAWS)
    change = _twice(network, few)
    if change > SAME:
        return [
            Finding(
                "redraws", f"Two calls with equal arguments differ by {change:.2g} of the output's size.",
                "The network draws random numbers when it is called, or it is in training mode inside a function: call "
                ".eval() on it, and remove what is random.",
                {"change": change},
            )
        ]  # fmt: skip
    if not isinstance(net, nn.Module):
        return []
    with mode(net, True), _buffers_kept(net):
        try:
            change = _twice(network, many)
        except Exception:  # a network that cannot run in training mode without its losses is not judged by it
            return []
    if change <= SAME:
        return []
    return [
        Finding(
            "redraws", f"In training mode two calls with equal arguments differ by {change:.2g} of the output's size, "
            "with dropout off: the network draws random numbers itself, as by replacing labels.",
            "Wrap it in fs.adapt(net), which leaves all but dropout in evaluation mode; else a method that calls the "
            "network twice gets two different functions.",
            {"change": change},
        )
    ]  # fmt: skip


@contextmanager
def _buffers_kept(net: nn.Module) -> Iterator[None]:
    """Restore the buffers (running averages) that a call in training mode changes."""
    before = [(buffer, buffer.clone()) for buffer in net.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _twice(network: Network, rows: Rows) -> float:
    with isolated_rng(network.device):
        torch.manual_seed(1)
        one = network(rows.x, rows.t, **rows.cond)
        two = network(rows.x, rows.t, **rows.cond)
    return float((one - two).norm() / one.norm().clamp(min=1e-12))


def find_infinite(network: Network, rows: Rows) -> list[Finding]:
    """Whether the output is finite at both ends of time and inside."""
    few = rows.first(4)
    where = {"t = 0": (few.x0, torch.zeros(len(few))), "0 < t < 1": (few.x, few.t)}
    where["t = 1"] = (few.x1, torch.ones(len(few)))
    found = []
    for words, (x, t) in where.items():
        out = network(x, t, **few.cond)
        share = float((~torch.isfinite(out)).float().mean())
        if share:
            found.append((words, share))
    if not found:
        return []
    places = ", ".join(f"{share:.0%} of the values at {words}" for words, share in found)
    return [
        Finding(
            "not_finite", f"The output is not finite: {places}.",
            "A division by t or 1 - t inside the adapter must be limited at the ends; with float16 weights use "
            "bfloat16 or float32; weights that are not finite come from a training that diverged.",
            dict(found),
        )
    ]  # fmt: skip
