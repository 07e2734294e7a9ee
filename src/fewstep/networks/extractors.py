r"""Feature networks, which give the features of perceptual losses and Fréchet distances.

All take samples (B, *shape) in network units, as the flow network does, and have one interface:
``layers(x)``, a few intermediate activations (B, C, ...); ``pooled(x)``, features (B, F) before the head, the last
layer averaged over positions; ``forward(x)``, the head's outputs. None of them takes a time or draws random numbers.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UserError
from fewstep.networks import option_checks as options

NAME = "features"
CHECKERS: dict[str, options.Checker] = {"widths": options.positives}
IMAGE_WIDTHS, VECTOR_WIDTHS = [16, 32, 64, 96], [256, 256, 256]
MIN_SIDE = 4  # images with a smaller side are treated as vectors; chosen, not tuned
RGB_MEAN, RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in [0, 1]


class Extractor(Protocol):
    """The interface of a feature network."""

    def layers(self, x: Tensor) -> list[Tensor]:
        """Activations (B, C, ...) of samples (B, *shape), the earliest layer first."""
        ...

    def pooled(self, x: Tensor) -> Tensor:
        """Features (B, F) of samples (B, *shape)."""
        ...


def pool(h: Tensor) -> Tensor:
    """The mean over all positions: (B, C, ...) to (B, C)."""
    return h.flatten(2).mean(2) if h.ndim > 2 else h


def is_image(shape: Sequence[int]) -> bool:
    """Whether samples of this shape pass convolutions: (C, H, W) with sides of at least 4.

    >>> is_image((1, 8, 8)), is_image((3, 2, 2)), is_image((64,))
    (True, False, False)
    """
    return len(shape) == 3 and min(shape[1:]) >= MIN_SIDE


def resolve_features(config: Mapping[str, Any] | str, shape: Sequence[int], outputs: int) -> dict[str, Any]:
    """Complete and check the configuration of a :class:`FeatureNet`; a resolved one is returned unchanged.

    Args:
        config: ``{}``, or ``{widths: […]}``, the channels of every stage.
        shape: Shape of one sample.
        outputs: Outputs of the head.

    Returns:
        ``{"name", "shape", "outputs", "widths"}``, plain values for :func:`build_features`.

    Raises:
        UserError: another network's name, an unknown key, a wrong value, a configuration resolved for other data.
    """
    given = {"name": config} if isinstance(config, str) else dict(config)
    if (name := given.pop("name", NAME)) != NAME:
        raise UserError(
            f"a feature network cannot be a velocity network such as {name!r}: give 'widths', or no network."
        )
    frame = {"shape": options.data_shape(list(shape)), "outputs": options.positive("network.outputs", outputs)}
    for key, value in frame.items():
        stored = given.pop(key, value)
        stored = list(stored) if isinstance(stored, tuple) else stored
        if stored != value:
            raise UserError(f"network.{key} is {stored!r}, but the data has {value!r}: remove the key.")
    widths = IMAGE_WIDTHS if is_image(shape) else VECTOR_WIDTHS
    return {"name": NAME, **frame, "widths": list(widths), **options.checked(NAME, given, CHECKERS)}


def build_features(config: Mapping[str, Any]) -> FeatureNet:
    """Build the network of a resolved configuration; its weights come from torch's global generator.

    Raises:
        UserError: as :func:`resolve_features`, or the configuration was not resolved.
    """
    missing = [key for key in ("name", "shape", "outputs", "widths") if key not in config]
    if missing:
        raise UserError(f"network configuration lacks {', '.join(missing)}: pass it through resolve_features() first.")
    full = resolve_features(config, config["shape"], config["outputs"])
    return FeatureNet(tuple(full["shape"]), full["outputs"], full["widths"])


@final
class ConvStage(nn.Module):
    """Two 3×3 convolutions with group normalisation and SiLU, the first with a stride."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        groups = math.gcd(8, width)
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width)

    def forward(self, h: Tensor) -> Tensor:
        """(B, before, H, W) to (B, width, H / stride, W / stride)."""
        return F.silu(self.norm2(self.conv2(F.silu(self.norm1(self.conv1(h))))))


