r"""Convention and units of a network, judged by its flow-matching loss.

A repair is a time ``s(t)`` that the network is evaluated at and a reading of its output: the velocity, its opposite,
the data prediction or the noise prediction, the last two converted to a velocity. A trained network approximates
``E[u | x_t]`` in its own convention and in no other, so the right repair has the least loss. More holds: if
``v_b`` is that expectation, then for every other ``v_a``

.. math:: q = \frac{E|v_a - u|^2 - E|v_b - u|^2}{E|v_a - v_b|^2} = 1.

A repair is named where it lowers the loss by more than 5 standard errors and 5 %, where q lies in [.75, 2.1], and
where it beats zero velocity in the same sense. The second condition is what a straightened, distilled or untrained
network does not meet by chance: it is no expectation under independent pairs in any convention. Measured over 550
networks with a fault of convention (digits and data in the plane, three paths), q was .86 to 1.08, and .78 to 2.0 for
those trained for 60 steps; for networks that a consistency loss had changed, .2 to .73.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fewstep.diagnostics.check_report import Finding
from fewstep.diagnostics.check_rows import Network, Rows, Setting
from fewstep.flow.affine_path import AffinePath

SIGNIFICANT, MATERIAL = 5.0, 0.05  # standard errors, and share of the smaller loss
SHORT_SIGNIFICANT = 3.0  # standard errors in the short form, where rows are few
LOWEST, HIGHEST = 0.75, 2.1  # of q; see the module's docstring
POOR = 1.6  # loss of a repaired network, in units of the best linear velocity's, above which nothing is named
SIMPLER = 1.03  # the simplest repair is taken among those whose loss is within this factor of the least
CAP = 30.0  # a row's loss counts at most so much in standard errors, in the same unit
FAR = 2.0  # loss over that of zero velocity above which a network is no velocity of the data
STEPS, SAMPLES = 16, 64  # Euler steps and samples that show the network's own units
STRETCH, SHIFT = 0.2, 0.25  # |log scale|, and shift over the standard deviation, that are no accident of so few samples
ACCORD = 0.4  # |log| of the scale, and shift in standard deviations, by which a candidate may differ from the samples
NEAREST = 0.05  # least distance in time by which a data or noise prediction is divided; chosen, not tuned
UNITS_GAIN = 0.75  # loss in other units over that in the given ones, at most


@final
@dataclass(frozen=True)
class TimeMap:
    """A time that the network is evaluated at instead of t, and the faults that this repairs."""

    words: str
    at: Callable[[Tensor], Tensor]
    faults: tuple[str, ...] = ()


FLIP, MISSING, EXCESS = "flipped_time", "time_factor_missing", "time_factor_too_much"
TIMES = (
    TimeMap("t", lambda t: t),
    TimeMap("1 - t", lambda t: 1 - t, (FLIP,)),
    TimeMap("1000 * t", lambda t: 1000 * t, (MISSING,)),
    TimeMap("t / 1000", lambda t: t / 1000, (EXCESS,)),
    TimeMap("1000 * (1 - t)", lambda t: 1000 * (1 - t), (FLIP, MISSING)),
    TimeMap("(1 - t) / 1000", lambda t: (1 - t) / 1000, (FLIP, EXCESS)),
    TimeMap("1 - (1 - t) / 1000", lambda t: 1 - (1 - t) / 1000, (EXCESS,)),
    TimeMap("1 - t / 1000", lambda t: 1 - t / 1000, (FLIP, EXCESS)),
    TimeMap("1 - 1000 * (1 - t)", lambda t: 1 - 1000 * (1 - t), (MISSING,)),
    TimeMap("1 - 1000 * t", lambda t: 1 - 1000 * t, (FLIP, MISSING)),
)
SHORT_TIMES = 3  # of them are tried in the short form; one more where the loss is not that of a good velocity

Reading = Callable[[AffinePath, Tensor, Tensor, Tensor], Tensor]
READINGS: dict[str, Reading] = {
    "velocity": lambda path, out, x, t: out,
    "minus": lambda path, out, x, t: -out,
    "data": lambda path, out, x, t: path.data_to_velocity(out, x, t),
    "noise": lambda path, out, x, t: path.noise_to_velocity(out, x, t),
}
SIGNS = {"minus": "wrong_sign", "data": "data_prediction", "noise": "noise_prediction"}
MEANING = {
    FLIP: "the network's time runs from data to noise",
    MISSING: "the network expects times of 0 to 1000",
    EXCESS: "the network expects times of 0 to 1, and the call multiplies them by 1000",
    "wrong_sign": "the network's velocity points from data to noise",
    "data_prediction": "the output is the data prediction E[x1 | x_t]",
    "noise_prediction": "the output is the noise prediction E[x0 | x_t]",
}


@final
@dataclass(frozen=True)
class Repair:
    """A time and a reading, with the velocity they give.

    Args:
        time: the time map.
        reading: key of READINGS.
        out: what the network returned, (n, *shape).
        v: the velocity, (n, *shape).
        loss: mean weighted squared error, in units of the best linear velocity's.
    """

    time: TimeMap
    reading: str
    out: Tensor
    v: Tensor
    loss: float

    @property
    def faults(self) -> tuple[str, ...]:
        """Names of the faults that it repairs."""
        return (*self.time.faults, *((SIGNS[self.reading],) if self.reading in SIGNS else ()))

    def words(self, linear: bool = False) -> str:
        """The repaired velocity as source text.

        Args:
            linear: whether the path is the straight line, whose conversions are short.
        """
        call = f"v(x, {self.time.words})"
        if self.reading in ("velocity", "minus"):
            return call if self.reading == "velocity" else f"-{call}"
        if linear:
            return f"({call} - x) / (1 - t)" if self.reading == "data" else f"(x - {call}) / t"
        return f"path.{self.reading}_to_velocity({call}, x, t)"


def repairs(network: Network, rows: Rows, path: AffinePath, short: bool) -> list[Repair]:
    """The network under every hypothesis; the first is the network as given."""
    found: list[Repair] = []
    for number, time in enumerate(TIMES):
        if short and (number > SHORT_TIMES or (number >= SHORT_TIMES and found[0].loss < 1)):
            break
        try:
            out = network(rows.x, time.at(rows.t), **rows.cond)
        except Exception:  # a network may refuse times outside of 0 to 1: then this is not its convention
            continue
        for reading, convert in READINGS.items():
            v = convert(path, out, rows.x, rows.t)
            loss = (float(rows.squares(v - rows.mean).mean()) + rows.least) / rows.unit
            found.append(Repair(time, reading, out, v, loss))
    return found


def significance(rows: Rows, worse: Tensor, better: Tensor) -> float:
    """Loss of one velocity minus that of another, in standard errors of the paired difference over rows."""
    one, two = (rows.squares(v - rows.mean).div(rows.unit).clamp(max=CAP) for v in (worse, better))
    difference = one - two
    return float(difference.mean() / (difference.std() / math.sqrt(len(rows)) + 1e-12))


def calibration(rows: Rows, worse: Tensor, better: Tensor) -> float:
    """q of the module's docstring; 0 where both velocities are the same."""
    one, two = (rows.squares(v - rows.mean).mean() for v in (worse, better))
    return float((one - two) / rows.squares(worse - better).mean().clamp(min=1e-30))


