"""One row of a quality table: every score of a set of generated samples, under one protocol.

- Generated: ``min(4000, size of the training split)`` samples (:func:`sample_count`; more are drawn from), in the data
  scale of the network.
- Reference: the training split, or 10 000 rows of it by the fixed rule :func:`fewstep.metrics.rows.pick`
  (seed 0) when it is larger. The memorisation check alone looks at every training row, because any of them
  can be copied.
- Beside each distance stands its data-data floor at the same sizes: what data of the same law would score.
- Fréchet distances carry the name of their features, ``FD-<name>``; ``FD-pixels`` are the data themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, final

import torch
from torch import Tensor

from fewstep.errors import UserError, unknown
from fewstep.metrics.frechet import Moments, frechet_from_moments, moments
from fewstep.metrics.memorisation import check_from_held_out
from fewstep.metrics.neighbours import expected_coverage, nearest, neighbour_radius, prdc_from_radius
from fewstep.metrics.rows import Samples, as_pair, as_rows, as_tensor, pick
from fewstep.metrics.sample_distances import (
    directions,
    distance,
    energy_from_moments,
    floor_from_moments,
    sliced_w2_floor,
    sliced_w2_from_projections,
    sorted_projections,
)
from fewstep.metrics.two_sample import Within, between, within

Features = Callable[[Tensor], Tensor]
"""Maps a batch of samples ``(B, ...)`` to features ``(B, F)``."""

MAX_GENERATED = 4000
MAX_REFERENCE = 10_000
PROJECTIONS = 256  # directions of the sliced distance
PIXELS = "pixels"
HELD_OUT_SCORES = (
    "energy_held_out",
    "energy_held_out_se",
    "energy_held_out_floor",
    "memorised",
    "replicas",
    "replicas_base",
    "copied",
    "copied_se",
    "memorised_flag",
)


@dataclass(frozen=True)
class Scores:
    """All scores of one set of samples; distances and floors in units of the data.

    Attributes:
        energy, energy_se: energy distance to the reference, and its standard error.
        energy_floor, energy_floor_sd: mean and spread of the same for two samples of the data's own law.
        energy_held_out, energy_held_out_se, energy_held_out_floor: the same against the held-out split, or
            None.
        sliced_w2, sliced_w2_floor: sliced 2-Wasserstein distance (256 directions) and its floor.
        fd, fd_percent: squared Fréchet distance on ``features``, and in percent of the real feature trace.
        precision, recall, density, coverage: by ``k`` nearest neighbours in ``neighbours_in``.
        coverage_floor: coverage that data of the same law have at these sizes (an upper mark, not 1).
        memorised: share of samples nearer to training data than 5 % of held-out ones are, or None.
        replicas, replicas_base: share of samples three times nearer to one training sample than to any other,
            and the same share of held-out samples, or None.
        copied, copied_se: estimated share of copies, and its standard error if there are none, or None.
        memorised_flag: memorisation beyond chance and blur (:attr:`Memorisation.flagged`), or None.
        features: name of the features of ``fd``.
        neighbours_in: ``"pixels"``, or the name of the features.
        k, seed, n_generated, n_reference, n_held_out: the protocol.
    """

    energy: float
    energy_se: float
    energy_floor: float
    energy_floor_sd: float
    energy_held_out: float | None
    energy_held_out_se: float | None
    energy_held_out_floor: float | None
    sliced_w2: float
    sliced_w2_floor: float
    fd: float
    fd_percent: float
    precision: float
    recall: float
    density: float
    coverage: float
    coverage_floor: float
    memorised: float | None
    replicas: float | None
    replicas_base: float | None
    copied: float | None
    copied_se: float | None
    memorised_flag: bool | None
    features: str
    neighbours_in: str
    k: int
    seed: int
    n_generated: int
    n_reference: int
    n_held_out: int

    def as_dict(self) -> dict[str, float | int | str | bool | None]:
        """Plain numbers for JSON; the Fréchet distance stands under ``FD-<features>`` and
        ``FD-<features>_percent``."""
        names = {"fd": f"FD-{self.features}", "fd_percent": f"FD-{self.features}_percent"}
        return {names.get(key, key): value for key, value in asdict(self).items()}


def sample_count(reference: int) -> int:
    """How many samples to generate for a training split of this size: ``min(4000, reference)``."""
    return min(MAX_GENERATED, reference)


def evaluate(
    fake: Samples,
    train: Samples,
    held_out: Samples | None = None,
    features: Features | None = None,
    seed: int = 0,
    *,
    features_name: str | None = None,
    neighbours_in: Literal["pixels", "features"] = "pixels",
    k: int = 5,
) -> Scores:
    """Score generated samples against data: one row of a table (protocol: module docstring).

    Args:
        fake: generated samples ``(N, ...)``; :func:`sample_count` of them are used.
        train: the training split ``(T, ...)``, in the same scale.
        held_out: data of the same law not trained on ``(H, ...)``; without it there is no memorisation check.
        features: extractor for the Fréchet distance, called on batches of at most 500 samples; the data
            themselves when not given. Not one that was used in a loss.
        seed: seed of the directions and splits of the sliced distance.
        features_name: names the features in ``FD-<name>``, e.g. ``"digits_cnn@1a2b3c"`` with a hash of its
            weights.
        neighbours_in: space of precision, recall, density and coverage.
        k: neighbour that sets their radius.

    Raises:
        UserError: features without a name, shapes that differ, too few samples, values that are not finite.
    """
    train = as_tensor(train, "train").to(as_tensor(fake, "fake").device)
    reference = Reference(
        train, held_out, features, seed, features_name=features_name, neighbours_in=neighbours_in, k=k
    )
    return reference.score(fake)


@final
class Reference:
    """The data that generated samples are scored against; what depends on the data alone is computed once.

    Args: as of :func:`evaluate`, without ``fake``.

    Attributes:
        count: how many generated samples are scored.
        train: every training row ``(T, D)``.
        rows: the rows that distances are measured to ``(M, D)``, at most 10 000.
    """

    def __init__(
        self,
        train: Samples,
        held_out: Samples | None = None,
        features: Features | None = None,
        seed: int = 0,
        *,
        features_name: str | None = None,
        neighbours_in: Literal["pixels", "features"] = "pixels",
        k: int = 5,
    ) -> None:
        _check_features(features, features_name, neighbours_in)
        self.seed, self.k = seed, k
        self.count = sample_count(len(train))
        self.train = as_rows(train, "train", least=k + 1)
        self._chosen = torch.as_tensor(pick(self.train.shape[0], MAX_REFERENCE))  # on the CPU: indexes any device
        self.rows = self.train[self._chosen]
        self._extractor, self._in_features = features, neighbours_in == "features"
        self._name = features_name or PIXELS
        self._samples = as_tensor(train, "train")
        self._held_out = held_out

    @cached_property
    def features(self) -> Tensor:
        """Features of :attr:`rows`, ``(M, F)``; the rows themselves without an extractor."""
        return self.rows if self._extractor is None else extract(self._extractor, self._samples[self._chosen])

    @cached_property
    def feature_moments(self) -> Moments:
        """Mean and covariance root of :attr:`features`."""
        return moments(self.features)

    @cached_property
    def energy_moments(self) -> Within:
        """Moments of the distances within :attr:`rows`."""
        return within(self.rows, distance)

    @cached_property
    def radius(self) -> Tensor:
        """Squared distance of every reference point to its k-th neighbour, in the space of precision and recall."""
        return neighbour_radius(self.features if self._in_features else self.rows, self.k)

    @cached_property
    def directions(self) -> Tensor:
        """The directions of the sliced distance, ``(D, 256)``."""
        return directions(self.rows.shape[1], PROJECTIONS, self.seed, self.rows.device)

    @cached_property
    def projections(self) -> Tensor:
        """:attr:`rows` on :attr:`directions`, each column in ascending order."""
        return sorted_projections(self.rows, self.directions)

    @cached_property
    def sliced_floor(self) -> float:
        """The sliced distance's floor at the sizes of a row."""
        return sliced_w2_floor(self.rows, self.count, self.rows.shape[0], PROJECTIONS, self.seed)

    @cached_property
    def held_out(self) -> _HeldOut | None:
        """What is known of the held-out split before anything is generated, None without one."""
        if self._held_out is None:
            return None
        z = as_pair(self.train, self._held_out, ("fake", "held_out"))[1]
        return _HeldOut(z, within(z, distance), nearest(z, self.train, 2)[0])

    def score(self, fake: Samples) -> Scores:
        """All scores of generated samples ``(N, ...)``, of which ``count`` are used, drawn by :func:`pick`.

        Data rows may be scored too. A file can be sorted, so the first rows would not have its law.

        Raises:
            UserError: as :func:`evaluate`.
        """
        fake = as_tensor(fake, "fake")
        fake = fake[torch.as_tensor(pick(fake.shape[0], self.count), device=fake.device)]
        y, x = as_pair(fake, self.rows, ("fake", "train"), least=self.k + 1)
        n, m = y.shape[0], x.shape[0]
        features = y if self._extractor is None else extract(self._extractor, fake)
        frechet = frechet_from_moments(moments(_same_width(features, self.features)), self.feature_moments)
        space = (self.features, features) if self._in_features else (x, y)
        near = prdc_from_radius(space[0], self.radius, space[1], self.k)
        inside = within(y, distance)
        total = energy_from_moments(inside, self.energy_moments, between(y, x, distance))
        floor = floor_from_moments(self.energy_moments, n, m)
        scale = math.sqrt((1 / n + 1 / m) / (1 / self.count + 1 / m))  # fewer samples than the protocol's
        values = {
            "energy": total.value,
            "energy_se": total.standard_error,
            "energy_floor": floor.value,
            "energy_floor_sd": floor.standard_error,
            "sliced_w2": sliced_w2_from_projections(y, self.directions, self.projections),
            "sliced_w2_floor": self.sliced_floor * scale,
            "fd": frechet.value,
            "fd_percent": frechet.percent,
            **asdict(near),
            "coverage_floor": expected_coverage(m, n, self.k),
        }
        return Scores(
            **values,
            **self._against_held_out(y, inside),
            features=self._name,
            neighbours_in=self._name if self._in_features else PIXELS,
            k=self.k,
            seed=self.seed,
            n_generated=n,
            n_reference=m,
        )

    def _against_held_out(self, y: Tensor, inside: Within) -> dict[str, Any]:
        """The scores that need held-out data: energy with its floor, and the memorisation check.

        The floor's law is the reference's, which is larger.
        """
        if self.held_out is None:
            return {**dict.fromkeys(HELD_OUT_SCORES), "n_held_out": 0}
        z = self.held_out.rows
        energy = energy_from_moments(inside, self.held_out.energy_moments, between(y, z, distance))
        check = check_from_held_out(y, self.train, z, self.held_out.nearest)
        return {
            "energy_held_out": energy.value,
            "energy_held_out_se": energy.standard_error,
            "energy_held_out_floor": floor_from_moments(self.energy_moments, y.shape[0], z.shape[0]).value,
            "memorised": check.share,
            "replicas": check.replicas,
            "replicas_base": check.replicas_base,
            "copied": check.copied.value,
            "copied_se": check.copied.standard_error,
            "memorised_flag": check.flagged,
            "n_held_out": z.shape[0],
        }


