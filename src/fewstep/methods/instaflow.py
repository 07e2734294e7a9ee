"""One-step distillation with several objectives: regression, then perceptual, then adversarial.

The student ``G(z) = z + v_theta(z, 0)`` starts from a (straightened) flow and learns in stages, each of which may be
left out: the distance to the teacher's endpoints; the same with a distance of features, which does not count
differences that an eye does not see; both with a discriminator, which tells samples from real ones. InstaFlow as
published (Liu et al., arXiv:2309.06380) is the first two, with LPIPS alone in the second: ``shares: [2, 1, 0]``,
``reconstruction: 0``, ``features: lpips:vgg``.

An ODE teacher has one endpoint per noise, so regression alone has the exact map as its optimum, and blurs only where
the network is too small for it. With ``discriminator_real: data`` the adversarial term can do better than the teacher;
it then moves samples away from the teacher's endpoints, so read ``rmse`` and ``recall`` of the statistics together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from fewstep.flow.couplings import Independent
from fewstep.flow.noise import isolated_rng, mix
from fewstep.methods.contract.objective import Batches, Learning, Objective
from fewstep.methods.contract.options import PairOptions
from fewstep.methods.contract.stage import Phase, Plan, Spec, Stage, pair_needs
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.adversarial import find_adversarial
from fewstep.methods.families.adversarial_distillation import AdversarialDistillation, Adversary, Real
from fewstep.methods.families.distances import Distance, find_distance
from fewstep.methods.guards.coverage import CoverageGuard
from fewstep.methods.training_pairs.batches import BesideBatches, DataBatches, StoredBatches
from fewstep.methods.training_pairs.generate import PairRequest, build_pairs, pair_facts
from fewstep.metrics.feature_distance import FeatureDistance, find_features
from fewstep.networks.discriminator import Discriminator
from fewstep.solvers.maps import SampleRule

PHASES = ("regression", "perceptual", "adversarial")


class InstaflowOptions(PairOptions):
    """Options of ``method: instaflow``."""

    old_names: ClassVar[Mapping[str, str]] = {"real": "discriminator_real"}

    samples: int = Field(800_000, gt=0, description="samples seen in the stage, over its phases")
    shares: tuple[float, float, float] = Field(
        (0.5, 0.1, 0.4), description="of the samples: regression, perceptual, adversarial; 0 leaves a phase out"
    )
    loss: Literal["l2", "l1", "huber"] = "l2"
    reconstruction: float = Field(
        1.0, ge=0, description="weight of the distance to the endpoints after the first phase; 0: features alone"
    )
    features: str | None = Field(None, description="a 'features' stage, a folder or file, or lpips:vgg; none: off")
    perceptual: float = Field(0.1, ge=0, description="weight of the perceptual term, where features are named")
    adversarial: float = Field(0.25, ge=0, description="pull of the adversarial term, as a share of the others'")
    discriminator_real: Real = Field("data", description="what the discriminator takes for real")
    gan: Literal["relativistic", "non_saturating", "hinge"] = "relativistic"
    sees: Literal["samples", "features"] = Field(
        "samples", description="what the discriminator looks at; 'features' beside the samples, where they are named"
    )
    gamma: float = Field(0.1, ge=0, description="weight of the discriminator's gradient penalties R1 + R2, halved")
    penalty_every: int = Field(1, gt=0, description="steps between two penalties")
    discriminator_lr: float = Field(5e-4, gt=0)
    discriminator_turns: int = Field(1, gt=0, description="of the discriminator per turn of the student")
    adversarial_lr: float = Field(1e-3, gt=0, description="of the student in the adversarial phase")
    ramp: float = Field(0.1, ge=0, le=1, description="share of the adversarial phase in which the term is raised")

    @model_validator(mode="after")
    def _features_alone(self) -> InstaflowOptions:
        if self.reconstruction == 0.0 and (self.features is None or self.perceptual == 0.0):
            raise ValueError("'reconstruction: 0' leaves the features alone, and none are used: add 'features: STAGE'")
        return self

    @model_validator(mode="after")
    def _features_to_see(self) -> InstaflowOptions:
        if self.sees == "features" and self.features is None:
            raise ValueError("'sees: features' needs the name of some: add 'features: STAGE' (method features)")
        return self

    @field_validator("shares")
    @classmethod
    def _some_share(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value) < 0 or not 0 < sum(value) < float("inf"):
            raise ValueError("must be three parts, none negative and not all zero")
        return value


def phase_samples(options: InstaflowOptions) -> dict[str, int]:
    """Samples of every phase that takes place; what is switched off gives its share to the others."""
    on = (True, options.features is not None and options.perceptual > 0, options.adversarial > 0)
    shares = {name: share for name, share, used in zip(PHASES, options.shares, on, strict=True) if used and share > 0}
    whole = sum(shares.values())
    if not shares:  # only switched-off terms had a share
        return {"regression": options.samples}
    ends = [0]
    for k in range(1, len(shares) + 1):
        ends.append(round(options.samples * sum(list(shares.values())[:k]) / whole))
    return {name: end - begin for name, begin, end in zip(shares, ends[:-1], ends[1:], strict=True)}


def plan(options: InstaflowOptions, stage: Stage) -> Plan:
    """Up to three phases on generated pairs."""
    student = stage.build()
    assert stage.teacher is not None
    if options.discriminator_real != "teacher" and not stage.teacher.follows_data(options.guidance):
        stage.world.say("note: guided endpoints follow another law than the data: only they count as real.")
        options = options.model_copy(update={"discriminator_real": "teacher"})
    features = None
    if options.features is not None and (options.perceptual > 0 or options.sees == "features"):
        scaling = stage.data.scaling.as_dict()
        features = find_features(stage.find(options.features), stage.data.shape, stage.world.device, scaling)
    request = PairRequest("generated", options.pairs, options, stage.teacher, "distill")
    phases = [
        Phase(name, samples, _preparer(options, stage, student, request, features, name, samples))
        for name, samples in phase_samples(options).items()
    ]
    rule = SampleRule(kind="map", steps=(1,), default_steps=1)
    used = None if features is None else features.digest
    return Plan(student, phases, rule, pair_facts(request), features=used)


def _preparer(
    options: InstaflowOptions,
    stage: Stage,
    student: nn.Module,
    request: PairRequest,
    features: FeatureDistance | None,
    phase: str,
    samples: int,
) -> Callable[[Teacher | None], tuple[Objective, Batches]]:
    """What a phase does before it trains."""

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        store = build_pairs(stage, request)
        batches: Batches = StoredBatches(store, pair_facts(request), (stage.seed, stage.name))
        adversary = None
        if phase == "adversarial":
            adversary = make_adversary(options, stage, samples, features)
            if options.discriminator_real != "teacher":
                key = (stage.seed, stage.name, "real")
                data = DataBatches(stage.data, Independent(stage.source), stage.conditional, stage.dequantise, key)
                batches = BesideBatches(batches, data)
        advice = (
            f"Raise gamma (now {options.gamma:g}), or lower adversarial (now {options.adversarial:g}), adversarial_lr "
            f"(now {options.adversarial_lr:g}) or discriminator_lr (now {options.discriminator_lr:g})."
            if adversary
            else f"Lower lr (now {options.lr:g})."
        )
        guard = CoverageGuard(student, store.held_out_rows(), stage.name, advice)
        near: Distance | None = find_distance(options.loss)
        alike: Distance | None = None
        if phase != "regression":
            near = weighted(options.reconstruction, find_distance(options.loss))
            alike = None if features is None else weighted(options.perceptual, features)
        objective = AdversarialDistillation(student, near, alike, adversary, guard, stage.world)
        return objective, batches

    return prepare


def weighted(weight: float, distance: Distance) -> Distance | None:
    """``weight * distance``; None for the weight 0."""
    return None if weight == 0.0 else lambda x, y: weight * distance(x, y)


def make_adversary(
    options: InstaflowOptions, stage: Stage, samples: int, features: FeatureDistance | None
) -> Adversary:
    """The discriminator, its weights a function of the stage's seed, and how the two play."""
    with isolated_rng():
        torch.default_generator.manual_seed(mix(stage.seed, stage.name, "discriminator"))
        seen = features.layers if features is not None and options.sees == "features" else None
        discriminator = Discriminator(stage.data.shape, stage.data.classes if stage.conditional else 0, seen)
    return Adversary(
        discriminator=discriminator,
        loss=find_adversarial(options.gan),
        share=options.adversarial,
        gamma=options.gamma,
        every=options.penalty_every,
        turns=options.discriminator_turns,
        real=options.discriminator_real,
        ramp=options.ramp,
        steps=samples / options.batch_size,
        learning={
            "student": Learning(options.adversarial_lr, (0.5, 0.99)),
            "discriminator": Learning(options.discriminator_lr, (0.5, 0.99)),
        },
    )


SPEC = Spec(
    options=InstaflowOptions,
    plan=plan,
    summary="one-step student: regression, perceptual and adversarial objectives in stages",
    learns_from="teacher, pairs, data",
    needs=lambda options: replace(pair_needs(options), features=options.features),
    makes="map",
    cite=("liu2024instaflow",),
)
