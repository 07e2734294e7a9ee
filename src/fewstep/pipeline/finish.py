"""What follows the stages: the comparison, its files, and the report."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.data.dataset import DataSet
from fewstep.generator import Generator
from fewstep.metrics.feature_distance import FeatureDistance
from fewstep.pipeline.compare import compare, table
from fewstep.pipeline.environment import environment
from fewstep.pipeline.opening import Run
from fewstep.pipeline.recipe import Recipe
from fewstep.pipeline.run import Outcome
from fewstep.store.files import write_json, write_text

BEST = " (best)"  # marks the name of a collapsed stage's best model


def finish_run(run: Run, outcome: Outcome) -> Path | None:
    """Compare a run's models and write ``compare.json``, ``compare.md`` and ``report.html``; None without a model.

    Of a stage that collapsed, the model at its best is compared, where there is one.
    """
    options = run.recipe.header.compare
    models = models_of(run, outcome)
    if not models:
        return None
    print("compare")
    made = compare(
        models,
        run.data,
        steps=options.steps,
        solver=options.solver,
        grid=options.grid,
        samples=options.samples,
        seed=options.seed,
        features=judge_of(run, outcome),
        max_rows=options.max_rows,
        diagnosis=options.diagnosis,
    )
    result = made.result
    result["failures"] = [
        {"stage": failure.stage, "reason": failure.reason, "compared": failure.best is not None}
        for failure in outcome.failures.values()
    ]
    print("\n" + made.table)
    folders = {model.name: model.folder for model in models if model.folder is not None}
    pairs = {name: found for name, folder in folders.items() if (found := last_pairs(folder))}
    return write_comparison(run.out, result, models, run.data, run.recipe, pairs)


def models_of(run: Run, outcome: Outcome) -> list[Generator]:
    """The models to compare, in the recipe's order; a collapsed stage's best model is named ``STAGE (best)``."""
    models = []
    for name in run.recipe.stages:
        failure = outcome.failures.get(name)
        if failure is None and run.method(name).makes != "features":
            models.append(run.model(run.out / name))
        elif failure is not None and failure.best is not None:
            models.append(run.model(failure.best))
            models[-1].name = name + BEST
    return models


def judge_of(run: Run, outcome: Outcome) -> FeatureDistance | None:
    """The features of the comparison; none where the recipe names none, or where their stage has failed."""
    word = run.recipe.header.compare.features
    if word in outcome.failures:
        print(f"  the features {word!r} have no finished network: the Fréchet distance is on the values themselves")
        return None
    return None if word is None else run.features(word)


def last_pairs(folder: Path) -> Path | None:
    """The pairs that a stage's last round learned from; None for a stage without pairs."""
    stores = [path.parent for path in (folder / "pairs").glob("*/generated/manifest.json")]
    return max(stores, key=lambda store: (len(store.parent.name), store.parent.name), default=None)


def write_comparison(
    out: Path,
    result: dict[str, Any],
    models: Sequence[Generator],
    data: DataSet,
    recipe: Recipe | None = None,
    pairs: Mapping[str, Path] | None = None,
) -> Path:
    """Write the comparison's files; return the report's path."""
    from fewstep.report import write_report

    write_json(out / "compare.json", result)
    write_text(out / "compare.md", table(result) + "\n")
    recipe_file = out / "recipe.yaml"
    return write_report(
        out / "report.html",
        result=result,
        models=models,
        data=data,
        title=out.resolve().name,
        recipe_text=recipe_file.read_text(encoding="utf-8") if recipe and recipe_file.exists() else None,
        environment=environment(recipe.header.seed if recipe else result["protocol"]["seed"]),
        pairs=pairs,
        command=" ".join(["fewstep", *sys.argv[1:]]),
        stats=out / "stats.jsonl" if recipe else None,
    )