def beats_zero(rows: Rows, v: Tensor) -> bool:
    """Whether a velocity is better than zero velocity, and by as much as an expectation is."""
    zero = torch.zeros_like(v)
    return LOWEST <= calibration(rows, zero, v) <= HIGHEST and significance(rows, zero, v) >= SIGNIFICANT / 2


def near_best(found: list[Repair]) -> list[Repair]:
    """The repairs whose loss is nearly the least, the simplest first."""
    least = min(repair.loss for repair in found)
    return [repair for repair in found if repair.loss <= SIMPLER * least]


def find_convention(found: list[Repair], rows: Rows, linear: bool, short: bool) -> tuple[Repair, list[Finding]]:
    """The repair that the network needs, and its faults.

    Args:
        found: all hypotheses, first the network as given.
        rows: what they were evaluated on.
        linear: whether the path is the straight line.
        short: whether this is the short form.

    Returns:
        The repair (the network as given if there is no fault), and findings.
    """
    given, near = found[0], near_best(found)
    if near[0] is given:
        return given, []
    best = next((repair for repair in near if _right(rows, given, repair)), near[0])
    z, q = significance(rows, given.v, best.v), calibration(rows, given.v, best.v)
    if z < (SHORT_SIGNIFICANT if short else SIGNIFICANT) or given.loss - best.loss < MATERIAL * best.loss:
        return given, []
    evidence = {"loss": given.loss, "repaired": best.loss, "standard_errors": z, "q": q}
    numbers = (
        f"its loss is {given.loss:.3g} as given and {best.loss:.3g} as {best.words(linear)} ({z:.0f} standard errors)"
    )
    if not _right(rows, given, best):
        text = (
            f"Not conclusive: {numbers}, but that is no velocity of these data either. A straightened, distilled, "
            "guided or untrained network looks like this, and so does one with another fault."
        )
        return given, [Finding("inconclusive", text, "", evidence, kind="note")]
    fix = _fix(best, linear, rows.x.ndim)
    return best, [Finding(name, f"It seems that {MEANING[name]}: {numbers}.", fix, evidence) for name in best.faults]


