"""One row of a quality table: every score of a set of generated samples, under one protocol.

- Generated: the first ``min(4000, size of the training split)`` samples (:func:`sample_count`), in the data
  scale of the network.
- Reference: the training split, or 10 000 rows of it by the fixed rule :func:`fewstep.metrics.rows.pick`
  (seed 0) when it is larger. The memorisation check alone looks at every training row, because any of them
  can be copied.
- Beside each distance stands its data-data floor at the same sizes: what data of the same law would score.
- Fréchet distances carry the name of their features, ``FD-<name>``; ``FD-pixels`` are the data themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.errors import UserError, unknown
from fewstep.metrics.frechet import frechet_distance
from fewstep.metrics.memorisation import Memorisation, nearest_neighbour_check
from fewstep.metrics.neighbours import expected_coverage, prdc
from fewstep.metrics.rows import Samples, as_pair, as_rows, as_tensor, pick
from fewstep.metrics.sample_distances import (
    Estimate,
    distance,
    energy_from_moments,
    floor_from_moments,
    sliced_w2,
    sliced_w2_floor,
)
from fewstep.metrics.two_sample import Within, between, within

Features = Callable[[Tensor], Tensor]
"""Maps a batch of samples ``(B, ...)`` to features ``(B, F)``."""

MOST_GENERATED = 4000
MOST_REFERENCE = 10_000
PIXELS = "pixels"


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
    return min(MOST_GENERATED, reference)


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
        fake: generated samples ``(N, ...)``; the first :func:`sample_count` are used.
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
    _check_features(features, features_name, neighbours_in)
    count = sample_count(len(train))
    y, x_all = as_pair(fake[:count], train, ("fake", "train"), least=k + 1)
    chosen = torch.as_tensor(pick(x_all.shape[0], MOST_REFERENCE))  # on the CPU: indexes any device
    x = x_all[chosen]
    n, m = y.shape[0], x.shape[0]
    features_y, features_x = y, x
    if features is not None:
        features_y = extract(features, as_tensor(fake[:count], "fake"))
        features_x = extract(features, as_tensor(train, "train")[chosen])
    frechet = frechet_distance(features_y, features_x)
    neighbours = prdc(features_x, features_y, k) if neighbours_in == "features" else prdc(x, y, k)
    inside, outside = within(y, distance), within(x, distance)
    total = energy_from_moments(inside, outside, between(y, x, distance))
    floor = floor_from_moments(outside, n, m)
    held = None if held_out is None else _against_held_out(y, x_all, held_out, inside, outside)
    return Scores(
        energy=total.value,
        energy_se=total.standard_error,
        energy_floor=floor.value,
        energy_floor_sd=floor.standard_error,
        energy_held_out=held.energy.value if held else None,
        energy_held_out_se=held.energy.standard_error if held else None,
        energy_held_out_floor=held.floor.value if held else None,
        sliced_w2=sliced_w2(y, x, seed=seed),
        sliced_w2_floor=sliced_w2_floor(x, n, m, seed=seed),
        fd=frechet.value,
        fd_percent=frechet.percent,
        precision=neighbours.precision,
        recall=neighbours.recall,
        density=neighbours.density,
        coverage=neighbours.coverage,
        coverage_floor=expected_coverage(m, n, k),
        memorised=held.check.share if held else None,
        replicas=held.check.replicas if held else None,
        replicas_base=held.check.replicas_base if held else None,
        copied=held.check.copied.value if held else None,
        copied_se=held.check.copied.standard_error if held else None,
        memorised_flag=held.check.flagged if held else None,
        features=features_name or PIXELS,
        neighbours_in=(features_name or PIXELS) if neighbours_in == "features" else PIXELS,
        k=k,
        seed=seed,
        n_generated=n,
        n_reference=m,
        n_held_out=held.size if held else 0,
    )


@dataclass(frozen=True)
class _HeldOut:
    """What the held-out split tells: energy and its floor, and the memorisation check."""

    energy: Estimate
    floor: Estimate
    check: Memorisation
    size: int


def _against_held_out(y: Tensor, train: Tensor, held_out: Samples, inside: Within, reference: Within) -> _HeldOut:
    """Compare generated rows with held-out data; the floor's law is the reference's, which is larger."""
    z = as_pair(y, held_out, ("fake", "held_out"))[1]
    return _HeldOut(
        energy=energy_from_moments(inside, within(z, distance), between(y, z, distance)),
        floor=floor_from_moments(reference, y.shape[0], z.shape[0]),
        check=nearest_neighbour_check(y, train, z),
        size=z.shape[0],
    )


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
