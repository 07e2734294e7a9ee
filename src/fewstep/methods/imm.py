r"""Inductive moment matching: compare the laws of a map's samples from two starting times (arXiv:2503.07565).

A map ``f(x, t, r) = x + (r - t) u(x, t, r)`` is to carry samples of the path's law at time t to its law at time r. For
a data pair and times ``t < q <= r``, the states ``x_t`` and ``x_q`` lie on one line, and

    L(theta) = E_{t, r} w MMD^2( law of f_theta(x_t, t, r), law of sg[ f_theta(x_q, q, r) ] ),     q = min(t + g, r).

Where q = r the second law is that of x_r itself, so this case is learned from data. Each further step of length g
extends it to earlier times. t and r are two draws of the law ``time``, sorted, and r = 1 in a share ``to_data`` of the
groups. The weight is ``w = 1 / (g max(r - t, .05))``: a change of u moves y by ``r - t`` times as much, and a smaller
gap makes the difference between the laws smaller. Both calls are in float32.

The laws are compared in groups of M rows (``particles``) that share t, r and, where there are labels, the class. With
``y_i = f(x_t^i, t, r)``, ``z_i = sg f(x_q^i, q, r)`` and the kernel of the energy distance, smoothed at zero,
``k(a, b) = -sqrt(|a - b|^2 / D + s^2)``,

    MMD^2 = 1/(M (M - 1)) sum_{i != j} [ k(y_i, y_j) - 2 k(y_i, z_j) + k(z_i, z_j) ]

is an unbiased estimate. It is zero in the mean for every map with the right laws, whatever g. (The paper's kernel is
the Laplace kernel. It is bounded, so samples far from all targets have no gradient: on digits, 800,000 samples of
training with it ended at an energy distance of .13, and with this one at .016.)

``paired`` keeps the terms i = j of the middle sum, and divides by M^2, as the paper does. ``y_i`` and ``z_i`` belong to
one data pair, so these terms are a consistency loss with a robust distance. They reduce the variance: without them
no setting that was tried learned digits (64 values; precision .01 instead of .5 after 300,000 samples). They also have
a bias, because one state has many data pairs: on a mixture of two modes in one dimension, W1 of one call was .26 times
that of one Euler step with them, and .06 times without.
Rows seldom have equal conditions of other kinds than labels, so with those the joint laws of samples and conditions are
compared: the kernel's ``|a - b|^2 / D`` is the mean over the entries of sample and condition together, where the
condition c is scaled to unit variance and to the sample's number of entries. The condition of ``y_i`` is that of
``z_i``, and the joint laws are equal only if the laws given c are.

So the default is paired, M = 4, from 50 values per sample on, and unpaired, M = 32, below.

The gap starts at 1, where the target is x_r, and is halved ``halvings`` times in the first half of the training. (The
paper's gap is fixed in the noise level (1 - t)/t, and its weight is a function of the same.) An unpaired loss needs no
small gap, so its default is one halving; a paired one has six.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fewstep.data.dataset import LABEL
from fewstep.flow.couplings import Pair
from fewstep.flow.field import Velocity
from fewstep.flow.noise import Draws
from fewstep.flow.paths import expand_time
from fewstep.flow.precision import full_precision, in_full
from fewstep.flow.time_laws import TimeLaw, make_time_law
from fewstep.methods.contract.objective import Batches, Networks, Objective, Terms
from fewstep.methods.contract.options import refuse_teacher
from fewstep.methods.contract.stage import Phase, Plan, Spec, Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.consistency_loss import gap_at
from fewstep.methods.families.distances import FEW_VALUES
from fewstep.methods.families.flow_map import Times, draw_times
from fewstep.methods.families.velocity_source import (
    LawOfTime,
    MapOptions,
    VelocitySource,
    two_time_network,
    velocity_source,
)
from fewstep.solvers.maps import SampleRule

MIN_LENGTH = 0.05  # of r - t in the weight; chosen, not tuned


class IMMOptions(MapOptions):
    """Options of ``method: imm``."""

    paired: bool | None = Field(None, description="keep the terms i = j; default: from 50 values per sample on")
    particles: int | None = Field(None, gt=1, description="rows M that are compared; default: 4 paired, 32 unpaired")
    halvings: int | None = Field(None, ge=0, le=12, description="of the gap from 1; default: 6 paired, 1 unpaired")
    smoothing: float = Field(0.01, gt=0, description="s of the kernel: differences below it, per value, count squared")
    time: LawOfTime = Field("uniform", description="law of both times: uniform, logit_normal:m,s, …")
    to_data: float = Field(0.25, ge=0, le=1, description="share of the groups with r = 1")

    @model_validator(mode="after")
    def _learns_from_data(self) -> IMMOptions:
        refuse_teacher(self)
        return self

    @model_validator(mode="after")
    def _whole_groups(self) -> IMMOptions:
        if self.particles is not None and self.batch_size % self.particles:
            raise ValueError(f"batch_size {self.batch_size} does not divide into groups of {self.particles} particles")
        return self


@final
@dataclass(frozen=True)
class Comparison:
    """How laws are compared, with the defaults for the data filled in.

    Attributes:
        paired: whether the terms i = j of the middle sum are kept.
        particles: M.
        halvings: of the gap.
        smoothing: s.
    """

    paired: bool
    particles: int
    halvings: int
    smoothing: float = 0.01


def comparison(options: IMMOptions, shape: tuple[int, ...]) -> Comparison:
    """The options, with the defaults for samples of that shape.

    >>> comparison(IMMOptions(method="imm"), (2,))
    Comparison(paired=False, particles=32, halvings=1, smoothing=0.01)
    >>> comparison(IMMOptions(method="imm"), (1, 8, 8))
    Comparison(paired=True, particles=4, halvings=6, smoothing=0.01)
    """
    paired = math.prod(shape) >= FEW_VALUES if options.paired is None else options.paired
    particles = options.particles or (4 if paired else 32)
    halvings = (6 if paired else 1) if options.halvings is None else options.halvings
    return Comparison(paired, particles, halvings, options.smoothing)


def kernel_sums(a: Tensor, b: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """``sum_{i != j} k(a_i, b_j)`` and ``sum_i k(a_i, b_i)`` of every group, (G,) each, from groups (G, M, D)."""
    square = (a[:, :, None] - b[:, None]).square().mean(-1)
    kernel = -(square + smoothing**2).sqrt()
    own = kernel.diagonal(dim1=1, dim2=2).sum(1)
    return kernel.sum((1, 2)) - own, own


def with_conditions(x: Tensor, cond: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
    """Samples with their conditions beside them, (B, D'); the samples alone, (B, ...), where ``scales`` is empty.

    Args:
        x: samples (B, ...).
        cond: the conditions, each (B, ...); of more than one dimension beside the batch, the mean over all but the last
            counts.
        scales: standard deviations of the conditions that are compared, by name.
    """
    if not scales:
        return x
    flat = x.flatten(1)
    rows = [cond[name].to(flat).reshape(len(flat), -1, (cond[name].shape[1:] or (1,))[-1]).mean(1) for name in scales]
    scaled = torch.cat([part / scale for part, scale in zip(rows, scales.values(), strict=True)], 1)
    return torch.cat([flat, scaled * math.sqrt(flat.shape[1] / scaled.shape[1])], 1)


def condition_scales(stage: Stage) -> dict[str, float]:
    """Standard deviations of the conditions beside labels, over all entries of up to 1024 rows; 1 for a constant."""
    rows = stage.data.cond_rows(stage.data.train[:1024], [name for name in stage.conditions if name != LABEL])
    return {name: float(value.float().std()) or 1.0 for name, value in rows.items()}


def squared_mmd(y: Tensor, z: Tensor, particles: int, smoothing: float = 0.01, *, paired: bool = False) -> Tensor:
    """The estimate of ``MMD^2`` between two laws in every group, (B / M,).

    Args:
        y, z: samples (B, ...), M of every group in succession.
        particles: M.
        smoothing: s of the kernel ``-sqrt(|a - b|^2 / D + s^2)``.
        paired: keep the terms i = j of the middle sum, and divide by M^2 instead of M (M - 1).

    (Paired: arXiv:2503.07565. Unpaired: Gretton et al., A Kernel Two-Sample Test, 2012, eq. 4.)
    """
    y, z = (x.flatten(1).unflatten(0, (-1, particles)) for x in (y, z))
    (yy, _), (yz, own), (zz, _) = (kernel_sums(*pair, smoothing) for pair in ((y, y), (y, z), (z, z)))
    if paired:
        return (yy - 2 * (yz + own) + zz) / particles**2
    return (yy - 2 * yz + zz) / (particles * (particles - 1))


@final
class IMM(Objective):
    """The loss of the module's docstring.

    Args:
        student: ``u(x, t, r=r, **cond)``.
        source: the path of the data pairs.
        law: law of both times.
        compare: how laws are compared.
        to_data: share of the groups with r = 1.
        scales: standard deviations of the conditions that are compared with the samples, by name.
    """

    def __init__(
        self,
        student: nn.Module,
        source: VelocitySource,
        law: TimeLaw,
        compare: Comparison,
        to_data: float = 0.25,
        scales: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.modules = {"student": student}
        self.scales = scales
        self.source, self.law, self.compare, self.to_data = source, law, compare, to_data
        self.group = compare.particles

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        times, gap = self.draw(draws, batch.x1), gap_at(done, self.compare.halvings)
        y, z = (with_conditions(x, batch.cond, self.scales) for x in self.ends(nets["student"], batch, times, gap))
        rows = squared_mmd(y, z, self.group, self.compare.smoothing, paired=self.compare.paired)
        length = (times.r - times.t)[:: self.group].clamp(min=MIN_LENGTH)
        return {"loss": (rows / (gap * length)).mean(), "mmd": rows.detach().mean(), "gap": torch.tensor(gap)}

    def draw(self, draws: Draws, like: Tensor) -> Times:
        """Times t and r of the rows, equal within a group."""
        times = draw_times(self.law, 0.0, draws, like)
        r = torch.where((draws.uniform() < self.to_data).to(times.r.device), 1.0, times.r)
        t, r = (part[:: self.group].repeat_interleave(self.group) for part in (times.t, r))
        return Times(t, r, times.diagonal)

    def ends(self, u: Velocity, batch: Pair, times: Times, gap: float) -> tuple[Tensor, Tensor]:
        """``f(x_t, t, r)``, with its graph, and ``f(x_q, q, r)``, without; (B, ...) each."""
        t, r, _ = times
        q, path = torch.minimum(t + gap, r), self.source.path
        x_t, x_q = (path.interpolate(batch.x0, batch.x1, time) for time in (t, q))
        with full_precision(x_q):
            z = x_q + expand_time(r - q, x_q) * u(x_q, q, r=r, **batch.cond).to(x_q)
        return x_t + expand_time(r - t, x_t) * in_full(u, x_t, t, r=r, **batch.cond), z


def plan(options: IMMOptions, stage: Stage) -> Plan:
    """One phase on data rows, grouped by class.

    Raises:
        UserError: a batch size that does not divide into groups.
    """
    source, student = velocity_source(options, stage), stage.build()
    compare = comparison(options, stage.data.shape)

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        law = make_time_law(options.time)
        objective = IMM(student, source, law, compare, options.to_data, condition_scales(stage))
        return objective, source.batches(group=compare.particles)

    rule = SampleRule(kind="map", default_steps=1, sampler="chain")
    return Plan(student, [Phase("train", options.samples, prepare)], rule, source.facts)


SPEC = Spec(
    options=IMMOptions,
    plan=plan,
    summary="any number of steps from one, from data: laws of samples from two starting times agree",
    learns_from="data",
    makes="map",
    cite=("zhou2025inductive",),
    network=two_time_network,
)
