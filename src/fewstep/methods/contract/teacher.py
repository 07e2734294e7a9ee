"""A frozen model that a stage learns from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow.field import Guided, Velocity


@final
@dataclass(frozen=True)
class Teacher:
    """A frozen model that a stage learns from: EMA weights, eval mode, no gradients.

    Attributes:
        velocity: ``v(x, t, **cond)``.
        digest: hash of its weights.
        guidance: guidance already baked into its weights, or None.
        guidable: whether it has learned without labels too.
        path: the affine path it was trained on.
        name: what to call it in messages.
        independent: whether it was trained on noise independent of the data, so that the path has its marginals.
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

    def follows_data(self, scale: float) -> bool:
        """Whether its endpoints, with guidance ``scale``, are to have the law of the data."""
        return scale == 1.0 and self.guidance in (None, 1.0)

    def require_noised_data(self, method: str) -> None:
        """Refuse to be asked at noised data where its own states are others."""
        if not self.independent:
            raise UserError(
                f"method {method!r} asks the teacher at noised data, and {self.name!r} does not pass through "
                "those: it was trained on dependent pairs (reflow, optimal transport ...). Learn from a flow_matching "
                "stage with 'coupling: independent'."
            )

    def guided(self, scale: float) -> Velocity:
        """The velocity with guidance ``scale``; refuses to guide twice."""
        if scale == 1.0:
            return self.velocity
        if self.guidance not in (None, 1.0):
            raise UserError(
                f"guidance {scale} asked of {self.name!r}, which already has guidance {self.guidance} baked in: "
                "guiding twice is wrong. Leave guidance out of this stage, or learn from the unguided teacher."
            )
        if not self.guidable:
            raise UserError(
                f"guidance {scale} asked of {self.name!r}, which never learned without labels: guidance compares the "
                "two. Bake it in from the teacher that was trained with label_dropout."
            )
        return Guided(self.velocity, scale)
