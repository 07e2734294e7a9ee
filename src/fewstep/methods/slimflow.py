r"""SlimFlow: a one-step student smaller than its teacher (arXiv:2407.12718).

A small network cannot start from a large teacher's weights. It is trained in two phases on the teacher's pairs (x0,
x1).

*Annealing ReFlow* (sec. 3.1) trains a straight flow from scratch. The noise of a pair is mixed with fresh noise,

    x0^b = sqrt(1 - b^2) x0 + b xi,   xi ~ N(0, I),     L = E d( u(x_t, t), x1 - x0^b ),   x_t = (1 - t) x0^b + t x1,

and b decreases from 1 (independent noise: flow matching on the teacher's samples) to 0 (ReFlow). x0^b ~ N(0, I) for
every b; for Gaussian data the pairs have correlation rho = sqrt(1 - b^2) (:mod:`fewstep.flow.coupled_gaussian`).

*Flow-guided distillation* (sec. 3.2) starts from that flow u with averaged weights. Two Euler steps of a frozen copy of
u from fresh noise x0' give a second target:

    L = E d( x0 + v(x0, 0), x1 )  +  w E d( x0' + v(x0', 0), y + (1 - t) u(y, t) ),   y = x0' + t u(x0', 0),
    t ~ U(0.2, 0.8).

``annealing: false`` sets b = 0: plain ReFlow of the small network from scratch. ``flow_weight: 0`` (or false) leaves
the second term out. Regression of the endpoints from scratch is ``method: distill`` with the same
``network: {size: ...}``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.flow.couplings import Pair, Source
from fewstep.flow.field import Velocity
from fewstep.flow.noise import Draws
from fewstep.flow.paths import Linear, expand_time
from fewstep.flow.precision import full_precision
from fewstep.flow.time_laws import make_time_law
from fewstep.methods.contract.objective import Batches, Networks, Objective, Terms
from fewstep.methods.contract.options import PairOptions
from fewstep.methods.contract.stage import Phase, Plan, Spec, Stage, pair_needs
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.distances import find_distance
from fewstep.methods.families.straight_line import VelocityRegression, one_step
from fewstep.methods.training_pairs.batches import StoredBatches
from fewstep.methods.training_pairs.generate import PairRequest, build_pairs, pair_facts
from fewstep.solvers.maps import SampleRule

STEEPNESS = 5.0  # rate of the exponential schedule per annealing; chosen, not tuned
FIRST_STEP = (0.2, 0.8)  # least and largest t of the second term (arXiv:2407.12718, sec. 3.2)


class SlimflowOptions(PairOptions):
    """Options of ``method: slimflow``."""

    old_names: ClassVar[Mapping[str, str]] = {"guided": "flow_weight"}

    network: dict[str, Any] | str | None = Field(
        {"size": 0.25},
        description="the student's network; default: a quarter of the teacher's parameters, or a foreign teacher's own",
    )
    samples: int = Field(1_000_000, gt=0, description="samples seen in the stage, over all phases")
    share: float = Field(0.5, gt=0, lt=1, description="share of the samples in the first phase")
    annealing: bool = Field(True, description="mix the pairs' noise with fresh noise; false: plain ReFlow")
    anneal: float = Field(0.6, gt=0, lt=1, description="share of the first phase in which b decreases to 0")
    schedule: Literal["linear", "cosine", "exponential"] = Field("linear", description="how b decreases")
    flow_weight: float = Field(1.0, ge=0, description="weight of the flow-guided term; 0 or false leaves it out")
    loss: Literal["l2", "l1", "huber"] = Field("l2", description="distance of the prediction to its target")


def noise_law(schedule: str, samples: int) -> Callable[[int], float]:
    """b as a function of the samples seen: from 1 at 0 down to 0 at ``samples`` and after.

    Args:
        schedule: with ``s = seen / samples``, ``linear``: ``1 - s``; ``cosine``: ``(1 + cos(pi s)) / 2``;
            ``exponential``: ``(e^{-5 s} - e^{-5}) / (1 - e^{-5})``.
        samples: in which b decreases.

    >>> b = noise_law("linear", 100)
    >>> b(0), b(25), b(100)
    (1.0, 0.75, 0.0)
    """
    shapes: dict[str, Callable[[float], float]] = {
        "linear": lambda s: 1.0 - s,
        "cosine": lambda s: 0.5 * (1.0 + math.cos(math.pi * s)),
        "exponential": lambda s: math.expm1(STEEPNESS * (1.0 - s)) / math.expm1(STEEPNESS),
    }
    shape = shapes[schedule]
    return lambda seen: shape(seen / samples) if seen < samples else 0.0


def blend(x0: Tensor, xi: Tensor, b: float) -> Tensor:
    """``sqrt(1 - b^2) x0 + b xi``, (B, ...).

    If x0 and xi are independent and N(0, I), so is the result; its correlation with x0 is ``sqrt(1 - b^2)``.

    Args:
        x0: the pairs' noise (B, ...).
        xi: fresh noise (B, ...).
        b: share of fresh noise in [0, 1].

    Source: arXiv:2407.12718, sec. 3.1.

    >>> round(blend(torch.ones(1), torch.ones(1), 0.6).item(), 6)
    1.4
    """
    return math.sqrt(1.0 - b * b) * x0 + b * xi


@final
class AnnealedBatches:
    """Pairs whose noise is mixed with fresh noise by :func:`blend`.

    Args:
        pairs: the pairs.
        law: b as a function of the samples seen.
    """

    def __init__(self, pairs: Batches, law: Callable[[int], float]) -> None:
        self.facts = pairs.facts
        self._pairs, self._law = pairs, law

    def batch(self, start: int, count: int, generator: torch.Generator) -> Pair:
        """The pairs of samples ``start … start + count``, all with the b of ``start``."""
        pair = self._pairs.batch(start, count, generator)
        xi = torch.randn(pair.x0.shape, generator=generator, dtype=pair.x0.dtype)
        return Pair(blend(pair.x0, xi, self._law(start)), pair.x1, pair.cond)


def guided_target(flow: Velocity, x0: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """``y + (1 - t) u(y, t)`` with ``y = x0 + t u(x0, 0)``, (B, ...): two Euler steps, from 0 to t and from t to 1.

    Args:
        flow: ``u(x, t, **cond)``.
        x0: noise (B, ...).
        t: times (B,). If the flow is straight, the result is its endpoint for every t.
        cond: conditions of the rows.

    Source: arXiv:2407.12718, sec. 3.2.

    >>> guided_target(lambda x, t: torch.ones_like(x), torch.zeros(1, 1), torch.tensor([0.3]), {}).item()
    1.0
    """
    time = expand_time(t, x0)
    y = x0 + time * flow(x0, torch.zeros_like(t), **cond)
    return y + (1.0 - time) * flow(y, t, **cond)


@final
class GuidedEndpoint(Objective):
    """The loss of flow-guided distillation, as in the module's docstring.

    Args:
        student: the network ``v(x, t, **cond)``.
        flow: the frozen straight flow u of the second term.
        source: the base distribution of the fresh noise x0'.
        weight: w of the second term; 0 leaves it out.
        distance: d by name (:func:`~fewstep.methods.families.distances.find_distance`).
    """

    def __init__(
        self, student: nn.Module, flow: Velocity, source: Source, weight: float = 1.0, distance: str = "l2"
    ) -> None:
        self.modules = {"student": student}
        self.flow = flow
        self.source = source
        self.weight = weight
        self.distance = find_distance(distance)

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        student = nets["student"]
        if self.weight == 0.0:
            return {"loss": self.distance(one_step(student, batch.x0, batch.cond), batch.x1)}
        least, most = FIRST_STEP
        t = (least + (most - least) * draws.uniform()).to(batch.x0)
        fresh = self.source.sample(draws.batch, draws.generator)[draws.rows or slice(None)]
        fresh = draws.masked(fresh).to(batch.x0)
        with full_precision(fresh):
            target = guided_target(self.flow, fresh, t, batch.cond)
        cond = {name: torch.cat([value, value]) for name, value in batch.cond.items()}
        ends = one_step(student, torch.cat([batch.x0, fresh]), cond).chunk(2)
        paired, guided = self.distance(ends[0], batch.x1), self.distance(ends[1], target)
        return {"loss": paired + self.weight * guided, "paired": paired, "guided": guided}


def plan(options: SlimflowOptions, stage: Stage) -> Plan:
    """Two phases on the same pairs: annealing ReFlow, then flow-guided distillation.

    Raises:
        UserError: annealing with a base that is not Gaussian.
    """
    assert stage.teacher is not None
    if options.annealing and not stage.source.gaussian:
        raise UserError(
            "annealing mixes the pairs' noise with Gaussian noise, and the base here is another data set: set "
            "'annealing: false', or leave 'base' out."
        )
    student = stage.build()
    request = PairRequest("generated", options.pairs, options, stage.teacher, "slimflow")
    facts = pair_facts(request)
    first = max(1, round(options.share * options.samples))

    def pairs(tag: str) -> Batches:
        return StoredBatches(build_pairs(stage, request), facts, (stage.seed, stage.name, tag))

    def straighten(_: Teacher | None) -> tuple[Objective, Batches]:
        batches = pairs("anneal")
        if options.annealing:
            batches = AnnealedBatches(batches, noise_law(options.schedule, max(1, round(options.anneal * first))))
        return VelocityRegression(student, Linear(), make_time_law("uniform"), options.loss), batches

    def distil(previous: Teacher | None) -> tuple[Objective, Batches]:
        assert previous is not None, "the second phase follows the first"
        student.load_state_dict(previous.state)  # its average, not its last weights
        objective = GuidedEndpoint(student, previous.velocity, stage.source, options.flow_weight, options.loss)
        return objective, pairs("distil")

    phases = [Phase("anneal", first, straighten), Phase("distil", max(1, options.samples - first), distil)]
    return Plan(student, phases, SampleRule(kind="map", steps=(1,), default_steps=1), facts)


SPEC = Spec(
    options=SlimflowOptions,
    plan=plan,
    summary="one-step student with a smaller network: annealed ReFlow, then flow-guided distillation",
    learns_from="teacher, pairs",
    needs=pair_needs,
    makes="map",
    cite=("zhu2024slimflow", "liu2023flow"),
)
