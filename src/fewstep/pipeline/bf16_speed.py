"""Whether bf16 is worth asking for on a device: a matrix product, timed in both precisions."""

from __future__ import annotations

import functools
import time

import torch

SLOWER = 1.2  # a ratio above which bf16 counts as slower; what lies between is timing noise (chosen, not tuned)
REPEATS = 5  # the least of so many timings counts
CPU_SIDE, ACCELERATOR_SIDE = 256, 4096  # emulated bf16 takes 20 ms at 256; below 4096 an accelerator waits for launches


@functools.cache
def bf16_slowdown(device: str) -> float:
    """Time of a matrix product in bf16 over its time in fp32 on this device; measured once per process."""
    return _seconds(torch.bfloat16, device) / _seconds(torch.float32, device)


def bf16_is_slow(device: torch.device) -> bool:
    """Whether bf16 is slower than fp32 on this device, as on CPUs that emulate it."""
    return bf16_slowdown(device.type) > SLOWER


def bf16_note(device: torch.device, stages: list[str]) -> str:
    """What to tell a user whose stages ask for bf16 where it is slow, with the fix."""
    changes = " ".join(f"--set stages.{stage}.precision=fp32" for stage in stages)
    return (
        f"note: stage(s) {', '.join(stages)} ask for precision: bf16, and on this {device.type} a matrix product takes "
        f"{bf16_slowdown(device.type):.1f} times as long in bf16 as in fp32. Use fp32 here: {changes}"
    )


def _seconds(dtype: torch.dtype, device: str) -> float:
    """Seconds of one square matrix product, the least of a few."""
    side = CPU_SIDE if device == "cpu" else ACCELERATOR_SIDE
    a = torch.ones(side, side, dtype=dtype, device=device)
    times = []
    for _ in range(1 + REPEATS):  # the first call sets the kernels up
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return min(times[1:])
