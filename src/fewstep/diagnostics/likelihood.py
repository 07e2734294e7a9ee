r"""Exact log-likelihood of a flow: the change of variables along its trajectories.

Along ``dz/dt = v(z, t)`` the log-density of the moving point changes by ``-div v`` (Neural ODEs, arXiv:1806.07366,
theorem 1), so from the data ``z(1) = x1`` back to the noise ``z(0)``

    log p_1(x1) = log p_0(z(0)) - int_0^1 div v(z(t), t) dt.

The state and the integral ``l`` are solved together, backwards on one grid: ``l(1) = 0``, ``l' = div v``, and
``log p_1 = log p_0(z(0)) + l(0)``. The divergence is a sum of quadratic forms ``w^T (dv/dx) w``: over the D unit
vectors it is exact; over one random ``w = e`` with independent signs (Rademacher) it is unbiased, with variance
``2 (|J_s|_F^2 - sum_i J_ii^2)``, ``J_s`` the symmetric part of the Jacobian (Hutchinson; FFJORD, arXiv:1810.01367,
section 3.1). A probe is kept along a solve, so that what is solved is an ODE, and probes are averaged over solves.

**Bits per dimension.** Discrete data with values ``delta`` apart (8 bits on [-1, 1]: 2/256) have probabilities
``P(k)``, not densities. With uniform noise of one quantum added, ``y = x_k + delta u``, ``u ~ U[0, 1)^D``, Jensen's
inequality gives ``E log p(y) <= log int p(x_k + delta u) du = log(P(k) / delta^D)``, so that

    bits/dim = -log p(y) / (D ln 2) + log2(1 / delta)

is on average an upper bound of the code length ``-log2 P(k) / D``, and equal to it where the density is constant on
every cell (arXiv:1511.01844, section 3.1). Without the noise it bounds nothing: the density of discrete data can be
made arbitrarily large.

**Padding.** With a mask, a sample is its valid entries: ``log p_0`` is that of the valid entries alone, and padded
ones neither move nor count in the divergence (:mod:`.masks`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from fewstep.diagnostics.jacobian_trace import QuadraticForms, chunk, rademacher
from fewstep.diagnostics.masks import mask_name, masked_field, valid_entries, without_padding
from fewstep.errors import UserError, unknown
from fewstep.flow.derivatives import rows_of
from fewstep.flow.field import Velocity, check_conditions
from fewstep.flow.grids import Grid, GridSpec, explicit_times, make_grid
from fewstep.flow.noise import BLOCK, block_rows, generator_for
from fewstep.solvers.solve import check_start, solve
from fewstep.solvers.tables import find_solver

Divergence = Literal["auto", "exact", "hutchinson"]
STEPS = 100  # default solver steps; chosen, not tuned
EXACT_UP_TO = 128  # most dimensions in which "auto" computes the exact divergence
CONVERGED = 0.005  # largest change with half the steps, in bits per dimension, that counts as converged; not tuned
CHECKED = 64  # samples solved again with half the steps


@final
@dataclass(frozen=True, eq=False)
class Likelihood:
    """What :func:`log_likelihood` returns; B samples of D dimensions.

    Attributes:
        log_prob: log-density in nats, (B,).
        x0: the noise of every sample, like ``x1``.
        probe_error: standard error of ``log_prob`` over its probes, (B,), NaN with one probe; None when exact.
        nfe: network evaluations per sample, counted, the differentiated ones of every direction included; the
            checks are not.
        directions: directions in which every evaluation was differentiated: D, or the number of probes.
        dimensions: D, padded entries included.
        valid: number of valid entries of every sample, (B,) like ``log_prob``; None without a mask.
        solver: solver and steps.
        divergence: how it was computed.
        dtype: of the solve.
        round_trip: largest absolute error of ``x1`` after solving ``x0`` forward again; None without checks.
        coarse: ``log_prob`` of the first samples, at most 64, with every second grid time left out; None without checks
            or with one step.
        discretisation: mean ``|log_prob - coarse|`` in bits per dimension: for a solver of order p about ``2^p - 1``
            times the error of ``log_prob``.
        converged: whether ``discretisation`` is at most 0.005; None without checks.
        notes: warnings for whoever quotes the value.

    >>> found = log_likelihood(lambda x, t: 0 * x, torch.zeros(1, 2), steps=4)
    >>> round(float(found.bits_per_dim(2 / 256)), 4)  # log2(2 pi) / 2 + 7
    8.3257
    """

    log_prob: Tensor
    x0: Tensor
    probe_error: Tensor | None
    nfe: int
    directions: int
    dimensions: int
    valid: Tensor | None
    solver: str
    divergence: str
    dtype: torch.dtype
    round_trip: float | None
    coarse: Tensor | None
    discretisation: float | None
    converged: bool | None
    notes: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Mean log-density over the samples, nats."""
        return float(self.log_prob.detach().mean())

    @property
    def mean_error(self) -> float:
        """Standard error of :attr:`mean` over the samples (and so over their probes); NaN for one sample."""
        values = self.log_prob.detach()
        return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan

    @property
    def nats_per_dim(self) -> Tensor:
        """``log_prob / D``, (B,); with a mask D is each sample's own number of valid entries."""
        return self.log_prob / (self.dimensions if self.valid is None else self.valid)

    @property
    def nats_per_dim_error(self) -> float:
        """Standard error over the samples of the mean of :attr:`nats_per_dim`; NaN for one sample."""
        values = self.nats_per_dim.detach()
        return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan

    def bits_per_dim(self, quantum: float) -> Tensor:
        """``-log_prob / (D ln 2) + log2(1 / quantum)``, (B,), of data with :func:`dequantise`'s noise.

        Args:
            quantum: distance between neighbouring values, in the units of ``x1``: 2/256 for 8-bit images in [-1, 1],
                which adds 7.

        Returns:
            (B,). Source: arXiv:1511.01844, section 3.1.

        Raises:
            UserError: a quantum that is no positive number.
        """
        return -self.nats_per_dim / math.log(2.0) - math.log2(_check_quantum(quantum))


