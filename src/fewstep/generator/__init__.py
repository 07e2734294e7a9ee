"""A generator: a base distribution, a network, how it is sampled, and how samples are turned back into data.

On disk it is a folder with ``config.json``, ``model.safetensors`` (EMA weights) and a card, ``README.md``; with a base
made of data, ``base.safetensors`` too.
"""

from __future__ import annotations

from fewstep.generator.config import FORMAT, Config, read_config
from fewstep.generator.draw import Draw
from fewstep.generator.label_draws import Label
from fewstep.generator.loading import load
from fewstep.generator.model import Generator
from fewstep.generator.model_folder import model_card, save_model
from fewstep.generator.starts import BaseRows
from fewstep.store.tensors import read_tensors, weights_digest

__all__ = [
    "FORMAT",
    "BaseRows",
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
