"""One-step distillation in up to three phases: regression, perceptual, adversarial.

The student ``G(z) = z + v_theta(z, 0)`` starts from a (straightened) flow. The first phase regresses the teacher's
endpoints. The second adds a distance of features, which is small for differences that are hard to see. The third adds a
discriminator between samples and real data. Every phase may be left out. InstaFlow as published (Liu et al.,
arXiv:2309.06380) has the first two phases, and only LPIPS in the second: ``shares: [2, 1, 0]``, ``reconstruction: 0``,
``features: lpips:vgg``. The terms: :mod:`fewstep.methods.families.adversarial_distillation`.

An ODE teacher has one endpoint per noise, so regression alone has its minimum at the exact map; samples are blurred
only if the network is too small for that map. With ``discriminator_real: data`` samples can come closer to the data
than the teacher's. They then move away from the teacher's endpoints, so read ``rmse`` and ``recall`` of the statistics
together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from fewstep.data.dataset import LABEL
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
from fewstep.methods.training_pairs.batches import BesideBatches, StoredBatches, stage_batches
from fewstep.methods.training_pairs.generate import PairRequest, build_pairs, pair_facts
from fewstep.metrics.feature_distance import FeatureDistance, find_features
from fewstep.networks.discriminator import Discriminator
from fewstep.solvers.maps import SampleRule

PHASES = ("regression", "perceptual", "adversarial")


class InstaflowOptions(PairOptions):
    """Options of ``method: instaflow``."""

    old_names: ClassVar[Mapping[str, str]] = {"real": "discriminator_real"}

    samples: int = Field(800_000, gt=0, description="samples seen in the stage, over all phases")
    shares: tuple[float, float, float] = Field(
        (0.5, 0.1, 0.4),
        description="shares of the samples in the regression, perceptual and adversarial phase; 0 leaves a phase out",
    )
    loss: Literal["l2", "l1", "huber"] = Field("l2", description="distance of the prediction to its target")
    reconstruction: float = Field(
        1.0, ge=0, description="weight of the distance to the endpoints after the first phase; 0: features alone"
    )
    features: str | None = Field(
        None, description="feature network of the loss: a 'features' stage, a folder or file, or lpips:vgg"
    )
    perceptual: float = Field(0.1, ge=0, description="weight of the features' distance, if features are named")
    adversarial: float = Field(
        0.25, ge=0, description="gradient norm of the adversarial term, as a share of that of the other terms"
    )
    discriminator_real: Real = Field(
        "data", description="the discriminator's real samples: data, teacher (its endpoints), or both"
    )
    gan: Literal["relativistic", "non_saturating", "hinge"] = Field("relativistic", description="adversarial loss")
    sees: Literal["samples", "features"] = Field(
        "samples", description="inputs of the discriminator: the samples, or the samples and their features"
    )
    gamma: float = Field(0.1, ge=0, description="weight of the discriminator's gradient penalties R1 + R2, times two")
    penalty_every: int = Field(1, gt=0, description="the penalties are computed in one of so many steps")
    discriminator_lr: float = Field(5e-4, gt=0, description="peak learning rate of the discriminator")
    discriminator_turns: int = Field(1, gt=0, description="updates of the discriminator per update of the student")
    adversarial_lr: float = Field(1e-3, gt=0, description="peak learning rate of the student in the adversarial phase")
    ramp: float = Field(0.1, ge=0, le=1, description="share of the adversarial phase in which the term rises from 0")

    @model_validator(mode="after")
    def _features_alone(self) -> InstaflowOptions:
        if self.reconstruction == 0.0 and (self.features is None or self.perceptual == 0.0):
            raise ValueError(
                "'reconstruction: 0' leaves the features' distance alone, and no features are used: add 'features: "
                "STAGE' with 'perceptual' above 0"
            )
        return self

    @model_validator(mode="after")
    def _features_to_see(self) -> InstaflowOptions:
        if self.sees == "features" and self.features is None:
            raise ValueError("'sees: features', and no features are named: add 'features: STAGE' (method features)")
        return self

    @field_validator("shares")
    @classmethod
    def _some_share(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value) < 0 or not 0 < sum(value) < float("inf"):
            raise ValueError("must be three parts, none negative and not all zero")
        return value


def phase_samples(options: InstaflowOptions) -> dict[str, int]:
    """The number of samples of every phase with a share above 0 and terms that are in use.

    The shares of the other phases are divided among these in proportion.

    >>> options = InstaflowOptions(method="instaflow", teacher="teacher", samples=900, shares=(2, 1, 1))
    >>> phase_samples(options)  # no features are named
    {'regression': 600, 'adversarial': 300}
    """
    on = (True, options.features is not None and options.perceptual > 0, options.adversarial > 0)
    shares = {name: share for name, share, used in zip(PHASES, options.shares, on, strict=True) if used and share > 0}
    total = sum(shares.values())
    if not shares:  # every phase with a share had only terms that are not in use
        return {"regression": options.samples}
    ends = [0]
    for k in range(1, len(shares) + 1):
        ends.append(round(options.samples * sum(list(shares.values())[:k]) / total))
    return {name: end - begin for name, begin, end in zip(shares, ends[:-1], ends[1:], strict=True)}


def plan(options: InstaflowOptions, stage: Stage) -> Plan:
    """Up to three phases on generated pairs."""
    student = stage.build()
    assert stage.teacher is not None
    if options.discriminator_real != "teacher" and not stage.teacher.follows_data(options.guidance):
        stage.world.say("note: guided endpoints follow another law than the data: only they count as real samples.")
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
    """Prepares a phase: its pairs, its terms, its discriminator and its guard."""

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        store = build_pairs(stage, request)
        batches: Batches = StoredBatches(store, pair_facts(request), (stage.seed, stage.name))
        adversary = None
        if phase == "adversarial":
            adversary = make_adversary(options, stage, samples, features)
            if options.discriminator_real != "teacher":
                batches = BesideBatches(batches, stage_batches(stage, Independent(stage.source), "real"))
        advice = (
            f"Raise gamma (now {options.gamma:g}), or lower adversarial (now {options.adversarial:g}), adversarial_lr "
            f"(now {options.adversarial_lr:g}) or discriminator_lr (now {options.discriminator_lr:g})."
            if adversary
            else f"Lower lr (now {options.lr:g})."
        )
        guard = CoverageGuard(student, store.held_out_rows(), stage.name, advice)
        reconstruction: Distance | None = find_distance(options.loss)
        perceptual: Distance | None = None
        if phase != "regression":
            reconstruction = scaled(options.reconstruction, find_distance(options.loss))
            perceptual = None if features is None else scaled(options.perceptual, features)
        objective = AdversarialDistillation(student, reconstruction, perceptual, adversary, guard, stage.world)
        return objective, batches

    return prepare


def scaled(weight: float, distance: Distance) -> Distance | None:
    """The distance ``weight d(x, y)``; None for the weight 0.

    >>> scaled(2.0, lambda x, y: (x - y).abs())(torch.tensor(1.0), torch.tensor(4.0)).item()
    6.0
    """
    return None if weight == 0.0 else lambda x, y: weight * distance(x, y)


def make_adversary(
    options: InstaflowOptions, stage: Stage, samples: int, features: FeatureDistance | None
) -> Adversary:
    """The adversarial term of the options, with a discriminator whose first weights depend on the stage's seed alone.

    Args:
        options: of the stage.
        stage: the stage.
        samples: of the adversarial phase.
        features: the feature network; the discriminator gets its activations with ``sees: features``.
    """
    with isolated_rng():
        torch.default_generator.manual_seed(mix(stage.seed, stage.name, "discriminator"))
        inputs = features.layers if features is not None and options.sees == "features" else None
        shapes = {name: stage.data.conditions[name].shape[1:] for name in stage.conditions if name != LABEL}
        discriminator = Discriminator(stage.data.shape, stage.classes, inputs, shapes)
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
    summary="one-step student: regression of the teacher's endpoints, then with features, then with a discriminator",
    learns_from="teacher, pairs, data",
    needs=lambda options: replace(pair_needs(options), features=options.features),
    makes="map",
    cite=("liu2024instaflow",),
)