def log_likelihood(
    v: Velocity,
    x1: Tensor,
    *,
    cond: Mapping[str, Any] | None = None,
    solver: str = "rk4",
    steps: int | None = None,
    grid: GridSpec = "uniform",
    divergence: Divergence = "auto",
    probes: int = 1,
    seed: int = 0,
    row: int = 0,
    base: str = "gaussian",
    mask: str | None = None,
    grad: bool = False,
    check: bool = True,
) -> Likelihood:
    """Log-density of ``x1`` under the flow of ``v``, in nats: ``log p_0(z(0)) - int_0^1 div v(z(t), t) dt``.

    Args:
        v: ``v(x, t, **cond)``, t = 0 noise, t = 1 data.
        x1: data, (B, ...), floating point; the solve keeps its dtype (float64 for small problems).
        cond: conditions, tensors with one row per sample; what is no tensor is handed on as it is.
        solver: a deterministic fixed-step solver.
        steps: solver steps, default 100 on a named grid; an explicit grid fixes them.
        grid: as in :func:`fewstep.solve`.
        divergence: ``exact`` (D derivatives per evaluation), ``hutchinson`` (one per probe), or ``auto``: exact up to
            128 dimensions.
        probes: Rademacher probes per sample, for ``hutchinson``.
        seed, row: probes are a function of ``seed`` and of the sample's number, which is ``row`` for the first.
        base: law of the noise; ``gaussian``, N(0, I), is the only one.
        mask: name of the condition that is 1 at the valid entries of ``x1`` and 0 at padded ones, (B,), (B, T) or of
            the shape of ``x1``; by default the mask that an adapted network declares. Only valid entries count.
        grad: build the autograd graph, to ``x1`` and to the network's parameters (the whole solve is kept in memory).
        check: solve forward again, and the first 64 samples with half the steps.

    Returns:
        A :class:`Likelihood`. The log-density of a solve with few steps is not that of the flow: see ``converged``.
        Source: arXiv:1806.07366, theorem 1; arXiv:1810.01367, section 3.1.

    Raises:
        UserError: a start or a grid that :func:`fewstep.solve` refuses, conditions of another length, an unknown base
            or divergence, a mask that is not among the conditions or does not fit, a stochastic solver, a velocity that
            is not finite, ``grad`` with a network that lets no
            gradient through.

    >>> round(log_likelihood(lambda x, t: 0 * x, torch.zeros(1, 2), steps=4).mean, 4)  # log N(0; 0, I)
    -1.8379
    """
    mask = mask_name(v) if mask is None else mask
    x1 = without_padding(x1, cond or {}, mask)
    check_start(x1)
    given = _check(x1, dict(cond or {}), solver, divergence, probes, base)
    times = make_grid(grid, STEPS if steps is None and explicit_times(grid) is None else steps)
    times = times if times[0] > times[-1] else times[::-1]
    if (times[0], times[-1]) != (1.0, 0.0):
        raise UserError(f"the likelihood needs a grid from 0 to 1, got {times[-1]:g} to {times[0]:g}.")
    dimensions = x1[0].numel()
    exact = divergence == "exact" or (divergence == "auto" and dimensions <= EXACT_UP_TO)
    forms = QuadraticForms(masked_field(v, mask), grad)
    forms.choose(x1.detach(), given)
    valid = None if mask is None else valid_entries(x1, given, mask).flatten(1).sum(1).to(x1)
    problem = _Problem(forms, solver, dimensions if exact else probes, exact, seed, row, valid)
    log_prob, x0, error = problem.solve(x1, given, times)
    bad = int((~torch.isfinite(log_prob)).sum())
    if bad:
        raise UserError(
            f"the log-likelihood is NaN or infinite for {bad} of {len(x1)} samples: the network's velocity or its "
            "derivative is not finite on their trajectories. Check its weights and the scale of the data."
        )
    nfe = forms.spent // len(x1)
    found = problem.check(x1.detach(), x0.detach(), log_prob.detach(), given, times) if check else _Checks()
    return Likelihood(
        log_prob=log_prob,
        x0=x0,
        probe_error=error,
        nfe=nfe,
        directions=problem.directions,
        dimensions=dimensions,
        valid=valid,
        solver=f"{solver}, {len(times) - 1} steps",
        divergence=problem.name(),
        dtype=x1.dtype,
        **vars(found),
    )


