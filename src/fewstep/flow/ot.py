r"""Minibatch optimal transport: which noise belongs to which data.

For n noises and n data points the assignment problem is

    min over permutations p of  sum_i ||x0[p(i)] - x1[i]||^2,   equivalently  max  sum_i <x0[p(i)], x1[i]>,

so only the inner products matter (Tong et al., arXiv:2302.00482; Pooladian et al., arXiv:2304.14772). The answer is
always a permutation: sampling a transport plan with replacement leaves out about a third of a batch.

* one dimension: sorting both sides is optimal;
* n <= EXACT_ROWS: scipy's exact solver;
* beyond: four steps in float32, each a handful of passes over the n x n matrix.
  1. a few Sinkhorn scalings of exp(<x0, x1> / eps) give approximate dual prices (Cuturi, arXiv:1306.0895);
  2. every noise chooses its best data point at these prices, every data point keeps the best of the noises that chose
     it;
  3. steps 1 and 2 are repeated among the noises and data left over, until few enough are left for the exact solver;
  4. sweeps of pairwise exchanges: for each i the partner j whose exchange gains most, non-overlapping exchanges
     applied, until a sweep lowers the cost by less than half a per cent.

Measured excess cost over the optimum and times are in ``benchmarks/ot.py``.
"""

from __future__ import annotations

import functools
import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.errors import UserError

EXACT_ROWS = 128
_KEPT_ROWS = 1024  # work matrices up to this size are kept between calls (at most 4 x 8 MiB)
_TEMPERATURE = 0.05  # eps of the Sinkhorn kernel, in standard deviations of the inner products
_SCALINGS = (10, 5)  # Sinkhorn iterations on the whole matrix, and on the leftovers
_LEFTOVER = 64  # at most so many remaining rows go to the exact solver
_STALL = 1 / 40  # a round that pairs a smaller share than this is the last before the exact solver (many equal points)
_FLOOR = np.float32(1e-12)  # added to the kernel so that no Sinkhorn sum is 0
_SWEEPS = 8  # at most
_GAIN = 5e-3  # a sweep that lowers the cost by less than this share is the last

Array = NDArray[np.float32]
Index = NDArray[np.intp]


def assignment(x0: Tensor, x1: Tensor) -> Tensor:
    """Permutation ``p`` (n,) that pairs ``x0[p]`` with ``x1`` at (nearly) least squared distance.

    Args:
        x0: noises (n, ...).
        x1: data (n, ...), same shape.

    Returns:
        LongTensor (n,) on the device of ``x1``, a permutation of 0..n-1; optimal in one dimension and for
        n <= 128, otherwise within a few per cent of the optimal cost. Deterministic; needs n^2 floats.

    Raises:
        UserError: shapes differ, or a value is not finite.

    >>> assignment(torch.tensor([[5.0], [0.0]]), torch.tensor([[1.0], [9.0]]))
    tensor([1, 0])
    """
    if x0.shape != x1.shape or x0.ndim < 2:
        raise UserError(
            f"optimal transport pairs equally many points of one shape, but x0 is {tuple(x0.shape)} and "
            f"x1 is {tuple(x1.shape)}: give both as (n, ...)."
        )
    a, b = _rows(x0), _rows(x1)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError("optimal transport got NaN or infinite values in x0 or x1: check the data.")
    return torch.from_numpy(_permutation(a, b).astype(np.int64)).to(x1.device)


def _rows(x: Tensor) -> NDArray[np.float64]:
    """(n, D) on the host, centred: a shift of either side changes no assignment but costs digits."""
    rows = x.detach().reshape(x.shape[0], -1).to("cpu", torch.float64).numpy()
    return rows - rows.mean(0) if len(rows) else rows


def _permutation(a: NDArray[np.float64], b: NDArray[np.float64]) -> Index:
    n, dim = a.shape
    if dim == 1:
        perm = np.empty(n, dtype=np.intp)
        perm[np.argsort(b[:, 0], kind="stable")] = np.argsort(a[:, 0], kind="stable")
        return perm
    if n <= EXACT_ROWS:
        return _exact(a @ b.T)
    matrices = _buffers if n <= _KEPT_ROWS else _buffers.__wrapped__
    inner, work = matrices(n, threading.get_ident())
    a32, b32 = a.astype(np.float32), b.astype(np.float32)
    np.matmul(a32, b32.T, out=inner)
    perm = _round(inner, work)
    np.take(inner, perm, axis=0, out=work)
    return _sweep(work, inner, perm, float((a32**2).sum() + (b32**2).sum()))


