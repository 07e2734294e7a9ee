r"""Couplings: the joint law of (x0, x1) that training pairs are drawn from.

The path is always the line; only the coupling decides how straight the flow is (arXiv:2209.03003). A coupling takes
a batch of data with its conditions and returns the batch with its noises. Conditions travel with the data:
optimal transport permutes x0, so x1 and everything that belongs to it stay in place.

Couplings carry :class:`Facts`, and combinations that would give wrong results without an error are refused: the score
formula ``score = -x0 / sigma`` needs x0 ~ N(0, I) independent of x1; optimal transport across classes makes the noise
depend on the label, while sampling draws it from the base, so pairs are made within one class only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow.degradations import block_average, inpainting_base, random_mask
from fewstep.flow.ot import assignment


@dataclass(frozen=True)
class Pair:
    """One batch of pairs: row i of x0, of x1 and of every condition belong together.

    Attributes:
        x0, x1: (B, ...).
        cond: conditions, each (B, ...), by the name of the network's keyword (``label``, ``context``).
        beside: rows that are given to no network as a condition, such as unpaired data; of any length. A coupling whose
            x0 is Gaussian given its context adds ``start_mean`` and ``start_scale``: x0 = start_mean + start_scale *
            noise.
    """

    x0: Tensor
    x1: Tensor
    cond: dict[str, Tensor] = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)

    def head(self, rows: int) -> Pair:
        """The first rows, of x0, x1 and every condition."""
        return Pair(self.x0[:rows], self.x1[:rows], {name: value[:rows] for name, value in self.cond.items()})

    def to(self, device: torch.device) -> Pair:
        """The pair on a device."""
        cond, beside = ({name: rows.to(device) for name, rows in some.items()} for some in (self.cond, self.beside))
        return Pair(self.x0.to(device), self.x1.to(device), cond, beside)


@dataclass(frozen=True)
class Facts:
    """What is known about a coupling, for code that depends on it (scores, SDE samplers, cards).

    Attributes:
        independent: x0 is independent of x1 (given nothing or given the label).
        deterministic: x1 is a function of x0 (and of the conditions).
        teacher: hash of the model that made the pairs.
        guidance: guidance weight the pairs were made with.
        gaussian: x0 is standard normal.
    """

    independent: bool
    deterministic: bool
    teacher: str | None = None
    guidance: float | None = None
    gaussian: bool = True


def require_independent(facts: Facts, what: str) -> None:
    """Refuse ``what`` (a score, an SDE sampler ...) unless x0 is standard normal and independent of x1.

    The relation score = (t v - x) / (1 - t) between velocity and score is false otherwise.

    Args:
        facts: of the coupling that the model was trained on.
        what: the subject of the message.

    Raises:
        UserError: the coupling is dependent, or the base is not standard normal.
    """
    if facts.independent and facts.gaussian:
        return
    reason = "starts from a base that is not standard normal"
    if not facts.independent:
        reason = "was trained on dependent pairs (reflow, optimal transport, in-painting ...)"
    raise UserError(
        f"{what} needs the score, and the score is -x0/sigma only for Gaussian noise independent of the "
        f"data, but this model {reason}. Use an ODE solver, or a model trained with the independent coupling."
    )


class Source(ABC):
    """The base distribution p0 that x0 is drawn from."""

    @property
    @abstractmethod
    def gaussian(self) -> bool:
        """Whether p0 = N(0, I)."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw (n, *shape) float32 on the generator's device."""


@final
@dataclass(frozen=True)
class GaussianSource(Source):
    """p0 = N(0, I) of the given shape (without the batch).

    >>> GaussianSource((3,)).sample(2, torch.Generator()).shape
    torch.Size([2, 3])
    """

    shape: tuple[int, ...]

    @property
    def gaussian(self) -> bool:
        """True."""
        return True

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """N(0, 1) draws, (n, *shape) float32."""
        return torch.randn((n, *self.shape), generator=generator, device=generator.device)


