"""The processes at work, and how they speak: progress bars on a terminal, plain lines otherwise."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.errors import UserError

WAIT = timedelta(days=1)  # processes wait for each other's pairs, and one may have many more to make
PLAIN_SECONDS = 10.0  # between two plain progress lines


@final
class LocalWorld:
    """One process, or one of several started by ``torchrun`` / ``accelerate launch``.

    accelerate finds the device and the process group, and wraps modules; data order, random numbers,
    schedules and checkpoints are not its business.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        from accelerate import PartialState

        # without a word, accelerate takes processes without an accelerator for strangers to each other
        self._state = PartialState(cpu=_on_cpu(), timeout=WAIT)
        started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else self.size
        if started != self.size:
            raise UserError(f"{started} processes were started, and accelerate sees {self.size}: use torchrun.")
        if self.size > 1:
            atexit.register(_leave)
        self.quiet = quiet

    @property
    def rank(self) -> int:
        """This process's number."""
        return int(self._state.process_index)

    @property
    def size(self) -> int:
        """Number of processes."""
        return int(self._state.num_processes)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self._state.device

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.size > 1:
            self._state.wait_for_everyone()

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over the processes; one process gets the module itself."""
        if self.size == 1:
            return module
        from accelerate import Accelerator
        from torch.nn.parallel import DistributedDataParallel

        # precision is a stage's option, not the launcher's
        accelerator = Accelerator(mixed_precision="no", cpu=self.device.type == "cpu")
        wrapped = accelerator.prepare_model(module, device_placement=False)  # it is where it shall be
        if not isinstance(wrapped, DistributedDataParallel):
            raise UserError(
                f"the launcher asks for {self._state.distributed_type.value}, and training here keeps whole "
                "weights in every process (DDP): use torchrun, or 'accelerate launch --multi_gpu'."
            )
        return wrapped

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean of every number over the processes, the same in all of them."""
        if self.size == 1:
            return list(values)
        packed = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(packed)
        return (packed / self.size).tolist()

    def average(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        if self.size == 1:
            return value
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value / self.size

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of the global batch, without a graph; equally many in each."""
        rows = rows.detach()
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def say(self, message: str) -> None:
        """Print a line, once for all processes."""
        if self.rank == 0 and not self.quiet:
            print(message, flush=True)

    def progress(self, total: int, done: int, label: str) -> Progress:
        """A progress display over ``total`` units of which ``done`` are done."""
        return Progress(total, max(0, done), label, shown=self.rank == 0 and not self.quiet)


@final
class Progress:
    """A tqdm bar on a terminal, a plain line now and then otherwise."""

    def __init__(self, total: int, done: int, label: str, *, shown: bool) -> None:
        self.total, self.done, self.label = total, done, label
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
                unit="sample",
                unit_scale=True,
                leave=False,
            )
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._shown and failed is None:
            seconds = time.monotonic() - self._began
            print(f"  {self.label}: {self.done:,} samples, {seconds:.1f} s {self.note}".rstrip(), flush=True)

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


def _leave() -> None:
    """Leave the process group: its threads must not outlive Python.

    Wrapped modules hold the group, so those in reference cycles are collected first.
    """
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _on_cpu() -> bool:
    """Whether this machine has no accelerator, or it is not wanted (``ACCELERATE_USE_CPU``)."""
    wish = os.environ.get("ACCELERATE_USE_CPU", "").lower()
    return wish in ("1", "true", "yes") or not torch.accelerator.is_available()


def default_device() -> str:
    """Where models are sampled: this machine's accelerator, if it has one and it is wanted."""
    return "cpu" if _on_cpu() else torch.accelerator.current_accelerator().type  # type: ignore[union-attr]


def set_threads() -> int:
    """Choose the number of threads: OMP_NUM_THREADS or FEWSTEP_THREADS if set, else half the cores.

    Spinning OpenMP threads that fight over a shared core are slower than one thread, so half is safe.
    """
    wish = os.environ.get("FEWSTEP_THREADS") or os.environ.get("OMP_NUM_THREADS")
    threads = int(wish) if wish and wish.isdigit() and int(wish) > 0 else max(1, (os.cpu_count() or 2) // 2)
    torch.set_num_threads(threads)
    return threads
