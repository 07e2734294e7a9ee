"""Data with a part hidden or blurred, for the in-painting and super-resolution couplings (arXiv:2310.03725)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.errors import UserError


def random_mask(x1: Tensor, generator: torch.Generator) -> Tensor:
    """Masks (1 = known) for the rows of ``x1``: (B, D) or (B, 1, H, W), with at least one 0 in each.

    Raises:
        UserError: ``x1`` is neither (B, D) nor (B, C, H, W).
    """
    if x1.ndim == 2:
        return _coordinate_mask(x1.shape[0], x1.shape[1], generator).to(x1)
    if x1.ndim == 4:
        return _rectangle_mask(x1.shape[0], x1.shape[2], x1.shape[3], generator).to(x1)
    raise UserError(f"x1 has shape {tuple(x1.shape)}: masks are made for vectors (B, D) and images (B, C, H, W).")


def inpainting_base(x1: Tensor, mask: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(x0, context): x0 = mask x1 + (1 - mask) noise, context = [mask, mask x1] along dimension 1."""
    known = mask * x1
    return known + (1 - mask) * noise, torch.cat([mask, known], dim=1)


def block_average(x1: Tensor, factor: int) -> Tensor:
    """Every value replaced by the mean of its block of ``factor`` (per side); same shape.

    Raises:
        UserError: sides that are no multiples of ``factor``, or another number of dimensions than 2 and 4.

    >>> block_average(torch.tensor([[1.0, 3.0, 5.0, 5.0]]), 2)
    tensor([[2., 2., 5., 5.]])
    """
    sides = x1.shape[1:] if x1.ndim == 2 else x1.shape[2:]
    if x1.ndim not in (2, 4) or any(side % factor for side in sides):
        raise UserError(
            f"x1 has shape {tuple(x1.shape)}: super-resolution by {factor} needs vectors (B, D) or images "
            f"(B, C, H, W) whose sides are multiples of {factor}."
        )
    if x1.ndim == 2:
        return functional.avg_pool1d(x1[:, None], factor)[:, 0].repeat_interleave(factor, dim=1)
    small = functional.avg_pool2d(x1, factor)
    return small.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)


def _coordinate_mask(n: int, dim: int, generator: torch.Generator) -> Tensor:
    """Known coordinates: a uniformly random subset whose size is uniform on 0 .. D - 1."""
    device = generator.device
    size = torch.randint(dim, (n, 1), generator=generator, device=device)
    rank = torch.rand((n, dim), generator=generator, device=device).argsort(1).argsort(1)
    return rank < size


def _rectangle_mask(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Known pixels: those outside a hidden half (four halves, probability 1/8 each) or outside a hidden rectangle."""
    device = generator.device
    u = torch.rand((n, 6), generator=generator, device=device)
    top, bottom = _interval(u[:, 0], u[:, 1], height)
    left, right = _interval(u[:, 2], u[:, 3], width)
    is_half, across, second = u[:, 4] < 0.5, u[:, 5] < 0.5, (4 * u[:, 5]).long() % 2 == 1
    middle_row, middle_column = (height + 1) // 2, (width + 1) // 2
    top = torch.where(is_half, torch.where(across & second, height - middle_row, 0), top)
    bottom = torch.where(is_half, torch.where(across & ~second, middle_row, height), bottom)
    left = torch.where(is_half, torch.where(~across & second, width - middle_column, 0), left)
    right = torch.where(is_half, torch.where(~across & ~second, middle_column, width), right)
    row = torch.arange(height, device=device)
    column = torch.arange(width, device=device)
    in_rows = (row >= top[:, None]) & (row < bottom[:, None])
    in_columns = (column >= left[:, None]) & (column < right[:, None])
    return ~(in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def _interval(u: Tensor, w: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Random pixels [start, stop): a quarter to three quarters of the side, and at least one pixel."""
    length = ((0.25 + 0.5 * u) * side).round().long().clamp(1, side)
    start = torch.minimum((w * (side - length + 1)).long(), side - length)
    return start, start + length
