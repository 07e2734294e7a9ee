"""The software, command and machine of a run, as ``run.json`` records them."""

from __future__ import annotations

import platform
import sys
from typing import Any

import numpy as np
import torch

import fewstep


def environment(seed: int) -> dict[str, Any]:
    """Versions, command and seed: what is needed to repeat the run."""
    return {
        "command": " ".join(["fewstep", *sys.argv[1:]]),
        "seed": seed,
        "versions": {
            "fewstep": fewstep.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "machine": {"system": platform.platform(), "threads": torch.get_num_threads()},
    }
