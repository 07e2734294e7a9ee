"""The velocity that a learned map is trained on: a teacher's, or that of the data pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, final

from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from fewstep.data.dataset import DataSet
from fewstep.flow.couplings import Facts, Independent, Pair
from fewstep.flow.derivatives import Way
from fewstep.flow.field import Velocity, calls_at
from fewstep.flow.paths import AffinePath, Linear, make_path
from fewstep.flow.precision import full_precision
from fewstep.flow.time_laws import make_time_law
from fewstep.methods.contract.objective import Batches
from fewstep.methods.contract.options import Options, baked_in
from fewstep.methods.contract.stage import Needs, Stage, velocity_network
from fewstep.methods.training_pairs.batches import stage_batches


class MapOptions(Options):
    """Options of the methods that learn a map from data pairs or from a teacher's velocity."""

    guides_itself: ClassVar[bool] = False  # whether guidance can be learned without a teacher

    guidance: float = Field(1.0, ge=0, description="weight of the teacher's guidance, learned by the student; 1: none")

    @model_validator(mode="after")
    def _guidance_has_a_teacher(self) -> MapOptions:
        if self.guidance != 1.0 and self.teacher is None and not self.guides_itself:
            raise ValueError("guidance is the teacher's, and there is none: add 'teacher: STAGE', or leave it out")
        return self


def known_law(spec: str) -> str:
    """``spec`` itself, if it names a law of t.

    Args:
        spec: for example ``uniform`` or ``logit_normal:0,1``.

    Raises:
        UserError: there is no such law.
    """
    make_time_law(spec)
    return spec


LawOfTime = Annotated[str, AfterValidator(known_law)]


class PairOfTimesOptions(MapOptions):
    """Options of the methods that draw two times."""

    time: LawOfTime = Field("uniform", description="law of t and r: uniform, logit_normal:m,s, …")
    diagonal: float = Field(0.5, gt=0, le=1, description="share of rows with r = t, which learn the velocity")
    derivative: Way = Field(
        "auto", description="forward, finite_difference, or auto: forward where the network supports it"
    )


@final
@dataclass(frozen=True)
class VelocitySource:
    """The velocity and the batches that a stage learns a map from.

    Attributes:
        path: the affine path: the teacher's, or the straight line without a teacher.
        velocity: the teacher's velocity with guidance; None for that of the data pairs.
        facts: what holds for the coupling.
        batches: makes the batches of data rows and independent noise. With ``batches(group=M)`` every M consecutive
            rows have one class.
        path_name: the path's name.
    """

    path: AffinePath
    velocity: Velocity | None
    facts: Facts
    batches: Callable[..., Batches]
    path_name: str = "linear"

    def velocity_at(self, batch: Pair, x: Tensor, t: Tensor) -> Tensor:
        """The teacher's ``v(x, t)`` in full precision, or the pairs' ``d/dt x_t``; (B, ...), without a graph.

        Args:
            batch: the pairs.
            x: the points (B, ...).
            t: the times (B,).
        """
        if self.velocity is None:
            return self.path.target(batch.x0, batch.x1, t)
        with full_precision(x):
            return self.velocity(x, t, **batch.cond).to(x)


def velocity_source(options: MapOptions, stage: Stage) -> VelocitySource:
    """The velocity source of a stage: the teacher's velocity if the stage has one, otherwise that of the data pairs.

    Raises:
        UserError: the teacher was trained on dependent pairs, or guidance is asked of one that cannot be guided.
    """
    teacher = stage.teacher
    if teacher is not None:
        teacher.require_noised_data(options.method)
    coupling = Independent(stage.source)

    def batches(group: int = 1) -> Batches:
        return stage_batches(stage, coupling, group=group)

    if teacher is None:
        return VelocitySource(Linear(), None, coupling.facts, batches)
    facts = replace(coupling.facts, teacher=teacher.digest, guidance=baked_in(options.guidance))
    return VelocitySource(make_path(teacher.path), teacher.guided(options.guidance), facts, batches, teacher.path)


def teacher_calls(options: MapOptions) -> int:
    """The teacher's network calls per sample seen, for one velocity: 0 without a teacher, 2 with guidance."""
    return 0 if options.teacher is None else calls_at(options.guidance)


def map_needs(options: MapOptions) -> Needs:
    """The needs of a stage that evaluates a teacher once per sample."""
    return Needs(guidance=options.guidance, other_calls=teacher_calls(options))


def two_time_network(
    options: Options, data: DataSet, config: Mapping[str, Any], classes: int, **changes: Any
) -> dict[str, Any]:
    """The resolved configuration of a two-time network ``u(x, t, r)``.

    The arguments are those of :func:`~fewstep.methods.contract.stage.velocity_network`.
    """
    return velocity_network(options, data, config, classes, two_time=True, **changes)
