r"""The flow-map family: regress the average velocity ``u(x, t, r) = (X(x, t, r) - x) / (r - t)`` of a two-time network.

Three equations each have the flow map X as their only solution, with ``u(x, t, t) = v`` (t = 0 is noise, t <= r):

    derivative    (r - t) u = int_t^r v(x_s, s) ds, differentiated in t along the flow:  u = v + (r - t) du/dt,
                  du/dt = ∂_t u + (∂_x u) v                          (arXiv:2505.13447, eq. 6, there in time 1 - t)
    composition   (r - t) u(x, t, r) = (q - t) u(x, t, q) + (r - q) u(x_q, q, r),  x_q = x + (q - t) u(x, t, q)
                                                            (arXiv:2507.16884; q in the middle: arXiv:2410.12557)
    Lagrangian    ∂_r X(x, t, r) = v(X(x, t, r), r)                  (arXiv:2406.07507)

The velocity is a teacher's, or that of the data pair, ``d/dt x_t``, whose mean given x_t is v. The derivative equation
is linear in it (the tangent of du/dt included), so there a pair's velocity may stand for v in every place. In the other
two it may only stand on the diagonal r = t, where they ask ``u = v``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, final

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn
from torch.autograd import forward_ad

from fewstep.errors import UserError, unknown
from fewstep.flow.couplings import Facts, Independent, Pair
from fewstep.flow.derivatives import Derivative, Mode, plain_attention, rows_of
from fewstep.flow.field import Velocity, calls_at
from fewstep.flow.noise import Draws
from fewstep.flow.paths import AffinePath, Linear, expand_time, make_path
from fewstep.flow.time_laws import TimeLaw, make_time_law
from fewstep.methods.base import Options, Stage, baked_in
from fewstep.methods.batches import DataBatches

Way = Literal["auto", "forward", "finite_difference"]
STEP = {torch.float64: 1e-5}  # of differences in r; values in single precision carry errors of 1e-6 or so
COARSE_STEP = 5e-3
TRIED_ROWS = 4
LARGEST = 5.0  # root mean square of a target's change from the velocity


class MapOptions(Options):
    """Options of the methods that learn a two-time map, from data or from a teacher's velocity."""

    guides_itself: ClassVar[bool] = False  # whether guidance can be learned without a teacher

    guidance: float = Field(1.0, ge=0, description="teacher's guidance, baked in")

    @model_validator(mode="after")
    def _guidance_has_a_teacher(self) -> MapOptions:
        if self.guidance != 1.0 and self.teacher is None and not self.guides_itself:
            raise ValueError("guidance is the teacher's, baked in: add 'teacher: STAGE', or leave it out")
        return self


def known_law(spec: str) -> str:
    """A law of t by its words, refused where there is none of that name."""
    make_time_law(spec)
    return spec


LawOfTime = Annotated[str, AfterValidator(known_law)]


class PairOfTimesOptions(MapOptions):
    """Options of the methods that draw two times."""

    time: LawOfTime = Field("uniform", description="law of both times: uniform, logit_normal:m,s, …")
    diagonal: float = Field(0.5, gt=0, le=1, description="share of rows with r = t, which learn the velocity")
    derivative: Way = Field("auto", description="forward mode, or finite differences where that fails; or one of them")


class Times(NamedTuple):
    """Starts t and ends r >= t, (B,) each, and whether r = t was meant."""

    t: Tensor
    r: Tensor
    diagonal: Tensor


def draw_times(law: TimeLaw, diagonal: float, draws: Draws, like: Tensor) -> Times:
    """Two draws of the law, the smaller one first; with probability ``diagonal``, r = t (arXiv:2505.13447, alg. 1)."""
    one, two = (law.sample(draws.uniform()).to(like) for _ in range(2))
    t, r = torch.minimum(one, two), torch.maximum(one, two)
    same = (draws.uniform() < diagonal).to(t.device)
    return Times(t, torch.where(same, t, r), same)


