"""The output of ``fewstep diagnose``: measures, likelihood, the best solvers and grids, conclusions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.data.dataset import LABEL, DataSet
from fewstep.diagnostics.diagnosis import Diagnosis
from fewstep.diagnostics.likelihood import dequantise, log_likelihood
from fewstep.diagnostics.pick import Choice
from fewstep.diagnostics.verdict import verdict
from fewstep.errors import UserError

if TYPE_CHECKING:
    from fewstep.generator import Generator

MAX_LIKELIHOOD_ROWS = 256  # held-out rows; chosen, not tuned


def measures(d: Diagnosis) -> list[str]:
    """The lines with the measures of a diagnosis."""
    lines = [
        f"straightness     {d.straightness:.4g} ± {d.straightness_error:.2g} summed over {d.dimensions} dimensions",
        f"                 {d.relative_straightness:.4f} of the squared displacement (0 is straight)",
        f"one-step gap     {d.one_step_gap:.4g}, {d.relative_gap:.3f} of the displacement",
        f"path length      {d.path_length_ratio:.3f} × the chord",
        f"acceleration     {profile(d.times, d.curvature)}",
        f"  normal part    {profile(d.times, d.normal_curvature)}",
    ]
    if d.weighted_error is not None:
        lines.append(f"  at the end     {profile(d.times, 2 * d.weighted_error)}")
    if d.stiffness is not None and d.stiffness_times is not None:
        lines.append(f"stiffness        {profile(d.stiffness_times, d.stiffness)}")
    lines += [f"note             {note}" for note in d.notes]
    return [*lines, f"derivatives      {d.derivatives.replace('_', ' ')}, {d.derivative_samples} samples"]


def profile(times: np.ndarray, values: np.ndarray) -> str:
    """Five values of a profile along t."""
    chosen = [int(np.abs(times - t).argmin()) for t in np.linspace(0.0, 1.0, 5)]
    return "  ".join(f"t={times[k]:.2f}: {values[k]:.3g}" for k in chosen)


def advice(choice: Choice) -> str:
    """The lines with a chosen solver, its grid and its error."""
    grid = ",".join(f"{t:.3f}" for t in choice.grid)
    gain = (
        "no better than" if choice.error >= choice.euler else f"{choice.euler / choice.error:.1f} × more accurate than"
    )
    lines = [
        f"{choice.calls} calls: {choice.solver} on {grid}",
        f"                 error {choice.error / choice.spread:.2%} of the spread, {gain} uniform Euler steps",
        *(f"                 note: {note}" for note in choice.notes),
    ]
    return "\n".join(lines)


def conclusions(model: Generator, d: Diagnosis, found: Sequence[Choice]) -> list[str]:
    """The conclusions of a diagnosis, with the best solver for every number of calls."""
    coupling = model.config.coupling
    lines = verdict(d, deterministic=None if coupling is None else coupling.deterministic)
    best = [f"{choice.solver} at {choice.calls}" for choice in found]
    return [*lines, f"Best solvers by a pilot run: {', '.join(best)} calls."] if best else lines


def likelihood(model: Generator, data: DataSet, seed: int) -> tuple[list[str], dict[str, Any]]:
    """Log-likelihood of held-out rows, and bits per dimension for discrete data.

    Args:
        model: a velocity model with a Gaussian base.
        data: the data that it was trained on.
        seed: seed of dequantisation and of the divergence estimate.

    Returns:
        The lines to print, and the values as a dictionary.

    Raises:
        UserError: the data or the model do not fit.
    """
    source = repr(data.name)
    if data.shape != model.config.shape:
        raise UserError(
            f"{source} has rows of shape {data.shape}, and the model makes samples of shape {model.config.shape}. "
            "Give the data that it was trained on."
        )
    if model.config.scaling != data.scaling.as_dict():
        raise UserError(
            f"{source} has another scaling than the model's data, so the likelihood would be that of other values. "
            "Give the data that the model was trained on, with the same 'scale'."
        )
    if model.config.base != "gaussian":
        raise UserError(f"the likelihood needs a Gaussian base, and the base of {model.name!r} is data.")
    if model.conditional and (data.labels is None or data.classes != len(model.config.class_weights)):
        raise UserError(
            f"{source} does not have the labels of {model.name!r}: the likelihood is conditional on the label."
        )
    names = (*((LABEL,) if model.conditional else ()), *model.config.conditions)
    if missing := [name for name in names if name not in data.condition_names]:
        raise UserError(
            f"{source} does not have the condition {missing[0]!r} of {model.name!r}: the likelihood is conditional on "
            f"it. Name it with the data, --data '{{path: FILE, conditions: [{missing[0]}]}}'."
        )
    rows = data.held_out if len(data.held_out) else data.train
    rows = rows[: min(MAX_LIKELIHOOD_ROWS, len(rows))]
    x = data.network_rows(rows).double()
    if data.quantum is not None:
        # dequantise adds noise from 0 to one quantum, and values are the centres of their cells
        x = dequantise(x, data.quantum, seed=seed) - data.quantum / 2
    cond = {name: value.to(model.device) for name, value in data.cond_rows(rows, names).items()}
    found = log_likelihood(model.module, x.to(model.device, model.dtype), cond=cond, seed=seed, mask=model.config.mask)
    bits = None if data.quantum is None else found.bits_per_dim(data.quantum)
    nats, error = float(found.nats_per_dim.mean()), found.nats_per_dim_error
    lines = [f"log-likelihood   {nats:.4f} ± {error:.2g} nats per dimension, {len(rows)} held-out rows, network units"]
    if bits is not None:
        lines.append(
            f"                 {float(bits.mean()):.3f} ± {error / math.log(2):.2g} bits per dimension, dequantised"
        )
    lines.append(f"                 {found.solver}, {found.divergence}; round trip {found.round_trip:.1e}")
    lines += [f"                 note: {note}" for note in found.notes]
    values = {"nats_per_dim": nats, "error": error, "bits_per_dim": None if bits is None else float(bits.mean())}
    return lines, values | {"rows": len(rows), "solver": found.solver, "divergence": found.divergence}
