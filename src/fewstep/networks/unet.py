r"""A small U-Net for images of 8×8 to 64×64 pixels.

An encoder of residual blocks halves the resolution between levels. At the lowest resolution there are further
blocks and, optionally, self-attention. Skip connections lead from the encoder to the decoder (arXiv 1505.04597;
residual blocks and attention as in arXiv 2006.11239, appendix B). Each block is

.. math:: h \mapsto S h + W_2\,\mathrm{SiLU}\bigl((1 + s(c)) \odot N(W_1\,\mathrm{SiLU}(N(h))) + b(c)\bigr)

with 3×3 convolutions W, group normalisation N, the scale and shift (s, b) linear in the conditioning c (FiLM,
arXiv 1709.07871; arXiv 2105.05233, section 3), and S the identity or a 1×1 convolution.

``patch = p`` moves p×p pixels into channels first and back at the end, so that nothing is convolved at the full
resolution, where most of the time would be spent. The output is :math:`v = W_{out} h + g(c) \odot x`, with one
gain per channel for the part of the velocity that is linear in x (a skip connection weighted by the noise level:
arXiv 2206.00364, eq. 7). :math:`W_{out} = g = 0` initially, so that training begins at v = 0.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UserError
from fewstep.networks import option_checks as options
from fewstep.networks.conditioning import Conditioning, check_inputs, concatenate_context
from fewstep.networks.two_time import interval

CHECKERS: dict[str, options.Checker] = {
    "widths": options.positives,
    "blocks": options.positive,
    "middle": options.positive,
    "patch": options.positive,
    "attention": options.flag,
    "embedding": options.positive,
    "dropout": options.probability,
}


def _preset(widths: list[int], blocks: int, middle: int, patch: int, embedding: int) -> dict[str, Any]:
    sizes = {"blocks": blocks, "middle": middle, "patch": patch, "embedding": embedding}
    return {"widths": widths, **sizes, "attention": True, "dropout": 0.0}


PRESETS: dict[str, dict[str, Any]] = {
    "nano": _preset([16, 16], blocks=1, middle=1, patch=2, embedding=32),
    "tiny": _preset([24, 32, 32], blocks=1, middle=2, patch=2, embedding=64),
    "small": _preset([48, 64, 64], blocks=1, middle=3, patch=2, embedding=64),
    "base": _preset([64, 128, 192], blocks=2, middle=3, patch=1, embedding=256),
    "large": _preset([128, 256, 512], blocks=3, middle=4, patch=1, embedding=512),
}

MIN_PATCHED_SIDE = 16  # presets use patches from this shorter side on; chosen, not tuned
MAX_TOKENS = 1024  # presets use attention up to so many pixels at the lowest resolution; chosen, not tuned


def _levels(height: int, width: int) -> int:
    """Number of resolutions: an image is halved while both sides are even and at least 8."""
    levels = 1
    while height % 2 == 0 and width % 2 == 0 and min(height, width) >= 8:
        height, width, levels = height // 2, width // 2, levels + 1
    return levels


def complete_options(shape: list[int], preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Complete checked options for images of this shape (C, H, W).

    Options of a preset are adapted to the image: fewer levels, no patches or no attention where they do not fit.
    A given option that does not fit is refused.

    Args:
        shape: shape of one image.
        preset: all options of the preset.
        given: the options that were given.

    Returns:
        All options of the network.

    Raises:
        UserError: the shape is not (C, H, W); ``patch`` does not divide it; more ``widths`` than resolutions.
    """
    if len(shape) != 3:
        raise UserError(
            f"network 'unet' takes images (C, H, W), but one sample has shape {tuple(shape)}: "
            "use network 'mlp', or add a channel axis to the data."
        )
    full = {**preset, **given}
    height, width = shape[1:]
    patch = full["patch"]
    fits = height % patch == 0 and width % patch == 0
    if not fits and "patch" in given:
        raise UserError(f"network.patch is {patch}, which does not divide the image size {height}×{width}.")
    if "patch" not in given and (not fits or min(height, width) < MIN_PATCHED_SIDE):
        patch = 1
    height, width = height // patch, width // patch
    levels = _levels(height, width)
    if "widths" in given and len(full["widths"]) > levels:
        raise UserError(
            f"network.widths has {len(full['widths'])} levels, but an image of {height}×{width} can be halved only "
            f"{levels - 1} times (while its sides are even and at least 8): give at most {levels} widths."
        )
    widths = full["widths"][:levels]
    lowest = (height * width) >> (2 * (len(widths) - 1))
    attention = full["attention"] and ("attention" in given or lowest <= MAX_TOKENS)
    return {**full, "patch": patch, "widths": widths, "attention": attention}


