"""Features: a small network trained on the user's data, for perceptual losses and for comparing models.

If the data have labels it is a classifier, also for models without labels:

    L(theta) = -E log p_theta(label | x + sigma xi),     xi ~ N(0, I),  sigma ~ U(0, noise).

Otherwise it is a denoising autoencoder (Vincent et al. 2008; arXiv:1211.4246), with a linear head on pooled features:

    L(theta) = E | h_theta(x + sigma xi) - x |^2 / D.

The targets x of images are averaged down to 16 pixels a side or less. Images are shifted by a few pixels. With noise
and shifts in training, the features change little for differences that are too small to see. A classifier's features
are better for comparisons if the labels name the differences that matter. ``learn: noise`` gives other features of the
same data: a model whose loss used one kind can be scored with the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.data.dataset import LABEL, DataSet
from fewstep.errors import UserError
from fewstep.flow.couplings import Coupling, Facts, Pair
from fewstep.flow.noise import Draws
from fewstep.methods.contract.objective import Batches, Networks, Objective, Terms
from fewstep.methods.contract.options import Options
from fewstep.methods.contract.stage import Phase, Plan, Spec, Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.training_pairs.batches import stage_batches
from fewstep.networks.extractors import is_image, resolve_features
from fewstep.solvers.maps import SampleRule

MAX_NOISE = {"labels": 0.2, "noise": 1.0}  # largest sigma by task, in network units; chosen, not tuned
DENOISED_SIDE = 16  # largest side of the images that a denoiser predicts, in pixels; chosen, not tuned
SHIFT_SHARE = 14  # the largest shift of an image is its side divided by this; chosen, not tuned
ROWS_PER_CALL = 500  # when accuracy is measured


class FeaturesOptions(Options):
    """Options of ``method: features``."""

    samples: int = Field(300_000, gt=0, description="samples seen in the stage, over all phases")
    batch_size: int = Field(128, gt=0, description="samples per optimiser step, over all processes")
    learn: Literal["labels", "noise"] | None = Field(
        None, description="labels: a classifier; noise: a denoiser; default: labels if the data have them"
    )
    noise: float | None = Field(
        None, ge=0, description="largest standard deviation of the noise; default: .2 for labels, 1 for noise"
    )
    shift: int | None = Field(None, ge=0, description="largest shift of images in pixels; default: a 14th of the side")

    @model_validator(mode="after")
    def _learns_from_data(self) -> FeaturesOptions:
        if self.teacher is not None or self.init is not None:
            raise ValueError("features are learned from data, from scratch: leave 'teacher' and 'init' out")
        if self.learn == "noise" and self.noise == 0:
            raise ValueError("'learn: noise' takes noise out, and 'noise: 0' adds none: set it above 0 or leave it out")
        return self


def task(options: FeaturesOptions, data: DataSet) -> str:
    """What the network learns: ``labels`` or ``noise``.

    Raises:
        UserError: ``learn: labels`` for data without labels.
    """
    if options.learn == "labels" and data.labels is None:
        raise UserError(
            f"'learn: labels', but the data {data.name!r} has none: name them, data: {{path: …, labels: …}}, or leave "
            "'learn' out."
        )
    return options.learn or ("noise" if data.labels is None else "labels")


def denoising_target(x: Tensor) -> Tensor:
    """The denoiser's target (B, D) for clean samples (B, ...); images are averaged down to at most 16 pixels a side.

    >>> denoising_target(torch.ones(2, 1, 32, 32)).shape
    torch.Size([2, 256])
    """
    if is_image(x.shape[1:]):
        x = F.adaptive_avg_pool2d(x, (min(DENOISED_SIDE, x.shape[2]), min(DENOISED_SIDE, x.shape[3])))
    return x.flatten(1)


def network(options: FeaturesOptions, data: DataSet, config: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """The resolved configuration of the feature network, from the stage's own ``network``.

    The recipe's shared network is not used, because it is a velocity network.
    """
    outputs = data.classes
    if task(options, data) == "noise":
        outputs = denoising_target(torch.zeros(1, *data.shape)).shape[1]
    return resolve_features(options.network or {}, data.shape, outputs)


def shifted(x: Tensor, u: Tensor, most: int) -> Tensor:
    """Images shifted by whole pixels, with the edges repeated.

    Args:
        x: images (B, C, H, W).
        u: uniform numbers (2, B) in [0, 1): the shifts of rows and columns, from -most to most.
        most: largest shift in pixels.

    >>> shifted(torch.arange(3.0).view(1, 1, 1, 3), torch.tensor([[0.5], [0.99]]), 1).flatten()
    tensor([1., 2., 2.])
    """
    if most == 0:
        return x
    start = (u.to(x.device) * (2 * most + 1)).floor().long()
    padded = F.pad(x, (most,) * 4, mode="replicate")
    height, width = (torch.arange(side, device=x.device) for side in x.shape[2:])
    rows, columns = start[0][:, None] + height, start[1][:, None] + width
    batch = torch.arange(len(x), device=x.device)
    return padded.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


@final
@dataclass(frozen=True)
class Blur:
    """Random shifts and noise for a batch.

    Attributes:
        noise: largest standard deviation, in network units; that of a sample is uniform on [0, noise].
        shift: largest shift in pixels; 0 for samples that are not images.
    """

    noise: float
    shift: int

    def __call__(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The shifted samples, and the same with noise added, (B, ...) each.

        Args:
            x: samples (B, ...).
            draws: the random numbers.
        """
        clean = shifted(x, torch.stack([draws.uniform(), draws.uniform()]), self.shift)
        sigma = (self.noise * draws.uniform()).view(-1, *(1,) * (x.ndim - 1))
        return clean, clean + (sigma * draws.normal(x.shape[1:])).to(clean)


