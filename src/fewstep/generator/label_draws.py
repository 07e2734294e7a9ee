"""Labels of a class-conditional model's samples: the user's, or drawn as often as in the data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UserError, unknown
from fewstep.flow.noise import BLOCK, block_rows, generator_for
from fewstep.generator.config import Config

LABEL_DRAW = 1  # which table of draws the labels come from; 0 is the base noise

Label = int | str | Sequence[int] | Sequence[str] | Tensor


def draw_labels(config: Config, name: str, num: int, label: Label | None, seed: int) -> Tensor | None:
    """Class numbers of the samples ``0 … num - 1``: the user's, or drawn as often as in the data.

    Args:
        config: of the model.
        name: the model's name, for messages.
        num: number of samples.
        label: one for all samples, one per sample, or None to draw them: label ``i`` is a function of (seed, i).
        seed: the samples' seed.

    Returns:
        ``(num,)`` int64, from 0; None for a model that takes no labels.

    Raises:
        UserError: as many labels as neither 1 nor ``num``; a label that the data do not have; labels for a model that
            takes none.
    """
    if not config.class_weights:
        if label is not None:
            raise UserError(
                f"{name!r} takes no labels: it was trained without. Leave label out. For a network of your own give "
                "the number of classes, fs.Generator(net, shape, classes=10), or pass cond={'label': …}."
            )
        return None
    classes = len(config.class_weights)
    if label is None:
        edges = torch.tensor(config.class_weights, dtype=torch.float64).cumsum(0)
        uniform = block_rows(
            num,
            0,
            lambda block: torch.rand(BLOCK, dtype=torch.float64, generator=generator_for(seed, block, LABEL_DRAW)),
            empty=torch.empty(0),
        )
        return torch.searchsorted(edges / edges[-1], uniform, right=True).clamp_max(classes - 1)
    labels = label_numbers(config, name, label)
    if len(labels) not in (1, num):
        raise UserError(f"{len(labels)} labels for {num} samples: give one, or one per sample.")
    bad = labels[(labels < 0) | (labels >= classes)]
    if len(bad):
        raise UserError(f"label {int(bad[0])} is out of range: {name!r} has classes 0 … {classes - 1}.")
    return labels.expand(num)


def label_numbers(config: Config, name: str, label: Label) -> Tensor:
    """Class numbers ``(n,)`` of one label or of several, which may be the data's names."""
    names = config.label_names
    given = label.flatten().tolist() if isinstance(label, Tensor) else np.asarray(label).flatten().tolist()
    wrong = [n for n in given if isinstance(n, bool) or not isinstance(n, int | str)]
    if wrong:
        raise UserError(f"labels must be whole numbers or the data's names, got {wrong[0]!r}.")
    if names is None:
        strange = [n for n in given if isinstance(n, str) and not n.isdecimal()]
        if strange:
            raise UserError(
                f"label {strange[0]!r}: the classes of {name!r} are numbers, 0 … {len(config.class_weights) - 1}."
            )
        return torch.tensor([int(n) for n in given], dtype=torch.long)
    position = {str(known_name): k for k, known_name in enumerate(names)}
    # classes named by words (image folders) may be given by number too; classes named by numbers only by those
    named = all(isinstance(n, str) for n in names)
    numbers = {str(k): k for k in range(len(names))} if named else {}
    known = {**numbers, **position}
    for n in given:
        if str(n) not in known:
            raise unknown("label", n, position)
    return torch.tensor([known[str(n)] for n in given], dtype=torch.long)
