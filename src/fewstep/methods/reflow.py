"""ReFlow with a mixed buffer (Liu et al., arXiv:2209.03003, alg. 1).

In each round a teacher with averaged weights, frozen for the round, maps noise to its endpoints. The student starts
from the teacher's weights and regresses the straight-line velocity of pairs from a buffer. With probability p a pair is
synthetic (noise, teacher's endpoint); otherwise its endpoint is a data row. p rises over the rounds (``mix``). The
choice of x0 for a data row decides how straight the result is, because straightness depends on the coupling alone:

- ``inverted``: x0 is the solution of the teacher's flow from the data row back to t = 0. Synthetic and real pairs then
  belong to one deterministic coupling.
- ``independent``: x0 is fresh noise. The optimal v(x, 0) is then ``(1 - p) v_ind + p v_syn``, so one Euler step returns
  ``(1 - p) E[x1] + p T(x0)`` with T the teacher's map. In one Gaussian dimension its standard deviation is p times that
  of the data.
- ``anneal``: independent, and p rises to 1 between 60 % and 80 % of the last round.

Two published variants are options. 2-RF++ (Lee et al., arXiv:2405.20320): more times near 0 and 1 (``time: ushape:4``),
a distance of the endpoints' features (``loss: perceptual``), a start from a diffusion model
(:class:`~fewstep.flow.denoiser.DenoiserVelocity`). Simple ReFlow (Kim et al., arXiv:2410.07815): more times near 0
(``time: exponential``), errors divided by their own size (``weight: normalised``), a larger weight of high frequencies
(``loss: highpass``), less dropout than the teacher's (``dropout``). Losses whose minimum is not at the mean of several
targets need pairs with one target per noise, and are refused for others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from fewstep.data.dataset import DataSet
from fewstep.errors import UserError
from fewstep.flow.couplings import Facts, Independent, Pair
from fewstep.flow.field import Velocity
from fewstep.flow.noise import generator_for
from fewstep.flow.paths import Linear
from fewstep.flow.time_laws import TimeLaw, make_time_law
from fewstep.methods.contract.objective import Batches, Objective
from fewstep.methods.contract.options import PairOptions, baked_in
from fewstep.methods.contract.stage import Needs, Phase, Plan, Spec, Stage, pair_needs, velocity_network
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.distances import (
    DISTANCES,
    ROBUST,
    STRENGTH,
    VALUED,
    Distance,
    Loss,
    Normalised,
    Operator,
    Perceptual,
    Residual,
    distance_words,
    endpoint_errors,
    high_pass,
    identity,
    require_many_values,
    robust_note,
)
from fewstep.methods.families.straight_line import VelocityRegression
from fewstep.methods.training_pairs.batches import MixedBatches, StoredBatches, stage_batches
from fewstep.methods.training_pairs.generate import PairRequest, build_pairs, has_base_law, pair_facts
from fewstep.metrics.feature_distance import FeatureDistance, find_features
from fewstep.solvers.maps import SampleRule

PERCEPTUAL = "perceptual"
NORMALISER_ROWS = 512  # pairs from which the constant of the normalised loss is computed; chosen, not tuned
NORMALISER_SHARE = 1e-3  # that constant, as a share of the teacher's median error on them; chosen, not tuned
MIN_NORMALISER = 1e-8  # least constant, in squared network units: about the rounding error of float32


class ReflowOptions(PairOptions):
    """Options of ``method: reflow``."""

    samples: int = Field(800_000, gt=0, description="samples seen in the stage, over all rounds")
    rounds: int = Field(1, gt=0, description="number of rounds; each makes pairs with the student of the one before")
    mix: tuple[float, ...] = Field(
        (0.4, 0.9), description="probability of a synthetic pair: of all rounds, of first and last, or of each"
    )
    real: Literal["inverted", "independent", "anneal"] = Field(
        "inverted", description="the x0 of a real endpoint: the data row inverted, fresh noise, or fresh noise annealed"
    )
    real_pairs: int | None = Field(
        None, gt=0, description="inverted pairs per round; default: one per training row, at most 'pairs'"
    )
    time: str = Field("uniform", description="law of t: uniform, logit_normal:m,s, ushape:a, exponential:rate")
    loss: str = Field(
        "l2",
        description="distance of the prediction to its target: l2, l1, huber:share, highpass:strength (images), "
        "perceptual:floor",
    )
    weight: Literal["none", "normalised", "divided"] = Field(
        "none",
        description="weight of each row; normalised: 1 / its error; divided: 1 / (1 - t), of the features' distance",
    )
    features: str | None = Field(
        None, description="feature network of 'loss: perceptual': a 'features' stage, a folder or file, or lpips:vgg"
    )
    dropout: float | None = Field(None, ge=0, lt=1, description="dropout of the student; default: its network's")

    @field_validator("mix", mode="before")
    @classmethod
    def _one_number(cls, value: object) -> object:
        return (value,) if isinstance(value, int | float | str) else value

    @model_validator(mode="after")
    def _known_time(self) -> ReflowOptions:
        make_time_law(self.time)
        return self

    @model_validator(mode="after")
    def _fitting_loss(self) -> ReflowOptions:
        name, _ = self.loss_words()
        if (name == PERCEPTUAL) != (self.features is not None):
            raise ValueError(
                "'loss: perceptual' compares features, and none are named: add 'features: …'"
                if name == PERCEPTUAL
                else "features belong to 'loss: perceptual': set that, or leave features out"
            )
        if self.weight == "divided" and name != PERCEPTUAL:
            raise ValueError("'weight: divided' is of the features' distance: set 'loss: perceptual', or leave it out")
        if self.weight == "normalised" and name not in ("l2", "highpass"):
            raise ValueError(f"'weight: normalised' is of a squared error: set 'loss: l2' or 'highpass', not {name!r}")
        return self

    @model_validator(mode="after")
    def _mix_in_range(self) -> ReflowOptions:
        if not self.mix or any(not 0.0 < p <= 1.0 for p in self.mix):
            raise ValueError(f"mix must hold probabilities in (0, 1], got {list(self.mix)}")
        if len(self.mix) > 2 and len(self.mix) != self.rounds:
            raise ValueError(
                f"mix has {len(self.mix)} values for {self.rounds} rounds: give one, two, or one per round"
            )
        return self

    @model_validator(mode="after")
    def _one_target(self) -> ReflowOptions:
        if not self.noisy_targets:
            return self
        what = {
            "weight: normalised": self.weight == "normalised",
            "loss: perceptual": self.loss_words()[0] == PERCEPTUAL,
        }
        for name, chosen in what.items():
            if chosen:
                raise ValueError(
                    f"'{name}' has its minimum at the mean of the targets only where there is one, and with 'real: "
                    f"{self.real}' noise does not determine its endpoint: use 'real: inverted', or 'mix: 1'"
                )
        return self

    @property
    def noisy_targets(self) -> bool:
        """Whether a noise has several endpoints, because data rows are paired with independent noise."""
        return self.real != "inverted" and min(self.shares()) < 1.0

    def loss_words(self) -> tuple[str, float | None]:
        """The name in ``loss`` and the value after its colon; None for the default."""
        return distance_words(self.loss, [*DISTANCES, PERCEPTUAL], [*VALUED, PERCEPTUAL])

    def shares(self) -> list[float]:
        """p of every round, linear from the first to the last value of ``mix``; one round uses the last value.

        >>> ReflowOptions(method="reflow", teacher="teacher", rounds=3, mix=(0.5, 1)).shares()
        [0.5, 0.75, 1.0]
        """
        if len(self.mix) == self.rounds:
            return list(self.mix)
        if self.rounds == 1:
            return [self.mix[-1]]
        return [float(p) for p in np.linspace(self.mix[0], self.mix[-1], self.rounds)]


def share_law(p: float, samples: int, anneal: bool) -> Callable[[int], float]:
    """p as a function of the samples seen in the round.

    Args:
        p: the round's probability of a synthetic pair.
        samples: of the round.
        anneal: whether p rises linearly to 1 between 60 % and 80 % of the round, and stays there.

    >>> law = share_law(0.5, 100, anneal=True)
    >>> law(0), law(70), law(90)
    (0.5, 0.75, 1.0)
    """
    if not anneal:
        return lambda seen: p
    return lambda seen: p + (1.0 - p) * float(np.clip((seen / samples - 0.6) / 0.2, 0.0, 1.0))


def plan(options: ReflowOptions, stage: Stage) -> Plan:
    """One phase per round."""
    student = stage.build()
    assert stage.teacher is not None
    if options.noisy_targets and (name := options.loss_words()[0]) in ROBUST:
        stage.world.say(robust_note(name))
    shares = options.shares()
    per_round = -(-options.samples // options.rounds)
    features = named_features(options, stage)
    phases = []
    for number, p in enumerate(shares, start=1):
        samples = min(per_round, options.samples - per_round * (number - 1))
        last = number == options.rounds
        law = share_law(p, samples, anneal=last and options.real == "anneal")
        phases.append(Phase(f"round-{number}", samples, _preparer(options, stage, student, features, number, p, law)))
    deterministic = shares[-1] == 1.0 or options.real in ("inverted", "anneal")
    facts = Facts(
        independent=False,
        deterministic=deterministic,
        teacher=stage.teacher.digest,
        guidance=baked_in(options.guidance),
    )
    return Plan(student, phases, SampleRule(), facts, features=None if features is None else features.digest)


def _preparer(
    options: ReflowOptions,
    stage: Stage,
    student: nn.Module,
    features: Distance | None,
    number: int,
    p: float,
    law: Callable[[int], float],
) -> Callable[[Teacher | None], tuple[Objective, Batches]]:
    """Prepares a round: makes its pairs."""

    def prepare(previous: Teacher | None) -> tuple[Objective, Batches]:
        teacher = previous or stage.teacher
        assert teacher is not None
        # the first round learns the guided velocity; the teacher of a later round has the guidance already
        used = options if previous is None else options.model_copy(update={"guidance": 1.0})
        batches = make_buffer(used, stage, teacher, f"round-{number}", p, law)
        times = make_time_law(options.time)
        loss = make_loss(used, stage, teacher, batches, times, features)
        return VelocityRegression(student, Linear(), times, loss), batches

    return prepare


def make_buffer(
    options: ReflowOptions, stage: Stage, teacher: Teacher, tag: str, p: float, law: Callable[[int], float]
) -> Batches:
    """The round's buffer of synthetic and real pairs.

    Args:
        options: of the stage, with the guidance of this round.
        stage: the stage.
        teacher: of this round.
        tag: name of the round, which distinguishes its noise.
        p: probability of a synthetic pair when the round begins.
        law: p as a function of the samples seen in the round.
    """
    request = PairRequest("generated", options.pairs, options, teacher, tag)
    facts = pair_facts(request)
    key = (stage.seed, stage.name, tag)
    synthetic = StoredBatches(build_pairs(stage, request), facts, (*key, "generated"))
    if p == 1.0:
        return synthetic
    if not teacher.follows_data(options.guidance):
        # the endpoints of a guided flow do not have the data's law, so a data row is no endpoint of it
        stage.world.say("note: guided endpoints follow another law than the data: real endpoints are left out.")
        return synthetic
    real: Batches
    if options.real == "inverted":
        stage.require_random_access("'real: inverted' pairs every data row with its own noise, which")
        rows = options.real_pairs or min(len(stage.data.train), options.pairs)
        request = PairRequest("inverted", rows, options, teacher, tag)
        store = build_pairs(stage, request)
        if not has_base_law(store):
            stage.world.say(
                "warning: the noise of the inverted data is much smaller than that of the base, which happens for "
                "memorised data: real endpoints are left out. Use more data, or train the teacher for fewer samples."
            )
            return synthetic
        real = StoredBatches(store, facts, (*key, "inverted"))
    else:
        real = stage_batches(stage, Independent(stage.source), *key[2:], "real")
        facts = replace(facts, deterministic=False)
    return MixedBatches(synthetic, real, law, facts)


def needs(options: ReflowOptions) -> Needs:
    """The needs of a stage: generated pairs in every round, and inverted ones in the rounds with p below 1."""

    def pairs(rows: int) -> int:
        real = options.real_pairs or min(rows, options.pairs)
        mixed = sum(p < 1.0 for p in options.shares()) if options.real == "inverted" else 0
        return options.rounds * options.pairs + mixed * real

    return replace(pair_needs(options, pairs), features=options.features)


def network(options: ReflowOptions, data: DataSet, config: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """The resolved configuration of the student's network, with the option ``dropout`` if it is set.

    Raises:
        UserError: ``loss: highpass`` for samples that are not images, or a robust loss on noisy targets for data with
            few values.
    """
    name, shape = options.loss_words()[0], data.shape
    if name == "highpass" and len(shape) != 3:
        raise UserError(
            f"'loss: highpass' filters images (C, H, W), and one sample has shape {shape}: use 'l2', or give the data "
            "a channel axis."
        )
    if options.noisy_targets:
        require_many_values(f"loss: {name}", name in ROBUST, shape, "use 'l2', or 'real: inverted'")
    changes = {} if options.dropout is None else {"dropout": options.dropout}
    return velocity_network(options, data, config, classes, **changes)


def named_features(options: ReflowOptions, stage: Stage) -> FeatureDistance | None:
    """The distance of the features that the options name; None for none."""
    if options.features is None:
        return None
    shape, scaling = stage.data.shape, stage.data.scaling.as_dict()
    return find_features(stage.find(options.features), shape, stage.world.device, scaling)


def make_loss(
    options: ReflowOptions,
    stage: Stage,
    teacher: Teacher,
    batches: Batches,
    times: TimeLaw,
    features: Distance | None,
) -> str | Loss:
    """The loss of a round: a distance's name, or a loss of the residual.

    Args:
        options: of the stage.
        stage: the stage.
        teacher: of the round.
        batches: the round's pairs, from which the constant of the normalised loss is computed.
        times: the law of t.
        features: the features' distance for ``loss: perceptual``.
    """
    name, value = options.loss_words()
    if features is not None:
        return Perceptual(features, value or 0.0, options.weight == "divided")
    if options.weight == "none":
        return options.loss
    operator: Operator = identity
    if name == "highpass":
        operator = partial(high_pass, strength=STRENGTH if value is None else value)
    # the constant depends on the teacher and its pairs alone, so a resumed round has the same one
    generator = generator_for(stage.seed, stage.name, "normaliser")
    pair = batches.batch(0, NORMALISER_ROWS, generator).to(stage.world.device)
    t = times.sample(torch.rand(NORMALISER_ROWS, generator=generator)).to(pair.x1)
    return Normalised(normaliser(teacher.guided(options.guidance), pair, t, operator), operator)


@torch.no_grad()
def normaliser(v: Velocity, pair: Pair, t: Tensor, operator: Operator) -> float:
    """The constant c of the normalised loss: a thousandth of a velocity's median endpoint error, at least 1e-8.

    Args:
        v: the velocity ``v(x, t, **cond)``.
        pair: pairs (B, ...).
        t: times (B,).
        operator: phi of the loss.
    """
    x_t = Linear().interpolate(pair.x0, pair.x1, t)
    at = Residual(v(x_t, t, **pair.cond), pair.x1 - pair.x0, x_t, pair.x1, t)
    return max(NORMALISER_SHARE * float(endpoint_errors(at, operator).median()), MIN_NORMALISER)


SPEC = Spec(
    options=ReflowOptions,
    plan=plan,
    summary="straighten a teacher on its own (noise, endpoint) pairs",
    learns_from="teacher, pairs, data",
    needs=needs,
    network=network,
    cite=("liu2023flow",),
)