@final
class Classification(Objective):
    """The loss ``-log p(label | noisy x)``; the accuracy on the batch is logged.

    Args:
        student: the classifier, from samples (B, ...) to logits (B, classes).
        blur: shifts and noise.
    """

    def __init__(self, student: nn.Module, blur: Blur) -> None:
        self.modules = {"student": student}
        self.blur = blur

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        logits, label = nets["student"](self.blur(batch.x1, draws)[1]), batch.cond["label"]
        right = (logits.detach().argmax(1) == label).float().mean()
        return {"loss": F.cross_entropy(logits, label), "accuracy": right}


@final
class Denoising(Objective):
    """The loss ``|h(noisy x) - x|^2 / D`` with the targets x of :func:`denoising_target`.

    Args:
        student: h, from samples (B, ...) to (B, D).
        blur: shifts and noise.
    """

    def __init__(self, student: nn.Module, blur: Blur) -> None:
        self.modules = {"student": student}
        self.blur = blur

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        clean, noisy = self.blur(batch.x1, draws)
        return {"loss": (nets["student"](noisy) - denoising_target(clean)).square().mean()}


@final
class DataAlone(Coupling):
    """The coupling of a stage that uses data rows alone: x0 is a copy of x1 and is not used."""

    @property
    def facts(self) -> Facts:
        """What holds for the coupling: dependent and deterministic."""
        return Facts(independent=False, deterministic=True, gaussian=False)

    def pair(self, x1: Tensor, cond: Mapping[str, Tensor], generator: torch.Generator) -> Pair:
        """The pairs (x1, x1)."""
        return Pair(x1, x1, dict(cond))


def plan(options: FeaturesOptions, stage: Stage) -> Plan:
    """One phase on data rows."""
    student, data = stage.build(), stage.data
    learns = task(options, data)
    shift = options.shift if options.shift is not None else math.ceil(min(data.shape[-2:]) / SHIFT_SHARE)
    blur = Blur(MAX_NOISE[learns] if options.noise is None else options.noise, shift if is_image(data.shape) else 0)

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        objective = (Classification if learns == "labels" else Denoising)(student, blur)
        return objective, stage_batches(replace(stage, conditions=(LABEL,) if learns == "labels" else ()), DataAlone())

    rule = SampleRule(kind="features")
    return Plan(student, [Phase("train", options.samples, prepare)], rule, DataAlone().facts)


@torch.no_grad()
def accuracy(classifier: nn.Module, data: DataSet) -> float:
    """Share of the held-out rows whose label has the largest logit, in [0, 1].

    Args:
        classifier: from samples (B, ...) to logits (B, classes).
        data: the data set.

    Raises:
        UserError: the data have no labels.
    """
    labels = data.label_rows(data.held_out)
    if labels is None:
        raise UserError(
            f"the data {data.name!r} has no labels, so the accuracy is undefined: name them with the key 'labels'."
        )
    rows = data.held_out_rows().split(ROWS_PER_CALL)
    return float((torch.cat([classifier(x).argmax(1) for x in rows]) == labels).float().mean())


SPEC = Spec(
    options=FeaturesOptions,
    plan=plan,
    summary="a feature network for perceptual losses and Fréchet distances: a classifier, or a denoiser without labels",
    learns_from="data",
    makes="features",
    network=network,
    cite=("zhang2018unreasonable", "alain2014regularized"),
)
