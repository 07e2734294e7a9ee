"""The best way to sample a frozen field with so many network calls: ``fs.tune``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fewstep.diagnostics.fit import can_start, fit
from fewstep.diagnostics.masks import mask_name, masked_field, without_padding
from fewstep.diagnostics.pick import FITTED, Choice, pick, scan
from fewstep.diagnostics.pilot import Pilot
from fewstep.errors import UserError, unknown
from fewstep.flow.field import Velocity
from fewstep.flow.grids import check_steps
from fewstep.flow.paths import AffinePath, make_path
from fewstep.solvers.solve import check_start
from fewstep.solvers.tables import LINEAR

KINDS = ("auto", FITTED)
MIN_NOISES = 32  # noises to fit on, and noises to validate on; chosen, not tuned
MIN_DRAWN, MAX_DRAWN = 256, 2048  # noises that a generator draws for each; chosen, not tuned
ENTRIES = {"auto": 1 << 11, FITTED: 1 << 17}  # values in those noises: in few dimensions outliers need many noises


def noises_for(kind: str, shape: Sequence[int]) -> int:
    """How many noises of that shape to give :func:`tune`: half of them fit, half judge.

    Raises:
        UserError: an unknown kind.

    >>> noises_for("auto", (2,))
    2048
    """
    if kind not in KINDS:
        raise unknown("kind of tuning", kind, KINDS)
    return 2 * min(MAX_DRAWN, max(MIN_DRAWN, ENTRIES[kind] // math.prod(shape)))


def tune(
    v: Velocity,
    x0: Tensor,
    *,
    calls: int,
    kind: str = "auto",
    cond: Mapping[str, Any] | None = None,
    path: AffinePath | str = LINEAR,
) -> Choice:
    """Find how to sample a frozen field best with ``calls`` network evaluations per sample.

    ``auto`` runs every deterministic solver on every grid and refines the grids of the best; ``fitted`` continues from
    there and fits all of the table's numbers. Candidates are fitted on the first half of the noises and kept only if
    they are better on the second half.

    Args:
        v: ``v(x, t, **cond)``.
        x0: base samples, (M, ...): 512 for ``auto``; for ``fitted`` more in few dimensions (:func:`noises_for`).
        calls: evaluations of ``v`` per sample (one guided evaluation is two network calls).
        kind: ``auto`` or ``fitted``.
        cond: conditions, tensors with one row per sample; what is no tensor is handed on as it is. Where an adapted
            network declares a mask among them, padded entries of ``x0`` are set to zero.
        path: the path that ``v`` was trained on, or its name.

    Returns:
        A :class:`Choice`; ``fs.solve(v, x0, solver=choice.table)`` samples with it.

    Raises:
        UserError: fewer than 64 noises, conditions of another length, calls below 1, an unknown kind, a flow
            that is not finite.

    >>> import torch
    >>> choice = tune(lambda x, t: 0 * x + 2, torch.randn(64, 1, generator=torch.Generator()), calls=1)
    >>> choice.calls, choice.error < 1e-6
    (1, True)
    """
    if kind not in KINDS:
        raise unknown("kind of tuning", kind, KINDS)
    mask = mask_name(v)
    x0 = without_padding(x0, cond or {}, mask)
    check_start(x0)
    if len(x0) < 2 * MIN_NOISES:
        raise UserError(f"tuning needs at least {2 * MIN_NOISES} noises, half of them to judge by, got {len(x0)}.")
    calls = check_steps(calls)
    path = make_path(path) if isinstance(path, str) else path
    field, half = masked_field(v, mask), len(x0) // 2
    before = field.calls
    whole = Pilot(field, x0, cond)
    pilot, held_out = whole.split(half)
    if kind == "auto":
        return pick(pilot, held_out, calls, path)
    few = noises_for("auto", x0.shape[1:]) // 2
    some, others = pilot.part(few), held_out.part(few)
    choice = pick(some, others, calls, path, refined=1)
    start = choice.table
    if not can_start(start):
        start = next(found.table for found in scan(some, calls, path) if can_start(found.table))
    table = fit(pilot, held_out, start)
    if held_out.error(table) >= held_out.error(choice.table):
        return choice
    return replace(
        choice,
        table=table,
        solver=FITTED,
        grid=table.grid,
        error=held_out.error(table),
        pilot_error=pilot.error(table),
        nfe=field.calls - before,
    )