def derivative_target(
    derivative: Derivative, x: Tensor, times: Times, v: Tensor, cond: Mapping[str, Any], along: Tensor | None = None
) -> Tensor:
    """``v + (r - t) du/dt`` with ``du/dt = ∂_t u + (∂_x u) w``, without a graph.

    Args:
        derivative: of ``u(x, t, r=r, **cond)``.
        x: (B, ...) at ``times.t``.
        times: t and r.
        v: a velocity at (x, t), or a pair's whose mean it is.
        cond: further keyword arguments of u.
        along: w, v itself by default.

    Rows whose ``(r - t) du/dt`` has a root mean square above 5, in units where data have one of about 1, are shortened
    to that: the target depends on the network, and one batch of steep rows could otherwise end a training.
    """
    _, slope = derivative(x, times.t, v if along is None else along, torch.ones_like(times.t), r=times.r, **cond)
    change = expand_time(times.r - times.t, x) * slope
    size = change.flatten(1).square().mean(1).sqrt()
    return v + expand_time(LARGEST / size.clamp(min=LARGEST), x) * change


def composition_target(u: Velocity, x: Tensor, times: Times, q: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """``a u(x, t, q) + (1 - a) u(x_q, q, r)``, ``a = (q - t) / (r - t)``, ``x_q = x + (q - t) u(x, t, q)``.

    On the diagonal it is ``u(x, t, t)``.
    """
    t, r, _ = times
    width = torch.where(r == t, 1.0, r - t)
    share = expand_time((q - t) / width, x)
    first = u(x, t, r=q, **cond).to(x)
    return share * first + (1 - share) * u(x + expand_time(q - t, x) * first, q, r=r, **cond).to(x)


def where_rows(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Rows of ``yes`` where the mask (B,) is true, of ``no`` elsewhere."""
    return torch.where(mask.reshape(-1, *(1,) * (yes.ndim - 1)), yes, no)


Target = Callable[[Tensor, Tensor, Times, Mapping[str, Any]], Tensor]


def off_diagonal(target: Tensor, x: Tensor, times: Times, cond: Mapping[str, Any], make: Target) -> Tensor:
    """The target with the rows whose r is not t made otherwise.

    Args:
        target: (B, ...), kept on the diagonal.
        x: (B, ...) at ``times.t``.
        times: t, r and where they are the same.
        cond: conditions of all rows.
        make: ``make(rows, x, times, cond)``, of those rows alone; called in full precision, without a graph.
    """
    rows = (~times.diagonal).nonzero()[:, 0]
    if not len(rows):
        return target
    apart = Times(*(part[rows] for part in times))
    with full_precision(x):
        found = make(rows, x[rows], apart, rows_of(cond, len(x), rows))
    return target.index_copy(0, rows, found.to(target))


@final
class EndDerivative:
    """The map ``X = x + (r - t) u`` and ``∂_r X = u + (r - t) ∂_r u``, both with their autograd graph.

    Forward mode, or differences of two calls at ``r ± h`` (inside [0, 1]) where the network has none.

    Args:
        u: ``u(x, t, r=r, **cond)``.
        mode: ``forward``, ``finite_difference``, or ``auto``: the first that works.

    Attributes:
        used: the way that was taken, None before the first call.
    """

    def __init__(self, u: Velocity, mode: Way = "auto") -> None:
        if mode not in ("auto", "forward", "finite_difference"):
            raise unknown("derivative mode", mode, ("auto", "forward", "finite_difference"))
        self.u, self.mode = u, mode
        self.used: Mode | None = None if mode == "auto" else mode

    def __call__(self, x: Tensor, times: Times, cond: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        if self.used is None:
            self.used = "forward" if self._forward_works(x, times, cond) else "finite_difference"
        return self._forward(x, times, cond) if self.used == "forward" else self._differences(x, times, cond)

    def _forward_works(self, x: Tensor, times: Times, cond: Mapping[str, Any]) -> bool:
        """Whether it and the gradient through it can be had; tried on a few rows, all random numbers put back."""
        few = slice(TRIED_ROWS)
        try:
            with torch.random.fork_rng(), torch.enable_grad():
                point = x[few].detach().requires_grad_()
                part = Times(*(values[few] for values in times))
                _, speed = self._forward(point, part, rows_of(cond, len(x), few))
                torch.autograd.grad(speed.square().sum(), point)
        except Exception:  # what a network raises where it cannot be differentiated may be anything
            return False
        return True

    def _forward(self, x: Tensor, times: Times, cond: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level(), plain_attention():
            end = forward_ad.make_dual(times.r, torch.ones_like(times.r))
            u, slope = forward_ad.unpack_dual(self.u(x, times.t, r=end, **cond))
        length = expand_time(times.r - times.t, x)
        return x + length * u, u if slope is None else u + length * slope

    def _differences(self, x: Tensor, times: Times, cond: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        h = STEP.get(x.dtype, COARSE_STEP)
        ends = (times.r - h).clamp(min=0.0), (times.r + h).clamp(max=1.0)
        low, high = (x + expand_time(end - times.t, x) * self.u(x, times.t, r=end, **cond) for end in ends)
        width = expand_time(ends[1] - ends[0], x)
        share = expand_time(times.r - ends[0], x) / width
        return low + share * (high - low), (high - low) / width


def weighted_square(e: Tensor, p: float = 0.0, c: float = 1e-3) -> Tensor:
    """Mean over rows of ``w |e|^2 / D``, ``w = (|e|^2 + c)^-p`` without gradient; p = 0 is the mean square.

    (arXiv:2505.13447, sec. 4.3.) With p > 0 the optimum is no longer the mean of noisy targets.
    """
    size = e.flatten(1).square().sum(1)
    return ((size.detach() + c) ** -p * size).mean() / e[0].numel()


@final
@dataclass(frozen=True)
class Lesson:
    """What a stage learns a map from.

    Attributes:
        path: the affine path: the teacher's, the line without one.
        velocity: the teacher's, guided; None: that of the data pair.
        facts: of the coupling.
        batches: makes the batches of data rows and independent noise.
        path_name: the path's name.
    """

    path: AffinePath
    velocity: Velocity | None
    facts: Facts
    batches: Callable[[], DataBatches]
    path_name: str = "linear"

    def velocity_at(self, batch: Pair, x: Tensor, t: Tensor) -> Tensor:
        """The teacher's ``v(x_t, t)`` in full precision, or the pair's ``d/dt x_t``; no graph."""
        if self.velocity is None:
            return self.path.target(batch.x0, batch.x1, t)
        with full_precision(x):
            return self.velocity(x, t, **batch.cond).to(x)


def lesson(options: MapOptions, stage: Stage) -> Lesson:
    """From the options and the stage.

    Raises:
        UserError: a teacher whose states are not noised data; guidance it cannot take.
    """
    teacher = stage.teacher
    if teacher is not None:
        teacher.require_noised_data(options.method)
    coupling = Independent(stage.source)

    def batches() -> DataBatches:
        return DataBatches(stage.data, coupling, stage.conditional, stage.dequantise, (stage.seed, stage.name))

    if teacher is None:
        return Lesson(Linear(), None, coupling.facts, batches)
    facts = replace(coupling.facts, teacher=teacher.digest, guidance=baked_in(options.guidance))
    return Lesson(make_path(teacher.path), teacher.guided(options.guidance), facts, batches, teacher.path)


def teacher_calls(options: MapOptions) -> int:
    """The teacher's network calls per sample seen."""
    return 0 if options.teacher is None else calls_at(options.guidance)


def two_time(options: Options, shape: tuple[int, ...]) -> dict[str, Any]:
    """What the methods of this family set in the network's configuration."""
    return {"two_time": True}


def refuse_dropout(stage: Stage, way: str) -> None:
    """Differences of two calls need the same network in both."""
    if way == "finite_difference" and stage.network.get("dropout"):
        raise UserError(
            "derivative: finite_difference compares calls of the network, and dropout makes every call another one: "
            "set the network's dropout to 0, or take 'derivative: forward'."
        )


@final
class full_precision:
    """No graph and no autocast: targets are numbers, and derivatives need all their digits."""

    def __init__(self, like: Tensor) -> None:
        self._contexts = (torch.no_grad(), torch.autocast(like.device.type, enabled=False))

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *failed: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*failed)


@final
class Announcement:
    """Says once by which way derivatives are taken, where it is not the expected one."""

    def __init__(self, say: Callable[[str], None] | None) -> None:
        self._say = say

    def __call__(self, used: Mode | None) -> None:
        if self._say is not None and used not in (None, "forward"):
            self._say(f"  note: this network has no forward-mode derivative: {used} is taken instead")
        if used is not None:
            self._say = None


def caller(modules: Mapping[str, nn.Module]) -> Velocity:
    """The student as a function, whatever module the trainer has put in its place."""
    return lambda x, t, **cond: modules["student"](x, t, **cond)