@functools.lru_cache(maxsize=4)
def _buffers(n: int, thread: int) -> tuple[Array, Array]:
    """Two (n, n) matrices kept per thread: fresh pages would cost as much as the arithmetic."""
    return np.empty((n, n), dtype=np.float32), np.empty((n, n), dtype=np.float32)


def _exact(inner: NDArray[np.floating]) -> Index:
    """Row assigned to each column, maximising the sum of inner products."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(inner, maximize=True)
    perm = np.empty(len(rows), dtype=np.intp)
    perm[columns] = rows
    return perm


def _kernel(inner: Array, out: Array) -> Array:
    """exp(inner / eps), each row and column scaled to maximum 1; eps follows the spread of ``inner``."""
    mean = inner.mean()
    variance = float(np.vdot(inner, inner)) / inner.size - float(mean) ** 2
    if variance > 0:
        np.multiply(inner, np.float32(1 / (_TEMPERATURE * variance**0.5)), out=out)
    else:
        out.fill(0)
    out -= out.max(1, keepdims=True)
    out -= out.max(0)
    np.exp(out, out=out)
    out += _FLOOR
    return out


def _scale(kernel: Array, iterations: int) -> None:
    """Sinkhorn scaling in place: columns are scaled to equal sums ``iterations`` times, then rows to the sum 1."""
    v: Array = np.ones(len(kernel), dtype=np.float32)
    for _ in range(iterations):
        v = np.reciprocal(np.reciprocal(kernel @ v) @ kernel)
    kernel *= v
    kernel *= np.reciprocal(kernel.sum(1))[:, None]


def _round(inner: Array, work: Array) -> Index:
    """Steps 1 to 3: every row bids for its best column, the best bid is kept, and the rest is repeated."""
    perm = np.empty(len(inner), dtype=np.intp)
    rows = columns = np.arange(len(inner))
    left, kernel = inner, _kernel(inner, work)
    _scale(kernel, _SCALINGS[0])
    while len(rows) > _LEFTOVER:
        wish = kernel.argmax(1)
        bidders = np.argsort(kernel[np.arange(len(wish)), wish])
        winner = np.full(len(columns), -1)
        winner[wish[bidders]] = bidders  # of several bids for one column the last, that is the best, stays
        sold = winner >= 0
        perm[columns[sold]] = rows[winner[sold]]
        loser = np.ones(len(rows), dtype=bool)
        loser[winner[sold]] = False
        left = left[np.ix_(loser, ~sold)]
        rows, columns = rows[loser], columns[~sold]
        if np.count_nonzero(sold) < _STALL * len(sold):
            break
        kernel = _kernel(left, work.reshape(-1)[: left.size].reshape(left.shape))
        _scale(kernel, _SCALINGS[1])
    if len(rows):
        perm[columns] = rows[_exact(left)]
    return perm


def _sweep(s: Array, exchange: Array, perm: Index, norms: float) -> Index:
    """Step 4: exchanging the partners of i and j gains s_ij + s_ji - s_ii - s_jj, s = inner[perm]."""
    rows = np.arange(len(perm))
    for _ in range(_SWEEPS):
        own = s.diagonal().copy()
        torch.from_numpy(exchange).copy_(torch.from_numpy(s).T)  # blocked: 3x faster than numpy's s + s.T
        exchange += s
        exchange -= own
        partner = exchange.argmax(1)
        gain = exchange[rows, partner] - own
        first, second, total = _disjoint(gain, partner)
        both, swapped = first + second, second + first
        perm[both] = perm[swapped]
        s[both] = s[swapped]
        if total <= _GAIN * (norms / 2 - float(own.sum())):
            break
    return perm


def _disjoint(gain: Array, partner: Index) -> tuple[list[int], list[int], float]:
    """The exchanges (i, partner[i]) of positive gain that touch no row twice, and their total gain."""
    order = np.argsort(-gain)[: np.count_nonzero(gain > 0)]
    taken = bytearray(len(gain))
    first: list[int] = []
    second: list[int] = []
    total = 0.0
    for i, j, g in zip(order.tolist(), partner[order].tolist(), gain[order].tolist(), strict=True):
        if i != j and not (taken[i] or taken[j]):
            taken[i] = taken[j] = 1
            first.append(i)
            second.append(j)
            total += g
    return first, second, total
