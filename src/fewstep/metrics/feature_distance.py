r"""Perceptual distance between two samples, in the activations of a frozen network.

.. math:: d(x, y) = \sum_l \frac{1}{P_l} \sum_p \bigl| w_l \odot (\hat f_l(x)_p - \hat f_l(y)_p) \bigr|^2,
          \qquad \hat f = f / |f|

(Zhang et al., arXiv:1801.03924, eq. 1): at each of the P_l positions of layer l the activations are divided by
their norm along the channels, and the squared differences are averaged. ``w`` is 1, except for LPIPS, whose weights
were fitted to human judgements.

Networks: LPIPS for natural images; a network trained on the user's own data by a stage ``method: features``, where
ImageNet features do not apply or their weights cannot be downloaded; a CIFAR ResNet from a file. A model must not be
judged by the features of its loss, because the score would be biased. So each distance carries the digest of its
weights, by which the features can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UserError, require_extra, unknown
from fewstep.flow.noise import isolated_rng
from fewstep.networks.extractors import Extractor, build_features, cifar_resnet, pool
from fewstep.store.files import json_round_trip, read_json
from fewstep.store.tensors import read_tensors, weights_digest

LPIPS = "lpips:"
LPIPS_NETS = ("vgg", "alex")
MIN_LPIPS_SIDE = 64  # smaller images are enlarged, because the networks halve them four times; chosen, not tuned
SUFFIXES = (".th", ".pt", ".safetensors")
CIFAR_SHAPE = (3, 32, 32)
MIN_NORM = 1e-10  # activations are divided by at least this norm
FEATURE_SOURCES = "a 'features' stage's folder, a CIFAR ResNet's .th, .pt or .safetensors file, lpips:vgg or lpips:alex"


@final
class FeatureDistance:
    """The distance of the module docstring, differentiable in both samples.

    Args:
        network: the feature network; it is put into eval mode and its weights get no gradients.
        shape: shape of one sample.
        kind: first part of the name, before the digest.
        weights: ``w_l²`` per layer, (C_l,) each; None: ones.
        device: device of the network.

    Attributes:
        digest: digest of the network's weights.
        name: ``kind@`` and the first six digits of the digest, as in ``FD-features@1a2b3c``.
    """

    def __init__(
        self,
        network: nn.Module,
        shape: Sequence[int],
        kind: str = "features",
        weights: Sequence[Tensor] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self._network = network.to(device).eval().requires_grad_(False)
        self._extractor: Extractor = network  # type: ignore[assignment]
        self.shape = tuple(shape)
        self._weights = None if weights is None else [w.to(device).detach() for w in weights]
        self.digest = weights_digest(network.state_dict())
        self.name = f"{kind}@{self.digest[:6]}"
        self.device = torch.device(device)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (B,) between samples x and y, both (B, *shape) in network units.

        Raises:
            UserError: the samples have another shape.
        """
        for given in (x, y):
            if tuple(given.shape[1:]) != self.shape or len(x) != len(y):
                raise UserError(
                    f"features {self.name} compare two batches of samples (B, *{self.shape}), got {tuple(x.shape)} and "
                    f"{tuple(y.shape)}."
                )
        total = torch.zeros(len(x), device=x.device)
        for k, (f, g) in enumerate(zip(self._extractor.layers(x), self._extractor.layers(y), strict=True)):
            each = (_unit(f) - _unit(g)).square()
            if self._weights is not None:
                each = each * self._weights[k].view(1, -1, *(1,) * (each.ndim - 2))
            total = total + pool(each).sum(1)
        return total

    def layers(self, x: Tensor) -> list[Tensor]:
        """Activations (B, C_l, ...) of every layer, differentiable in the samples."""
        return self._extractor.layers(x)

    def pooled(self, x: Tensor) -> Tensor:
        """Features (B, F) of samples (B, *shape), without gradients, on the device of the samples."""
        with torch.no_grad():
            return self._extractor.pooled(x.to(self.device)).to(x.device)


def _unit(f: Tensor) -> Tensor:
    """Divide activations (B, C, ...) by their norm along the channels, in float32 or float64."""
    return F.normalize(f.float() if f.dtype in (torch.bfloat16, torch.float16) else f, dim=1, eps=MIN_NORM)


def find_features(
    spec: str | Path,
    shape: Sequence[int],
    device: str | torch.device = "cpu",
    scaling: Mapping[str, Any] | None = None,
) -> FeatureDistance:
    """Load the feature distance that ``spec`` names.

    Args:
        spec: the folder of a stage ``method: features``; a file with the state dict of a CIFAR ResNet; ``lpips:vgg`` or
            ``lpips:alex`` (extra ``perceptual``).
        shape: shape of one sample.
        device: device of the network.
        scaling: the scaling of the data; features that were trained on data with another scaling are refused. None:
            not checked.

    Raises:
        UserError: ``spec`` names no features, a file is damaged, or the features need another shape or scaling.
        MissingExtra: the package of LPIPS is not installed.
    """
    name, path = str(spec), Path(spec)
    if name.startswith(LPIPS):
        return _lpips(name.removeprefix(LPIPS), shape, device)
    if path.is_dir():
        return _load_folder(path, shape, device, scaling)
    if path.is_file() and path.suffix in SUFFIXES:
        return _load_file(path, shape, device)
    what = f"is a file that does not end in {', '.join(SUFFIXES)}" if path.is_file() else "does not exist"
    raise UserError(f"features {name!r}: it {what}. Give {FEATURE_SOURCES}.")