def _norm(width: int) -> nn.GroupNorm:
    """Group normalisation in groups of about 16 channels."""
    return nn.GroupNorm(math.gcd(width, max(1, width // 16)), width)


@final
class Block(nn.Module):
    """The residual block of the module docstring."""

    def __init__(self, before: int, after: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * after)
        self.norm2 = _norm(after)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.skip = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """h (B, before, H, W) and c (B, embedding) to (B, after, H, W)."""
        inner = self.norm2(self.conv1(F.silu(self.norm1(h))))
        scale, shift = self.film(c).to(inner.dtype)[:, :, None, None].chunk(2, dim=1)
        inner = F.silu(torch.addcmul(shift, inner, 1 + scale))
        return self.skip(h) + self.conv2(self.dropout(inner))


@final
class Stack(nn.Module):
    """``number`` residual blocks, one after the other."""

    def __init__(self, before: int, width: int, number: int, embedding: int, dropout: float) -> None:
        super().__init__()
        sizes = [before] + [width] * number
        self.blocks = nn.ModuleList(Block(a, b, embedding, dropout) for a, b in itertools.pairwise(sizes))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """h (B, before, H, W) and c (B, embedding) to (B, width, H, W)."""
        for block in self.blocks:
            h = block(h, c)
        return h


@final
class Attention(nn.Module):
    """h + W softmax(q k^T / sqrt(d)) v over the pixels of one image (arXiv 1706.03762, eq. 1).

    It does not use torch's fused attention: every operation here has a forward-mode derivative (JVP), and the
    lowest resolution has few pixels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = math.gcd(width, max(1, width // 32))
        self.norm = _norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        """(B, width, H, W) to the same shape."""
        batch, width, rows, columns = h.shape
        tokens = self.norm(h).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1).to(v.dtype)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        return h + self.out(mixed).transpose(1, 2).reshape(batch, width, rows, columns)


@final
class UNet(nn.Module):
    """Residual U-Net with FiLM conditioning.

    Args:
        shape: (C, H, W) of one image.
        classes: Number of labels; label ``classes`` is the null label. 0: no labels.
        context: Number of context channels (B, context, H, W), concatenated to x. 0: none.
        widths: Channels of each resolution, the highest resolution first; each halves the one before.
        blocks: Residual blocks of encoder and of decoder at each resolution but the lowest.
        middle: Residual blocks at the lowest resolution.
        patch: Side of the pixel patches that become channels; must divide H and W.
        attention: Whether there is self-attention after the first middle block.
        embedding: Width of the conditioning vector.
        dropout: Dropout probability inside the blocks.
        two_time: Whether it also takes an end time r (:mod:`fewstep.networks.two_time`).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        context: int,
        *,
        widths: list[int],
        blocks: int,
        middle: int,
        patch: int,
        attention: bool,
        embedding: int,
        dropout: float,
        two_time: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.classes, self.context = tuple(shape), classes, context
        self.patch, area, top = patch, patch * patch, widths[0]

        steps, low = list(itertools.pairwise(widths)), widths[-1]
        rest = (embedding, dropout)
        self.conditioning = Conditioning(embedding, classes, interval(embedding, two_time))
        self.input = nn.Conv2d((shape[0] + context) * area, top, 3, padding=1)
        self.encoder = nn.ModuleList(Stack(a, a, blocks, *rest) for a, _ in steps)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in steps)
        self.first = Stack(low, low, 1, *rest)
        self.attention = Attention(low) if attention else nn.Identity()
        self.middle = Stack(low, low, middle - 1, *rest)
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in reversed(steps))
        self.decoder = nn.ModuleList(Stack(2 * a, a, blocks, *rest) for a, _ in reversed(steps))
        self.norm = _norm(top)
        self.output = nn.Conv2d(top, shape[0] * area, 3, padding=1)
        self.gain = nn.Linear(embedding, shape[0])
        for parameter in (*self.output.parameters(), *self.gain.parameters()):
            nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        context: Tensor | None = None,
        r: Tensor | None = None,
    ) -> Tensor:
        """v(x, t), or u(x, t, r) with r; (B, C, H, W).

        Args:
            x: images (B, C, H, W).
            t: times (B,).
            label: labels (B,); None: the null label.
            context: context (B, context, H, W), or None.
            r: end times (B,) of a two-time network; None: r = t.
        """
        check_inputs(self.shape, self.classes, x, t, label, r)
        h = F.pixel_unshuffle(concatenate_context(x, context, self.context), self.patch)
        c = self.conditioning(t, label, r)
        h = self.input(h.contiguous())  # group normalisation has no JVP for channels_last
        skips = []
        for level in range(len(self.encoder)):
            skips.append(self.encoder[level](h, c))
            h = self.down[level](skips[-1])
        h = self.middle(self.attention(self.first(h, c)), c)
        for level in range(len(self.decoder)):
            h = F.interpolate(self.up[level](h), scale_factor=2.0, mode="nearest")
            h = self.decoder[level](torch.cat([h, skips.pop()], dim=1), c)
        v = F.pixel_shuffle(self.output(F.silu(self.norm(h))), self.patch)
        return torch.addcmul(v, self.gain(c).to(x.dtype)[:, :, None, None], x)
