"""What a diagnosis means, in a few plain sentences.

The bounds lie between the values of measured flows, given as ``S / E|Δ|^2`` and one-step gap over displacement:

    a teacher of digits                              .13 and .48, after one round of ReFlow .005 and .11
    a teacher of two moons                           2.9 and 2.6, after one round of ReFlow .001 and .07
    the exact flow to Gaussian data of width .1      .05 and .11
    the exact flow to Gaussian data of width .01     .004 and .01
"""

from __future__ import annotations

import math

import numpy as np

from fewstep.diagnostics.diagnosis import Diagnosis

STRAIGHT, CURVED = 0.01, 0.05  # S / E|Δ|^2 below which a flow is straight, and above which it is not
SMALL_GAP, LARGE_GAP = 0.15, 0.3  # one-step gap over displacement, likewise
NO_DISPLACEMENT = 1e-6  # displacement per dimension below which nothing can be expressed relative to it
STEPS = (8, 16)  # Euler steps whose error is stated
STIFF_STEP = 1 / 8  # step length that the sentence on stiffness is about


def verdict(d: Diagnosis, *, deterministic: bool | None = None) -> list[str]:
    """Short sentences: is the flow straight, will ReFlow pay, is it stiff, where do errors come from, and how large.

    Args:
        d: a diagnosis.
        deterministic: whether the flow was trained on a teacher's pairs (a reflowed flow); None where it is not known.

    Returns:
        Up to six sentences; one, where trajectories have no displacement.

    >>> import torch
    >>> from fewstep.diagnostics.diagnose import diagnose
    >>> verdict(diagnose(lambda x, t: 0 * x + 2, torch.zeros(4, 1), nodes=8))[0][:21]
    'The flow is straight:'
    """
    if d.displacement < NO_DISPLACEMENT * d.dimensions:
        return ["Trajectories end where they began: without a displacement there is no scale to judge by."]
    return [_straightness(d), _reflow(d, deterministic), *_stiffness(d), *_origin(d), *_errors(d)]


def _straightness(d: Diagnosis) -> str:
    s, gap = d.relative_straightness, d.relative_gap
    if s < STRAIGHT and gap < SMALL_GAP:
        word = "The flow is straight"
    elif s < CURVED and gap < LARGE_GAP:
        word = "The flow is nearly straight"
    else:
        word = "The flow is not straight"
    return f"{word}: S is {s:.2g} of the squared displacement, one Euler step misses by {gap:.0%} of the displacement."


def _reflow(d: Diagnosis, deterministic: bool | None) -> str:
    again = " again" if deterministic else ""
    if d.relative_straightness >= CURVED:
        return f"ReFlow{again} will pay: there is much to straighten."
    if deterministic and d.relative_straightness >= STRAIGHT:
        return "Another round of ReFlow may pay: it gains straightness and loses some quality, so compare both."
    if d.relative_straightness >= STRAIGHT:
        return "ReFlow may pay: there is something to straighten, not much."
    if deterministic:
        return "Another round of ReFlow would gain little: distil this flow, or sample it as it is."
    return "ReFlow would gain little: distil this flow, or sample it as it is."


def _stiffness(d: Diagnosis) -> list[str]:
    """An explicit step h overshoots along a contracting direction where ``h |λ| > 1``."""
    if d.stiffness is None or d.contraction is None or d.stiffness_times is None:
        return []
    stiff = d.contraction * STIFF_STEP < -1
    if not stiff.any():
        return [f"It is not stiff: steps of {STIFF_STEP:g} follow its fastest direction everywhere."]
    times = d.stiffness_times[stiff]
    worst = int(np.argmin(d.contraction))
    where = f"at t = {times[0]:.3g}" if len(times) == 1 else f"between t = {times[0]:.3g} and {times[-1]:.3g}"
    return [
        f"It is stiff {where} (eigenvalue {d.contraction[worst]:.3g} at t = {d.stiffness_times[worst]:.3g}): explicit "
        f"steps of {STIFF_STEP:g} overshoot there, steps shorter than {-1 / d.contraction[worst]:.2g} do not."
    ]


def _origin(d: Diagnosis) -> list[str]:
    """The shortest stretch of time that makes half of the error on equal steps, by weighted error where known."""
    error = d.local_error if d.weighted_error is None else d.weighted_error
    if not error.max() > 0:
        return []
    mass = np.concatenate([[0.0], np.cumsum((error[1:] + error[:-1]) / 2 * np.diff(d.times))])
    starts = np.linspace(0, 0.5, 201) * mass[-1]
    begin, end = np.interp(starts, mass, d.times), np.interp(starts + mass[-1] / 2, mass, d.times)
    k = int(np.argmin(end - begin))
    arrives = "the error of equal Euler steps" if d.weighted_error is None else "the error that arrives at t = 1"
    return [f"Half of {arrives} is made between t = {begin[k]:.3g} and {end[k]:.3g}."]


def _errors(d: Diagnosis) -> list[str]:
    if d.unit_error is None:
        return []
    shares = [d.predicted_error(steps) / math.sqrt(d.displacement) for steps in STEPS]
    words = " and ".join(f"{share:.1%} with {steps}" for share, steps in zip(shares, STEPS, strict=True))
    return [f"Euler's endpoint error on equal steps is {words} (of the displacement, 95 % of the samples)."]
