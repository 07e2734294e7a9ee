"""The trainer: optimiser steps, EMA, checkpoints, the non-finite guard, and nothing else.

Everything random in a step is drawn from one generator seeded with (seed, stage, samples seen), for the global batch,
and cut to the process's rows; so one process or several, resumed or not, take the same steps.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.flow.couplings import Pair
from fewstep.flow.noise import Draws, mix
from fewstep.methods.base import Batches, Objective, Options, World
from fewstep.training.checkpoint import Checkpoints
from fewstep.training.ema import EMA

CHECKPOINT_SECONDS = 20.0
MAX_BAD_STEPS = 10  # non-finite steps in a row after which training stops
LOGS_PER_PHASE = 100


@final
@dataclass
class Position:
    """Where a stage's training stands; everything a checkpoint keeps beside the tensors."""

    phase: int = 0
    phase_samples: int = 0
    total_samples: int = 0
    step: int = 0
    bad_steps: int = 0
    sums: dict[str, float] | None = None
    summed: int = 0


Log = Callable[[dict[str, Any]], None]


@final
class Trainer:
    """Trains the phases of one stage, one after the other.

    Args:
        student: the module that is kept; it has the EMA.
        options: batch size, learning rate and so on.
        key: (seed, stage name): what all draws are functions of, beside the samples seen.
        world: the processes at work.
        checkpoints: where the training state is kept; None keeps none.
        log: called with each line of statistics.
    """

    def __init__(
        self,
        student: nn.Module,
        options: Options,
        key: tuple[int, str],
        world: World,
        checkpoints: Checkpoints | None = None,
        log: Log | None = None,
    ) -> None:
        self.student = student.to(world.device)
        self.options = options
        self.key = key
        self.world = world
        self.checkpoints = checkpoints
        self.log = log or (lambda line: None)
        self.ema = EMA(self.student, options.ema)
        self.position = Position()
        self._rows = _rows_of(world, options.batch_size)
        self._generator = torch.Generator()
        self._saved_state: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self.optimisers: dict[str, torch.optim.Optimizer] = {}

    def resume(self) -> bool:
        """Load the newest checkpoint, if there is one; say whether there was."""
        found = self.checkpoints.load() if self.checkpoints else None
        if found is None:
            return False
        tensors, state = found
        self.position = Position(**state["position"])
        _load_module(self.student, tensors, "student.")
        self.ema.load(_strip(tensors, "ema."), state["ema_updates"])
        self._saved_state = found
        return True

    def train(self, number: int, samples: int, objective: Objective, batches: Batches, label: str) -> None:
        """Train phase ``number`` until it has seen ``samples`` samples."""
        if self.position.phase != number:
            self.position.phase, self.position.phase_samples = number, 0
            self.position.sums, self.position.summed = None, 0
        self._prepare(objective)
        steps = -(-samples // self.options.batch_size)
        every = max(1, min(100, steps // LOGS_PER_PHASE))
        saved = time.monotonic()
        with _isolated_rng(), self.world.progress(samples, self.position.phase_samples, label) as bar:
            while self.position.phase_samples < samples:
                self._step(objective, batches, samples)
                bar.update(self.options.batch_size)
                if self.position.step % every == 0 or self.position.phase_samples >= samples:
                    bar.note = self._flush(label)
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = time.monotonic()

    def save(self, *, keep: int = 2) -> None:
        """Write a checkpoint (the first process does)."""
        if self.checkpoints is None or self.world.rank != 0:
            return
        tensors = {f"ema.{name}": value for name, value in self.ema.state.items()}
        for role, module in self._modules.items():
            tensors |= {f"{role}.{name}": value for name, value in module.state_dict().items()}
        for role, optimiser in self.optimisers.items():
            tensors |= _optimiser_tensors(role, optimiser)
        state = {
            "position": vars(self.position),
            "ema_updates": self.ema.updates,
            "total_samples": self.position.total_samples,
        }
        self.checkpoints.save(tensors, state, keep=keep)

    def _prepare(self, objective: Objective) -> None:
        """Optimisers for the objective's modules, data-parallel wrappers where there are several processes."""
        for module in objective.modules.values():
            module.to(self.world.device).train()
        self._modules = dict(objective.modules)
        self.optimisers = {
            role: torch.optim.AdamW(
                [p for p in module.parameters() if p.requires_grad],
                lr=self.options.lr,
                weight_decay=self.options.weight_decay,
                fused=True,
            )
            for role, module in self._modules.items()
        }
        if self._saved_state is not None:
            tensors, state = self._saved_state
            self._saved_state = None
            if state["position"]["phase_samples"] > 0 and state["position"]["phase"] == self.position.phase:
                for role, module in self._modules.items():
                    _load_module(module, tensors, f"{role}.")
                for role, optimiser in self.optimisers.items():
                    _load_optimiser(role, optimiser, tensors)
        if self.world.size > 1:
            from torch.nn.parallel import DistributedDataParallel

            for role, module in self._modules.items():
                objective.modules[role] = DistributedDataParallel(module)
        self._parameters = {role: list(m.parameters()) for role, m in self._modules.items()}

    def _step(self, objective: Objective, batches: Batches, samples: int) -> None:
        position, options = self.position, self.options
        seed = mix(*self.key, position.total_samples)
        self._generator.manual_seed(seed)
        torch.default_generator.manual_seed(seed + self.world.rank)
        batch = batches.batch(position.phase_samples, options.batch_size, self._generator)
        batch = _local(batch, self._rows, self.world.device)
        draws = Draws(self._generator, options.batch_size, self._rows)
        rate = learning_rate(options, position.phase_samples, samples)
        for role in objective.turns(position.step):
            terms = self._turn(objective, role, batch, draws, rate)
            self._count(role, terms)
        position.step += 1
        position.phase_samples += options.batch_size
        position.total_samples += options.batch_size

    def _turn(
        self, objective: Objective, role: str, batch: Pair, draws: Draws, rate: float
    ) -> Mapping[str, Tensor]:
        """One role's forward, backward and update."""
        optimiser = self.optimisers[role]
        optimiser.param_groups[0]["lr"] = rate
        with self._autocast():
            terms = objective.loss(role, batch, draws)
        optimiser.zero_grad(set_to_none=True)
        terms["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self._parameters[role], self.options.clip)
        if math.isfinite(norm.item()):
            optimiser.step()
            self.position.bad_steps = 0
            if role == "student":
                self.ema.update()
        else:
            self._bad_step(role, terms)
        return terms

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.options.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

    def _bad_step(self, role: str, terms: Mapping[str, Tensor]) -> None:
        """Skip a step whose gradient is not finite; stop when they do not end."""
        self.position.bad_steps += 1
        loss = float(terms["loss"].detach())
        self.world.say(f"warning: step {self.position.step}: non-finite gradient of {role!r} (loss {loss:g}), skipped")
        if self.position.bad_steps >= MAX_BAD_STEPS:
            kept = self.checkpoints.files()[-1:] if self.checkpoints else []
            where = f"the last good checkpoint is {kept[0]}" if kept else "no checkpoint was written yet"
            raise UserError(
                f"training of {role!r} diverged: {MAX_BAD_STEPS} steps in a row had non-finite gradients; {where}. "
                f"Lower lr (now {self.options.lr:g}), lengthen warmup, or use precision: fp32."
            )

    def _count(self, role: str, terms: Mapping[str, Tensor]) -> None:
        sums = self.position.sums = self.position.sums or {}
        prefix = "" if role == "student" else f"{role}/"
        for name, value in terms.items():
            sums[prefix + name] = sums.get(prefix + name, 0.0) + value.item()
        self.position.summed += 1

    def _flush(self, label: str) -> str:
        """Log the mean terms since the last flush (mean over processes)."""
        position = self.position
        if not position.summed or not position.sums:
            return ""
        means = {name: value / position.summed for name, value in position.sums.items()}
        if self.world.size > 1:
            packed = torch.tensor(list(means.values()), dtype=torch.float64)
            torch.distributed.all_reduce(packed)
            means = dict(zip(means, (packed / self.world.size).tolist(), strict=True))
        position.sums, position.summed = None, 0
        self.log(
            {"phase": position.phase, "samples": position.total_samples, "step": position.step, "terms": means}
        )
        return f"loss {means['loss']:.4g}"


def learning_rate(options: Options, seen: int, samples: int) -> float:
    """Linear warm-up over ``warmup · samples``, then a cosine to zero at ``samples``."""
    begin = options.warmup * samples
    position = seen + options.batch_size / 2  # the middle of the step's batch
    if position < begin:
        return options.lr * position / begin
    return options.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (position - begin) / max(1.0, samples - begin))))


def _rows_of(world: World, batch: int) -> slice | None:
    """This process's rows of the global batch."""
    if world.size == 1:
        return None
    if batch % world.size:
        raise UserError(f"batch_size {batch} does not divide among {world.size} processes: make it a multiple.")
    each = batch // world.size
    return slice(world.rank * each, (world.rank + 1) * each)


def _local(pair: Pair, rows: slice | None, device: torch.device) -> Pair:
    if rows is None and device.type == "cpu":
        return pair
    cut = rows or slice(None)
    cond = {name: value[cut].to(device) for name, value in pair.cond.items()}
    return Pair(pair.x0[cut].to(device), pair.x1[cut].to(device), cond)


@contextlib.contextmanager
def _isolated_rng() -> Any:
    """Leave the global random state as it was found."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield


def _strip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _load_module(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    try:
        module.load_state_dict(_strip(tensors, prefix))
    except RuntimeError as error:
        raise UserError(
            f"the checkpoint holds another network than the recipe describes: {error}. Use another --out."
        ) from error


def _optimiser_tensors(role: str, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimiser.{role}.{number}.{name}": value
        for number, entry in optimiser.state_dict()["state"].items()
        for name, value in entry.items()
    }


def _load_optimiser(role: str, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in _strip(tensors, f"optimiser.{role}.").items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