@final
@dataclass(frozen=True)
class _HeldOut:
    """The held-out rows, the moments of their distances, and how far their two nearest training rows are (squared)."""

    rows: Tensor
    energy_moments: Within
    nearest: Tensor


def _same_width(fake: Tensor, real: Tensor) -> Tensor:
    """Features of generated samples, which must be as many per sample as those of the data."""
    return as_pair(fake, real, ("fake features", "real features"))[0]


def extract(features: Features, samples: Tensor, batch: int = 500) -> Tensor:
    """Features ``(N, F)`` of samples ``(N, ...)``, in batches and without gradients."""
    with torch.no_grad():
        parts = [features(part) for part in samples.split(batch)]
    sizes = [part.shape[0] for part in parts]
    if sum(sizes) != samples.shape[0]:
        raise UserError(f"features gave {sum(sizes)} rows for {samples.shape[0]} samples: one row per sample needed.")
    return as_rows(torch.cat(parts), "features")


def _check_features(features: Features | None, name: str | None, neighbours_in: str) -> None:
    if neighbours_in not in ("pixels", "features"):
        raise unknown("neighbours_in", neighbours_in, ["pixels", "features"])
    if (features is None) != (name is None):
        raise UserError(
            "features and features_name go together: a Fréchet distance is named after its features "
            "(FD-<name>), and without an extractor it is FD-pixels."
        )
    if features is None and neighbours_in == "features":
        raise UserError("neighbours_in='features' needs an extractor: pass features and features_name.")
