"""Which solver, grid and number of steps a model is sampled with, from the user's arguments and the model's config."""

from __future__ import annotations

from fewstep.diagnostics.tune import KINDS
from fewstep.errors import UserError
from fewstep.flow.couplings import Facts, require_independent
from fewstep.flow.grids import FROM_MODEL, Grid, GridSpec, explicit_times
from fewstep.generator.config import Config
from fewstep.generator.model_folder import words
from fewstep.solvers.tables import ADAPTIVE_NAMES, find_solver

TUNED_CALLS = 8  # network evaluations of a tuned sampler when the user names no number; chosen, not tuned


def choose(
    config: Config, name: str, solver: str | None, grid: GridSpec | None, steps: int | None
) -> tuple[str, GridSpec, int | None]:
    """Choose how to sample: the user's arguments where given, the model's own way otherwise.

    Args:
        config: of the model.
        name: the model's name, for messages.
        solver, grid, steps: the user's; None where not given.

    Returns:
        Solver, grid and steps; steps is None where the grid or the solver fixes their number.

    Raises:
        UserError: step counts that a map was not made for; a grid for a solver that finds its own; times that do not
            run from 0 to 1; a stochastic solver for a model of a dependent coupling; a solver for straight
            trajectories for a model whose trajectories are curved.
    """
    if config.rule.kind == "map":
        return _of_map(config, name, solver, grid, steps)
    solver, chosen = config.solver if solver is None else solver, config.grid if grid is None else grid
    if solver in KINDS:
        if grid is not None:
            raise UserError(f"solver {solver!r} finds its own grid: leave grid out, or name a solver.")
        return solver, "uniform", TUNED_CALLS if steps is None else steps
    adaptive = isinstance(solver, str) and solver.partition(":")[0] in ADAPTIVE_NAMES
    if not adaptive and config.coupling is not None:
        found, facts = find_solver(solver), config.coupling
        if found.stochastic:
            require_independent(facts, f"solver {solver!r}")
        if not found.converges:
            _require_straight(facts, name, solver)
    times = explicit_times(chosen)
    if times is None:
        return solver, chosen, steps if adaptive or steps is not None else config.rule.default_steps
    _require_whole_way(times)
    return solver, chosen, steps


def _require_whole_way(times: Grid) -> None:
    if (times[0], times[-1]) != (0.0, 1.0):
        raise UserError(
            f"a grid for sampling runs from 0 (noise) to 1 (data), and this one from {times[0]:g} to "
            f"{times[-1]:g}: write for example '0,0.2,1'. For a part of the way there is fs.solve."
        )


def _require_straight(facts: Facts, name: str, solver: str) -> None:
    """Refuse a solver that is right for straight trajectories only, unless the pairs were deterministic."""
    if not facts.deterministic:
        raise UserError(
            f"solver {solver!r} is for straight trajectories, and those of {name!r} are curved, because it was trained "
            "on noise that does not determine the data. On N(0, .7^2) the samples' standard deviation would be .329, "
            ".476, .581, .858 at 2, 3, 4, 8 steps: it does not converge. Take 'euler', or straighten the model with "
            "reflow first."
        )


def _of_map(
    config: Config, name: str, solver: str | None, grid: GridSpec | None, steps: int | None
) -> tuple[str, GridSpec, int | None]:
    """The way of a map: its own sampler, with the step counts that it was made for.

    Where these are not fixed, ``chain`` takes any grid, and ``restart`` any number of uniform steps.
    """
    if solver not in (None, "euler"):
        raise UserError(f"{name!r} is a map with its own sampler: leave solver out.")
    if config.rule.sampler == "chain" and config.rule.steps is None:
        return _along_grid(config, name, grid, steps)
    allowed = config.rule.steps or (1,)
    made_for = steps is None or steps in allowed or (config.rule.sampler == "restart" and config.rule.steps is None)
    if config.rule.multiple and steps is not None:
        made_for = steps > 0 and any(steps % number == 0 for number in allowed)
    if not made_for:
        multiples = "multiples of " if config.rule.multiple else ""
        raise UserError(
            f"{name!r} was made for {multiples}{words(allowed)} step(s), not {steps}: leave steps out, or "
            "sample the flow it was distilled from."
        )
    if grid not in (None, "uniform"):
        raise UserError(f"{name!r} is a map with its own sampler: leave grid out.")
    return "euler", "uniform", config.rule.default_steps if steps is None else steps


def _along_grid(
    config: Config, name: str, grid: GridSpec | None, steps: int | None
) -> tuple[str, GridSpec, int | None]:
    """The way of a two-time map: any number of steps, on any grid that is not found from a velocity."""
    chosen = "uniform" if grid is None else grid
    if isinstance(chosen, str) and chosen in FROM_MODEL:
        raise UserError(
            f"grid {chosen!r} is found from a velocity's solver error, and {name!r} is a map, which has no solver: "
            "leave grid out, or name another."
        )
    times = explicit_times(chosen)
    if times is None:
        return "euler", chosen, config.rule.default_steps if steps is None else steps
    _require_whole_way(times)
    return "euler", chosen, steps
