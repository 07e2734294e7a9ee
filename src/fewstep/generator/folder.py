"""The files of a model folder: weights, base rows and card beside ``config.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.generator.config import FORMAT, Config
from fewstep.store.files import make_folder, write_bytes, write_json, write_text
from fewstep.store.tensors import unshared


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
    if base_rows is not None:
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


def model_card(config: Config, parameters: int) -> str:
    """The card: what the model is and how to sample it."""
    steps = words(config.steps) if config.steps else "any number of"
    what = "one-step map" if config.kind == "map" else "velocity field"
    module = "" if config.network else ", module=net"  # a network that only the user can build
    lines = [
        "---",
        "library_name: fewstep",
        "tags: [flow-matching]",
        "---",
        f"# {config.stage or 'flow model'}",
        "",
        f"A {what} of {parameters:,} parameters"
        + (f", trained with `{config.method}`" if config.method else "")
        + (f" on `{config.data['name']}`" if config.data.get("name") else "")
        + f". Samples in {steps} step(s).",
    ]
    if config.guidance is not None:
        lines.append(f"Guidance {config.guidance:g} is baked into the weights; do not guide it again.")
    lines += [
        "",
        "```python",
        "import fewstep as fs",
        "",
        f'x = fs.load("path/to/this/folder"{module}).sample(64, seed=0)',
        "```",
        "",
    ]
    return "\n".join(lines)


def words(numbers: Sequence[int] | None) -> str:
    """``1, 2, 4``."""
    return ", ".join(map(str, numbers or ()))
