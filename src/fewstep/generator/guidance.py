"""The field of a generator's network, guided where the user asks for it and the model allows it."""

from __future__ import annotations

import math

from torch import nn

from fewstep.errors import UserError
from fewstep.flow.field import CountedField, Field, Guided
from fewstep.generator.config import Config
from fewstep.networks.foreign import Foreign


def guided_field(module: nn.Module, config: Config, name: str, guidance: float | None) -> Field:
    """The counted field of the network, with classifier-free guidance of that weight.

    Args:
        module: the network.
        config: of its model.
        name: the model's name, for messages.
        guidance: the weight; None and 1 are no guidance.

    Raises:
        UserError: a weight that is not finite; a model whose weights have guidance baked in, an unconditional one, a
            map, or one that was never trained without its conditions.
    """
    if guidance is not None and not math.isfinite(guidance):
        raise UserError(f"guidance must be a finite number, got {guidance}.")
    if guidance is None or (guidance == 1.0 and config.guidance is None):
        return CountedField(module)
    if config.guidance is not None:
        raise UserError(
            f"{name!r} has guidance {config.guidance} baked into its weights: guiding it again "
            "is wrong. Leave guidance out."
        )
    foreign = module if isinstance(module, Foreign) else None
    if foreign is not None and not foreign.null:
        raise UserError(
            "guidance compares velocities with and without conditions, and it is not known what replaces a condition "
            f"of {name!r}: say it, fs.adapt(net, …, null={{'label': 10}}), or leave guidance out."
        )
    if foreign is None and not config.class_weights:
        raise UserError(
            f"guidance needs a class-conditional model, and {name!r} takes no labels: leave guidance out. For a "
            "network of your own give the number of classes, fs.Generator(net, shape, classes=10), or "
            "fs.adapt(net, …, null={'label': 10})."
        )
    if config.rule.kind == "map":
        raise UserError(f"{name!r} is a map; guidance must be baked in when it is distilled.")
    if not config.guidable:
        raise UserError(
            f"{name!r} never learned without conditions, and guidance compares the two: guide its teacher, or "
            "bake the guidance in with 'guidance:' in the recipe."
        )
    return Guided(module, guidance) if foreign is None else Guided(module, guidance, foreign.null, foreign.combine)
