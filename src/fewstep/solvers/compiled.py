"""The loop under ``torch.compile``: one program per network, with all steps unrolled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow.field import CountedField, Field, Guided
from fewstep.solvers.loop import Plan, run_terms

BACKEND = "inductor"

Program = Callable[..., tuple[Tensor, list[Tensor]]]

# The programs of a plan by network. The references are weak, so plans and networks are not kept alive.
_programs: WeakKeyDictionary[Plan, WeakKeyDictionary[Any, Program]] = WeakKeyDictionary()


def run_compiled(
    plan: Plan, field: Field, x0: Tensor, cond: Mapping[str, Any], *, trajectory: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """As :func:`fewstep.solvers.loop.run`, compiled; the results agree up to rounding.

    Raises:
        UserError: a stochastic plan; no compiler; a network that cannot be compiled.
    """
    if plan.table.stochastic:
        raise UserError(f"compile=True cannot draw the noise of {plan.table.solver!r}: leave compile out.")
    times = plan.times(x0.shape[0], x0.dtype, x0.device)
    # with the count at zero: torch.compile treats the count as a constant of the program
    counted = copy.copy(field)
    counted.calls = 0
    try:
        result = _program(plan, field)(counted, x0, times, dict(cond), trajectory)
    except Exception as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            first = str(error).strip().splitlines()[0]
            raise UserError(f"the solve could not be compiled ({first}): leave compile out.") from error
        raise
    field.calls += counted.calls
    return result


def _program(plan: Plan, field: Field) -> Program:
    owner: Any = field.velocity if isinstance(field, (CountedField, Guided)) else field
    if isinstance(owner, MethodType):  # Python makes a new object at each access to a bound method
        owner = owner.__self__
    programs = _programs.setdefault(plan, WeakKeyDictionary())
    try:
        found = programs.get(owner)
    except TypeError as error:
        raise UserError(
            f"compile=True stores its program by a weak reference to the network, and a {type(owner).__name__} has "
            "none: wrap it in a function."
        ) from error
    if found is None:
        found = programs[owner] = _compile(plan)
    return found


def _compile(plan: Plan) -> Program:
    rows, end, slots = plan.rows, plan.end, plan.slots

    def program(
        field: Field, x0: Tensor, times: tuple[Tensor, ...], cond: dict[str, Any], trajectory: bool
    ) -> tuple[Tensor, list[Tensor]]:
        return run_terms(rows, end, slots, field, x0, times, cond, trajectory)

    # torch keeps a small number of variants per code object, so each program gets a code object of its own
    code: CodeType = program.__code__.replace()
    own = FunctionType(code, program.__globals__, closure=program.__closure__)
    return torch.compile(own, dynamic=False, backend=BACKEND)
