r"""Perceptual distance: how far two samples are apart in the activations of a frozen network.

.. math:: d(x, y) = \sum_l \frac{1}{P_l} \sum_p \bigl| w_l \odot (\hat f_l(x)_p - \hat f_l(y)_p) \bigr|^2,
          \qquad \hat f = f / |f|

(Zhang et al., arXiv:1801.03924, eq. 1): the activations of layer l are normalised along the channels at each of its
P_l positions, and compared. ``w`` is 1 but for LPIPS, whose weights were fitted to human judgements.

Which network: LPIPS for natural images; one trained on the user's own data by a stage ``method: features`` where
ImageNet means nothing or its weights cannot be had; a CIFAR ResNet from a file. The features of a loss must not be
those that judge the result, so every distance has the digest of its weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UserError, require_extra, unknown
from fewstep.networks.extractors import Extractor, build_features, cifar_resnet, pool
from fewstep.store.files import read_json
from fewstep.store.tensors import read_tensors, weights_digest

LPIPS = "lpips:"
LPIPS_NETS = ("vgg", "alex")
LPIPS_SIDE = 64  # smaller images are enlarged: the networks halve them four times
SUFFIXES = (".th", ".pt", ".safetensors")
CIFAR_SHAPE = (3, 32, 32)
TINY = 1e-10  # channels of a smaller norm count as zero
WAYS = "a 'features' stage's folder, a CIFAR ResNet's .th, .pt or .safetensors file, lpips:vgg or lpips:alex"


@final
class FeatureDistance:
    """The distance of the module docstring, differentiable in both samples; its network is frozen.

    Args:
        network: the feature network; put into eval mode, its weights without gradients.
        shape: of one sample.
        kind: what to call it, before the digest.
        weights: ``w_l²`` per layer, (C_l,) each; ones when absent.
        device: where to put it.

    Attributes:
        digest: hash of the network's weights.
        name: ``kind@`` and the first six digits of it, as in ``FD-features@1a2b3c``.
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
        """Distances (B,) of samples (B, *shape), network units.

        Raises:
            UserError: samples of another shape.
        """
        for given in (x, y):
            if tuple(given.shape[1:]) != self.shape or len(x) != len(y):
                raise UserError(
                    f"features {self.name} compare samples (B, *{self.shape}), got {tuple(x.shape)} and "
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
        """Features (B, F) of samples, for Fréchet distances; no gradients, on the samples' device."""
        with torch.no_grad():
            return self._extractor.pooled(x.to(self.device)).to(x.device)


def _unit(f: Tensor) -> Tensor:
    """Channels over their norm, in float32 at least."""
    return F.normalize(f.float() if f.dtype in (torch.bfloat16, torch.float16) else f, dim=1, eps=TINY)


def find_features(
    spec: str | Path,
    shape: Sequence[int],
    device: str | torch.device = "cpu",
    scaling: Mapping[str, Any] | None = None,
) -> FeatureDistance:
    """The features that a word of the user's stands for.

    Args:
        spec: the folder of a stage ``method: features``; a file with the state dict of a CIFAR ResNet; ``lpips:vgg`` or
            ``lpips:alex`` (extra ``perceptual``).
        shape: of one sample.
        device: where to put the network.
        scaling: of the data at hand: features of data scaled otherwise are refused.

    Raises:
        UserError: nothing of that kind, a damaged file, features of samples of another shape or scale.
        MissingExtra: LPIPS without its package.
    """
    words, path = str(spec), Path(spec)
    if words.startswith(LPIPS):
        return _lpips(words.removeprefix(LPIPS), shape, device)
    if path.is_dir():
        return _of_folder(path, shape, device, scaling)
    if path.is_file() and path.suffix in SUFFIXES:
        return _of_file(path, shape, device)
    what = f"is a file that does not end in {', '.join(SUFFIXES)}" if path.is_file() else "is not there"
    raise UserError(f"features {words!r}: it {what}. Give {WAYS}.")


def _of_folder(
    folder: Path, shape: Sequence[int], device: str | torch.device, scaling: Mapping[str, Any] | None
) -> FeatureDistance:
    """The network that a stage trained."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"features {str(folder)!r}: the folder has no config.json: it is no finished stage. Give {WAYS}."
        )
    config = read_json(folder / "config.json")
    # format 1 has the keys of the rule at the top level
    rule = config.get("rule", config) if isinstance(config, dict) else None
    kind = rule.get("kind") if isinstance(rule, dict) else None
    if kind != "features":
        raise UserError(
            f"features {str(folder)!r}: it holds a model of kind {kind!r}, which has no features. Train some with a "
            "stage 'method: features'."
        )
    network = config.get("network") or {}
    if (own := tuple(network.get("shape", ()))) != tuple(shape):
        raise UserError(
            f"features {str(folder)!r}: they are of samples of shape {own}, and the data has {tuple(shape)}: train "
            "them on this data."
        )
    if scaling is not None and config.get("scaling") not in (None, _plain(scaling)):
        raise UserError(
            f"features {str(folder)!r}: they were trained on data scaled otherwise than here: use the same 'scale'."
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
    """A feature network whose weights are about to be loaded; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return build_features(network)


def _plain(value: Mapping[str, Any]) -> Any:
    """As it looks when read back from JSON."""
    return json.loads(json.dumps(value))


def _of_file(path: Path, shape: Sequence[int], device: str | torch.device) -> FeatureDistance:
    """A CIFAR ResNet's weights."""
    if tuple(shape) != CIFAR_SHAPE:
        raise UserError(
            f"features {str(path)!r}: a CIFAR ResNet looks at samples of shape {CIFAR_SHAPE}, and the data has "
            f"{tuple(shape)}: train features on this data with a stage 'method: features'."
        )
    state = read_tensors(path) if path.suffix == ".safetensors" else _unpickled(path)
    try:
        net = cifar_resnet(state)
    except UserError as error:
        raise UserError(f"features {str(path)!r}: {error}") from error
    depth = 6 * len(net.layer1) + 2
    return FeatureDistance(net, shape, f"resnet{depth}", device=device)


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The state dict in a torch file, read without running code."""
    import pickle

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"features {str(path)!r}: it is damaged, or holds more than tensors, which is not read ({what}): save the "
            "state dict alone, as .safetensors."
        ) from error
    if isinstance(found, Mapping):
        found = found.get("state_dict", found)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"features {str(path)!r}: it holds no state dict of tensors: save module.state_dict().")
    return dict(found)


@final
class LpipsNet(nn.Module):
    """The network under LPIPS, for images (B, 1 | 3, H, W) in [-1, 1]: grey ones in all colours, small ones enlarged.

    Args:
        model: ``lpips.LPIPS``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(model.scaling_layer, model.net)

    def layers(self, x: Tensor) -> list[Tensor]:
        """Five activations (B, C, h, w)."""
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        side = min(x.shape[2:])
        if side < LPIPS_SIDE:
            size = [-(-n * LPIPS_SIDE // side) for n in x.shape[2:]]
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return list(self.body(x))

    def pooled(self, x: Tensor) -> Tensor:
        """(B, C): the last activation, averaged over positions."""
        return pool(self.layers(x)[-1])


def _lpips(name: str, shape: Sequence[int], device: str | torch.device) -> FeatureDistance:
    """LPIPS, with its fitted weights per channel."""
    if name not in LPIPS_NETS:
        raise unknown("LPIPS network", name, LPIPS_NETS)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UserError(
            f"features 'lpips:{name}' look at grey or RGB images (1 or 3, H, W), and the data has shape "
            f"{tuple(shape)}: train features on this data with a stage 'method: features'."
        )
    try:
        model = require_extra("lpips", "perceptual").LPIPS(net=name, verbose=False)
    except RuntimeError as error:  # a torchvision of another torch fails while it is imported
        raise UserError(
            f"features 'lpips:{name}': torchvision cannot be imported ({error}): install the one that belongs to torch "
            f"{torch.__version__}, or train features on the data with a stage 'method: features'."
        ) from error
    except OSError as error:
        raise UserError(
            f"features 'lpips:{name}': its weights cannot be downloaded ({error}): put them into torch's hub folder "
            f"({torch.hub.get_dir()}), or train features on the data with a stage 'method: features'."
        ) from error
    weights = [layer.model[-1].weight.flatten() for layer in model.lins]
    return FeatureDistance(LpipsNet(model), shape, f"lpips-{name}", weights, device)
