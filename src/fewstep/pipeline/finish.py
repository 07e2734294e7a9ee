"""What follows the stages: the comparison, its files, and the report."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.data.dataset import DataSet
from fewstep.data.load import load_data
from fewstep.generator import Generator, load
from fewstep.pipeline.compare import compare, table
from fewstep.pipeline.environment import environment
from fewstep.pipeline.feature_checks import find_judge, models_among
from fewstep.pipeline.recipe import Recipe
from fewstep.store.files import write_json, write_text
from fewstep.training.world import default_device


def finish_run(recipe: Recipe, out: Path, folders: Sequence[Path]) -> Path | None:
    """Compare a run's stages and write ``compare.json``, ``compare.md`` and ``report.html``; None without a model."""
    header = recipe.header
    folders = models_among(folders)
    if not folders:
        return None
    data = load_data(header.data, seed=header.seed)
    models = [load(folder, device=default_device()) for folder in folders]
    judge = header.compare.features
    judge = str(out / judge) if judge in recipe.stages else judge
    print("compare")
    result = compare(
        models,
        data,
        steps=header.compare.steps,
        solver=header.compare.solver,
        grid=header.compare.grid,
        samples=header.compare.samples,
        seed=header.compare.seed,
        features=find_judge(judge, data, default_device()),
    )
    print("\n" + table(result))
    pairs = {model.name: found for model, folder in zip(models, folders, strict=True) if (found := last_pairs(folder))}
    return write_comparison(out, result, models, data, recipe, pairs)


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
