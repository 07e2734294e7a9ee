"""The processes that train together, and their output: progress bars on a terminal, plain lines otherwise."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.networks.foreign import Foreign

WAIT = timedelta(days=1)  # longest wait for another process, which may have many more pairs to make
BUCKET_BYTES = 1 << 26  # of gradients that are averaged in one exchange, 64 MiB; chosen, not tuned
PLAIN_SECONDS = 10.0  # least time between two plain progress lines


@final
class LocalWorld:
    """This process, alone or one of several that ``torchrun`` or ``accelerate launch`` started.

    accelerate chooses the device, starts the process group and wraps modules. Data order, random numbers, schedules and
    checkpoints are computed by fewstep.

    Args:
        quiet: print nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        from accelerate import PartialState

        # without cpu=True, accelerate does not connect processes that have no accelerator
        self._state = PartialState(cpu=_on_cpu(), timeout=WAIT)
        started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else self.size
        if started != self.size:
            raise UserError(f"{started} processes were started, and accelerate found {self.size}: use torchrun.")
        if self.size > 1:
            atexit.register(_leave)
        self.quiet = quiet

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return int(self._state.process_index)

    @property
    def size(self) -> int:
        """The number of processes."""
        return int(self._state.num_processes)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._state.device

    def barrier(self) -> None:
        """Wait until all processes have called it."""
        if self.size > 1:
            self._state.wait_for_everyone()

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over the processes; for one process the module itself.

        It is also the module itself for a network from outside, whose gradients :meth:`average_gradients` averages: DDP
        waits for a gradient of every parameter, and some of such a network's may have no part in the loss.

        Raises:
            UserError: the launcher asks for another kind of data parallelism than DDP.
        """
        if self.size == 1 or any(isinstance(part, Foreign) for part in module.modules()):
            return module
        from accelerate import Accelerator
        from torch.nn.parallel import DistributedDataParallel

        # precision is a stage's option, not the launcher's
        accelerator = Accelerator(mixed_precision="no", cpu=self.device.type == "cpu")
        wrapped = accelerator.prepare_model(module, device_placement=False)  # the trainer has placed it already
        if not isinstance(wrapped, DistributedDataParallel):
            raise UserError(
                f"the launcher asks for {self._state.distributed_type.value}, and training here keeps whole "
                "weights in every process (DDP): use torchrun, or 'accelerate launch --multi_gpu'."
            )
        return wrapped

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace the gradients of a module that :meth:`wrap` left as it is by their means over the processes.

        A parameter that has no gradient in some of the processes has a zero there. One that has none in any of them
        keeps none, so that the optimiser leaves it alone, as with one process.

        Args:
            parameters: equal in number, order and shape in every process.
        """
        if self.size == 1:
            return
        found = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        torch.distributed.all_reduce(found)
        for bucket in _buckets([p for p, count in zip(parameters, found.tolist(), strict=True) if count]):
            for p in bucket:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            gradients = [p.grad for p in bucket if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            parts = (flat / self.size).split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean over the processes of every number, equal in all of them."""
        if self.size == 1:
            return list(values)
        packed = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(packed)
        return (packed / self.size).tolist()

    def average(self, value: Tensor) -> Tensor:
        """The mean over the processes of a tensor of equal shape in each."""
        if self.size == 1:
            return value
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value / self.size

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, (size * B, ...) of (B, ...), in the order of the global batch, without a graph."""
        rows = rows.detach()
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def say(self, message: str) -> None:
        """Print a line, from the first process alone."""
        if self.rank == 0 and not self.quiet:
            print(message, flush=True)

    def progress(self, total: int, done: int, label: str) -> Progress:
        """A progress display, a context manager, over ``total`` units of which ``done`` are done."""
        return Progress(total, max(0, done), label, shown=self.rank == 0 and not self.quiet)


@final
class Progress:
    """A tqdm bar on a terminal, and otherwise a plain line every ten seconds.

    Args:
        total: number of units.
        done: units that are done already.
        label: name of the work.
        shown: whether anything is printed.
        unit: name of one unit.
    """

    def __init__(self, total: int, done: int, label: str, *, shown: bool, unit: str = "sample") -> None:
        self.total, self.done, self.label, self.unit = total, done, label, unit
        self.note = ""
        self._shown = shown
        self._bar: Any = None
        self._said = self._began = time.monotonic()
        self._first = done

    def __enter__(self) -> Progress:
        if self._shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total,
                initial=self.done,
                desc=self.label,
                unit=self.unit,
                unit_scale=True,
                leave=False,
            )
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._shown and failed is None:
            seconds = time.monotonic() - self._began
            print(f"  {self.label}: {self.done:,} {self.unit}s, {seconds:.1f} s {self.note}".rstrip(), flush=True)

    def update(self, count: int, note: str = "") -> None:
        """Advance by ``count`` units."""
        self.done = min(self.total, self.done + count)
        self.note = note or self.note
        if self._bar is not None:
            self._bar.update(count)
            if note:
                self._bar.set_postfix_str(note, refresh=False)
        elif self._shown and time.monotonic() - self._said > PLAIN_SECONDS:
            self._said = time.monotonic()
            rate = (self.done - self._first) / (self._said - self._began)
            left = (self.total - self.done) / max(rate, 1e-9)
            share = self.done / max(self.total, 1)
            print(f"  {self.label}: {share:4.0%}, {left:.0f} s left {self.note}".rstrip(), flush=True)

    def reach(self, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` units are done; the total may have changed."""
        self.total = total
        if self._bar is not None:
            self._bar.total = total
        self.update(done - self.done)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Successive parameters of one dtype, together as large as BUCKET_BYTES unless a single one is larger."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (parameter.dtype != bucket[0].dtype or size + parameter.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket


def _leave() -> None:
    """End the process group, whose threads must end before Python does.

    Wrapped modules hold a reference to the group, so modules in reference cycles are collected first.
    """
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _on_cpu() -> bool:
    """Whether to use the CPU: this machine has no accelerator, or ``ACCELERATE_USE_CPU`` is set."""
    wish = os.environ.get("ACCELERATE_USE_CPU", "").lower()
    return wish in ("1", "true", "yes") or not torch.accelerator.is_available()


def default_device() -> str:
    """The device on which models are sampled: the accelerator, or the CPU as :func:`_on_cpu` decides."""
    return "cpu" if _on_cpu() else torch.accelerator.current_accelerator().type  # type: ignore[union-attr]


def set_threads() -> int:
    """Set and return the number of threads: FEWSTEP_THREADS or OMP_NUM_THREADS if set, otherwise half the cores.

    Two OpenMP threads on one shared core are slower than one thread, and half the cores avoids that.
    """
    wish = os.environ.get("FEWSTEP_THREADS") or os.environ.get("OMP_NUM_THREADS")
    threads = int(wish) if wish and wish.isdigit() and int(wish) > 0 else max(1, (os.cpu_count() or 2) // 2)
    torch.set_num_threads(threads)
    return threads
