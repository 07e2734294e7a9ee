"""The options that the stages of all methods share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fewstep.flow.grids import explicit_times, make_grid
from fewstep.solvers.tables import find_solver


class Options(BaseModel):
    """Options every stage has; a method's own options extend them. Unknown keys are refused.

    Progress is measured in samples seen: ``samples`` is the stage's total over all its phases.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    old_names: ClassVar[Mapping[str, str]] = {}  # former names of options, which one more version reads

    method: str
    teacher: str | None = Field(None, description="the stage this one learns from")
    init: str | None = Field(None, description="the stage whose EMA weights the student starts from")
    network: dict[str, Any] | str | None = Field(None, description="overrides the recipe's network")
    samples: int = Field(1_000_000, gt=0, description="samples seen in the stage, over all phases")
    batch_size: int = Field(256, gt=0)
    lr: float = Field(2e-3, gt=0, description="peak learning rate of AdamW; warm-up, then cosine to zero")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of a phase's samples in linear warm-up")
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    ema: float = Field(0.998, ge=0, lt=1, description="largest decay of the weight average, per step")
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, fields: Any) -> Any:
        return cls.with_present_names(fields) if isinstance(fields, Mapping) else fields

    @classmethod
    def with_present_names(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields with former names of options replaced by the present ones; warns once per name.

        Raises:
            ValueError: an option is given by both of its names.
        """
        present = dict(fields)
        for old, new in cls.old_names.items():
            if old not in present:
                continue
            if new in present:
                raise ValueError(f"{old} is the former name of {new}, and both are given: leave {old} out")
            said = f"option {old!r} is now called {new!r}, and the old name goes with the next version: rename it"
            warnings.warn_explicit(said, FutureWarning, filename="recipe", lineno=1, module="recipe")
            present[new] = present.pop(old)
        return present


def require_teacher(options: Options) -> None:
    """Refuse a stage that names no teacher, of a method that cannot do without."""
    if options.teacher is None:
        raise ValueError(f"method {options.method!r} learns from a teacher: add 'teacher: STAGE'")


def require_whole_steps(solver: str, nfe: int) -> None:
    """Refuse a number of calls that is no whole number of the solver's steps."""
    calls = find_solver(solver).calls
    if nfe % calls:
        raise ValueError(f"nfe = {nfe} is no multiple of the {calls} calls that a step of {solver!r} makes")


def baked_in(guidance: float) -> float | None:
    """A stage's guidance as its model's facts have it: None where there is none."""
    return None if guidance == 1.0 else guidance


class PairOptions(Options):
    """Options of methods that learn from pairs (noise, teacher's endpoint)."""

    pairs: int = Field(20_000, gt=0, description="generated pairs per round")
    solver: str = Field("rk4", description="the solver that makes the pairs")
    grid: str = Field("uniform", description="the named time grid of those solves")
    nfe: int | None = Field(None, gt=0, description="network calls per pair; chosen by the error gate when absent")
    tolerance: float = Field(0.02, gt=0, description="largest relative endpoint error of the pairs")
    guidance: float = Field(1.0, ge=0, description="teacher's guidance, baked into the pairs")

    @model_validator(mode="after")
    def _needs_teacher(self) -> PairOptions:
        require_teacher(self)
        return self

    @model_validator(mode="after")
    def _known_solver(self) -> PairOptions:
        if self.solver in ("auto", "fitted"):
            raise ValueError("pairs are made in both directions by a solver of known order: name one, such as 'rk4'")
        solver = find_solver(self.solver)
        if solver.stochastic:
            raise ValueError(f"solver {self.solver!r} adds noise, and a pair is a noise with its one endpoint")
        if not solver.converges:
            raise ValueError(f"solver {self.solver!r} follows straight flows only: make pairs with another, as 'rk4'")
        if explicit_times(self.grid) is not None:
            raise ValueError(f"pairs need a named grid, for any number of steps (got {self.grid!r})")
        make_grid(self.grid, 2)
        if self.nfe is not None:
            require_whole_steps(self.solver, self.nfe)
        return self