def _right(rows: Rows, given: Repair, best: Repair) -> bool:
    """Whether a repair gives what an expectation gives, relative to the network as given and to zero velocity."""
    q = calibration(rows, given.v, best.v)
    return LOWEST <= q <= HIGHEST and best.loss <= POOR and beats_zero(rows, best.v)


def _fix(best: Repair, linear: bool, ndim: int) -> str:
    """The declaration that repairs the call, as code that runs for states of ``ndim`` dimensions."""
    call = f"m(x, {best.time.words}, **cond)"
    code = best.words(linear).replace(f"v(x, {best.time.words})", call)
    if linear and best.reading in ("data", "noise"):
        difference, _, length = code.rpartition(" / ")  # length is 0 at one end, and has one number per row
        code = f"{difference} / {length}.clamp(min={NEAREST})[:{', None' * (ndim - 1)}]"
    fix = f"fs.adapt(net, lambda m, x, t, **cond: {code})."
    if best.reading != "noise":
        return fix
    return (
        f"{fix} Near t = 0 that is inaccurate, because the noise prediction is nearly x there whatever the velocity "
        "is. Few-step students start there: first make it a velocity network, fs.train('flow_matching', "
        f"network=fs.adapt(net, lambda m, x, t, **cond: -{call}), data=…, out=…), and take that as the teacher."
    )


def find_no_velocity(given: Repair, rows: Rows) -> list[Finding]:
    """A network, under no repair, that is far worse than zero velocity."""
    zero = torch.zeros_like(rows.x)
    ratio = given.loss * rows.unit / float(rows.squares(zero - rows.u).mean())
    z = significance(rows, given.v, zero)
    if ratio < FAR or z < SIGNIFICANT:
        return []
    return [
        Finding(
            "not_a_velocity", f"The loss is {ratio:.3g} times that of zero velocity ({z:.0f} standard errors), and no "
            "repair explains it.",
            "See that the data, its units and its conditions are those that the network was trained on, and that the "
            "weights are loaded. With a large guidance weight built in, check the network without guidance.",
            {"over_zero": ratio, "standard_errors": z},
        )
    ]  # fmt: skip


@final
@dataclass(frozen=True)
class Units:
    """``a x + b``: from the given units to others."""

    a: float
    b: float

    def __call__(self, x: Tensor) -> Tensor:
        """The data in the other units."""
        return self.a * x + self.b

    def words(self) -> str:
        """The map as source text."""
        factor = f"x / {1 / self.a:.4g}" if 0 < self.a < 1 else f"{self.a:.4g} * x"
        factor = "x" if self.a == 1 else factor
        return factor if self.b == 0 else f"{factor} {'-' if self.b < 0 else '+'} {abs(self.b):.4g}"


