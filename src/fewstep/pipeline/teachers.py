"""A finished model as a frozen teacher."""

from __future__ import annotations

from fewstep.errors import UserError
from fewstep.generator import Generator, weights_digest
from fewstep.methods.base import Teacher


def frozen(generator: Generator, name: str) -> Teacher:
    """A generator as a teacher."""
    if generator.config.kind != "velocity":
        raise UserError(f"{name!r} is a one-step map, not a velocity field: learn from the flow it was distilled from.")
    if generator.config.base == "examples":
        raise UserError(
            f"{name!r} starts from damaged data (in-painting, super-resolution), and pairs need a base that can be "
            "drawn: learn from a model with a Gaussian base, or sample this one in a few steps."
        )
    return as_teacher(generator, name)


def as_teacher(generator: Generator, name: str) -> Teacher:
    """A generator's network, frozen: what an earlier phase of the stage left, whatever it is sampled by."""
    state = generator.module.state_dict()
    return Teacher(
        velocity=generator.module,
        digest=weights_digest(state),
        guidance=generator.config.guidance,
        guidable=generator.config.guidable,
        path=generator.config.path,
        name=name,
        state=state,
        network=generator.config.network or {},
        independent=bool(generator.config.coupling.get("independent", True)),
    )
