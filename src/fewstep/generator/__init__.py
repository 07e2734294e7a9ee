"""A generator: what the user holds in the end.

A base distribution, a network, how it should be sampled, and how to turn the result back into data. On disk
it is a folder with ``config.json``, ``model.safetensors`` (EMA weights) and a card, ``README.md``.
"""

from __future__ import annotations

from fewstep.generator.config import FORMAT, Config, read_config
from fewstep.generator.label_draws import Label
from fewstep.generator.model import Draw, Generator, load
from fewstep.generator.model_folder import model_card, save_model
from fewstep.store.tensors import read_tensors, weights_digest

__all__ = [
    "FORMAT",
    "Config",
    "Draw",
    "Generator",
    "Label",
    "load",
    "model_card",
    "read_config",
    "read_tensors",
    "save_model",
    "weights_digest",
]
