"""Flow matching / rectified flow: the teacher (arXiv:2210.02747, arXiv:2209.03003).

    L(theta) = E_{x0 ~ p0, x1 ~ data, t} |v_theta(x_t, t) - d/dt x_t|^2

with the coupling of x0 and x1 one of: independent; optimal transport within the batch (``ot``, arXiv:2302.00482);
optimal transport from the base to the whole training split (``semidiscrete``, arXiv:2509.25519); or x0 made from x1
(``inpainting`` and ``super_resolution``, arXiv:2310.03725), where the network gets the known part as its context.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from fewstep.data.dataset import DataSet
from fewstep.errors import UserError
from fewstep.flow.couplings import (
    Coupling,
    Facts,
    GaussianSource,
    Independent,
    Inpainting,
    MinibatchOT,
    SuperResolution,
)
from fewstep.flow.noise import generator_for
from fewstep.flow.paths import make_path
from fewstep.flow.time_laws import make_time_law
from fewstep.methods.contract.objective import Batches, Objective
from fewstep.methods.contract.options import Options, refuse_teacher
from fewstep.methods.contract.stage import Phase, Plan, Spec, Stage, velocity_network
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.distances import ROBUST, require_many_values, robust_note
from fewstep.methods.families.straight_line import VelocityRegression
from fewstep.methods.training_pairs.batches import stage_batches
from fewstep.methods.training_pairs.semidiscrete_batches import SemidiscreteBatches
from fewstep.solvers.maps import SampleRule

LATENT = (
    "path 'interpolant' adds a second noise to x0, and the two can be merged into one only if x0 is Gaussian and "
    "independent of the data"
)
EXAMPLES = 1024  # held-out rows kept with a model whose base is made from data, to sample from; chosen, not tuned


class FlowMatchingOptions(Options):
    """Options of ``method: flow_matching``."""

    coupling: Literal["independent", "ot", "semidiscrete", "inpainting", "super_resolution"] = Field(
        "independent", description="joint law of noise and data"
    )
    ot_batch_size: int | None = Field(None, gt=1, description="ot: rows per transport problem; default: the batch")
    factor: int = Field(2, gt=1, description="super_resolution: side of the averaged blocks, in pixels")
    sigma: float = Field(0.1, gt=0, description="super_resolution: standard deviation of the noise on the blurred data")
    path: str = Field("linear", description="affine path from noise to data, by name")
    time: str = Field("uniform", description="law of t: uniform, logit_normal:m,s, ushape:a, exponential:rate")
    loss: Literal["l2", "l1", "huber"] = Field("l2", description="distance of the prediction to its target")
    label_dropout: float = Field(0.1, ge=0, lt=1, description="share of rows with null conditions, for guidance")

    @property
    def noisy_targets(self) -> bool:
        """Whether one x_t has several targets: for all couplings but ``semidiscrete``, whose lines do not cross."""
        return self.coupling != "semidiscrete"

    @model_validator(mode="after")
    def _known_words(self) -> FlowMatchingOptions:
        refuse_teacher(self)
        make_path(self.path)
        if self.path == "interpolant" and self.coupling != "independent":
            raise ValueError(f"{LATENT}: leave 'coupling: {self.coupling}' out, or use another path ('linear')")
        make_time_law(self.time)
        if self.ot_batch_size is not None and self.coupling != "ot":
            raise ValueError("ot_batch_size belongs to 'coupling: ot': set that, or leave it out")
        return self


def make_coupling(options: FlowMatchingOptions, stage: Stage) -> Coupling:
    """The coupling of the options.

    Raises:
        UserError: the coupling does not fit the stage's base, labels or path.
    """
    if options.coupling == "ot":
        return MinibatchOT(stage.source, batch_size=options.ot_batch_size)
    if options.coupling == "independent":
        if options.path == "interpolant" and not stage.source.gaussian:
            raise UserError(f"{LATENT}: leave 'base' out, or use another path ('linear').")
        return Independent(stage.source)
    if not isinstance(stage.source, GaussianSource):
        raise UserError(f"coupling {options.coupling!r} makes its own base from the data: leave 'base' out.")
    if stage.conditional:
        raise UserError(
            f"coupling {options.coupling!r} gives the network a context and no other condition: set "
            "'conditional: false'."
        )
    if options.coupling == "inpainting":
        return Inpainting()
    return SuperResolution(options.factor, options.sigma)


def context_size(options: FlowMatchingOptions, shape: tuple[int, ...]) -> int:
    """Number of context values (vectors) or channels (images) that the coupling gives to the network.

    Args:
        options: of the stage.
        shape: of one sample.
    """
    if options.coupling == "inpainting":
        return 2 * shape[0] if len(shape) == 1 else 1 + shape[0]
    return shape[0] if options.coupling == "super_resolution" else 0


def network(options: FlowMatchingOptions, data: DataSet, config: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """The resolved configuration of the velocity network, with the context of the coupling.

    Raises:
        UserError: a robust loss on noisy targets, for data with few values.
    """
    robust = options.noisy_targets and options.loss in ROBUST
    require_many_values(f"loss: {options.loss}", robust, data.shape, "leave 'loss' out")
    return velocity_network(options, data, config, classes, context=context_size(options, data.shape))


def plan(options: FlowMatchingOptions, stage: Stage) -> Plan:
    """One phase on data rows."""
    student = stage.build()
    if options.noisy_targets and options.loss in ROBUST:
        stage.world.say(robust_note(options.loss))
    coupling = None if options.coupling == "semidiscrete" else make_coupling(options, stage)
    facts = Facts(independent=False, deterministic=True, gaussian=stage.source.gaussian)
    if coupling is not None:
        facts = coupling.facts

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        objective = VelocityRegression(
            student,
            make_path(options.path),
            make_time_law(options.time),
            options.loss,
            label_dropout=options.label_dropout if stage.conditional else 0.0,
            nulls=stage.nulls,
        )
        if coupling is None:
            return objective, SemidiscreteBatches(stage)
        return objective, stage_batches(stage, coupling)

    examples = None
    if coupling is not None and context_size(options, stage.data.shape):
        rows = stage.data.network_rows(stage.data.held_out[:EXAMPLES])
        examples = coupling.pair(rows, {}, generator_for(stage.seed, stage.name, "examples"))
    null_trained = bool(stage.nulls) and options.label_dropout > 0.0
    phases = [Phase("train", options.samples, prepare)]
    return Plan(student, phases, SampleRule(), facts, examples, null_trained, options.path)


SPEC = Spec(
    options=FlowMatchingOptions,
    plan=plan,
    summary="train a velocity field on data (the teacher)",
    learns_from="data",
    network=network,
    cite=("lipman2023flow", "liu2023flow"),
)
