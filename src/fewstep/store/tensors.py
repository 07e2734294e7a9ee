"""Tensors as safetensors takes them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


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