USUAL = tuple(
    Units(a, b)
    for a, b in ((2, -1), (0.5, 0.5), (1 / 127.5, -1), (127.5, 127.5), (1 / 255, 0), (255, 0), (1 / 8, -1), (8, 8),
                 (2, 0), (0.5, 0), (1 / 16, 0), (16, 0), (10, 0), (0.1, 0), (1, 1), (1, -1), (1, 0.5), (1, -0.5))
)  # fmt: skip


def own_samples(network: Network, rows: Rows, path: AffinePath, repair: Repair) -> Tensor | None:
    """Samples of the network by Euler's method from the rows' noise, (m, *shape); None if it diverges."""
    few = rows.first(SAMPLES)
    x = few.x0.clone()
    for step in range(STEPS):
        t = torch.full((len(few),), max(step / STEPS, 1e-3))
        out = network(x, repair.time.at(t), **few.cond)
        x = x + few.valid * READINGS[repair.reading](path, out, x, t) / STEPS
    return x if bool(torch.isfinite(x).all()) and float(x.abs().max()) < 1e6 else None


def find_units(network: Network, setting: Setting, rows: Rows, repair: Repair) -> list[Finding]:
    """Whether the network was trained on the same data in other units.

    The network's samples are in its own units, whatever the data. Maps that bring mean and standard deviation of the
    data to theirs are tried; the data are in other units where one of them lowers the loss, relative to the best linear
    velocity in those units.
    """
    samples = own_samples(network, rows, setting.path, repair)
    if samples is None or float(rows.x1.std()) == 0:
        return []
    scale = float(samples.std() / rows.x1.std())
    fitted = Units(scale, float(samples.mean() - scale * rows.x1.mean()))
    moved = abs(float(fitted(rows.x1).mean() - rows.x1.mean())) / max(float(rows.x1.std()), float(samples.std()))
    if abs(math.log(max(scale, 1e-12))) < STRETCH and moved < SHIFT:
        return []
    candidates = [units for units in USUAL if _agrees(units, fitted, rows.x1, float(samples.std()))]
    tried = [(units, *_loss_in(units, network, setting, repair)) for units in (*candidates, fitted)]
    least = min(loss for _, loss, _, _ in tried)
    units, loss, errors, beats = next(entry for entry in tried if entry[1] <= SIMPLER * least)
    given = rows.squares(repair.v - rows.u).div(rows.unit)
    gained = given.clamp(max=CAP) - errors.clamp(max=CAP)
    z = float(gained.mean() / (gained.std() / math.sqrt(len(rows)) + 1e-12))
    if not beats or z < SIGNIFICANT or loss > UNITS_GAIN * float(given.mean()) or loss > POOR:
        return []
    evidence = {"loss": float(given.mean()), "repaired": loss, "standard_errors": z, "a": units.a, "b": units.b}
    text = (
        f"The network was trained on data in other units: samples of the network have mean {float(samples.mean()):.3g} "
        f"and standard deviation {float(samples.std()):.3g}, the data {float(rows.x1.mean()):.3g} and "
        f"{float(rows.x1.std()):.3g}. The loss is {float(given.mean()):.3g} on x and {loss:.3g} on {units.words()}."
    )
    return [Finding("data_units", text, f"Give the data in the network's units: {units.words()}.", evidence)]


def _agrees(units: Units, fitted: Units, x1: Tensor, spread: float) -> bool:
    away = abs(float(units(x1).mean() - fitted(x1).mean())) / spread
    return abs(math.log(units.a / fitted.a)) < ACCORD and away < ACCORD


def _loss_in(units: Units, network: Network, setting: Setting, repair: Repair) -> tuple[float, Tensor, bool]:
    rows = setting.rows(units)
    out = network(rows.x, repair.time.at(rows.t), **rows.cond)
    v = READINGS[repair.reading](setting.path, out, rows.x, rows.t)
    errors = rows.squares(v - rows.u) / rows.unit
    return float(errors.mean()), errors, beats_zero(rows, v)
