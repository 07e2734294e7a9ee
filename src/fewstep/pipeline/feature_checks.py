"""Features in a run: a feature stage's ``config.json``, the words that may name features, and which may judge."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.data.dataset import DataSet
from fewstep.errors import UserError, suggestion, unknown
from fewstep.generator import Config, Generator
from fewstep.interop.open_model import folder_kind
from fewstep.methods.contract.options import Options
from fewstep.methods.registry import find_method
from fewstep.metrics.feature_distance import FEATURE_SOURCES, LPIPS, LPIPS_NETS, FeatureDistance, find_features
from fewstep.solvers.maps import SampleRule

NO_VELOCITY = {
    "map": "is a one-step map, not a velocity field: learn from the flow it was distilled from.",
    "features": "is a feature network, not a velocity field: learn from a flow, and name this one under 'features'.",
}


def features_config(data: DataSet, name: str, options: Options, network: dict[str, Any]) -> Config:
    """The ``config.json`` of a stage that trains features."""
    return Config(
        shape=data.shape,
        rule=SampleRule(kind="features"),
        network=network,
        scaling=data.scaling.as_dict(),
        method=options.method,
        stage=name,
        data={"name": data.name, "fingerprint": data.fingerprint},
    )


def named_features(options: Options) -> str | None:
    """The features in a stage's loss, as the recipe names them; None without."""
    return find_method(options.method).needs(options).features


def check_features(stages: Mapping[str, Options], judge: str | None) -> None:
    """Check the names of features, and that the comparison's features are in no stage's loss.

    Raises:
        UserError: a stage that comes later or makes no features, a path that is not there, a comparison by features
            that a loss uses.
    """
    earlier: dict[str, Options] = {}
    for name, options in stages.items():
        if (word := named_features(options)) is not None:
            where = f"stage {name!r}"
            if word in stages and word not in earlier and word != name:
                raise UserError(f"{where}: its features {word!r} come later: put that stage before this one.")
            _check_word(where, word, earlier)
            if word == judge:
                raise UserError(
                    f"compare.features: {word!r} are in the loss of stage {name!r}. The model was optimised against "
                    "these features: the score would be biased. Judge by other features, such as a second stage "
                    "'method: features' with another 'learn', or leave compare.features out."
                )
        earlier[name] = options
    if judge is not None:
        _check_word("compare.features", judge, stages)


def _check_word(where: str, word: str, stages: Mapping[str, Options]) -> None:
    """Refuse a name of features that is no stage of features, no LPIPS network and no path."""
    if word in stages:
        if find_method(stages[word].method).makes != "features":
            raise UserError(
                f"{where}: the features {word!r} are a stage of method {stages[word].method!r}, which makes none: name "
                "a stage 'method: features'."
            )
    elif word.startswith(LPIPS):
        if (name := word.removeprefix(LPIPS)) not in LPIPS_NETS:
            raise UserError(f"{where}: {unknown('LPIPS network', name, LPIPS_NETS)}")
    elif not os.path.exists(word):
        known = [name for name, options in stages.items() if find_method(options.method).makes == "features"]
        raise UserError(f"{where}: there are no features {word!r}: {suggestion(word, known)}Give {FEATURE_SOURCES}.")


def find_judge(word: str | None, data: DataSet, device: str) -> FeatureDistance | None:
    """The features of a comparison's Fréchet distance; None for the samples themselves."""
    return None if word is None else find_features(word, data.shape, device, data.scaling.as_dict())


def check_judge(models: Sequence[Generator], judge: FeatureDistance) -> None:
    """Refuse to score a model by features that were in its loss."""
    for model in models:
        if model.config.features == judge.digest:
            raise UserError(
                f"the features {judge.name} were in the loss of {model.name!r}. The model was optimised against these "
                "features: the score would be biased. Judge by other features, or leave features out."
            )


def models_among(folders: Sequence[Path]) -> list[Path]:
    """The folders that hold models, without those of feature networks."""
    return [folder for folder in folders if folder_kind(folder).kind != "features"]
