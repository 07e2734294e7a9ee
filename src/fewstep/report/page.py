"""Writes ``report.html``: the text, tables and figures of a comparison in one file that loads no other.

Styles are inline and pictures are PNG ``data:`` URLs; the template engine escapes every text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fewstep.citations import CITATIONS, bibtex, short_reference
from fewstep.data.dataset import DataSet
from fewstep.errors import UserError
from fewstep.generator import Generator
from fewstep.methods.registry import METHODS
from fewstep.report.curves import energy_curve, error_curves, fidelity_curves, loss_curves, straightness_curves
from fewstep.report.drawing import model_colours
from fewstep.report.html_tables import comparison, facts, straightness, timing
from fewstep.report.samples import samples
from fewstep.report.trajectories import open_pairs, trajectories
from fewstep.report.words import failures, headline, model_rows, number, warnings
from fewstep.store.files import write_text

METRIC_CITATIONS = ("szekely2013energy", "bonneel2015sliced", "heusel2017gans", "kynkaanniemi2019improved",
                    "naeem2020reliable")  # fmt: skip


def write_report(
    path: str | Path,
    *,
    result: Mapping[str, Any],
    models: Sequence[Generator],
    data: DataSet,
    title: str,
    recipe_text: str | None = None,
    environment: Mapping[str, Any] | None = None,
    command: str = "",
    seed: int = 0,
    pairs: Mapping[str, Path] | None = None,
    stats: Path | None = None,
) -> Path:
    """Write a self-contained HTML report of a comparison.

    Args:
        path: the HTML file.
        result: the result of :func:`fewstep.pipeline.compare.compare`, or the content of ``compare.json``.
        models: the models of the result.
        data: the data of the comparison.
        title: the page's title.
        recipe_text: the recipe as YAML, shown unchanged.
        environment: versions, seed and machine; nested mappings are shown with dotted keys.
        command: the command that repeats the run.
        seed: seed of the samples and trajectories shown.
        pairs: folder of the pairs that a model was trained on, by model name.
        stats: ``stats.jsonl`` of the run, for the training losses.

    Returns:
        The path of the file.

    Raises:
        UserError: the result has rows of a model that is not among ``models``, or no rows of models, or the file
            cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    named = {model.name: model for model in models}
    check(result, named)
    environment_ = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("fewstep.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    fields = content(result, named, data, seed, pairs or {}, stats)
    page = environment_.from_string(source).render(
        title=title,
        recipe=recipe_text,
        environment=facts(environment or {}),
        command=command,
        **fields,
    )
    write_text(path, page)
    return Path(path)


def check(result: Mapping[str, Any], models: Mapping[str, Generator]) -> None:
    """Refuse a result without rows of models, or with rows of a model that was not given."""
    names = {row["model"] for row in model_rows(result)}
    if not names:
        raise UserError(
            "the comparison has no row of a model, so there is nothing to report. Compare at least one model."
        )
    missing = sorted(names - set(models))
    if missing:
        raise UserError(
            f"the comparison has rows of {missing[0]!r}, and that model was not given "
            f"(given: {', '.join(map(repr, models))}): pass every model that was compared."
        )


def content(
    result: Mapping[str, Any],
    models: Mapping[str, Generator],
    data: DataSet,
    seed: int,
    pairs: Mapping[str, Path],
    stats: Path | None,
) -> dict[str, Any]:
    """Compute the fields of the template; arguments as in :func:`write_report`."""
    names = list(dict.fromkeys(row["model"] for row in model_rows(result)))
    models = {name: models[name] for name in names}
    colours = model_colours(names)
    stage_colours = {model.config.stage or name: colours[name] for name, model in models.items()}
    heads, lines = comparison(result)
    keys = citation_keys(models)
    return {
        "failures": failures(result),
        "headline": headline(result),
        "warnings": warnings(result),
        "heads": heads,
        "lines": lines,
        "colours": colours,
        "protocol": result["protocol"],
        "samples": samples(result, models, data, colours, seed),
        "energy": energy_curve(result, colours),
        "fidelity": fidelity_curves(result, colours),
        "trajectories": trajectories(models, data, colours, seed, result, pairs),
        "straightness": straightness_curves(result, colours),
        "error_profiles": error_curves(result, colours),
        "straightness_rows": straightness(result),
        "timing": timing(result),
        "losses": loss_curves(stats, stage_colours) if stats is not None and stats.exists() else None,
        "models": [describe(model, result) for model in models.values()],
        "pairs": [row for name, folder in pairs.items() for row in describe_pairs(name, folder)],
        "data": describe_data(data),
        "references": [short_reference(key) for key in keys],
        "bibtex": bibtex(keys),
    }


def describe(model: Generator, result: Mapping[str, Any]) -> dict[str, str]:
    """The row of a model in the table of models."""
    row = next(row for row in model_rows(result) if row["model"] == model.name)
    config = model.config
    about = []
    if config.class_weights:
        about.append(f"{len(config.class_weights)} classes")
    if config.guidance is not None:
        about.append(f"distilled with guidance {config.guidance:g}")
    if config.coupling is not None and config.coupling.deterministic:
        about.append("trained on pairs")
    rule = config.rule
    one_step = rule.kind == "map" and rule.sampler == "euler" and rule.steps in (None, (1,))
    return {
        "name": model.name,
        "method": config.method or "–",
        "kind": "one-step map" if one_step else rule.kind,
        "solver": f"{config.solver}, {config.grid}" if rule.kind == "velocity" else "its own sampler",
        "network": str((config.network or {}).get("name", type(model.module).__name__)),
        "parameters": number(row["parameters"]),
        "about": ", ".join(about) or "–",
    }


def describe_pairs(name: str, folder: Path) -> list[list[str]]:
    """The row of the pairs that a model was trained on, from their manifest."""
    store = open_pairs(folder)
    error = store.manifest.get("checks", {}).get("relative_error")
    keys = ("direction", "solver", "nfe")
    return [[name, *(str(store.request.get(key, "–")) for key in keys), number(store.rows), number(error)]]


def describe_data(data: DataSet) -> list[tuple[str, str]]:
    """Name, size, shape and hash of the data."""
    return [
        ("name", data.name),
        ("rows", f"{len(data):,} ({len(data.train):,} training, {len(data.held_out):,} held out)"),
        ("shape", " × ".join(map(str, data.shape))),
        ("SHA-256", data.fingerprint),
    ]


def citation_keys(models: Mapping[str, Generator]) -> list[str]:
    """Citation keys of the methods, of guidance where a model uses it, and of the scores."""
    keys: list[str] = []
    for model in models.values():
        if model.config.method in METHODS:
            keys += METHODS[model.config.method].cite
        if model.config.guidance is not None:
            keys.append("ho2022classifier")
    return [key for key in dict.fromkeys([*keys, *METRIC_CITATIONS]) if key in CITATIONS]
