"""The layers of a network that get an adapter, and copies of its modules with adapters around its own tensors."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.errors import UserError, require_extra, unknown
from fewstep.networks.adapter import Adapter

NAME = "role"  # peft's name of the adapter, one in every module; no key of a state has it
QUERIES = {"to_q", "to_qkv", "q_proj", "qkv", "qkv_proj", "query", "q", "wq", "Wqkv", "q_linear", "c_attn"}


@final
@dataclass(frozen=True)
class Settings:
    """What the adapters of all roles on a base have in common.

    Attributes:
        rank: number of rows of A.
        alpha: the factor of ``B A`` is ``alpha / rank``.
        places: names of the layers in the user's module.
        targets: as they were declared; None for the default.
    """

    rank: int
    alpha: float
    places: tuple[str, ...]
    targets: str | tuple[str, ...] | None = None


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Its parameters, then its buffers."""
    yield from module.parameters()
    yield from module.buffers()


def device_of(module: nn.Module) -> torch.device:
    """The device of its first tensor; the CPU without any."""
    return next(tensors_of(module), torch.empty(0)).device


def frozen(tensor: Tensor) -> Tensor:
    """The same values, sharing their memory, without gradients."""
    if type(tensor) is nn.Parameter:
        return nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor.requires_grad_(False) if isinstance(tensor, nn.Parameter) else tensor.detach()


def with_tensors(adapter: Adapter, tensors: Mapping[int, Tensor]) -> Adapter:
    """A copy of an adapter's modules around other tensors, which are given by the ``id`` of those they replace."""
    return copy.deepcopy(adapter, dict(tensors))


def lora_layers(module: nn.Module) -> dict[str, Any]:
    """peft's layers in a module by name."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def with_adapter(base: Adapter, settings: Settings) -> Adapter:
    """The base's modules anew around its own tensors, with a new adapter; half-precision adapters become float32."""
    made = _inject(base, _exactly(settings.places), settings.rank, settings.alpha)
    for layer in lora_layers(made.wrapped).values():
        for parameter in (layer.lora_A[NAME].weight, layer.lora_B[NAME].weight):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
    return made


def _inject(base: Adapter, targets: str | Sequence[str], rank: int, alpha: float, empty: bool = False) -> Adapter:
    """The base's modules anew with peft's layers in them; ``empty``: their matrices have no memory."""
    peft = require_extra("peft", "lora")
    made = with_tensors(base, {id(tensor): tensor for tensor in tensors_of(base)})
    names = targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)
    peft.inject_adapter_in_model(config, made.wrapped, NAME, low_cpu_mem_usage=empty)
    for module in made.wrapped.modules():  # torch's fused encoder reads weights, not layers, and would omit the adapter
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return made


def _exactly(names: Sequence[str]) -> str:
    """A regular expression for these names and no others."""
    return "|".join(re.escape(name) for name in names)


def find_places(base: Adapter, declared: str | Sequence[str] | None, rank: int) -> tuple[str, ...]:
    """The names of the layers that get an adapter, found by peft itself on a copy without memory.

    Raises:
        UserError: there are none, or some cannot have one.
    """
    require_extra("peft", "lora")
    if lora_layers(base.wrapped):
        raise UserError(
            "the network already has peft's layers: merge them first (diffusers: fuse_lora and unload_lora_weights; "
            "peft: merge_and_unload), so that the base is one plain network."
        )
    usual = _usual_layers(base.wrapped)
    if declared is None and not usual:
        raise UserError(
            f"{base.name} has no linear or convolution layer inside it that could have an adapter: name layers with "
            "targets=, or train the network itself."
        )
    targets = _exactly(usual) if declared is None else declared
    try:
        found = lora_layers(_inject(base, targets, rank, rank, empty=True).wrapped)
    except ValueError as error:
        found, reason = {}, str(error)
    for word in [] if isinstance(targets, str) else targets:
        if not any(f".{name}".endswith(f".{word}") for name in found):
            raise unknown("layer in targets", word, {name.rpartition(".")[2] for name in _plain_layers(base.wrapped)})
    if not found:
        raise UserError(f"targets={declared!r} cannot have an adapter: {reason}")
    unused = _opaque(base.wrapped)
    wrong = [name for name, layer in found.items() if name in unused or NAME not in layer.lora_A]
    if wrong:
        raise UserError(
            f"targets={declared!r} names {wrong[0]!r}, which cannot have an adapter here: nn.MultiheadAttention uses "
            "weights without calling the layers that hold them, and embeddings have matrices of another form. Name "
            "linear or convolution layers outside it."
        )
    return tuple(found)


def _usual_layers(module: nn.Module) -> list[str]:
    """The linear layers of modules that have one for queries; in a network without such, linear and convolution."""
    plain = _plain_layers(module)
    linear = [name for name, layer in plain.items() if isinstance(layer, nn.Linear)]
    homes = {name.rpartition(".")[0] for name in linear if name.rpartition(".")[2] in QUERIES}
    return [name for name in linear if any(_within(name, home) for home in homes)] or list(plain)


def _plain_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers and the convolutions that can have an adapter, by name."""
    opaque = _opaque(module)
    return {
        name: layer
        for name, layer in module.named_modules()
        if name and name not in opaque
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == 1)
    }


def _opaque(module: nn.Module) -> set[str]:
    """The names of torch's attention modules and of all inside them, whose weights are used without calling a layer."""
    homes = [name for name, layer in module.named_modules() if isinstance(layer, nn.MultiheadAttention)]
    return {name for name, _ in module.named_modules() if any(name == home or _within(name, home) for home in homes)}


def _within(name: str, home: str) -> bool:
    return not home or name.startswith(f"{home}.")
