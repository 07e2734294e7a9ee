"""The options that the stages of all methods share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fewstep.errors import with_present_names
from fewstep.flow.grids import explicit_times, make_grid
from fewstep.solvers.tables import find_solver


class Options(BaseModel):
    """Options that every stage has; a method's own options extend them. Unknown keys are refused.

    Lengths of training are in samples seen: ``samples`` is the stage's total over all its phases. One optimiser step
    sees ``batch_size`` samples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    old_names: ClassVar[Mapping[str, str]] = {}  # former name: present name; former names are read for one more version

    method: str
    teacher: str | None = Field(None, description="the stage this one learns from")
    init: str | None = Field(None, description="the stage whose averaged weights the student starts from")
    network: dict[str, Any] | str | None = Field(None, description="the student's network, instead of the recipe's")
    samples: int = Field(1_000_000, gt=0, description="samples seen in the stage, over all phases")
    batch_size: int = Field(256, gt=0, description="samples per optimiser step, over all processes")
    lr: float = Field(2e-3, gt=0, description="peak learning rate of the student: warm-up, then cosine to zero")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of a phase's samples in linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    clip: float = Field(1.0, gt=0, description="gradients of a larger norm are scaled down to it")
    ema: float = Field(0.998, ge=0, lt=1, description="largest decay of the student's weight average, per step")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the networks; weights are fp32")

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, fields: Any) -> Any:
        return cls.with_present_names(fields) if isinstance(fields, Mapping) else fields

    @classmethod
    def with_present_names(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The options with former names replaced by the present ones; warns once per former name.

        Args:
            fields: options by name, as a recipe has them.

        Raises:
            ValueError: an option is given by both of its names.
        """
        for old, new in cls.old_names.items():
            if old in fields and new in fields:
                raise ValueError(f"{old} is the former name of {new}, and both are given: leave {old} out")
        return with_present_names("option", fields, cls.old_names)


def refuse_teacher(options: Options) -> None:
    """Refuse a teacher for a method that learns from data only; the student would start from its weights.

    Raises:
        ValueError: the options name a teacher.
    """
    if options.teacher is not None:
        raise ValueError("it learns from data: leave 'teacher' out, or write 'init' to start from its weights")


def require_teacher(options: Options) -> None:
    """Refuse a stage without a teacher, for a method that needs one.

    Raises:
        ValueError: ``teacher`` is None.
    """
    if options.teacher is None:
        raise ValueError(f"method {options.method!r} learns from a teacher: add 'teacher: STAGE'")


def require_whole_steps(solver: str, nfe: int) -> None:
    """Refuse a number of network calls that is not a whole number of solver steps.

    Args:
        solver: its name.
        nfe: network calls in total.

    Raises:
        ValueError: ``nfe`` is not a multiple of the solver's calls per step.

    >>> require_whole_steps("heun", 8)
    """
    calls = find_solver(solver).calls
    if nfe % calls:
        raise ValueError(
            f"nfe = {nfe} is no multiple of the {calls} calls that one step of {solver!r} makes: "
            f"set it to {max(1, round(nfe / calls)) * calls}"
        )


def baked_in(guidance: float) -> float | None:
    """A stage's guidance in the form of its model's facts: None for the weight 1, which is no guidance.

    >>> baked_in(1.0), baked_in(2.0)
    (None, 2.0)
    """
    return None if guidance == 1.0 else guidance


class PairOptions(Options):
    """Options of the methods that learn from stored pairs (noise, teacher's endpoint)."""

    pairs: int = Field(20_000, gt=0, description="generated pairs per round")
    solver: str = Field("rk4", description="solver that makes the pairs")
    grid: str = Field("uniform", description="time grid of that solver, by name")
    nfe: int | None = Field(
        None, gt=0, description="network calls per pair; default: as many as the tolerance needs, 16 to 128"
    )
    tolerance: float = Field(0.02, gt=0, description="largest relative endpoint error of the pairs")
    guidance: float = Field(1.0, ge=0, description="weight of the teacher's guidance, learned by the student; 1: none")

    @model_validator(mode="after")
    def _needs_teacher(self) -> PairOptions:
        require_teacher(self)
        return self

    @model_validator(mode="after")
    def _known_solver(self) -> PairOptions:
        if self.solver in ("auto", "fitted"):
            raise ValueError(
                f"solver {self.solver!r} is chosen or fitted for one direction and one number of steps, and pairs need "
                "both directions and several numbers: name one, such as 'rk4'"
            )
        solver = find_solver(self.solver)
        if solver.stochastic:
            raise ValueError(
                f"solver {self.solver!r} adds noise, so a noise has no single endpoint to pair it with: name a "
                "solver without noise, such as 'rk4'"
            )
        if not solver.converges:
            raise ValueError(
                f"solver {self.solver!r} follows straight flows only, and the teacher's flow is curved: name another "
                "solver, such as 'rk4'"
            )
        if explicit_times(self.grid) is not None:
            raise ValueError(
                f"grid {self.grid!r} has a fixed number of steps, and pairs are solved with several: name a grid, "
                "such as 'uniform'"
            )
        make_grid(self.grid, 2)
        if self.nfe is not None:
            require_whole_steps(self.solver, self.nfe)
        return self
