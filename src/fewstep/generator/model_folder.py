"""The files of a model folder: weights, base rows and card beside ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from fewstep.errors import UserError
from fewstep.generator.config import FORMAT, Config
from fewstep.store.files import make_folder, write_bytes, write_json, write_text
from fewstep.store.tensors import read_tensors, unshared


def save_model(
    folder: str | Path,
    state: Mapping[str, Tensor],
    config: Config,
    base_rows: Tensor | None = None,
    base_context: Tensor | None = None,
) -> Path:
    """Write a model folder. ``config.json`` comes last, so a folder that has it is whole."""
    from safetensors.torch import save

    folder = make_folder(Path(folder))
    tensors = unshared({name: value.cpu() for name, value in state.items()})
    write_bytes(folder / "model.safetensors", save(tensors))
    if base_rows is not None and config.base != "gaussian":
        base = {"rows": base_rows.contiguous()}
        if base_context is not None:
            base["context"] = base_context.contiguous()
        write_bytes(folder / "base.safetensors", save(base))
    write_text(folder / "README.md", model_card(config, sum(value.numel() for value in tensors.values())))
    write_json(folder / "config.json", {"format": FORMAT, **asdict(config)})
    return folder


def read_base(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Rows of a base that is kept with the model, and their contexts where they have any."""
    base = read_tensors(path)
    rows = base.get("rows")
    if rows is None or tuple(rows.shape[1:]) != shape or not len(rows):
        raise UserError(f"{path} holds no base rows of shape {shape}: copy the folder again.")
    return rows, base.get("context")


def model_card(config: Config, parameters: int) -> str:
    """The card: what the model is and how to sample it, or to judge by it."""
    whose = (f", trained with `{config.method}`" if config.method else "") + (
        f" on `{config.data['name']}`" if config.data.get("name") else ""
    )
    tag, about = "flow-matching", _about_flow(config)
    map_ = {"chain": "flow map", "restart": "consistency map", "euler": "one-step map"}[config.sampler]
    what = map_ if config.kind == "map" else "velocity field"
    if config.kind == "features":
        tag, about, what = "feature-extraction", _about_features(config), "feature network"
    head = ["---", "library_name: fewstep", f"tags: [{tag}]", "---", f"# {config.stage or 'flow model'}", ""]
    about[0] = f"A {what} of {parameters:,} parameters{whose}. {about[0]}"
    return "\n".join([*head, *about, ""])


def _about_flow(config: Config) -> list[str]:
    steps = words(config.steps) if config.steps else "any number of"
    module = "" if config.network else ", module=net"  # a network that only the user can build
    lines = [f"Samples in {steps} step(s)."]
    if config.guidance is not None:
        lines.append(f"Guidance {config.guidance:g} is baked into the weights; do not guide it again.")
    if config.features is not None:
        lines.append(f"Its loss looked through the features `{config.features}`: others must judge it.")
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
