"""Tensors as safetensors takes them, read back, and told apart by a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fewstep.errors import UserError


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share storage, as tied weights do: the format refuses those."""
    seen: set[int] = set()
    out = {}
    for name, value in tensors.items():
        plain = value.detach().contiguous()
        pointer = plain.untyped_storage().data_ptr()
        out[name] = plain.clone() if pointer in seen else plain
        seen.add(pointer)
    return out


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, or say that it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is missing, truncated or no safetensors file ({error}): copy the folder again, or run "
            "its recipe again."
        ) from error


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes of the weights, first 16 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
