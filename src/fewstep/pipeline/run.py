"""Run a recipe: its stages in order, resuming whatever was begun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import yaml

from fewstep.errors import UserError
from fewstep.methods.contract.options import Options
from fewstep.pipeline.checks import check_begun, check_precision, check_run
from fewstep.pipeline.environment import environment
from fewstep.pipeline.feature_checks import named_features
from fewstep.pipeline.network_checks import check_foreign
from fewstep.pipeline.opening import Run, open_run
from fewstep.pipeline.recipe import Recipe
from fewstep.pipeline.train_stage import Failure, run_stage
from fewstep.store.files import make_folder, write_json, write_text
from fewstep.training.world import LocalWorld


@final
@dataclass(frozen=True)
class Outcome:
    """What came of a run's stages.

    Attributes:
        finished: folders of the finished stages, in the recipe's order.
        failures: the stages that collapsed or depend on one that did, by name, in the recipe's order.
    """

    finished: list[Path]
    failures: dict[str, Failure]


def run_recipe(recipe: Recipe, out: Path, world: LocalWorld | None = None) -> list[Path]:
    """Run every stage that is not finished; return the stages' folders.

    The same call again resumes: finished stages are left alone, an unfinished one goes on from its last checkpoint.

    Raises:
        UserError: a wrong recipe or folder; a stage that collapsed, once the stages that do not depend on it are run.
    """
    outcome = run_stages(open_run(recipe, Path(out), world or LocalWorld()))
    if outcome.failures:
        raise UserError("\n".join(failure.reason for failure in outcome.failures.values()))
    return outcome.finished


def run_stages(run: Run) -> Outcome:
    """Check the whole run, then run its stages in order; those that depend on a collapsed one are left out."""
    check_run(run)
    if run.recipe.header.check:
        check_foreign(run)
    if run.world.rank == 0:
        check_begun(run)
        make_folder(run.out)
        write_text(run.out / "recipe.yaml", yaml.safe_dump(run.recipe.as_dict(), sort_keys=False))
        write_json(run.out / "run.json", environment(run.recipe.header.seed))
    run.world.barrier()
    check_precision(run)
    outcome = Outcome([], {})
    for name, options in run.recipe.stages.items():
        failure = missing_input(name, options, outcome.failures)
        if failure is None:
            failure = run_stage(run, name, options)
        if failure is None:
            outcome.finished.append(run.out / name)
        else:
            outcome.failures[name] = failure
            run.world.say(f"{name}: {failure.reason}")
    return outcome


def missing_input(name: str, options: Options, failures: Mapping[str, Failure]) -> Failure | None:
    """Why a stage cannot be run: a teacher, an init or features among the failed stages; None when it can."""
    inputs = {"teacher": options.teacher, "init": options.init, "features": named_features(options)}
    for role, chosen in inputs.items():
        if chosen in failures:
            return Failure(name, f"stage {name!r} is not trained: its {role} {chosen!r} has no finished model.")
    return None
