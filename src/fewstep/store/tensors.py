"""Tensors in safetensors files, and the digest of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fewstep.errors import UserError


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make tensors contiguous and copy those that share storage (tied weights), which safetensors refuses."""
    pointers: set[int] = set()
    out = {}
    for name, value in tensors.items():
        plain = value.detach().contiguous()
        pointer = plain.untyped_storage().data_ptr()
        out[name] = plain.clone() if pointer in pointers else plain
        pointers.add(pointer)
    return out


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, memory-mapped.

    Raises:
        UserError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is missing, truncated or not a safetensors file ({error}): copy the folder again, or "
            "run its recipe again."
        ) from error


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """The first 16 hexadecimal digits of SHA-256 over names, dtypes, shapes and bytes of the weights.

    >>> weights_digest({"w": torch.zeros(2)}) == weights_digest({"w": torch.zeros(3)})
    False
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
