"""The schedule of the learning rate."""

from __future__ import annotations

import math

from fewstep.methods.contract.options import Options


def learning_rate(options: Options, seen: int, samples: int) -> float:
    """The learning rate of a step: ``lr s / w`` for s < w, then ``lr (1 + cos(pi (s - w) / (S - w))) / 2``.

    Args:
        options: ``lr``, and ``warmup`` with ``w = warmup S``.
        seen: samples seen before the step; s is the middle of the step's batch.
        samples: S.
    """
    w = options.warmup * samples
    s = seen + options.batch_size / 2
    if s < w:
        return options.lr * s / w
    return options.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (s - w) / max(1.0, samples - w))))