def dequantise(x: Tensor, quantum: float, *, seed: int = 0, row: int = 0) -> Tensor:
    """``x + quantum u`` with ``u ~ U[0, 1)`` per value: discrete data spread over their cells ``[x, x + quantum)``.

    Args:
        x: (B, ...), floating point, the lower edges of the cells: ``2 k / 256 - 1`` for 8-bit values k in [-1, 1].
        quantum: distance between neighbouring values.
        seed, row: the noise is a function of ``seed`` and of the sample's number, which is ``row`` for the first.

    Raises:
        UserError: a quantum that is no positive number.

    >>> x = dequantise(torch.zeros(3, 1), 0.5)
    >>> bool((x >= 0).all() and (x < 0.5).all())
    True
    """
    quantum = _check_quantum(quantum)
    shape = x.shape[1:]
    noise = block_rows(
        len(x),
        row,
        lambda block: torch.rand(BLOCK, *shape, generator=generator_for(seed, "dequantise", block)),
        empty=torch.empty(0, *shape),
    )
    return x + quantum * noise.to(x)


@final
@dataclass(frozen=True)
class _Checks:
    """The fields of a :class:`Likelihood` that need further solves."""

    round_trip: float | None = None
    coarse: Tensor | None = None
    discretisation: float | None = None
    converged: bool | None = None
    notes: tuple[str, ...] = ("not checked: whether the solver has converged is not known",)


