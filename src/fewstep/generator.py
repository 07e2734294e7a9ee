"""A generator: what the user holds in the end.

A base distribution, a network, how it should be sampled, and how to turn the result back into data. On disk it is a
folder with ``config.json``, ``model.safetensors`` (EMA weights) and a card, ``README.md``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from fewstep.data.scaling import Scaling
from fewstep.errors import UserError
from fewstep.flow.field import CountedField, Field, Guided
from fewstep.flow.grids import GridSpec
from fewstep.flow.noise import BLOCK, block_rows, generator_for, integer_rows, noise_rows
from fewstep.networks import build
from fewstep.solvers.solve import check_start, solve
from fewstep.store.files import make_folder, read_json, write_json, write_text

FORMAT = 1
LABEL_DRAW = 1  # which table of draws the labels come from; 0 is the base noise


@final
@dataclass(frozen=True)
class Config:
    """Everything about a generator but its weights; ``config.json`` holds these fields.

    Attributes:
        shape: of one sample inside the network.
        kind: ``velocity``: any solver, any steps; ``map``: its own sampler, only the step counts in ``steps``.
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
        shape: shape of one sample; may be left out when ``config`` is given.
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
        if config is None:
            if shape is None:
                raise UserError("a generator needs the shape of one sample: fs.Generator(module, shape=(3, 32, 32)).")
            config = Config(shape=tuple(int(n) for n in shape))
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
        label: int | Sequence[int] | Tensor | None = None,
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
            label: one label for all, one per sample, or None to draw them as often as in the data.
            guidance: guidance weight of a conditional velocity model (two network calls per evaluation).
            seed: sample ``i`` is a function of (seed, i) alone.
            noise: base samples ``(num, *shape)`` in network units, instead of drawing them.
            batch_size: rows per network call; it does not change the samples.

        Returns:
            ``(num, *data_shape)`` float32 on the CPU.
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
        label: int | Sequence[int] | Tensor | None = None,
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
            solution = solve(
                field_, x0[rows].to(self.device), solver=solver, steps=steps, grid=grid, cond=cond
            )
            parts.append(solution.x.cpu())
            nfe = solution.nfe
        return Draw(torch.cat(parts), x0, labels, nfe)

    def _how(
        self, solver: str | None, grid: GridSpec | None, steps: int | None
    ) -> tuple[str, GridSpec, int | None]:
        """The solver, grid and steps to use; a map refuses what it was not made for."""
        config = self.config
        if config.kind == "map":
            allowed = config.steps or (1,)
            if steps is not None and steps not in allowed:
                raise UserError(
                    f"{self.name!r} was made for {_words(allowed)} step(s), not {steps}: leave steps out, or sample "
                    "the flow it was distilled from."
                )
            if solver not in (None, "euler") or grid not in (None, "uniform"):
                raise UserError(f"{self.name!r} is a map with its own sampler: leave solver and grid out.")
            return "euler", "uniform", steps or config.default_steps
        solver, chosen = solver or config.solver, grid if grid is not None else config.grid
        named = isinstance(chosen, str) and not chosen[:1].isdigit()
        return solver, chosen, steps if steps is not None or not named else config.default_steps

    def _field(self, guidance: float | None) -> Field:
        if guidance is None or (guidance == 1.0 and self.config.guidance is None):
            return CountedField(self.module)
        if self.config.guidance is not None:
            raise UserError(
                f"{self.name!r} has guidance {self.config.guidance} baked into its weights: guiding it again is wrong. "
                "Leave guidance out."
            )
        if not self.conditional:
            raise UserError(f"guidance needs a class-conditional model, and {self.name!r} takes no labels.")
        if self.config.kind == "map":
            raise UserError(f"{self.name!r} is a one-step map; guidance must be baked in when it is distilled.")
        return Guided(self.module, guidance)

    def _starts(self, num: int | None, noise: Tensor | None, seed: int) -> Tensor:
        """Base samples: the user's, or rows of the seed's table."""
        shape = self.config.shape
        if noise is not None:
            check_start(noise)
            if tuple(noise.shape[1:]) != shape:
                raise UserError(f"noise has rows of shape {tuple(noise.shape[1:])}, the model needs {shape}.")
            if num not in (None, len(noise)):
                raise UserError(f"num={num} and noise of {len(noise)} rows contradict each other: leave num out.")
            return noise
        if num is None or num < 1:
            raise UserError(f"the number of samples must be at least 1, got {num}.")
        if self.config.base == "gaussian":
            return noise_rows(num, shape, seed=seed)
        if self.base_rows is None:
            raise UserError(f"{self.name!r} starts from data and its base rows are missing: pass noise=x0.")
        return self.base_rows[integer_rows(num, len(self.base_rows), seed=seed)]

    def _labels(self, num: int, label: int | Sequence[int] | Tensor | None, seed: int) -> Tensor | None:
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
        labels = torch.as_tensor(label).flatten()
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise UserError(f"labels must be whole numbers, got {labels.dtype}.")
        if self.config.label_names is not None:
            labels = self._by_name(labels)
        if len(labels) not in (1, num):
            raise UserError(f"{len(labels)} labels for {num} samples: give one, or one per sample.")
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise UserError(f"label {int(labels.max())} is out of range: {self.name!r} has classes 0 … {classes - 1}.")
        return labels.long().expand(num)

    def _by_name(self, labels: Tensor) -> Tensor:
        assert self.config.label_names is not None
        position = {name: k for k, name in enumerate(self.config.label_names)}
        unknown_labels = [n for n in labels.tolist() if n not in position]
        if unknown_labels and not all(isinstance(name, str) for name in position):
            raise UserError(f"label {unknown_labels[0]} is not in the data; known: {list(position)}.")
        return torch.tensor([position.get(n, n) for n in labels.tolist()])

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


def load(folder: str | Path, module: nn.Module | None = None, device: str | torch.device = "cpu") -> Generator:
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
                f"{folder} holds the weights of a module fewstep did not build: pass it, fs.load({str(folder)!r}, module=net)."
            )
        with torch.random.fork_rng(devices=[]):
            module = build(config.network)
    state = read_tensors(folder / "model.safetensors")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"the weights in {folder} do not fit the network: {error}") from error
    rows = read_tensors(folder / "base.safetensors")["rows"] if config.base == "empirical" else None
    generator = Generator(module.to(device).requires_grad_(False), config=config, base_rows=rows)
    generator.name = config.stage or folder.name
    return generator


def read_config(folder: Path) -> Config:
    """Read and check ``config.json``."""
    path = folder / "config.json"
    if not path.is_file():
        what = "is not a folder" if not folder.is_dir() else "has no config.json"
        raise UserError(
            f"{folder} is no model: it {what}. Give a stage's folder, such as runs/demo/teacher."
        )
    fields = read_json(path)
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise UserError(f"{path} is not a fewstep model's config, or of a newer version (format {FORMAT} is known).")
    try:
        config = Config(**fields)
        return replace(
            config,
            shape=tuple(config.shape),
            steps=None if config.steps is None else tuple(config.steps),
            class_weights=tuple(config.class_weights),
            label_names=None if config.label_names is None else tuple(config.label_names),
        )
    except TypeError as error:
        raise UserError(f"{path} is not a fewstep model's config: {error}.") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, or say that it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is missing, truncated or no safetensors file ({error}): copy the folder again, or run its "
            "recipe again."
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
        'x = fs.load("path/to/this/folder").sample(64, seed=0)',
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
