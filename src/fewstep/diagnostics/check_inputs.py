r"""Whether a network sees its inputs: the time, its exact value, the end time, and every condition.

The change of the output when one input is changed is measured in units of the output's spread over rows. Trained
networks that see an input changed by .1 to 1, with random weights by .007 at least; a U-Net whose group normalisation
removes the embedding of time and label changed by 8e-7, which is the rounding of float32. The bound lies between: 1e-5
in float32, and four roundings in lower precision.

Whether the right condition is given with a row is judged as in :mod:`.check_loss`: where v is ``E[u | x_t, c]``,
exchanging conditions between rows raises the loss by exactly ``E|v(c') - v(c)|^2``. If it does not, and another
condition than the given one fits a row better on noise that did not choose it, conditions do not belong to the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diagnostics.check_call import Plain
from fewstep.diagnostics.check_loss import SIGNIFICANT
from fewstep.diagnostics.check_report import Finding
from fewstep.diagnostics.check_rows import Network, Rows, Setting
from fewstep.flow.noise import generator_for

BLIND = 1e-5  # change over spread below which an input is not seen; see the module's docstring
ROUNDINGS = 4  # of the dtype of the weights that count as nothing
SEEN_ROWS = 12  # rows that the time and the structure are tested on
STEPS = (0.1, 0.02, 0.005, 0.001, 0.0002)  # differences of time that a network with rounded times does not see
EQUAL = 0.4  # share of rows with exactly equal output from which times are taken to be rounded
COARSE = 200  # rounded to more levels than this is a note, not a fault
OUTSIDE = (1.0, 5.0, 500.0)  # whole times that a network which truncates tells apart
BELONGS = 0.75  # share of E|v(c') - v(c)|^2 by which exchanged conditions raise the loss, at least
EFFECT = 0.01  # effect of a condition, in the loss's unit, below which nothing is said of its rows
CANDIDATES, JUDGED = 16, 128  # conditions tried for a row, and rows for which they are tried
SHIFTED = 0.3  # rms change of a weight, over the rms of its tensor, that shows what an architecture lets through
SHIFTED_LEAST = 0.05  # the same for tensors of zeros

NORMALISED = (
    "A normalisation with as many groups as channels (torchcfm's U-Net with num_channels=32 and channel_mult=(1, 1)) "
    "removes an embedding that is added before it: take more channels, or use_scale_shift_norm=True."
)

Velocity = Callable[..., Tensor]  # (x, t, **cond) -> velocity on the CPU


def bound(dtype: torch.dtype) -> float:
    """Change over spread below which a network with weights of this dtype does not see an input."""
    return max(BLIND, ROUNDINGS * torch.finfo(dtype).eps)


def spread_of(out: Tensor) -> float:
    """Root mean square of an output (n, ...) around its mean over rows."""
    return float((out - out.mean(0)).square().mean().sqrt())


def change(one: Tensor, two: Tensor, spread: float) -> float:
    """Root mean square difference of two outputs in units of ``spread``."""
    return float((one - two).square().mean().sqrt()) / max(spread, 1e-30)


def exchanged(rows: Rows, name: str, seed: int) -> tuple[Tensor, Tensor]:
    """A condition with its rows exchanged, and which rows got another value: (n, ...) and (n,)."""
    value = rows.cond[name]
    order = torch.randperm(len(value), generator=generator_for(seed, "check", name))
    other = value[torch.roll(order, 1)[torch.argsort(order)]]
    return other, (other != value).flatten(1).any(1) if value.ndim > 1 else other != value


def find_time(network: Network, rows: Rows, low: float, seen: dict[str, float], short: bool) -> list[Finding]:
    """Whether the network sees t, and its exact value.

    Args:
        network: the network as it is called.
        rows: states to evaluate it on.
        low: change over spread that counts as nothing.
        seen: the change is noted here, under ``t``.
        short: whether to try one difference of time only.
    """
    few = rows.first(SEEN_ROWS)
    base_t = 0.05 + 0.8 * (torch.arange(len(few)) + 0.37) / len(few)
    base = network(few.x, base_t, **few.cond)
    spread = spread_of(base)
    if spread == 0:
        return [
            Finding("constant_output", "The output is the same for all rows: the network is untrained.", kind="note")
        ]
    seen["t"] = change(base, network(few.x, torch.roll(base_t, SEEN_ROWS // 2), **few.cond), spread)
    if seen["t"] <= low:
        return _blind_or_truncated(network, few, base, spread, low, seen["t"])
    for step in STEPS[1:2] if short else STEPS:
        moved = network(few.x, base_t + step, **few.cond)
        share = float((moved == base).flatten(1).all(1).float().mean())
        if share >= EQUAL:
            levels = max(1.0, (1 - share) / step)
            return [_rounded(levels, step, share)]
    return []


def _rounded(levels: float, step: float, share: float) -> Finding:
    text = (
        f"The output does not change at all when t is raised by {step:g} for {share:.0%} of the rows: times are rounded"
    )
    fix = (
        "Give the network the time as a floating-point number, without .long(), int() or round(), and without a cast "
        "to half precision."
    )
    if levels >= COARSE:
        text += (
            f", to about {levels:.0f} levels. Derivatives in t vanish, on which meanflow and consistency losses rest."
        )
        return Finding("truncated_time", text, fix, {"levels": levels, "share": share}, kind="note")
    return Finding("truncated_time", f"{text}, to about {levels:.0f} levels.", fix, {"levels": levels, "share": share})


def _blind_or_truncated(
    network: Network, rows: Rows, base: Tensor, spread: float, low: float, measured: float
) -> list[Finding]:
    """A network that does not see times inside (0, 1): it truncates them, or it sees no time at all."""
    for time in OUTSIDE:
        try:
            out = network(rows.x, torch.full((len(rows),), time), **rows.cond)
        except Exception:  # times outside of 0 to 1 may be refused
            continue
        if not change(out, base, spread) <= low:
            return [
                Finding(
                    "truncated_time", f"The output is the same for all times between 0 and 1 and another one at t = "
                    f"{time:g}: times are truncated to whole numbers.",
                    "Give the network the time as a floating-point number, without .long() or int(); if it expects 0 "
                    "to 1000, multiply before.",
                    {"levels": 1.0, "change": measured},
                )
            ]  # fmt: skip
    return [
        Finding(
            "blind_to_time", f"The output changes by {measured:.1g} of its spread when t changes: t is not seen.",
            f"See that the call hands t on. {NORMALISED}",
            {"change": measured},
        )
    ]  # fmt: skip


def find_blind_conditions(
    network: Network, rows: Rows, base: Tensor, low: float, seen: dict[str, float], seed: int, mask: str | None
) -> list[Finding]:
    """Whether the network sees each of its conditions.

    Args:
        network: the network as it is called.
        rows: states to evaluate it on.
        base: its output on them.
        low: change over spread that counts as nothing.
        seen: the changes are noted here by name.
        seed: of the exchange.
        mask: name of the condition with the valid entries, which is not exchanged.
    """
    found, spread = [], spread_of(base)
    for name in (name for name in rows.cond if name != mask):
        other, changed = exchanged(rows, name, seed)
        if not bool(changed.any()):
            text = f"The condition {name!r} is the same for all rows: whether the network sees it is not known."
            found.append(Finding("constant_condition", text, "", {}, name, "note"))
            continue
        if spread == 0:
            continue
        out = network(rows.x, rows.t, **{**rows.cond, name: other})
        seen[name] = change(out[changed], base[changed], spread)
        if seen[name] <= low:
            text = f"The output changes by {seen[name]:.1g} of its spread when {name!r} is exchanged between rows."
            fix = f"See that the call hands {name!r} on, and that the network was built and trained with it."
            found.append(Finding("blind_to_condition", text, fix, {"change": seen[name]}, name))
    return found


def find_blind_end(network: Network, rows: Rows, low: float, seen: dict[str, float]) -> list[Finding]:
    """Whether a two-time network sees the end time r."""
    few = rows.first(SEEN_ROWS)
    near = network(few.x, few.t, r=few.t, **few.cond)
    spread = spread_of(near)
    if spread == 0:
        return []
    seen["r"] = change(network(few.x, few.t, r=torch.ones_like(few.t), **few.cond), near, spread)
    if seen["r"] > low:
        return []
    text = f"The output changes by {seen['r']:.1g} of its spread when the end time r changes."
    fix = "See that the call hands r on. A two-time form that was not trained yet is equal for every r: train it first."
    return [Finding("blind_to_r", text, fix, {"change": seen["r"]})]


def find_shuffled(
    v: Velocity, rows: Rows, again: Rows, given: Tensor, names: Sequence[str], seed: int
) -> list[Finding]:
    """Whether each condition belongs to its rows.

    Args:
        v: the velocity, repaired where the network needs it.
        rows: states to evaluate it on.
        again: the same data and conditions with other noise and times.
        given: the velocity on ``rows``.
        names: conditions to judge.
        seed: of the exchange.
    """
    found = []
    for name in names:
        other, changed = exchanged(rows, name, seed)
        if not bool(changed.any()):
            continue
        swapped = v(rows.x, rows.t, **{**rows.cond, name: other})
        effect = rows.squares(swapped - given) / rows.unit
        raised = (rows.squares(swapped - rows.mean) - rows.squares(given - rows.mean)) / rows.unit
        missing = (BELONGS * effect - raised)[changed]
        if float(effect.mean()) < EFFECT or _standard_errors(missing) < SIGNIFICANT / 2:
            continue
        q = float(raised[changed].mean() / effect[changed].mean())
        found.append(_judged(name, q, v, rows, again, seed))
    return found


def _standard_errors(values: Tensor) -> float:
    return float(values.mean() / (values.std() / math.sqrt(len(values)) + 1e-30))


def _judged(name: str, q: float, v: Velocity, rows: Rows, again: Rows, seed: int) -> Finding:
    """Try other values of a condition for every row: chosen on one draw of noise, judged on another."""
    candidates = _candidates(rows.cond[name], seed)
    rows, again = rows.first(JUDGED), again.first(JUDGED)
    losses = torch.stack([_losses(v, rows, name, value) for value in candidates])
    judged = torch.stack([_losses(v, again, name, value) for value in candidates])
    chosen = judged.gather(0, losses.argmin(0, keepdim=True))[0]
    own = again.squares(v(again.x, again.t, **again.cond) - again.u) / again.unit
    gain = own - chosen
    z, share = _standard_errors(gain), float(gain.mean() / own.mean())
    evidence = {"q": q, "gain": share, "standard_errors": z}
    told = (
        f"Exchanging {name!r} between rows raises the loss by {q:.2g} of what it does where they belong to their rows"
    )
    if z >= SIGNIFICANT and share > 0.02:
        text = (
            f"{told}, and another value than the given one, chosen on other noise, lowers the loss by {share:.0%} "
            f"({z:.0f} standard errors): {name!r} does not belong to the rows."
        )
        fix = f"See that {name!r} has the order of the rows, and the numbering that the network was trained with."
        return Finding("shuffled_condition", text, fix, evidence, name)
    text = f"Not conclusive: {told}, and no other value fits better. The network may have learned little from {name!r}."
    return Finding("inconclusive", text, "", evidence, name, "note")


def _candidates(value: Tensor, seed: int) -> Tensor:
    """Distinct values of a condition, (k, ...): all of them, or a choice of rows."""
    distinct = torch.unique(value, dim=0)
    if len(distinct) <= CANDIDATES:
        return distinct
    order = torch.randperm(len(distinct), generator=generator_for(seed, "check", "candidates"))
    return distinct[order[:CANDIDATES]]


def _losses(v: Velocity, rows: Rows, name: str, value: Tensor) -> Tensor:
    given = value.expand(len(rows), *value.shape)
    return rows.squares(v(rows.x, rows.t, **{**rows.cond, name: given}) - rows.u) / rows.unit


def find_structural(
    net: nn.Module, call: Plain, rows: Rows, device: torch.device, two_time: bool, setting: Setting
) -> list[Finding]:
    """Inputs that the network cannot see whatever its weights: for networks that are not trained yet.

    All weights are shifted by random amounts, zero-initialised layers included, without a change of the module.

    Args:
        net: the network.
        call: how it is called.
        rows: states to evaluate it on.
        device: of the network.
        two_time: whether it takes an end time ``r``.
        setting: the seed of the shift and of the exchange, and the mask.
    """
    shifted = _shifted(net, setting.seed)

    def moved(*arguments: Any, **named: Any) -> Any:
        return torch.func.functional_call(net, shifted, arguments, named)

    try:
        return _unseen(call.network(moved, device), rows.first(SEEN_ROWS), two_time, setting)
    except Exception:  # a module that cannot be called with other weights is not judged
        return []


def _unseen(network: Network, rows: Rows, two_time: bool, setting: Setting) -> list[Finding]:
    base = network(rows.x, rows.t, **rows.cond)
    spread, tried = spread_of(base), {"t": {"t": torch.roll(rows.t, len(rows) // 2)}}
    if not spread or not math.isfinite(spread):
        return []
    tried |= {"r": {"r": torch.ones_like(rows.t)}} if two_time else {}
    for name in (name for name in rows.cond if name != setting.mask):
        other, changed = exchanged(rows, name, setting.seed)
        tried |= {name: {name: other}} if bool(changed.any()) else {}
    found = []
    for name, replaced in tried.items():
        arguments: Mapping[str, Tensor] = {"t": rows.t, **rows.cond, **replaced}
        measured = change(network(rows.x, **arguments), base, spread)
        if measured <= 10 * BLIND:
            kind = {"t": "blind_to_time", "r": "blind_to_r"}.get(name, "blind_to_condition")
            about = name if kind == "blind_to_condition" else ""
            text = f"With random weights the output changes by {measured:.1g} of its spread when {name} changes."
            fix = f"Training cannot mend that: see that the call hands {name} on. {NORMALISED}"
            found.append(Finding(kind, text, fix, {"change": measured}, about))
    return found


def _shifted(net: nn.Module, seed: int) -> dict[str, Tensor]:
    generator, made = generator_for(seed, "check", "weights"), {}
    for name, weight in net.named_parameters():
        if weight.is_floating_point():
            size = max(SHIFTED * float(weight.detach().float().square().mean().sqrt()), SHIFTED_LEAST)
            noise = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
            made[name] = weight.detach() + size * noise
    return made
