"""A generator: what the user holds in the end.

A base distribution, a network, how it should be sampled, and how to turn the result back into data. On disk
it is a folder with ``config.json``, ``model.safetensors`` (EMA weights) and a card, ``README.md``.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.data.scaling import Scaling
from fewstep.errors import UserError, unknown
from fewstep.flow.field import CountedField, Field, Guided
from fewstep.flow.grids import GridSpec, explicit_times
from fewstep.flow.noise import BLOCK, block_rows, generator_for, integer_rows, noise_rows
from fewstep.networks import build
from fewstep.solvers.solve import check_start, solve
from fewstep.store.files import make_folder, read_json, write_json, write_text

FORMAT = 1
LABEL_DRAW = 1  # which table of draws the labels come from; 0 is the base noise

Label = int | str | Sequence[int] | Sequence[str] | Tensor


@final
@dataclass(frozen=True)
class Config:
    """Everything about a generator but its weights; ``config.json`` holds these fields.

    Attributes:
        shape: of one sample inside the network.
        kind: ``velocity``: any solver, any steps; ``map``: its own sampler, the step counts in ``steps``.
        steps: step counts a map was made for.
        default_steps: steps when the user names none.
        solver, grid: how a velocity is sampled when the user names none.
        network: resolved network configuration, None for a module fewstep did not build.
        scaling: from network units to data units, None when they are the same.
        class_weights: share of every class in the data; empty when unconditional.
        label_names: the labels as the data names them, when they are not 0 … classes - 1.
        guidance: guidance baked into the weights, None when there is none.
        base: ``gaussian``, or ``empirical`` with the rows kept in ``base.safetensors``.
        coupling: facts of the coupling it was trained on.
        method, stage, data: where it comes from.
    """

    shape: tuple[int, ...]
    kind: Literal["velocity", "map"] = "velocity"
    steps: tuple[int, ...] | None = None
    default_steps: int = 50
    solver: str = "euler"
    grid: str = "uniform"
    network: dict[str, Any] | None = None
    scaling: dict[str, Any] | None = None
    class_weights: tuple[float, ...] = ()
    label_names: tuple[str | int, ...] | None = None
    guidance: float | None = None
    base: Literal["gaussian", "empirical"] = "gaussian"
    coupling: dict[str, Any] = field(default_factory=dict)
    method: str | None = None
    stage: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Draw:
    """Samples in network units.

    Attributes:
        x: ``(num, *shape)``.
        x0: the base samples they come from.
        label: ``(num,)`` or None.
        nfe: network evaluations per sample, counted.
    """

    x: Tensor
    x0: Tensor
    label: Tensor | None
    nfe: int


@final
class Generator:
    """Sample a flow model, save it, load it back.

    Args:
        module: ``v(x, t, **cond)``; put into eval mode.
        shape: shape of one sample; left out when ``config`` is given.
        config: everything else; see :class:`Config`.
        base_rows: rows of an empirical base, network units.
    """

    def __init__(
        self,
        module: nn.Module,
        shape: Sequence[int] | None = None,
        *,
        config: Config | None = None,
        base_rows: Tensor | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise UserError(
                f"a generator needs a torch.nn.Module, got {type(module).__name__}: wrap the function in "
                "one, or call fs.solve(v, x0) with it."
            )
        if (config is None) == (shape is None):
            raise UserError(
                "a generator needs the shape of one sample (or a config, which has it): "
                "fs.Generator(module, shape=(3, 32, 32))."
            )
        if config is None:
            assert shape is not None
            config = Config(shape=_sample_shape(shape))
        self.module = module.eval()
        self.config = config
        self.base_rows = base_rows
        self.name = config.stage or type(module).__name__

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        first = next(self.module.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights compute in."""
        floating = (p.dtype for p in self.module.parameters() if p.dtype.is_floating_point)
        return next(floating, torch.float32)

    @property
    def conditional(self) -> bool:
        """Whether it takes labels."""
        return bool(self.config.class_weights)

    def sample(
        self,
        num: int | None = None,
        *,
        steps: int | None = None,
        solver: str | None = None,
        grid: GridSpec | None = None,
        label: Label | None = None,
        guidance: float | None = None,
        seed: int = 0,
        noise: Tensor | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Draw samples in the data's own units.

        Args:
            num: how many; may be left out when ``noise`` is given.
            steps: solver steps.
            solver, grid: for a velocity model; a map has its own.
            label: one label for all, one per sample, or None to draw them as often as in the data. Labels are
                the data's own: numbers, or names where the data has names.
            guidance: guidance weight of a conditional velocity model (two network calls per evaluation).
            seed: sample ``i`` is a function of (seed, i) alone.
            noise: base samples ``(num, *shape)`` in network units, instead of drawing them.
            batch_size: rows per network call; it does not change the samples.

        Returns:
            ``(num, *data_shape)`` float32 on the CPU.

        Raises:
            UserError: a number below 1, an unknown name, a label that is not there, a step count the model
                was not made for, guidance it cannot take, samples that are not finite.
        """
        draw = self.draw(
            num,
            steps=steps,
            solver=solver,
            grid=grid,
            label=label,
            guidance=guidance,
            seed=seed,
            noise=noise,
            batch_size=batch_size,
        )
        return self.to_data(draw.x)

    def to_data(self, x: Tensor) -> Tensor:
        """Network units to data units, float32 on the CPU."""
        if self.config.scaling is None:
            return x.detach().float().cpu()
        return Scaling.from_dict(self.config.scaling).to_data(x)

    def draw(
        self,
        num: int | None = None,
        *,
        steps: int | None = None,
        solver: str | None = None,
        grid: GridSpec | None = None,
        label: Label | None = None,
        guidance: float | None = None,
        seed: int = 0,
        noise: Tensor | None = None,
        batch_size: int = 256,
    ) -> Draw:
        """As :meth:`sample`, in network units and with the count of network evaluations."""
        solver, grid, steps = self._how(solver, grid, steps)
        field_ = self._field(guidance)
        x0 = self._starts(num, noise, seed)
        labels = self._labels(len(x0), label, seed)
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        parts, nfe = [], 0
        for first in range(0, len(x0), batch_size):
            rows = slice(first, first + batch_size)
            cond = {} if labels is None else {"label": labels[rows].to(self.device)}
            start = x0[rows].to(self.device, self.dtype)
            solution = solve(field_, start, solver=solver, steps=steps, grid=grid, cond=cond)
            parts.append(solution.x.cpu())
            nfe = solution.nfe
        x = torch.cat(parts)
        finite = torch.isfinite(x).flatten(1).all(1)
        if not finite.all():
            raise UserError(
                f"{int((~finite).sum())} of {len(x)} samples of {self.name!r} are NaN or infinite: its "
                "weights are damaged or its training diverged, or the guidance is too large."
            )
        return Draw(x, x0, labels, nfe)

    def _how(
        self, solver: str | None, grid: GridSpec | None, steps: int | None
    ) -> tuple[str, GridSpec, int | None]:
        """The solver, grid and steps to use; a map refuses what it was not made for."""
        config = self.config
        if config.kind == "map":
            allowed = config.steps or (1,)
            if steps is not None and steps not in allowed:
                raise UserError(
                    f"{self.name!r} was made for {_words(allowed)} step(s), not {steps}: leave steps out, or "
                    "sample the flow it was distilled from."
                )
            if solver not in (None, "euler") or grid not in (None, "uniform"):
                raise UserError(f"{self.name!r} is a map with its own sampler: leave solver and grid out.")
            return "euler", "uniform", config.default_steps if steps is None else steps
        solver, chosen = config.solver if solver is None else solver, config.grid if grid is None else grid
        times = explicit_times(chosen)
        if times is None:
            return solver, chosen, config.default_steps if steps is None else steps
        if (times[0], times[-1]) != (0.0, 1.0):
            raise UserError(
                f"a grid for sampling runs from 0 (noise) to 1 (data), and this one from {times[0]:g} to "
                f"{times[-1]:g}: write for example '0,0.2,1'. For a part of the way there is fs.solve."
            )
        return solver, chosen, steps

    def _field(self, guidance: float | None) -> Field:
        if guidance is not None and not math.isfinite(guidance):
            raise UserError(f"guidance must be a finite number, got {guidance}.")
        if guidance is None or (guidance == 1.0 and self.config.guidance is None):
            return CountedField(self.module)
        if self.config.guidance is not None:
            raise UserError(
                f"{self.name!r} has guidance {self.config.guidance} baked into its weights: guiding it again "
                "is wrong. Leave guidance out."
            )
        if not self.conditional:
            raise UserError(f"guidance needs a class-conditional model, and {self.name!r} takes no labels.")
        if self.config.kind == "map":
            raise UserError(
                f"{self.name!r} is a one-step map; guidance must be baked in when it is distilled."
            )
        return Guided(self.module, guidance)

    def _starts(self, num: int | None, noise: Tensor | None, seed: int) -> Tensor:
        """Base samples: the user's, or rows of the seed's table."""
        shape = self.config.shape
        if noise is not None:
            check_start(noise)
            if tuple(noise.shape[1:]) != shape:
                raise UserError(f"noise has rows of shape {tuple(noise.shape[1:])}, the model needs {shape}.")
            if num not in (None, len(noise)):
                raise UserError(
                    f"num={num} and noise of {len(noise)} rows contradict each other: leave num out."
                )
            return noise
        if not isinstance(num, int | np.integer) or isinstance(num, bool) or num < 1:
            raise UserError(f"the number of samples must be a whole number of at least 1, got {num!r}.")
        _check_memory(num, shape)
        if self.config.base == "gaussian":
            return noise_rows(num, shape, seed=seed)
        if self.base_rows is None:
            raise UserError(f"{self.name!r} starts from data and its base rows are missing: pass noise=x0.")
        return self.base_rows[integer_rows(num, len(self.base_rows), seed=seed)]

    def _labels(self, num: int, label: Label | None, seed: int) -> Tensor | None:
        if not self.conditional:
            if label is not None:
                raise UserError(f"{self.name!r} takes no labels: it was trained without. Leave label out.")
            return None
        classes = len(self.config.class_weights)
        if label is None:
            edges = torch.tensor(self.config.class_weights, dtype=torch.float64).cumsum(0)
            uniform = block_rows(
                num,
                0,
                lambda block: torch.rand(
                    BLOCK, dtype=torch.float64, generator=generator_for(seed, block, LABEL_DRAW)
                ),
                empty=torch.empty(0),
            )
            return torch.searchsorted(edges / edges[-1], uniform, right=True).clamp_max(classes - 1)
        labels = self._label_numbers(label)
        if len(labels) not in (1, num):
            raise UserError(f"{len(labels)} labels for {num} samples: give one, or one per sample.")
        bad = labels[(labels < 0) | (labels >= classes)]
        if len(bad):
            raise UserError(
                f"label {int(bad[0])} is out of range: {self.name!r} has classes 0 … {classes - 1}."
            )
        return labels.expand(num)

    def _label_numbers(self, label: Label) -> Tensor:
        """Class numbers ``(n,)`` of one label or of several, which may be names."""
        names = self.config.label_names
        given = (
            label.flatten().tolist() if isinstance(label, Tensor) else np.asarray(label).flatten().tolist()
        )
        wrong = [n for n in given if isinstance(n, bool) or not isinstance(n, int | str)]
        if wrong:
            raise UserError(f"labels must be whole numbers or the data's names, got {wrong[0]!r}.")
        if names is None:
            words = [n for n in given if isinstance(n, str) and not n.isdecimal()]
            if words:
                raise UserError(
                    f"label {words[0]!r}: the classes of {self.name!r} are numbers, "
                    f"0 … {len(self.config.class_weights) - 1}."
                )
            return torch.tensor([int(n) for n in given], dtype=torch.long)
        position = {str(name): k for k, name in enumerate(names)}
        # where classes have names (image folders) their numbers will do too; where they are numbers, those
        named = all(isinstance(name, str) for name in names)
        numbers = {str(k): k for k in range(len(names))} if named else {}
        known = {**numbers, **position}
        for n in given:
            if str(n) not in known:
                raise unknown("label", n, position)
        return torch.tensor([known[str(n)] for n in given], dtype=torch.long)

    def save(self, folder: str | Path) -> Path:
        """Write ``config.json``, ``model.safetensors`` and a card to a folder, atomically file by file."""
        return save_model(folder, self.module.state_dict(), self.config, self.base_rows)


def save_model(
    folder: str | Path, state: Mapping[str, Tensor], config: Config, base_rows: Tensor | None = None
) -> Path:
    """Write a model folder. ``config.json`` comes last, so a folder that has it is whole."""
    from safetensors.torch import save

    from fewstep.store.files import write_bytes

    folder = make_folder(Path(folder))
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_bytes(folder / "model.safetensors", save(_unshared(tensors)))
    if base_rows is not None:
        write_bytes(folder / "base.safetensors", save({"rows": base_rows.contiguous()}))
    write_text(folder / "README.md", model_card(config, sum(value.numel() for value in tensors.values())))
    write_json(folder / "config.json", {"format": FORMAT, **asdict(config)})
    return folder


def load(
    folder: str | Path, module: nn.Module | None = None, device: str | torch.device = "cpu"
) -> Generator:
    """Load a model folder.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``.
        module: the network to fill with the weights; needed for a module fewstep did not build.
        device: where to put it.

    Raises:
        UserError: no model folder, a truncated file, weights that do not fit the network.
    """
    folder = Path(folder)
    config = read_config(folder)
    if module is None:
        if config.network is None:
            raise UserError(
                f"{folder} holds the weights of a module fewstep did not build: pass it, "
                f"fs.load({str(folder)!r}, module=net)."
            )
        with torch.random.fork_rng(devices=[]):
            module = build(config.network)
    state = read_tensors(folder / "model.safetensors")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        what = [" ".join(line.split()) for line in str(error).splitlines()[1:]] or [str(error)]
        more = f" (and {len(what) - 1} more)" if len(what) > 1 else ""
        raise UserError(
            f"the weights in {folder} do not fit the network: {what[0].rstrip('.')}{more}. They belong to "
            "another network than config.json describes: copy the folder again."
        ) from error
    rows = _base_rows(folder / "base.safetensors", config.shape) if config.base == "empirical" else None
    generator = Generator(module.to(device).requires_grad_(False), config=config, base_rows=rows)
    generator.name = config.stage or folder.name
    return generator


def read_config(folder: Path) -> Config:
    """Read and check ``config.json``."""
    path = folder / "config.json"
    if not path.is_file():
        what = "is not a folder" if not folder.is_dir() else "has no config.json"
        raise UserError(f"{folder} is no model: it {what}. Give a stage's folder, such as runs/demo/teacher.")
    values = read_json(path)
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise UserError(
            f"{path} is not a fewstep model's config, or of a newer version (format {FORMAT} is known)."
        )
    known = [entry.name for entry in fields(Config)]
    for key in values:
        if key not in known:
            raise UserError(f"{path}: {unknown('key', key, known)} It may come from a newer version.")
    return _checked_config(values, path)


def _checked_config(values: dict[str, Any], path: Path) -> Config:
    """The config with every field's type checked, and the fields that must agree compared."""
    from pydantic import TypeAdapter, ValidationError

    try:
        config = TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].replace("Input should be", "must be").replace("Field required", "is missing")
        raise UserError(
            f"{path} is damaged: {place!r} {message}. Restore the file or run the recipe again."
        ) from error
    network, weights = config.network or {}, config.class_weights
    conflict = None
    if not config.shape or min(config.shape) < 1:
        conflict = f"shape {list(config.shape)} is no shape of a sample"
    elif config.default_steps < 1 or min(config.steps or (1,)) < 1:
        conflict = "step counts must be at least 1"
    elif weights and not (all(0 <= w < math.inf for w in weights) and sum(weights) > 0):
        conflict = "class_weights must be shares of classes"
    elif network and list(network.get("shape", config.shape)) != list(config.shape):
        conflict = (
            f"the network is for samples of shape {network['shape']}, the model for {list(config.shape)}"
        )
    elif network and network.get("classes", len(weights)) != len(weights):
        conflict = f"the network has {network['classes']} classes, and class_weights {len(weights)}"
    elif config.scaling is not None and Scaling.from_dict(config.scaling).shape not in (None, config.shape):
        conflict = f"the scaling is for another shape than {list(config.shape)}"
    elif config.label_names is not None and len(config.label_names) != len(weights):
        conflict = f"{len(config.label_names)} label_names for {len(weights)} classes"
    if conflict:
        raise UserError(f"{path} is damaged: {conflict}. Restore the file or run the recipe again.")
    return config


