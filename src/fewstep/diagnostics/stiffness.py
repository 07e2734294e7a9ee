r"""Eigenvalues of ``∂v/∂x`` along trajectories: how stiff a flow is.

An explicit step of length h multiplies a small error along an eigenvector by about ``1 + h λ``: for real negative λ
with ``h |λ| > 1`` Euler overshoots, with ``h |λ| > 2`` errors grow. For Gaussian data of width s,

    λ(t) = (t s^2 - (1 - t)) / ((1 - t)^2 + s^2 t^2),

which tends to ``-1 / (1 - t)`` as s -> 0 and is strongest, about ``-1 / (2 s)``, at ``t = 1 - s``.

Arnoldi's method, for all samples at once: an orthonormal basis Q of ``span(q, J q, J^2 q, …)`` with one Jacobian-vector
product per vector, and the eigenvalues of ``Q^T J Q``, complex pairs included (Saad, Numerical Methods for Large
Eigenvalue Problems, 2nd ed., sec. 6.2). With as many vectors as dimensions it is exact; with fewer, the outermost
eigenvalues come first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

VECTORS = 16  # Jacobian-vector products per sample; chosen, not tuned


def eigenvalues(
    product: Callable[[Tensor], Tensor], start: Tensor, vectors: int = VECTORS, valid: Tensor | None = None
) -> Tensor:
    """Ritz values of a linear map of every sample, by Arnoldi's method.

    Args:
        product: ``q -> J q``, both (B, ...), its own J for every row.
        start: random directions, (B, ...).
        vectors: Jacobian-vector products per sample, at most; no more than there are dimensions are used.
        valid: valid entries of every sample, bool (B, ...), where J has neither rows nor columns of the others: these
            would add eigenvalues 0. A sample with fewer than K valid entries has its first eigenvalue repeated.

    Returns:
        (B, K) complex128 on the CPU, ``K = min(vectors, D)``. Source: Saad, Numerical Methods for Large Eigenvalue
        Problems, 2nd ed., sec. 6.2.

    >>> eigenvalues(lambda q: 3 * q, torch.ones(1, 1))
    tensor([[3.+0.j]], dtype=torch.complex128)
    """
    drawn = start.flatten(1)
    inside = torch.ones_like(drawn) if valid is None else valid.flatten(1).to(drawn)
    flat = drawn * inside
    count = min(vectors, flat.shape[1])
    tiny = torch.finfo(flat.dtype).eps ** 0.75
    basis = [flat / flat.norm(dim=1, keepdim=True)]
    projected = flat.new_zeros(len(flat), count, count)
    for j in range(count):
        w = product(basis[j].reshape(start.shape)).flatten(1)
        size = w.norm(dim=1, keepdim=True)
        w, coefficients = _orthogonal(w, basis)
        projected[:, : j + 1, j] = coefficients
        if j == count - 1:
            break
        length = w.norm(dim=1, keepdim=True)
        closed = length <= tiny * size  # the span is mapped into itself: continue with another direction
        projected[:, j + 1, j] = torch.where(closed, 0.0, length)[:, 0]
        other, _ = _orthogonal(drawn.roll(j + 1, 1) * inside / drawn.norm(dim=1, keepdim=True), basis)
        following = torch.where(closed, _unit(other), w / torch.where(closed, 1.0, length))
        basis.append(following)
    projected = projected.cpu().double()
    return torch.linalg.eigvals(projected) if valid is None else _leading(projected, inside.sum(1).long().cpu())


def _unit(w: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays zero."""
    length = w.norm(dim=1, keepdim=True)
    return w / torch.where(length > 0, length, 1.0)


def _leading(projected: Tensor, sizes: Tensor) -> Tensor:
    """Eigenvalues of the leading blocks of these sizes, (B, K); the first is repeated where there are fewer than K."""
    count = projected.shape[-1]
    found = torch.empty(projected.shape[:2], dtype=torch.complex128)
    for size in sizes.clamp(max=count).unique().tolist():
        chosen = sizes.clamp(max=count) == size
        values = torch.linalg.eigvals(projected[chosen, :size, :size])
        found[chosen] = torch.cat([values, values[:, :1].expand(-1, count - size)], 1)
    return found


def _orthogonal(w: Tensor, basis: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The part of w orthogonal to the basis, and w's coefficients in it; projected twice because of rounding."""
    stacked = torch.stack(basis, 1)
    first = torch.einsum("bkd,bd->bk", stacked, w)
    w = w - torch.einsum("bk,bkd->bd", first, stacked)
    second = torch.einsum("bkd,bd->bk", stacked, w)
    return w - torch.einsum("bk,bkd->bd", second, stacked), first + second
