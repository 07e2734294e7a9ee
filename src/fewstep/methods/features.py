"""Features: a small network trained on the user's data, for perceptual losses and for judging.

With labels it is a classifier, whatever the recipe's models see:

    L(theta) = -E log p_theta(label | x + sigma xi),     xi ~ N(0, I),  sigma ~ U(0, noise).

Without, it takes noise out (denoising autoencoder: Vincent et al. 2008; arXiv:1211.4246), through a linear head on its
pooled features,

    L(theta) = E | h_theta(x + sigma xi) - x |^2 / D,

images being asked for at 16 pixels a side or less. Images are shifted by a few pixels. Noise and shifts make features
that do not leap at what an eye would not see. Trained with labels they are the better judge where labels mean what
matters; ``learn: noise`` gives other features of the same data, so that one kind can judge what learned from the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.data.dataset import DataSet
from fewstep.errors import UserError
from fewstep.flow.couplings import Coupling, Facts, Pair
from fewstep.flow.noise import Draws
from fewstep.methods.contract.objective import Batches, Networks, Objective, Terms
from fewstep.methods.contract.options import Options
from fewstep.methods.contract.stage import Phase, Plan, Spec, Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.training_pairs.batches import DataBatches
from fewstep.networks.extractors import is_image, resolve_features
from fewstep.solvers.maps import SampleRule

NOISE = {"labels": 0.2, "noise": 1.0}  # largest standard deviation, network units
DENOISED_SIDE = 16  # most pixels of a side that are asked for
SHIFT_SHARE = 14  # sides over this are the largest shift
JUDGED = 500  # rows per call when accuracy is measured


class FeaturesOptions(Options):
    """Options of ``method: features``."""

    samples: int = Field(300_000, gt=0, description="samples seen in the stage")
    batch_size: int = Field(128, gt=0)
    learn: Literal["labels", "noise"] | None = Field(None, description="default: labels where the data have any")
    noise: float | None = Field(None, ge=0, description="largest noise on the samples; default .2 labels, 1 noise")
    shift: int | None = Field(None, ge=0, description="largest shift of images, pixels; default a 14th of the side")

    @model_validator(mode="after")
    def _learns_from_data(self) -> FeaturesOptions:
        if self.teacher is not None or self.init is not None:
            raise ValueError("features are learned from data, from scratch: leave 'teacher' and 'init' out")
        if self.learn == "noise" and self.noise == 0:
            raise ValueError("'learn: noise' takes noise out: leave 'noise: 0' out, or set it above 0")
        return self


def task(options: FeaturesOptions, data: DataSet) -> str:
    """What the network learns: ``labels`` or ``noise``."""
    if options.learn == "labels" and data.labels is None:
        raise UserError(
            f"'learn: labels', but the data {data.name!r} has none: name them, data: {{path: …, labels: …}}, or leave "
            "'learn' out."
        )
    return options.learn or ("noise" if data.labels is None else "labels")


def wanted(x: Tensor) -> Tensor:
    """What is asked for of clean samples: (B, D), images averaged down to at most 16 pixels a side."""
    if is_image(x.shape[1:]):
        x = F.adaptive_avg_pool2d(x, (min(DENOISED_SIDE, x.shape[2]), min(DENOISED_SIDE, x.shape[3])))
    return x.flatten(1)


def network(options: FeaturesOptions, data: DataSet, config: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """The resolved configuration of the stage's own network; the recipe's shared one is of velocities, and not used."""
    outputs = data.classes
    if task(options, data) == "noise":
        outputs = wanted(torch.zeros(1, *data.shape)).shape[1]
    return resolve_features(options.network or {}, data.shape, outputs)


def shifted(x: Tensor, u: Tensor, most: int) -> Tensor:
    """Images (B, C, H, W) moved by whole pixels, edges repeated; ``u`` (2, B) in [0, 1) chooses -most … most."""
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
    """Shifts and noise on a batch.

    Attributes:
        noise: largest standard deviation.
        shift: largest shift, 0 for what is no image.
    """

    noise: float
    shift: int

    def __call__(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The shifted samples, and those with noise on them."""
        clean = shifted(x, torch.stack([draws.uniform(), draws.uniform()]), self.shift)
        sigma = (self.noise * draws.uniform()).view(-1, *(1,) * (x.ndim - 1))
        return clean, clean + (sigma * draws.normal(x.shape[1:])).to(clean)


@final
class Classification(Objective):
    """Cross-entropy of the labels; logs the accuracy on the batch."""

    def __init__(self, student: nn.Module, blur: Blur) -> None:
        self.modules = {"student": student}
        self.blur = blur

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        logits, label = nets["student"](self.blur(batch.x1, draws)[1]), batch.cond["label"]
        right = (logits.detach().argmax(1) == label).float().mean()
        return {"loss": F.cross_entropy(logits, label), "accuracy": right}


@final
class Denoising(Objective):
    """Squared error of the clean samples, per value."""

    def __init__(self, student: nn.Module, blur: Blur) -> None:
        self.modules = {"student": student}
        self.blur = blur

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        clean, noisy = self.blur(batch.x1, draws)
        return {"loss": (nets["student"](noisy) - wanted(clean)).square().mean()}


@final
class Alone(Coupling):
    """Data without noise beside them: x0 is x1 itself, and nobody looks at it."""

    @property
    def facts(self) -> Facts:
        return Facts(independent=False, deterministic=True, gaussian=False)

    def pair(self, x1: Tensor, cond: Mapping[str, Tensor], generator: torch.Generator) -> Pair:
        return Pair(x1, x1, dict(cond))


def plan(options: FeaturesOptions, stage: Stage) -> Plan:
    """One phase on data rows."""
    student, data = stage.build(), stage.data
    learns = task(options, data)
    shift = options.shift if options.shift is not None else math.ceil(min(data.shape[-2:]) / SHIFT_SHARE)
    blur = Blur(NOISE[learns] if options.noise is None else options.noise, shift if is_image(data.shape) else 0)

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        objective = (Classification if learns == "labels" else Denoising)(student, blur)
        return objective, DataBatches(data, Alone(), learns == "labels", stage.dequantise, (stage.seed, stage.name))

    rule = SampleRule(kind="features")
    return Plan(student, [Phase("train", options.samples, prepare)], rule, Alone().facts)


@torch.no_grad()
def accuracy(classifier: nn.Module, data: DataSet) -> float:
    """Share of the held-out rows whose label a classifier finds."""
    labels = data.label_rows(data.held_out)
    if labels is None:
        raise UserError(f"the data {data.name!r} has no labels to be right about: name them with the key 'labels'.")
    rows = data.held_out_rows().split(JUDGED)
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