def _sample_shape(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, list | tuple) else ()
    if not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise UserError(f"shape must be the sizes of one sample, such as (2,) or (3, 32, 32), got {shape!r}.")
    return sizes


def _check_memory(num: int, shape: tuple[int, ...]) -> None:
    """Refuse a number of samples that cannot fit into this machine's memory."""
    size = 4 * num * math.prod(shape)
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        return
    if size > memory:
        raise UserError(
            f"{num:,} samples of shape {shape} take {size / 2**30:.0f} GiB, and this machine has "
            f"{memory / 2**30:.0f} GiB of memory: draw fewer at a time, with other seeds."
        )


def _base_rows(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Rows of an empirical base."""
    rows = read_tensors(path).get("rows")
    if rows is None or tuple(rows.shape[1:]) != shape or not len(rows):
        raise UserError(f"{path} holds no base rows of shape {shape}: copy the folder again.")
    return rows


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
    steps = _words(config.steps) if config.steps else "any number of"
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


def _words(numbers: Sequence[int] | None) -> str:
    return ", ".join(map(str, numbers or ()))


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share storage, which safetensors refuses."""
    seen: set[int] = set()
    out = {}
    for name, value in tensors.items():
        pointer = value.untyped_storage().data_ptr()
        out[name] = value.clone() if pointer in seen else value
        seen.add(pointer)
    return out