@final
@dataclass(frozen=True)
class _Problem:
    """One flow, its solver and its divergence, for any samples."""

    forms: QuadraticForms
    solver: str
    directions: int
    exact: bool
    seed: int
    row: int
    valid: Tensor | None  # number of valid entries of all samples, (B,)

    def name(self) -> str:
        """The divergence in words, such as ``exact, 2 directions, reverse``."""
        kind, unit = ("exact", "direction") if self.exact else ("Hutchinson, Rademacher", "probe")
        return f"{kind}, {self.directions} {unit}{'s' * (self.directions != 1)}, {self.forms.used}"

    def solve(self, x1: Tensor, cond: dict[str, Any], times: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
        """``log_prob`` (B,), the noise (B, ...), and the standard error over probes (B,); x1 begins with sample 0."""
        size = chunk(x1, self.directions)
        with torch.set_grad_enabled(self.forms.grad):
            parts = [
                self._solve(x1[i : i + size], i, rows_of(cond, len(x1), slice(i, i + size)), times)
                for i in range(0, len(x1), size)
            ]
            terms = torch.cat([term for term, _ in parts])
            error = None if self.exact else _standard_error(terms.detach())
            return terms.mean(1), torch.cat([x0 for _, x0 in parts]), error

    def _solve(self, x1: Tensor, first: int, cond: dict[str, Any], times: Grid) -> tuple[Tensor, Tensor]:
        """``log p_0(z(0)) + l(0)``, a column per probe, (b, M) or (b, 1), and ``z(0)``; x1 begins at row ``first``."""
        dimensions = x1[0].numel()
        if self.exact:
            w = torch.eye(dimensions, dtype=x1.dtype, device=x1.device).expand(len(x1), -1, -1)
        else:
            w = rademacher(len(x1), dimensions, self.directions, seed=self.seed, row=self.row + first).to(x1)
        start = torch.cat([x1.flatten(1), x1.new_zeros(len(x1), 1 if self.exact else self.directions)], 1)

        def augmented(state: Tensor, t: Tensor) -> Tensor:
            """``(v, w^T J w)`` at ``(z, l)``; the divergence does not depend on ``l``."""
            v, terms = self.forms(state[:, :dimensions].reshape(x1.shape), t, w, cond)
            return torch.cat([v.flatten(1), terms.sum(1, keepdim=True) if self.exact else terms], 1)

        end = solve(augmented, start, solver=self.solver, grid=times, grad=self.forms.grad).x
        z, change = end[:, :dimensions], end[:, dimensions:]
        sizes = dimensions if self.valid is None else self.valid[first : first + len(x1), None]
        log_base = -0.5 * (z.square().sum(1, keepdim=True) + sizes * math.log(2 * math.pi))
        return log_base + change, z.reshape(x1.shape)

    @torch.no_grad()
    def check(self, x1: Tensor, x0: Tensor, log_prob: Tensor, cond: dict[str, Any], times: Grid) -> _Checks:
        """Solve forward again, and some samples with half the steps."""
        size = chunk(x1, 1)
        trips = [
            solve(
                self.forms.field,
                x0[i : i + size],
                solver=self.solver,
                grid=times[::-1],
                cond=rows_of(cond, len(x1), slice(i, i + size)),
            ).x
            for i in range(0, len(x1), size)
        ]
        trip = float((torch.cat(trips) - x1).abs().max())
        if len(times) == 2:
            return _Checks(trip, converged=False, notes=("one step: a few-step log-density is not a likelihood",))
        again = replace(self, forms=self.forms.without_graph())
        few, some = x1[:CHECKED], rows_of(cond, len(x1), slice(CHECKED))
        coarse = again.solve(few, some, (*times[:-1:2], times[-1]))[0]
        sizes = x1[0].numel() if self.valid is None else self.valid[:CHECKED]
        bits = float(((log_prob[:CHECKED] - coarse).abs() / sizes).mean()) / math.log(2.0)
        if bits <= CONVERGED:
            return _Checks(trip, coarse, bits, True, ())
        note = (
            f"a few-step log-density is not a likelihood: half the steps move this one by {bits:.3g} bits per "
            f"dimension (limit {CONVERGED:g}). Take more steps."
        )
        return _Checks(trip, coarse, bits, False, (note,))


def _standard_error(terms: Tensor) -> Tensor:
    """Standard error of the mean of every row; NaN where there is one value."""
    count = terms.shape[1]
    return terms.std(1) / math.sqrt(count) if count > 1 else torch.full_like(terms[:, 0], math.nan)


def _check(x1: Tensor, cond: dict[str, Any], solver: str, divergence: str, probes: int, base: str) -> dict[str, Any]:
    if base != "gaussian":
        raise unknown("base", base, ["gaussian"])
    if divergence not in ("auto", "exact", "hutchinson"):
        raise unknown("divergence", divergence, ["auto", "exact", "hutchinson"])
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise UserError(f"probes must be a whole number of at least 1, got {probes!r}.")
    if find_solver(solver).stochastic:
        raise UserError(f"solver {solver!r} adds noise, and the likelihood follows the ODE: take 'rk4'.")
    check_conditions(cond, len(x1))
    return cond


def _check_quantum(quantum: float) -> float:
    if isinstance(quantum, bool) or not isinstance(quantum, (int, float)) or not (0.0 < quantum < math.inf):
        raise UserError(
            "quantum is the distance between neighbouring values of the discrete data, in the network's units, and "
            f"must be a positive number (8-bit images in [-1, 1]: 2/256), got {quantum!r}."
        )
    return float(quantum)