def _load_folder(
    folder: Path, shape: Sequence[int], device: str | torch.device, scaling: Mapping[str, Any] | None
) -> FeatureDistance:
    """Load the feature network that a stage trained."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"features {str(folder)!r}: the folder has no config.json, so it is not a finished stage. "
            f"Give {FEATURE_SOURCES}."
        )
    config = read_json(folder / "config.json")
    # format 1 has the keys of the rule at the top level
    rule = config.get("rule", config) if isinstance(config, dict) else None
    kind = rule.get("kind") if isinstance(rule, dict) else None
    if kind != "features":
        raise UserError(
            f"features {str(folder)!r}: it holds a model of kind {kind!r}, which has no features. Train features "
            "with a stage 'method: features'."
        )
    network = config.get("network") or {}
    if (own := tuple(network.get("shape", ()))) != tuple(shape):
        raise UserError(
            f"features {str(folder)!r}: they need samples of shape {own}, and the data has {tuple(shape)}: train "
            "features on this data."
        )
    if scaling is not None and config.get("scaling") not in (None, json_round_trip(scaling)):
        raise UserError(
            f"features {str(folder)!r}: they were trained on data with another scaling: use the same 'scale'."
        )
    net = build_frozen(network)
    try:
        net.load_state_dict(read_tensors(folder / "model.safetensors"))
    except RuntimeError as error:
        what = " ".join(str(error).splitlines()[-1].split())
        raise UserError(
            f"features {str(folder)!r}: the weights do not fit config.json ({what}): copy the folder again."
        ) from error
    return FeatureDistance(net, shape, device=device)


def build_frozen(network: Mapping[str, Any]) -> nn.Module:
    """Build a feature network whose weights are loaded afterwards; the global random state is unchanged."""
    with isolated_rng():
        return build_features(network)


def _load_file(path: Path, shape: Sequence[int], device: str | torch.device) -> FeatureDistance:
    """Load a CIFAR ResNet from its weights."""
    if tuple(shape) != CIFAR_SHAPE:
        raise UserError(
            f"features {str(path)!r}: a CIFAR ResNet needs samples of shape {CIFAR_SHAPE}, and the data has "
            f"{tuple(shape)}: train features on this data with a stage 'method: features'."
        )
    state = read_tensors(path) if path.suffix == ".safetensors" else _read_torch_file(path)
    try:
        net = cifar_resnet(state)
    except UserError as error:
        raise UserError(f"features {str(path)!r}: {error}") from error
    depth = 6 * len(net.layer1) + 2
    return FeatureDistance(net, shape, f"resnet{depth}", device=device)


def _read_torch_file(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a torch file with ``weights_only=True``, which runs no code of the file."""
    import pickle

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"features {str(path)!r}: it is damaged, or holds more than tensors, which is refused ({what}): save "
            "only the state dict, as .safetensors."
        ) from error
    if isinstance(found, Mapping):
        found = found.get("state_dict", found)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"features {str(path)!r}: it does not hold a state dict of tensors: save module.state_dict().")
    return dict(found)


@final
class LpipsNet(nn.Module):
    """The network of LPIPS, for images (B, 1 | 3, H, W) in [-1, 1].

    Grey images are repeated in the three channels; images with a side below 64 are enlarged (bilinear).

    Args:
        model: an ``lpips.LPIPS``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(model.scaling_layer, model.net)

    def layers(self, x: Tensor) -> list[Tensor]:
        """Five activations (B, C, h, w) of images x."""
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        side = min(x.shape[2:])
        if side < MIN_LPIPS_SIDE:
            size = [-(-n * MIN_LPIPS_SIDE // side) for n in x.shape[2:]]
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return list(self.body(x))

    def pooled(self, x: Tensor) -> Tensor:
        """Features (B, C): the last activation, averaged over positions."""
        return pool(self.layers(x)[-1])


def _lpips(name: str, shape: Sequence[int], device: str | torch.device) -> FeatureDistance:
    """Load LPIPS with its fitted weights per channel."""
    if name not in LPIPS_NETS:
        raise unknown("LPIPS network", name, LPIPS_NETS)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UserError(
            f"features 'lpips:{name}' need grey or RGB images (1 or 3, H, W), and the data has shape "
            f"{tuple(shape)}: train features on this data with a stage 'method: features'."
        )
    try:
        model = require_extra("lpips", "perceptual").LPIPS(net=name, verbose=False)
    except RuntimeError as error:  # importing a torchvision that was built for another torch fails so
        raise UserError(
            f"features 'lpips:{name}': torchvision cannot be imported ({error}): install the version for torch "
            f"{torch.__version__}, or train features on the data with a stage 'method: features'."
        ) from error
    except OSError as error:
        raise UserError(
            f"features 'lpips:{name}': its weights cannot be downloaded ({error}): put them into torch's hub folder "
            f"({torch.hub.get_dir()}), or train features on the data with a stage 'method: features'."
        ) from error
    weights = [layer.model[-1].weight.flatten() for layer in model.lins]
    return FeatureDistance(LpipsNet(model), shape, f"lpips-{name}", weights, device)
