"""The generator itself: from a user's wish for samples to samples in the data's units."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.data.scaling import Scaling
from fewstep.diagnostics.pick import Choice
from fewstep.diagnostics.tune import KINDS
from fewstep.errors import UserError
from fewstep.flow.field import CountedField, Field, Guided
from fewstep.flow.grids import FROM_MODEL, GridSpec, make_grid
from fewstep.flow.noise import integer_rows, noise_rows
from fewstep.flow.paths import make_path
from fewstep.generator.choose import choose
from fewstep.generator.config import Config, read_config, sample_shape
from fewstep.generator.label_draws import Label, draw_labels
from fewstep.generator.model_folder import read_base, save_model
from fewstep.generator.samplers import Pilot, Samplers
from fewstep.networks import build
from fewstep.solvers.maps import Fresh, run_map
from fewstep.solvers.solve import check_start, solve
from fewstep.solvers.tables import Table
from fewstep.store.tensors import read_tensors, weights_digest

TUNING_SEED = 0x7E57  # of the noises samplers are tuned on, other than the ones anybody asks for


@final
@dataclass(frozen=True)
class Draw:
    """Samples in network units.

    Attributes:
        x: ``(num, *shape)``.
        x0: the base samples they come from.
        label: ``(num,)`` or None.
        nfe: network evaluations per sample, counted.
        context: what the network was shown of the data, or None.
    """

    x: Tensor
    x0: Tensor
    label: Tensor | None
    nfe: int
    context: Tensor | None = None

    def conditions(self, device: torch.device) -> dict[str, Tensor]:
        """The keyword arguments that the network was called with."""
        given = {"label": self.label, "context": self.context}
        return {name: value.to(device) for name, value in given.items() if value is not None}


@final
class Generator:
    """Sample a flow model, save it, load it back.

    Args:
        module: ``v(x, t, **cond)``; put into eval mode.
        shape: shape of one sample; left out when ``config`` is given.
        config: everything else; see :class:`Config`.
        base_rows: rows of an empirical base, or the kept examples of one made from data, network units.
        base_context: the examples' contexts.
    """

    def __init__(
        self,
        module: nn.Module,
        shape: Sequence[int] | None = None,
        *,
        config: Config | None = None,
        base_rows: Tensor | None = None,
        base_context: Tensor | None = None,
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
            config = Config(shape=sample_shape(shape))
        self.module = module.eval()
        self.config = config
        self.base_rows = base_rows
        self.base_context = base_context
        self.name = config.stage or type(module).__name__
        self.folder: Path | None = None  # where it was loaded from
        self.samplers: Samplers | None = None  # found by tune(), read from the folder when first needed

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
        context: Tensor | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Draw samples in the data's own units.

        Args:
            num: how many; may be left out when ``noise`` is given.
            steps: solver steps; network evaluations for ``auto`` and ``fitted`` (default 8).
            solver, grid: for a velocity model; a map has its own. ``auto`` and ``fitted`` are found for the model
                (:meth:`tune`) and bring their own grid.
            label: one label for all, one per sample, or None to draw them as often as in the data. Labels are
                the data's own: numbers, or names where the data has names.
            guidance: guidance weight of a conditional velocity model (two network calls per evaluation).
            seed: sample ``i`` is a function of (seed, i) alone.
            noise: base samples ``(num, *shape)`` in network units, instead of drawing them.
            context: with ``noise``, what the network is shown of the data (in-painting, super-resolution).
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
            context=context,
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
        context: Tensor | None = None,
        batch_size: int = 256,
    ) -> Draw:
        """As :meth:`sample`, in network units and with the count of network evaluations."""
        chosen, grid, steps = choose(self.config, self.name, solver, grid, steps)
        field_ = self._field(guidance)
        how: str | Table = chosen
        if chosen in KINDS:
            assert steps is not None, "tuned samplers have a number of calls"
            how, grid, steps = self.tune(steps, chosen, guidance).table, "uniform", None
        elif isinstance(grid, str) and grid in FROM_MODEL:
            assert steps is not None, "a named grid has a number of steps"
            grid, steps = self._samplers().grid(grid, steps, guidance, self._pilot(guidance)), None
        x0, shown = self._starts(num, noise, context, seed)
        labels = draw_labels(self.config, self.name, len(x0), label, seed)
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        parts, nfe = [], 0
        for first in range(0, len(x0), batch_size):
            rows = slice(first, first + batch_size)
            cond = {} if labels is None else {"label": labels[rows].to(self.device)}
            if shown is not None:
                cond["context"] = shown[rows].to(self.device, self.dtype)
            start = x0[rows].to(self.device, self.dtype)
            x, calls = self._carry(field_, start, how, steps, grid, cond, seed, first)
            parts.append(x.cpu())
            nfe += calls * len(start)
        x = torch.cat(parts)
        finite = torch.isfinite(x).flatten(1).all(1)
        if not finite.all():
            raise UserError(
                f"{int((~finite).sum())} of {len(x)} samples of {self.name!r} are NaN or infinite: its "
                "weights are damaged or its training diverged, or the guidance is too large."
            )
        return Draw(x, x0, labels, -(-nfe // len(x)), shown)

    def _carry(
        self,
        field_: Field,
        start: Tensor,
        how: str | Table,
        steps: int | None,
        grid: GridSpec,
        cond: dict[str, Tensor],
        seed: int,
        row: int,
    ) -> tuple[Tensor, int]:
        """From noise to data, by the map's own sampler or a solver: end points and evaluations per sample."""
        if self.config.sampler != "euler":
            fresh = Fresh(make_path(self.config.path), seed, row, self.base_rows)
            two_time = bool((self.config.network or {}).get("two_time"))
            return run_map(self.config.sampler, field_, start, make_grid(grid, steps), cond, fresh, two_time)
        path = self.config.path
        solution = solve(field_, start, solver=how, steps=steps, grid=grid, cond=cond, path=path, seed=seed, row=row)
        return solution.x, solution.nfe

    def tune(self, calls: int, kind: str = "auto", guidance: float | None = None) -> Choice:
        """The best way to sample this model with ``calls`` evaluations of its network: see :func:`fewstep.tune`.

        What is found is kept, in the model's folder too where it was loaded from one.

        Args:
            calls: evaluations per sample; a guided one is two network calls.
            kind: ``auto`` or ``fitted``.
            guidance: guidance weight it is to be sampled with.
        """
        if self.config.kind == "map":
            raise UserError(f"{self.name!r} is a map with its own sampler: tune the flow it was distilled from.")
        return self._samplers().tuned(kind, calls, guidance, self.config.shape, self._pilot(guidance))

    def _samplers(self) -> Samplers:
        if self.samplers is None:
            digest = weights_digest(self.module.state_dict())
            self.samplers = Samplers(digest, self.config.path, self.folder)
        return self.samplers

    def _pilot(self, guidance: float | None) -> Pilot:
        """Starts and conditions as :meth:`draw` makes them, of a seed that is nobody else's."""

        def pilot(num: int) -> tuple[Field, Tensor, dict[str, Tensor]]:
            x0, context = self._starts(num, None, None, TUNING_SEED)
            labels = draw_labels(self.config, self.name, num, None, TUNING_SEED)
            cond = Draw(x0, x0, labels, 0, context).conditions(self.device)
            return self._field(guidance), x0.to(self.device, self.dtype), cond

        return pilot

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
            raise UserError(f"{self.name!r} is a map; guidance must be baked in when it is distilled.")
        if not self.config.guidable and guidance != 1.0:
            raise UserError(
                f"{self.name!r} never learned without labels, and guidance compares the two: guide its teacher, or "
                "bake the guidance in with 'guidance:' in the recipe."
            )
        return Guided(self.module, guidance)

    def _starts(
        self, num: int | None, noise: Tensor | None, context: Tensor | None, seed: int
    ) -> tuple[Tensor, Tensor | None]:
        """Base samples and their contexts: the user's, or rows of the seed's table."""
        shape = self.config.shape
        if noise is None and context is not None:
            raise UserError("a context belongs to its noise: pass noise=x0 with it.")
        if noise is not None:
            check_start(noise)
            if tuple(noise.shape[1:]) != shape:
                raise UserError(f"noise has rows of shape {tuple(noise.shape[1:])}, the model needs {shape}.")
            if num not in (None, len(noise)):
                raise UserError(f"num={num} and noise of {len(noise)} rows contradict each other: leave num out.")
            needed = (self.config.network or {}).get("context", 0)
            if (context is None and needed) or (context is not None and len(context) != len(noise)):
                raise UserError(f"{self.name!r} takes a context: pass one row of it per row of noise, context=c.")
            return noise, context
        if not isinstance(num, int | np.integer) or isinstance(num, bool) or num < 1:
            raise UserError(f"the number of samples must be a whole number of at least 1, got {num!r}.")
        _check_memory(num, shape)
        if self.config.base == "gaussian":
            return noise_rows(num, shape, seed=seed), None
        if self.base_rows is None:
            raise UserError(f"{self.name!r} starts from data and its base rows are missing: pass noise=x0.")
        if self.config.base == "empirical":
            return self.base_rows[integer_rows(num, len(self.base_rows), seed=seed)], None
        rows = torch.arange(num) % len(self.base_rows)  # the kept examples in order, whatever the seed
        return self.base_rows[rows], None if self.base_context is None else self.base_context[rows]

    def save(self, folder: str | Path) -> Path:
        """Write ``config.json``, ``model.safetensors`` and a card to a folder, atomically file by file."""
        saved = save_model(folder, self.module.state_dict(), self.config, self.base_rows, self.base_context)
        if self.samplers is not None and len(self.samplers):
            self.samplers.write(saved)
        return saved


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
    if config.kind == "features":
        raise UserError(
            f"{folder} holds features (method {config.method!r}), not a generator: there is nothing to sample. Name it "
            f"where features are asked for: 'features:' in a recipe, or fewstep compare … --features {folder}."
        )
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
    rows, context = None, None
    if config.base != "gaussian":
        rows, context = read_base(folder / "base.safetensors", config.shape)
    module = module.to(device).requires_grad_(False)
    generator = Generator(module, config=config, base_rows=rows, base_context=context)
    generator.name = config.stage or folder.name
    generator.folder = folder
    return generator


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