@final
class FeatureNet(nn.Module):
    """A small feature network that is trained on the user's own data: convolutions for images, an MLP otherwise.

    There is no batch normalisation and no dropout, so that its outputs are the same in train and in eval mode.

    Args:
        shape: Shape of one sample.
        outputs: Outputs of the linear head.
        widths: Channels of every stage; images are halved before every stage but the first while their shorter
            side is at least 4.
    """

    def __init__(self, shape: tuple[int, ...], outputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.shape, self.image = tuple(shape), is_image(shape)
        self.stages = nn.ModuleList()
        if self.image:
            side = min(shape[1:])
            for k, (before, width) in enumerate(itertools.pairwise([shape[0], *widths])):
                stride = 2 if k and side >= MIN_SIDE else 1
                side = -(-side // stride)
                self.stages.append(ConvStage(before, width, stride))
        else:
            for before, width in itertools.pairwise([options.features(shape), *widths]):
                self.stages.append(nn.Sequential(nn.Linear(before, width), nn.SiLU()))
        self.head = nn.Linear(widths[-1], outputs)

    def layers(self, x: Tensor) -> list[Tensor]:
        """The activations of every stage: (B, C, h, w) of images, (B, C) otherwise.

        Raises:
            UserError: the samples x are not (B, *shape).
        """
        if tuple(x.shape[1:]) != self.shape:
            raise UserError(f"this feature network takes samples of shape {self.shape}, not {tuple(x.shape[1:])}.")
        h, out = x if self.image else x.flatten(1), []
        for stage in self.stages:
            h = stage(h)
            out.append(h)
        return out

    def pooled(self, x: Tensor) -> Tensor:
        """Features (B, F): the last stage, averaged over positions."""
        return pool(self.layers(x)[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, outputs): a linear function of the pooled features."""
        out: Tensor = self.head(self.pooled(x))
        return out


@final
class ResidualBlock(nn.Module):
    """relu(shortcut(h) + two 3×3 convolutions with batch normalisation); the shortcut has no weights.

    The shortcut is option A of arXiv 1512.03385, section 4.2: every second pixel; the new channels are
    zero, half of them before the old ones and half after.
    """

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.new = stride, width - before

    def forward(self, h: Tensor) -> Tensor:
        """(B, before, H, W) to (B, width, H / stride, W / stride)."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(h)))))
        if self.new or self.stride > 1:
            left = self.new // 2
            h = F.pad(h[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, left, self.new - left))
        return F.relu(inner + h)


@final
class CifarResNet(nn.Module):
    """The residual network for 32×32 RGB images (arXiv 1512.03385, section 4.2), for existing weights.

    Input: network units in [-1, 1], mapped to RGB in [0, 1] and normalised by ImageNet's mean and standard deviation.
    Use it in eval mode, in which batch normalisation uses the averages stored with the weights.

    Args:
        blocks: Residual blocks in each of the three stages (3: ResNet-20, 9: ResNet-56).
        width: Channels of the first stage; each stage has twice the channels of the one before.
        classes: Outputs of the head.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, blocks: int, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, 1)
        self.layer2 = self._stage(width, 2 * width, blocks, 2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, 2)
        self.linear = nn.Linear(4 * width, classes)
        self.register_buffer("mean", torch.tensor(RGB_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(RGB_STD).view(3, 1, 1), persistent=False)

    @staticmethod
    def _stage(before: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        first = ResidualBlock(before, width, stride)
        return nn.Sequential(first, *(ResidualBlock(width, width, 1) for _ in range(blocks - 1)))

    def layers(self, x: Tensor) -> list[Tensor]:
        """The stem and the three stages: (B, C, h, w)."""
        h = F.relu(self.bn1(self.conv1(((x + 1) / 2 - self.mean) / self.std)))
        out = [h]
        for stage in (self.layer1, self.layer2, self.layer3):
            out.append(stage(out[-1]))
        return out

    def pooled(self, x: Tensor) -> Tensor:
        """Features (B, 4 width): the last stage, averaged over positions."""
        return pool(self.layers(x)[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        out: Tensor = self.linear(self.pooled(x))
        return out


def cifar_resnet(state: Mapping[str, Tensor]) -> CifarResNet:
    """Build the network of a state dict in the common layout of CIFAR ResNets; the names give its depth.

    Args:
        state: ``conv1.weight``, ``layer1.0.conv1.weight``, …; a leading ``module.`` of names is ignored.

    Returns:
        The network with these weights, in eval mode.

    Raises:
        UserError: other names or shapes.
    """
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    blocks = sum(re.fullmatch(r"layer1\.\d+\.conv1\.weight", name) is not None for name in plain)
    try:
        net = CifarResNet(blocks, plain["conv1.weight"].shape[0], plain["linear.weight"].shape[0])
        net.load_state_dict(plain)
    except (KeyError, IndexError, RuntimeError) as error:
        what = " ".join(str(error).splitlines()[-1].split())
        raise UserError(
            f"these are not the weights of a CIFAR ResNet with conv1, bn1, layer1 … layer3 and linear ({what}): give "
            "those of a ResNet-20, -32, -44, -56 or -110 without weights in its shortcuts."
        ) from error
    return net.eval()
