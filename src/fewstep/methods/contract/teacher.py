"""A frozen model that a stage learns from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from fewstep.data.dataset import LABEL
from fewstep.errors import UserError
from fewstep.flow.field import Guided, Velocity
from fewstep.networks.foreign import Combine


@final
@dataclass(frozen=True)
class Teacher:
    """A frozen model that a stage learns from: averaged weights, eval mode, no gradients.

    Attributes:
        velocity: ``v(x, t, **cond)``.
        digest: hash of its weights.
        guidance: the guidance weight that it was trained to reproduce; None for none.
        name: its name in messages.
        state: its weights by parameter name.
        network: its network's configuration.
        guidable: whether it was also trained with the nulls of its conditions, which guidance needs.
        nulls: what replaces a condition in an unconditional call, by name.
        combine: how guidance combines ``(v_0, v_c, w)``; None for ``v_0 + w (v_c - v_0)``.
        path: name of the affine path it was trained on.
        independent: whether it was trained on noise independent of the data. Then the law of its flow at time t is that
            of the noised data ``x_t``.
    """

    velocity: Velocity
    digest: str
    guidance: float | None = None
    name: str = "teacher"
    state: Mapping[str, Tensor] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)
    guidable: bool = True
    path: str = "linear"
    independent: bool = True
    nulls: Mapping[str, Any] = field(default_factory=lambda: {LABEL: None})
    combine: Combine | None = None

    def follows_data(self, scale: float) -> bool:
        """Whether its endpoints with guidance ``scale`` have the data's law, which holds without any guidance.

        Args:
            scale: guidance weight of the stage; 1 is none.
        """
        return scale == 1.0 and self.guidance in (None, 1.0)

    def require_noised_data(self, method: str) -> None:
        """Refuse a teacher that was not trained at noised data.

        Args:
            method: the method that evaluates the teacher at noised data, for the message.

        Raises:
            UserError: the teacher was trained on dependent pairs.
        """
        if not self.independent:
            raise UserError(
                f"method {method!r} evaluates the teacher at noised data, and the flow of {self.name!r} does not pass "
                "through those: it was trained on dependent pairs (reflow, optimal transport ...). Learn from a "
                "flow_matching stage with 'coupling: independent'."
            )

    def guided(self, scale: float) -> Velocity:
        """The velocity ``v_0 + w (v_c - v_0)`` with guidance weight ``w = scale``; v itself for 1.

        Args:
            scale: guidance weight.

        Raises:
            UserError: the teacher already has guidance, or was never trained without conditions.

        Source: arXiv:2207.12598.
        """
        if scale == 1.0:
            return self.velocity
        if self.guidance not in (None, 1.0):
            raise UserError(
                f"guidance {scale} asked of {self.name!r}, which already has guidance {self.guidance} baked in: "
                "guiding twice gives neither weight. Leave guidance out of this stage, or learn from the unguided "
                "teacher."
            )
        if not self.guidable or not self.nulls:
            raise UserError(
                f"guidance {scale} asked of {self.name!r}, which never learned without conditions: guidance compares "
                "the velocities with and without them. Learn from a teacher that was trained with label_dropout, or "
                "say what replaces a condition, fs.adapt(…, null={'label': 10})."
            )
        return Guided(self.velocity, scale, self.nulls, self.combine)
