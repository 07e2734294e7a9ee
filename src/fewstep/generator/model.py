"""The generator: from what the user asks for to samples in the data's units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.data.scaling import Scaling
from fewstep.diagnostics.cost import Watch
from fewstep.diagnostics.pick import Choice
from fewstep.diagnostics.tune import KINDS
from fewstep.errors import UserError
from fewstep.flow.field import Field
from fewstep.flow.grids import FROM_MODEL, GridSpec, make_grid
from fewstep.flow.paths import make_path
from fewstep.generator.choose import choose
from fewstep.generator.conditions import draw_conditions, mask_starts
from fewstep.generator.config import Config, sample_shape
from fewstep.generator.draw import Draw
from fewstep.generator.guidance import guided_field
from fewstep.generator.label_draws import Label
from fewstep.generator.model_folder import save_model
from fewstep.generator.samplers import Pilot, Samplers
from fewstep.generator.starts import BaseRows, Starts, distinct_starts, draw_starts, given_starts
from fewstep.networks.foreign import Foreign, spread, whole_state
from fewstep.solvers.maps import FreshNoise, run_map
from fewstep.solvers.solve import solve
from fewstep.solvers.tables import Table
from fewstep.store.tensors import weights_digest

TUNING_SEED = 0x7E57  # of the noises that samplers are tuned on; a user's seeds are seldom this number


@final
class Generator:
    """A network with all that is needed to sample it: base samples, solver or map sampler, labels, data units.

    ``sample`` solves ``dx/dt = v(x, t, **cond)`` from base noise ``x0`` (t = 0) to data ``x1`` (t = 1), or calls the
    map's own sampler, and takes the result to the data's units.

    Args:
        module: ``v(x, t, **cond)``: ``x`` (B, *shape) in network units, ``t`` (B,) in [0, 1]. It is put into eval mode.
        shape: shape of one sample; left out when ``config`` is given.
        config: everything else; see :class:`~fewstep.generator.config.Config`.
        base_rows: rows of an empirical base, or complete starts made from data, (N, *shape) in network units.
        base_context: the contexts of these starts, (N, ...).
        classes: number of classes of a network of the user's own that takes labels; they are drawn with equal shares.

    Attributes:
        name: the recipe's stage, or the module's class.
        base: the rows that base samples are made of; None for a Gaussian base.
        kept: rows of conditions to draw from, by name.
        folder: where it was loaded from; None for one that was made in memory.

    Raises:
        UserError: a module that is no ``torch.nn.Module``; neither or both of ``shape`` and ``config``.

    >>> import torch, fewstep as fs
    >>> class Ones(torch.nn.Module):
    ...     def forward(self, x, t):
    ...         return torch.ones_like(x)
    >>> fs.Generator(Ones(), shape=(2,)).sample(noise=torch.zeros(1, 2), steps=4)
    tensor([[1., 1.]])
    """

    def __init__(
        self,
        module: nn.Module,
        shape: Sequence[int] | None = None,
        *,
        config: Config | None = None,
        base_rows: Tensor | None = None,
        base_context: Tensor | None = None,
        classes: int = 0,
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
            network = module.describe() if isinstance(module, Foreign) else None
            shares = (1 / classes,) * classes if classes else ()
            config = Config(shape=sample_shape(shape), network=network, class_weights=shares)
        self.module = module.eval()
        self.kept: dict[str, Tensor] = {}
        self.config = config
        self.base = None if base_rows is None else BaseRows(base_rows, base_context)
        own = module.describe()["module"].rpartition(".")[2] if isinstance(module, Foreign) else type(module).__name__
        self.name = config.stage or own
        self.folder: Path | None = None
        self.samplers: Samplers | None = None  # found by tune(), read from the folder when first needed

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        first = next(self.module.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the weights."""
        floating = (p.dtype for p in self.module.parameters() if p.dtype.is_floating_point)
        return next(floating, torch.float32)

    @property
    def inner(self) -> nn.Module:
        """The user's own module, with the user's own parameter names; for fewstep's own networks the network.

        A two-time student also has interval weights beside it: ``generator.module.state_dict()`` holds both.
        """
        return self.module.inner if isinstance(self.module, Foreign) else self.module

    @property
    def conditional(self) -> bool:
        """Whether it takes labels."""
        return bool(self.config.class_weights)

    @property
    def distinct_starts(self) -> int | None:
        """How many different base samples there are; None where they are drawn without end."""
        return distinct_starts(self.config, self.base)

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
        cond: Mapping[str, Any] | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Draw samples in the data's own units.

        Args:
            num: how many; may be left out when ``noise`` is given.
            steps: solver steps; network evaluations for ``auto`` and ``fitted`` (default 8).
            solver, grid: for a velocity model; a map has its own sampler. ``auto`` and ``fitted`` are found for the
                model (:meth:`tune`) and bring their own grid.
            label: one label for all, one per sample, or None to draw them as often as in the data. Labels are
                the data's own: numbers, or names where the data has names.
            guidance: guidance weight of a conditional velocity model (two network calls per evaluation).
            seed: sample ``i`` is a function of (seed, i) alone. A model that starts from data (in-painting,
                super-resolution) damages example ``k_i`` with noise ``i``, and uses all examples before repeating one.
            noise: base samples ``(num, *shape)`` in network units, instead of drawing them.
            context: with ``noise``, what the network is shown of the data (in-painting, super-resolution).
            cond: the network's conditions by name, each ``(num, ...)``; one row serves all samples. Without it they are
                drawn from rows of the training data that are kept with the model.
            batch_size: rows per network call; it does not change the samples.

        Returns:
            ``(num, *data_shape)`` float32 on the CPU.

        Raises:
            UserError: a number below 1, an unknown name, a label that is not there, a step count that the model
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
            cond=cond,
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
        cond: Mapping[str, Any] | None = None,
        batch_size: int = 256,
    ) -> Draw:
        """As :meth:`sample`, in network units, with the base samples, conditions and network evaluations."""
        chosen, grid, steps = choose(self.config, self.name, solver, grid, steps)
        field_ = guided_field(self.module, self.config, self.name, guidance)
        how: str | Table = chosen
        if chosen in KINDS:
            assert steps is not None, "tuned samplers have a number of calls"
            found = self.known_sampler(steps, chosen, guidance) or self.tune(steps, chosen, guidance)
            how, grid, steps = found.table, "uniform", None
        elif isinstance(grid, str) and grid in FROM_MODEL:
            assert steps is not None, "a named grid has a number of steps"
            grid, steps = self._samplers().grid(grid, steps, guidance, self._pilot(guidance)), None
        x0, conditions = self._inputs(num, noise, context, cond, label, seed)
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        parts, nfe = [], 0
        for first in range(0, len(x0), batch_size):
            rows = slice(first, first + batch_size)
            part = {name: self._cast(value[rows]) for name, value in conditions.items()}
            start = x0[rows].to(self.device, self.dtype)
            x, calls = self._carry(field_, start, how, steps, grid, part, seed, first)
            parts.append(x.cpu())
            nfe += calls * len(start)
        x = torch.cat(parts)
        finite = torch.isfinite(x).flatten(1).all(1)
        if not finite.all():
            raise UserError(
                f"{int((~finite).sum())} of {len(x)} samples of {self.name!r} are NaN or infinite: its "
                "weights are damaged or its training diverged, or the guidance is too large."
            )
        return Draw(x, x0, conditions, -(-nfe // len(x)))

    def _cast(self, rows: Tensor) -> Tensor:
        """Conditions on the network's device, numbers with a fraction in the dtype of its weights."""
        return rows.to(self.device, self.dtype) if rows.is_floating_point() else rows.to(self.device)

    def _inputs(
        self,
        num: int | None,
        noise: Tensor | None,
        context: Tensor | None,
        cond: Mapping[str, Any] | None,
        label: Label | None,
        seed: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Base samples and conditions, the user's or drawn."""
        if num is None and noise is None and cond:
            num = max((len(value) for value in map(torch.as_tensor, cond.values()) if value.ndim), default=None)
        x0, shown = self._starts(num, noise, context, seed)
        conditions = draw_conditions(self.config, self.name, self.kept, len(x0), cond, label, seed)
        if shown is not None:
            conditions["context"] = shown
        return mask_starts(self._mask, x0, conditions), conditions

    @property
    def _mask(self) -> str | None:
        """Name of the condition that marks valid entries."""
        return self.module.mask if isinstance(self.module, Foreign) else self.config.mask

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
        sampler = self.config.rule.sampler
        if sampler != "euler":
            rows = None if self.base is None else self.base.rows
            valid = None if self._mask is None else spread(cond[self._mask], start)
            fresh = FreshNoise(make_path(self.config.path), seed, row, rows, valid)
            two_time = bool((self.config.network or {}).get("two_time"))
            return run_map(sampler, field_, start, make_grid(grid, steps), cond, fresh, two_time)
        path = self.config.path
        solution = solve(field_, start, solver=how, steps=steps, grid=grid, cond=cond, path=path, seed=seed, row=row)
        return solution.x, solution.nfe

    def tune(
        self,
        calls: int,
        kind: str = "auto",
        guidance: float | None = None,
        *,
        max_rows: int | None = None,
        progress: Watch | None = None,
    ) -> Choice:
        """The best way to sample this model with ``calls`` evaluations of its network: see :func:`fewstep.tune`.

        What is found is kept, in the model's folder too where it was loaded from one.

        Args:
            calls: evaluations per sample; a guided one is two network calls.
            kind: ``auto`` or ``fitted``.
            guidance: guidance weight it is to be sampled with.
            max_rows, progress: as for :func:`fewstep.tune`; what was found within a limit is found again without one.

        Returns:
            The solver's table of numbers, with the error that it was chosen by.

        Raises:
            UserError: a map, which has its own sampler.
        """
        if self.config.rule.kind == "map":
            raise UserError(f"{self.name!r} is a map with its own sampler: tune the flow it was distilled from.")
        found = self._samplers()
        return found.tuned(kind, calls, guidance, self.config.shape, self._pilot(guidance), max_rows, progress)

    def known_sampler(self, calls: int, kind: str = "auto", guidance: float | None = None) -> Choice | None:
        """The sampler that :meth:`tune` has found before with these arguments, or None."""
        return self._samplers().known(kind, calls, guidance)

    def tuning_noises(self, num: int, guidance: float | None = None) -> tuple[Field, Tensor, dict[str, Tensor]]:
        """The field that :meth:`tune` evaluates, ``num`` of its noises, and their conditions."""
        return self._pilot(guidance)(num)

    def _samplers(self) -> Samplers:
        if self.samplers is None:
            digest = weights_digest(whole_state(self.module))
            self.samplers = Samplers(digest, self.config.path, self.folder)
        return self.samplers

    def _pilot(self, guidance: float | None) -> Pilot:
        """Starts and conditions as :meth:`draw` makes them, of the tuning seed."""

        def pilot(num: int) -> tuple[Field, Tensor, dict[str, Tensor]]:
            x0, conditions = self._inputs(num, None, None, None, None, TUNING_SEED)
            cond = {name: self._cast(rows) for name, rows in conditions.items()}
            return guided_field(self.module, self.config, self.name, guidance), x0.to(self.device, self.dtype), cond

        return pilot

    def _starts(self, num: int | None, noise: Tensor | None, context: Tensor | None, seed: int) -> Starts:
        """Base samples and their contexts: the user's, or drawn for the seed."""
        if noise is not None:
            return given_starts(self.config, self.name, num, noise, context)
        if context is not None:
            raise UserError("a context belongs to its noise: pass noise=x0 with it.")
        return draw_starts(self.config, self.name, self.base, num, seed)

    def save(self, folder: str | Path) -> Path:
        """Write ``config.json``, ``model.safetensors``, a card and what else the model needs, each file atomically.

        Args:
            folder: made if need be.

        Returns:
            The folder.

        Raises:
            UserError: the folder cannot be written.
        """
        saved = save_model(folder, self.module.state_dict(), self.config, self.base, self.kept)
        if self.samplers is not None and len(self.samplers):
            self.samplers.write(saved)
        return saved
