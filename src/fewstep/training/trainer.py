"""The trainer: optimiser steps, EMA, checkpoints and the non-finite guard.

All random numbers of a step are drawn for the global batch from one generator, seeded with (seed, stage, samples seen),
and each process takes its rows. So one process or several, resumed or not, take the same steps. The random numbers of
the networks themselves (dropout) have another seed, which also depends on the process.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.flow.couplings import Pair
from fewstep.flow.noise import Draws, isolated_rng, mix
from fewstep.methods.contract.objective import Batches, Collapse, Learning, Networks, Objective
from fewstep.methods.contract.options import Options
from fewstep.methods.contract.stage import Stream
from fewstep.networks.foreign import spread
from fewstep.training.checkpoint import KEEP, Checkpoints
from fewstep.training.ema import EMA
from fewstep.training.schedule import learning_rate
from fewstep.training.sharding import check_groups, local_pair, process_rows
from fewstep.training.state import load_module, load_optimiser, optimiser_tensors, strip
from fewstep.training.world import LocalWorld

CHECKPOINT_SECONDS = (2.0, 20.0)  # least and largest time between two checkpoints; chosen, not tuned
SAVE_SHARE = 50.0  # least time between two checkpoints, in times that writing one takes; chosen, not tuned
MAX_BAD_STEPS = 10  # non-finite steps of a role in a row at which training stops; chosen, not tuned
LOGS_PER_PHASE = 100  # least number of lines of statistics in a phase of 100 steps or more

Log = Callable[[dict[str, Any]], None]


@final
@dataclass
class Position:
    """The progress of a stage's training: what a checkpoint keeps beside the tensors.

    Attributes:
        phase, phase_samples: number of the phase, and samples seen in it.
        total_samples, step: samples seen and optimiser steps in the stage.
        bad_steps: non-finite steps in a row, by role.
        skipped: non-finite steps since the last line of statistics.
        sums: sum and number of a term's values since the last line of statistics, by name.
    """

    phase: int = 0
    phase_samples: int = 0
    total_samples: int = 0
    step: int = 0
    bad_steps: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)


@final
class Trainer:
    """Trains the phases of one stage, one after the other.

    Args:
        student: the module that is kept; its weights are averaged.
        options: batch size, learning rate and so on.
        key: (seed, stage name); all random numbers are functions of it and the samples seen.
        world: the processes that train together.
        checkpoints: store of the training state; None writes no checkpoints.
        log: called with each line of statistics.
        mask: name of the condition that marks valid entries; random draws are zero at padding.
        stream: the stream that the rows come from; checkpoints keep its place.
    """

    def __init__(
        self,
        student: nn.Module,
        options: Options,
        key: tuple[int, str],
        world: LocalWorld,
        checkpoints: Checkpoints | None = None,
        log: Log | None = None,
        mask: str | None = None,
        stream: Stream | None = None,
    ) -> None:
        self.student = student.to(world.device)
        self.options = options
        self.world = world
        self.checkpoints = checkpoints
        self.log = log or (lambda line: None)
        self.mask, self.stream = mask, stream
        self._place: dict[str, Any] | None = None  # of the stream, in the checkpoint that was loaded
        self.ema = EMA(self.student, options.ema)
        self.position = Position()
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        self._modules: dict[str, nn.Module] = {"student": self.student}
        self._objective: Objective | None = None
        self._wrapped: dict[nn.Module, nn.Module] = {}
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._learns: str | None = None  # the role whose parameters have gradients
        self._key = mix(*key)
        self._rows = process_rows(world, options.batch_size)
        self._generator = torch.Generator()
        self._loaded: dict[str, Tensor] | None = None
        self._saved, self._interval = 0.0, CHECKPOINT_SECONDS[0]

    def resume(self) -> bool:
        """Load the newest checkpoint if there is one, and return whether there was.

        Raises:
            UserError: the checkpoint is truncated, of another network or of another version.
        """
        found = self.checkpoints.load() if self.checkpoints else None
        if found is None:
            return False
        tensors, state = found
        try:
            self.position = Position(**state["position"])
            load_module(self.student, tensors, "student.")
            self.ema.load(strip(tensors, "ema."), state["ema_updates"])
        except (KeyError, TypeError) as error:
            raise self._other_version(str(error)) from error
        self._loaded, self._place = tensors, state.get("stream")
        return True

    def train(self, number: int, samples: int, objective: Objective, batches: Batches, label: str) -> None:
        """Train phase ``number`` until it has seen ``samples`` samples.

        Args:
            number: of the phase, from 0.
            samples: of the phase.
            objective: its loss and networks.
            batches: its training pairs.
            label: name in the progress display.

        Raises:
            UserError: too many non-finite steps in a row, weights that are not finite, or samples that became much
            worse.
        """
        position, size = self.position, self.options.batch_size
        if position.phase != number:
            position.phase, position.phase_samples = number, 0
        self._prepare(objective)
        every = max(1, min(100, -(-samples // size) // LOGS_PER_PHASE))
        self._saved = time.monotonic()
        progress = self.world.progress(samples, position.phase_samples, label)
        with isolated_rng(self.world.device), self._turns_ended(), progress as bar:
            while position.phase_samples < samples:
                self._step(objective, batches, samples)
                bar.update(size)
                self._check(objective, samples)
                if position.step % every == 0 or position.phase_samples >= samples:
                    bar.note = self._flush()
                if time.monotonic() - self._saved > self._interval:
                    self._save_between_steps()

    def save(self, *, keep: int = KEEP) -> None:
        """Write a checkpoint, on the first process, and keep the newest ``keep``.

        Raises:
            UserError: weights are not finite; the existing checkpoints are not changed.
        """
        if self.checkpoints is None or self.world.rank != 0:
            return
        for role, module in self._modules.items():
            if not all(bool(torch.isfinite(p).all()) for p in module.parameters()):
                failure = self._diverged(role, "its weights are not finite")
                # the other processes do not know it: this one must end the run, and not begin the next stage
                raise failure if self.world.size == 1 else UserError(str(failure))
        tensors = {f"ema.{name}": value for name, value in self.ema.state.items()}
        for role, module in self._modules.items():
            tensors |= {f"{role}.{name}": value for name, value in module.state_dict().items()}
        for role, optimiser in self.optimisers.items():
            tensors |= optimiser_tensors(role, optimiser)
        if self._objective is not None:
            tensors |= {f"state.{name}": value for name, value in self._objective.state.items()}
        state: dict[str, Any] = {
            "position": vars(self.position),
            "ema_updates": self.ema.updates,
            "total_samples": self.position.total_samples,
        }
        if self.stream is not None:
            state["stream"] = {"position": self.stream.position, "state": self.stream.state()}
        self.checkpoints.save(tensors, state, keep=keep)

    def _save_between_steps(self) -> None:
        """Write a checkpoint and set the time of the next; none is written after a non-finite step."""
        if any(self.position.bad_steps.values()):
            return
        began = time.monotonic()
        self.save()
        self._saved = time.monotonic()
        least, most = CHECKPOINT_SECONDS
        self._interval = min(most, max(least, SAVE_SHARE * (self._saved - began)))

    def _prepare(self, objective: Objective) -> None:
        """Optimisers for the objective's modules, and data-parallel wrappers for several processes."""
        check_groups(self.world, self.options.batch_size, objective.group)
        self._objective = objective
        self._modules = dict(objective.modules)
        for role, module in self._modules.items():
            module.to(self.world.device).train(objective.learning.get(role, Learning()).dropout)
        self._parameters = {
            role: [p for p in module.parameters() if p.requires_grad] for role, module in self._modules.items()
        }
        self.optimisers = {
            role: torch.optim.AdamW(
                parameters,
                lr=self.options.lr,
                betas=objective.learning.get(role, Learning()).betas,
                weight_decay=self.options.weight_decay,
                fused=True,
            )
            for role, parameters in self._parameters.items()
        }
        loaded, self._loaded = self._loaded, None
        if loaded is not None and self.position.phase_samples > 0:  # the checkpoint is of this phase
            for role, module in self._modules.items():
                load_module(module, loaded, f"{role}.")
                load_optimiser(role, self.optimisers[role], loaded)
            for name, value in objective.state.items():
                if f"state.{name}" not in loaded:
                    raise self._other_version(f"it has no state {name!r}")
                value.copy_(loaded[f"state.{name}"])
        if self.stream is not None and self._place is not None:
            self.stream.restore(self._place["state"], self._place["position"])
            self._place = None
        for module in self._modules.values():
            if module not in self._wrapped:
                self._wrapped[module] = self.world.wrap(module)

    def _step(self, objective: Objective, batches: Batches, samples: int) -> None:
        position, options = self.position, self.options
        seed = mix(self._key, position.total_samples)
        self._generator.manual_seed(seed)
        _seed_modules(self.world.device, mix(seed, "modules", self.world.rank))
        batch = batches.batch(position.phase_samples, options.batch_size, self._generator)
        batch = local_pair(batch, self._rows, options.batch_size, self.world.device)
        valid = None if self.mask is None or self.mask not in batch.cond else spread(batch.cond[self.mask], batch.x1)
        draws = Draws(self._generator, options.batch_size, self._rows, None if valid is None else valid.cpu())
        for role in objective.turns(position.phase_samples // options.batch_size):
            self._turn(objective, role, batch, draws, samples)
        position.step += 1
        position.phase_samples += options.batch_size
        position.total_samples += options.batch_size

    def _turn(self, objective: Objective, role: str, batch: Pair, draws: Draws, samples: int) -> None:
        """One role's forward, backward and update."""
        parameters = self._parameters[role]
        for parameter in parameters:
            parameter.grad = None
        done = self.position.phase_samples / samples
        with self._autocast():
            terms = objective.loss(role, self._networks(role), batch, draws, done)
        terms["loss"].backward()
        if self._wrapped[self._modules[role]] is self._modules[role]:
            self.world.average_gradients(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        total = nn.utils.get_total_norm(gradients)
        norm, values = total.item(), {name: value.item() for name, value in terms.items()}
        if self.world.size > 1:
            norm, values = self._agree(role, norm, values)
        if not (math.isfinite(norm) and math.isfinite(values["loss"])):
            self._bad_step(role, values["loss"])
            return
        self.position.bad_steps[role] = 0
        if norm > self.options.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.options.clip, total)
        self._update(objective, role, samples)
        for name in values.keys() & objective.state.keys():
            objective.state[name].fill_(values.pop(name))
        self._count("" if role == "student" else f"{role}/", values)

    def _update(self, objective: Objective, role: str, samples: int) -> None:
        """The optimiser's step, the average, and the objective's own update of its state."""
        own, optimiser = objective.learning.get(role, Learning()), self.optimisers[role]
        before = own.begins * self.options.batch_size
        rate = learning_rate(self.options, self.position.phase_samples - before, samples - before)
        optimiser.param_groups[0]["lr"] = rate if own.lr is None else rate * own.lr / self.options.lr
        optimiser.step()
        if role == "student":
            self.ema.update()
        objective.after_step(role)

    def _networks(self, role: str) -> Networks:
        """The networks for an update of ``role``: its own has gradients, and is wrapped for several processes."""
        if role != self._learns:
            self._learns = role
            for name, parameters in self._parameters.items():
                for parameter in parameters:
                    parameter.requires_grad_(name == role)
        return {name: self._wrapped[module] if name == role else module for name, module in self._modules.items()}

    @contextlib.contextmanager
    def _turns_ended(self) -> Iterator[None]:
        """Give all parameters gradients again when training ends, also by an error."""
        try:
            yield
        finally:
            self._learns = None
            for parameter in itertools.chain(*self._parameters.values()):
                parameter.requires_grad_(True)

    def _check(self, objective: Objective, samples: int) -> None:
        """Call the objective's :meth:`check`, ``checks`` times in the phase, and log the result."""
        if not objective.checks:
            return
        position = self.position
        before, now = position.phase_samples - self.options.batch_size, min(position.phase_samples, samples)
        if before * objective.checks // samples == now * objective.checks // samples:
            return
        found = objective.check(self.ema.weights())
        self.log({"phase": position.phase, "samples": position.total_samples, "step": position.step, "check": found})

    def _agree(self, role: str, norm: float, values: dict[str, float]) -> tuple[float, dict[str, float]]:
        """The means of norm and terms over all processes, so that all accept or skip the same steps."""
        mean, *means = self.world.mean([norm, *values.values()])
        assert not math.isfinite(mean) or math.isclose(mean, norm, rel_tol=1e-5), (
            f"the processes' gradients of {role!r} differ: its loss must call nets[{role!r}]"
        )
        return (norm if math.isfinite(mean) else mean), dict(zip(values, means, strict=True))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.options.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

    def _bad_step(self, role: str, loss: float) -> None:
        """Skip a step whose loss or gradient is not finite, and stop after ten in a row."""
        position = self.position
        position.skipped += 1
        position.bad_steps[role] = position.bad_steps.get(role, 0) + 1
        self.world.say(
            f"warning: step {position.step}: non-finite loss or gradient of {role!r} (loss {loss:g}), skipped"
        )
        if position.bad_steps[role] >= MAX_BAD_STEPS:
            raise self._diverged(role, f"{MAX_BAD_STEPS} steps in a row had non-finite losses or gradients")

    def _other_version(self, what: str) -> UserError:
        return UserError(
            f"the checkpoint {self._newest()} was written by another version of fewstep ({what}): "
            "delete its folder to begin the stage again, or use another --out."
        )

    def _newest(self) -> Path | None:
        kept = self.checkpoints.files() if self.checkpoints else []
        return kept[-1] if kept else None

    def _diverged(self, role: str, why: str) -> Collapse:
        kept = self._newest()
        where = f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet"
        return Collapse(
            f"training of {role!r} diverged at step {self.position.step}: {why}; {where}. Lower lr (now "
            f"{self.options.lr:g}), lengthen warmup, or use precision: fp32."
        )

    def _count(self, prefix: str, values: Mapping[str, float]) -> None:
        sums = self.position.sums
        for name, value in values.items():
            entry = sums.setdefault(prefix + name, [0.0, 0])
            entry[0] += value
            entry[1] += 1

    def _flush(self) -> str:
        """Log the terms' means since the last line of statistics; return the loss as text."""
        position = self.position
        means = {name: total / count for name, (total, count) in position.sums.items()}
        line: dict[str, Any] = {
            "phase": position.phase,
            "samples": position.total_samples,
            "step": position.step,
            "terms": means,
        }
        if position.skipped:
            line["skipped"] = position.skipped
        position.sums, position.skipped = {}, 0
        self.log(line)
        return f"loss {means['loss']:.4g}" if "loss" in means else ""


def _seed_modules(device: torch.device, seed: int) -> None:
    """Seed the generators that modules use, for example for dropout."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
