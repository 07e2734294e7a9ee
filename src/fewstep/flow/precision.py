"""Calls of networks in full precision."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor


@final
class full_precision:
    """No graph and no autocast: targets are numbers, and derivatives need all their digits."""

    def __init__(self, like: Tensor) -> None:
        self._contexts = (torch.no_grad(), torch.autocast(like.device.type, enabled=False))

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *failed: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*failed)
