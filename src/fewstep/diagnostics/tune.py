"""The best way to sample a frozen field with so many network calls: ``fs.tune``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

from torch import Tensor

from fewstep.diagnostics.cost import Allowance, Cost, RowCount, Watch, check_shape, most_that_fits
from fewstep.diagnostics.fit import can_start, fit, fit_rows
from fewstep.diagnostics.masks import mask_name, masked_field, without_padding
from fewstep.diagnostics.pick import FITTED, Choice, pick, pick_rows, scan, scan_rows
from fewstep.diagnostics.pilot import REFERENCE, RK4_CALLS, TRIED, Pilot, reference_rows, reference_steps
from fewstep.errors import UserError, unknown
from fewstep.flow.derivatives import rows_of
from fewstep.flow.field import Velocity, check_conditions
from fewstep.flow.grids import check_steps
from fewstep.flow.paths import AffinePath, make_path
from fewstep.solvers.solve import check_start, solve
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
    max_rows: int | None = None,
    progress: Watch | None = None,
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
        max_rows: most network rows (calls times samples, see :func:`tuning_cost`) to spend. Where it needs be, fewer
            noises are used, and the reference has fewer steps than it needs to converge; the result's ``notes`` say
            what was reduced. None for no limit.
        progress: called as ``progress(done, total)`` after every network call, in network rows; the total is what is
            spent at most, known when the reference is found.

    Returns:
        A :class:`Choice`; ``fs.solve(v, x0, solver=choice.table)`` samples with it.

    Raises:
        UserError: fewer than 64 noises, conditions of another length, calls below 1, an unknown kind, a flow
            that is not finite, ``max_rows`` below what 64 noises take.

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
    field = RowCount(masked_field(v, mask))
    allowance, given = Allowance(field, max_rows, progress), dict(cond or {})
    check_conditions(given, len(x0))
    if progress is not None or allowance.limited:  # network calls of one evaluation
        solve(field, x0[:1], steps=1, cond=rows_of(given, len(x0), slice(1)))
    search = _Search(field, calls, kind, path, allowance, max(1, field.rows))
    before = field.calls
    whole = search.limited_pilot(x0, given) if allowance.limited else search.pilot(x0, given)
    choice = search.run(whole, before)
    allowance.finish()
    return replace(choice, notes=tuple(allowance.notes), nfe=field.calls - before) if allowance.limited else choice


def tuning_cost(
    shape: Sequence[int],
    *,
    calls: int,
    kind: str = "auto",
    path: AffinePath | str = LINEAR,
    reference: int = REFERENCE[0],
    evaluations: int = 1,
) -> Cost:
    """The network rows that :func:`tune` takes at most, counted before it runs.

    How many it takes depends on what is found: on which tables follow each other, and on how many iterations a fit
    makes. On closed-form flows ``auto`` took .93 to 1 of this number, and ``fitted`` .56 to .99.

    Args:
        shape: of the noises, (M, ...).
        calls, kind, path: as for :func:`tune`.
        reference: RK4 steps that the reference needs: 16, as for most flows, 32, 64, 128 or 256.
        evaluations: network calls of one evaluation: 2 with guidance.

    Returns:
        A :class:`~fewstep.diagnostics.cost.Cost`.

    Raises:
        UserError: a shape of fewer than two sizes, calls below 1, an unknown kind.

    >>> tuning_cost((512, 64), calls=8).rows // 512
    910
    """
    if kind not in KINDS:
        raise unknown("kind of tuning", kind, KINDS)
    noises, *sample = check_shape(shape)
    path = make_path(path) if isinstance(path, str) else path
    searching = _searching(noises, tuple(sample), check_steps(calls), kind, path)
    return Cost(reference_rows(reference, noises) + searching) * evaluations


def _searching(noises: int, sample: tuple[int, ...], calls: int, kind: str, path: AffinePath) -> int:
    """Evaluations, summed over noises, once the reference is there, at most."""
    half, other = noises // 2, noises - noises // 2
    if kind == "auto":
        return pick_rows(half, other, calls, path)
    few = noises_for("auto", sample) // 2
    some, others = min(half, few), min(other, few)
    found = pick_rows(some, others, calls, path, refined=1) + fit_rows(half, other, calls)
    again = 0 if calls == 1 else scan_rows(some, calls, path)  # where a fit cannot start from the choice
    return found + again + other * (1 + 2 * calls) + half * calls


@final
@dataclass(frozen=True)
class _Search:
    """One tuning: its field and settings, and what it may spend.

    Attributes:
        each: network calls of one evaluation.
    """

    field: RowCount
    calls: int
    kind: str
    path: AffinePath
    allowance: Allowance
    each: int

    def searching(self, x0: Tensor, noises: int) -> int:
        """Network rows at most, once the reference is there."""
        return self.each * _searching(noises, tuple(x0.shape[1:]), self.calls, self.kind, self.path)

    def pilot(self, x0: Tensor, cond: dict[str, Any]) -> Pilot:
        """All noises with their reference."""
        if self.allowance.progress is None:
            return Pilot(self.field, x0, cond)
        after = self.searching(x0, len(x0))
        self.allowance.expect(self.each * reference_rows(REFERENCE[0], len(x0)) + after)
        whole = Pilot(self.field, x0, cond)
        self.allowance.expect(after)
        return whole

    def limited_pilot(self, x0: Tensor, cond: dict[str, Any]) -> Pilot:
        """As many noises, and as fine a reference, as the limit allows."""
        given, least = len(x0), 2 * MIN_NOISES

        def cost(noises: int) -> int:
            return self.each * reference_rows(REFERENCE[0], noises) + self.searching(x0, noises)

        def solving(noises: int, steps: int) -> int:
            return self.each * RK4_CALLS * noises * steps + self.searching(x0, noises)

        count = most_that_fits(least, given, cost, self.allowance.left)
        if count is None:
            raise UserError(
                f"max_rows={self.allowance.limit} is less than the {self.field.rows + cost(least)} network rows that "
                f"tuning {self.kind!r} with {self.calls} calls may take on {least} noises, the fewest: give more."
            )
        self.allowance.expect(cost(count))
        few = min(TRIED, count)

        def affordable(tried: int, used: int) -> bool:
            return self.each * RK4_CALLS * few * tried + solving(least, used) <= self.allowance.left

        steps, settled = reference_steps(self.field, x0[:few], rows_of(cond, given, slice(few)), affordable)
        count = most_that_fits(least, count, partial(solving, steps=steps), self.allowance.left) or least
        if count < given:
            self.allowance.note(f"{count} of {given} noises were used")
        if not settled:
            self.allowance.note(f"the reference was not refined beyond {steps} RK4 steps")
        self.allowance.expect(solving(count, steps))
        return Pilot(self.field, x0[:count], rows_of(cond, given, slice(count)), steps=steps)

    def run(self, whole: Pilot, before: int) -> Choice:
        """Pick, and for ``fitted`` fit, on the first half of the noises and by the errors on the second."""
        pilot, held_out = whole.split(len(whole) // 2)
        if self.kind == "auto":
            return pick(pilot, held_out, self.calls, self.path)
        few = noises_for("auto", whole.x0.shape[1:]) // 2
        some, others = pilot.part(few), held_out.part(few)
        choice = pick(some, others, self.calls, self.path, refined=1)
        start = choice.table
        if not can_start(start):
            start = next(found.table for found in scan(some, self.calls, self.path) if can_start(found.table))
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
            nfe=self.field.calls - before,
        )
