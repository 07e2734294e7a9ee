"""Load a model folder as a :class:`~fewstep.generator.model.Generator`."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from fewstep.errors import UserError
from fewstep.flow.noise import isolated_rng
from fewstep.generator.config import Config, read_config
from fewstep.generator.model import Generator
from fewstep.generator.model_folder import BASE_FILE, CONDITIONS_FILE, read_base, read_conditions
from fewstep.generator.starts import BaseRows
from fewstep.networks import build
from fewstep.networks.foreign import FOREIGN, WRAPPED, Foreign, freeze
from fewstep.store.tensors import read_tensors


def load(folder: str | Path, module: nn.Module | None = None, device: str | torch.device = "cpu") -> Generator:
    """Load a model folder: its network with the saved weights, frozen, and how it is sampled.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``.
        module: the network to fill with the weights; needed for a module that fewstep did not build.
        device: where to put it.

    Returns:
        The generator; the global random state is left as it was.

    Raises:
        UserError: no model folder, a truncated file, weights that do not fit the network, a feature network.

    >>> import tempfile, torch, fewstep as fs
    >>> class Velocity(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = torch.nn.Linear(2, 2)
    ...     def forward(self, x, t):
    ...         return self.linear(x)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     saved = fs.Generator(Velocity(), shape=(2,)).save(folder)
    ...     generator = fs.load(folder, module=Velocity())
    >>> generator.sample(3, steps=4, seed=0).shape
    torch.Size([3, 2])
    """
    folder = Path(folder)
    config = read_config(folder)
    if config.rule.kind == "features":
        raise UserError(
            f"{folder} holds features (method {config.method!r}), not a generator: there is nothing to sample. Name it "
            f"where features are asked for: 'features:' in a recipe, or fewstep compare … --features {folder}."
        )
    if module is not None and not isinstance(module, nn.Module):
        raise UserError(
            f"module is a {type(module).__name__}, and a network is needed: call the function that makes it, "
            "module=make()."
        )
    module = _build(folder, config) if module is None else _same_form(module, config)
    _fill(module, folder)
    base = None if config.base == "gaussian" else read_base(folder / BASE_FILE, config.shape)
    if config.base == "examples" and base is not None and base.scale is None:
        _warn_of_fixed_starts(folder, base)
    generator = Generator(freeze(module.to(device)), config=config)
    generator.base, generator.kept = base, read_conditions(folder / CONDITIONS_FILE)
    generator.name = config.stage or folder.name
    generator.folder = folder
    return generator


def _build(folder: Path, config: Config) -> nn.Module:
    """The network that the config describes."""
    network = config.network
    if network is None or network.get("name") == FOREIGN:
        what = "a module" if network is None else f"a {network['module']}, a module"
        raise UserError(
            f"{folder} holds the weights of {what} that fewstep did not build: pass it as it was when the model was "
            f"saved, fs.load({str(folder)!r}, module=net); in a shell, name the function that makes it, "
            "--module file.py:make."
        )
    with isolated_rng():
        return build(network)


def _same_form(module: nn.Module, config: Config) -> nn.Module:
    """A copy of the module that was passed, in two-time form where the saved model has it."""
    two_time = bool((config.network or {}).get("two_time"))
    if not isinstance(module, Foreign) or module.two_time == two_time:
        return module
    with isolated_rng():
        return module.with_interval()


def _fill(module: nn.Module, folder: Path) -> None:
    """Put the folder's weights into the network."""
    state = read_tensors(folder / "model.safetensors")
    own = module.state_dict()
    inside = {name for name in state if name not in own and WRAPPED + name in own}
    state = {WRAPPED + name if name in inside else name: value for name, value in state.items()}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        what = [" ".join(line.split()) for line in str(error).splitlines()[1:]] or [str(error)]
        more = f" (and {len(what) - 1} more)" if len(what) > 1 else ""
        raise UserError(
            f"the weights in {folder} do not fit the network: {what[0].rstrip('.')}{more}. They belong to "
            "another network than config.json describes: copy the folder again."
        ) from error


def _warn_of_fixed_starts(folder: Path, base: BaseRows) -> None:
    warnings.warn(
        f"{folder / BASE_FILE} was written without the scale of the start's noise: the seed chooses among its "
        f"{len(base.rows)} examples, and their noise stays as it is, so at most {len(base.rows)} samples differ. Run "
        "the stage again for fresh noise.",
        stacklevel=3,
    )