@final
@dataclass(frozen=True, eq=False)
class EmpiricalSource(Source):
    """p0 = the rows of an array (N, ...), drawn with replacement: flows from one data set to another.

    Raises:
        UserError: no row, or rows without a dimension.
    """

    rows: Tensor

    def __post_init__(self) -> None:
        if self.rows.ndim < 2 or len(self.rows) == 0:
            raise UserError(f"the base data have shape {tuple(self.rows.shape)}: give at least one row, as (N, ...).")

    @property
    def gaussian(self) -> bool:
        """False."""
        return False

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` rows at uniformly random indices, (n, ...) float32."""
        index = torch.randint(len(self.rows), (n,), generator=generator, device=generator.device)
        return self.rows[index.to(self.rows.device)].to(generator.device, torch.float32)


class Coupling(ABC):
    """Draws the noises of a batch of data."""

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """What may be assumed about the pairs."""

    @abstractmethod
    def pair(self, x1: Tensor, cond: Mapping[str, Tensor], generator: torch.Generator) -> Pair:
        """Return the pairs of a batch.

        Args:
            x1: data (B, ...).
            cond: conditions of the rows, each (B, ...).
            generator: source of all randomness.

        Returns:
            ``Pair`` with x1 as given, x0 in its shape, dtype and device, and conditions row by row.

        Raises:
            UserError: a condition with another number of rows; what the coupling cannot be used with.
        """


@final
@dataclass(frozen=True)
class Independent(Coupling):
    """x0 ~ p0 independent of x1: ordinary flow matching, 1-rectified flow (arXiv:2209.03003; arXiv:2210.02747)."""

    source: Source

    @property
    def facts(self) -> Facts:
        """Independent; Gaussian where the source is."""
        return Facts(independent=True, deterministic=False, gaussian=self.source.gaussian)

    def pair(self, x1: Tensor, cond: Mapping[str, Tensor], generator: torch.Generator) -> Pair:
        """x0 drawn from the source."""
        kept = _checked(x1, cond)
        return Pair(_draw(self.source, x1, generator), x1, kept)


@final
@dataclass(frozen=True)
class MinibatchOT(Coupling):
    """x0 permuted to the least sum of ||x0 - x1||^2 within the batch (arXiv:2302.00482; arXiv:2304.14772).

    With a ``label`` the pairing is within each class. With any other condition it is refused: the paired noise would
    depend on the condition, while sampling draws noise that does not.

    Args:
        source: the base.
        batch_size: rows per transport problem; a batch is cut into consecutive pieces of that size.
            None takes the whole batch.
    """

    source: Source
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 2:
            raise UserError(f"batch_size = {self.batch_size}: optimal transport permutes rows, so it needs at least 2.")

    @property
    def facts(self) -> Facts:
        """Dependent and random; Gaussian where the source is."""
        return Facts(independent=False, deterministic=False, gaussian=self.source.gaussian)

    def pair(self, x1: Tensor, cond: Mapping[str, Tensor], generator: torch.Generator) -> Pair:
        """x0 drawn from the source and permuted; conditions other than ``label`` are refused."""
        kept = _checked(x1, cond)
        foreign = sorted(set(kept) - {"label"})
        if foreign:
            raise UserError(
                f"minibatch optimal transport cannot be used with the condition {foreign[0]!r}: the paired "
                "noise would depend on it, while sampling draws noise that does not. "
                "Use the independent coupling."
            )
        x0 = _draw(self.source, x1, generator)
        matched = torch.empty_like(x0)
        for rows in self._problems(x1, kept.get("label")):
            matched[rows] = x0[rows][assignment(x0[rows], x1[rows])]
        return Pair(matched, x1, kept)

    def _problems(self, x1: Tensor, label: Tensor | None) -> list[Tensor]:
        """The rows of each transport problem: consecutive pieces, each split by class."""
        pieces = torch.arange(len(x1), device=x1.device).split(self.batch_size or max(len(x1), 1))
        if label is None:
            return list(pieces)
        if label.ndim != 1 or label.is_floating_point():
            raise UserError(
                f"label has shape {tuple(label.shape)} and dtype {label.dtype}: optimal transport pairs "
                "within classes, so labels must be whole numbers (B,)."
            )
        return [rows[label[rows] == c] for rows in pieces for c in label[rows].unique()]


@final
@dataclass(frozen=True)
class Inpainting(Coupling):
    """x0 = mask x1 + (1 - mask) noise: the base contains part of the data (arXiv:2310.03725).

    The mask (1 = known) hides a random rectangle or half of an image (B, C, H, W), or a random subset of the
    coordinates of a vector (B, D), of every size from one coordinate to all. The network gets as ``context``
    the mask and the known data, concatenated along dimension 1: (B, 1 + C, H, W) or (B, 2 D).
    """

    @property
    def facts(self) -> Facts:
        """Dependent, random, not Gaussian: x0 contains part of x1."""
        return Facts(independent=False, deterministic=False, gaussian=False)

    def pair(self, x1: Tensor, cond: Mapping[str, Tensor], generator: torch.Generator) -> Pair:
        """x0 = mask x1 + (1 - mask) noise, and the condition ``context``."""
        kept = _without_context(_checked(x1, cond), "in-painting")
        noise = _draw(GaussianSource(tuple(x1.shape[1:])), x1, generator)
        mask = random_mask(x1, generator)
        x0, context = inpainting_base(x1, mask, noise)
        return Pair(x0, x1, {**kept, "context": context}, {"start_mean": mask * x1, "start_scale": 1 - mask})


@final
@dataclass(frozen=True)
class SuperResolution(Coupling):
    """x0 = upsample(downsample(x1)) + sigma noise: the base is the blurred data (arXiv:2310.03725).

    Downsampling averages blocks of ``factor`` (pixels per side of an image, neighbours of a vector),
    upsampling repeats them; the network gets the blurred data as ``context``, in the shape of x1.

    Args:
        factor: block size, at least 2; must divide the image sides or the vector length.
        sigma: noise level, positive: without noise x0 given the context has no density.

    Raises:
        UserError: ``factor`` below 2, ``sigma`` not positive.
    """

    factor: int = 2
    sigma: float = 0.1

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise UserError(f"super-resolution factor = {self.factor}: it must be a whole number of at least 2.")
        if not 0 < self.sigma < math.inf:
            raise UserError(
                f"super-resolution sigma = {self.sigma}: without noise the base has no density; give sigma > 0."
            )

    @property
    def facts(self) -> Facts:
        """Dependent, random, not Gaussian: x0 is x1 blurred."""
        return Facts(independent=False, deterministic=False, gaussian=False)

    def pair(self, x1: Tensor, cond: Mapping[str, Tensor], generator: torch.Generator) -> Pair:
        """x0 = blurred x1 + sigma noise, and the condition ``context``."""
        kept = _without_context(_checked(x1, cond), "super-resolution")
        noise = _draw(GaussianSource(tuple(x1.shape[1:])), x1, generator)
        context = block_average(x1, self.factor)
        law = {"start_mean": context, "start_scale": torch.full_like(context[:, :1], self.sigma)}
        return Pair(context + self.sigma * noise, x1, {**kept, "context": context}, law)


@final
@dataclass(frozen=True)
class Paired(Coupling):
    """Stored pairs (x0, X(x0)) of a teacher: reflow and distillation (arXiv:2209.03003).

    The stored noise travels with the data like a condition: ``pair`` takes it out of ``cond["x0"]``.

    Args:
        teacher: hash of the model that made the pairs.
        guidance: the guidance weight it was sampled with.
        gaussian: whether the stored noise is standard normal.
    """

    teacher: str | None = None
    guidance: float | None = None
    gaussian: bool = True

    @property
    def facts(self) -> Facts:
        """Dependent and deterministic, with the teacher and the guidance that made the pairs."""
        return Facts(False, True, self.teacher, self.guidance, self.gaussian)

    def pair(self, x1: Tensor, cond: Mapping[str, Tensor], generator: torch.Generator) -> Pair:
        """x0 taken from ``cond['x0']``."""
        kept = _checked(x1, cond)
        if "x0" not in kept:
            raise UserError("stored pairs need their noise: give it as cond['x0'], one row per row of x1.")
        x0 = kept.pop("x0")
        if x0.shape != x1.shape:
            raise UserError(f"cond['x0'] has shape {tuple(x0.shape)} but x1 has {tuple(x1.shape)}: they must be equal.")
        return Pair(x0.to(x1), x1, kept)


def _draw(source: Source, x1: Tensor, generator: torch.Generator) -> Tensor:
    """x0 for the rows of x1, in its dtype and on its device."""
    x0 = source.sample(len(x1), generator)
    if x0.shape != x1.shape:
        raise UserError(
            f"the base gives x0 of shape {tuple(x0.shape[1:])} per row but the data have "
            f"{tuple(x1.shape[1:])}: flow matching needs equal shapes. Resize one of the two."
        )
    return x0.to(x1)


def _checked(x1: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the conditions, each checked to have one row per row of x1."""
    for name, value in cond.items():
        if value.ndim == 0 or len(value) != len(x1):
            raise UserError(
                f"condition {name!r} has shape {tuple(value.shape)} but x1 has {len(x1)} rows: "
                "give one row of it per row of x1."
            )
    return dict(cond)


def _without_context(cond: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    if "context" in cond:
        raise UserError(f"{what} makes the condition 'context' itself: remove it from the data.")
    return cond
