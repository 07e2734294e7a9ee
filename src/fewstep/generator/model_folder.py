"""The files of a model folder: weights, base rows and card beside ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from fewstep.errors import UserError
from fewstep.generator.config import FORMAT, Config
from fewstep.generator.starts import BaseRows
from fewstep.networks.foreign import FOREIGN, WRAPPED
from fewstep.store.files import make_folder, write_bytes, write_json, write_text
from fewstep.store.tensors import read_tensors, unshared

BASE_FILE = "base.safetensors"
CONDITIONS_FILE = "conditions.safetensors"


def save_model(
    folder: str | Path,
    state: Mapping[str, Tensor],
    config: Config,
    base: BaseRows | None = None,
    conditions: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a model folder, each file atomically. ``config.json`` comes last: a folder that has it is complete.

    Args:
        folder: made if need be.
        state: the weights by name.
        config: everything else.
        base: the rows of a base that is kept with the model; not written where the base is Gaussian.
        conditions: rows of conditions to draw from, by name; not written where there are none.

    Returns:
        The folder.

    Raises:
        UserError: the folder cannot be written.
    """
    from safetensors.torch import save

    folder = make_folder(Path(folder))
    tensors = unshared({name.removeprefix(WRAPPED): value.cpu() for name, value in state.items()})
    write_bytes(folder / "model.safetensors", save(tensors))
    if base is not None and config.base != "gaussian":
        write_bytes(folder / BASE_FILE, save(unshared(base.tensors())))
    if conditions:
        write_bytes(folder / CONDITIONS_FILE, save(unshared({name: rows.cpu() for name, rows in conditions.items()})))
    write_text(folder / "README.md", model_card(config, sum(value.numel() for value in tensors.values())))
    write_json(folder / "config.json", {"format": FORMAT, **asdict(config)})
    return folder


def read_conditions(path: Path) -> dict[str, Tensor]:
    """Read the rows of conditions that are kept with a model; empty where there is no such file."""
    return dict(read_tensors(path)) if path.is_file() else {}


def read_base(path: Path, shape: tuple[int, ...]) -> BaseRows:
    """Read the rows of a base that is kept with the model, with their contexts and noise scales where they have any.

    Raises:
        UserError: no safetensors file, no rows of the model's shape, contexts or scales of another number.
    """
    base = read_tensors(path)
    rows = base.get("rows")
    if rows is None or tuple(rows.shape[1:]) != shape or not len(rows):
        raise UserError(f"{path} holds no base rows of shape {shape}: copy the folder again.")
    found = BaseRows(rows, base.get("context"), base.get("scale"))
    if any(len(value) != len(rows) for value in found.tensors().values()):
        raise UserError(f"{path} holds {len(rows)} base rows, and contexts of another number: copy the folder again.")
    return found


def model_card(config: Config, parameters: int) -> str:
    """The card: what the model is and how to sample it, or to judge by it."""
    whose = (f", trained with `{config.method}`" if config.method else "") + (
        f" on `{config.data['name']}`" if config.data.get("name") else ""
    )
    tag, about = "flow-matching", _about_flow(config)
    map_ = {"chain": "flow map", "restart": "consistency map", "euler": "one-step map"}[config.rule.sampler]
    what = map_ if config.rule.kind == "map" else "velocity field"
    if config.rule.kind == "features":
        tag, about, what = "feature-extraction", _about_features(config), "feature network"
    head = ["---", "library_name: fewstep", f"tags: [{tag}]", "---", f"# {config.stage or 'flow model'}", ""]
    about[0] = f"A {what} of {parameters:,} parameters{whose}. {about[0]}"
    return "\n".join([*head, *about, ""])


def _about_flow(config: Config) -> list[str]:
    steps = words(config.rule.steps) if config.rule.steps else "any number of"
    own = bool(config.network) and (config.network or {}).get("name") != FOREIGN
    module = "" if own else ", module=net"  # a network that only the user can build
    lines = [f"Samples in {steps} step(s)."]
    if config.guidance is not None:
        lines.append(f"Guidance {config.guidance:g} is baked into the weights; do not guide it again.")
    if config.features is not None:
        lines.append(f"Its loss used the features `{config.features}`: judge it by others, or the score is biased.")
    sample = f'x = fs.load("path/to/this/folder"{module}).sample(64, seed=0)'
    return [*lines, "", "```python", "import fewstep as fs", "", sample, "```"]


def _about_features(config: Config) -> list[str]:
    judge = "fewstep compare MODEL --data DATA --features path/to/this/folder"
    return [
        f"For Fréchet distances and perceptual losses on samples of shape {tuple(config.shape)}; it makes no samples.",
        *("", "```", judge, "```"),
    ]


def words(numbers: Sequence[int] | None) -> str:
    """``1, 2, 4``."""
    return ", ".join(map(str, numbers or ()))
