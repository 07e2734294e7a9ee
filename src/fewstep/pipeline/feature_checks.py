"""Features in a run: what a feature stage's folder says, which words may name features, and who may judge whom."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.data.dataset import DataSet
from fewstep.errors import UserError, suggestion, unknown
from fewstep.generator import Config, Generator, read_config
from fewstep.methods.contract.options import Options
from fewstep.methods.registry import find_method
from fewstep.metrics.feature_distance import FEATURE_SOURCES, LPIPS, LPIPS_NETS, FeatureDistance, find_features
from fewstep.solvers.maps import SampleRule

NO_VELOCITY = {
    "map": "is a one-step map, not a velocity field: learn from the flow it was distilled from.",
    "features": "is a feature network, not a velocity field: learn from a flow, and name this one under 'features'.",
}


def features_config(data: DataSet, name: str, options: Options, network: dict[str, Any]) -> Config:
    """What ``config.json`` of a stage of features says."""
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
    """The features that a stage's loss looks through, in the recipe's word."""
    return find_method(options.method).needs(options).features


def check_features(stages: Mapping[str, Options], judge: str | None) -> None:
    """Check the words that name features, and that those of the comparison are in no stage's loss.

    Raises:
        UserError: a stage that comes later or makes no features, a path that is not there, a judge that is used.
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
                    f"compare.features: {word!r} are in the loss of stage {name!r}, and would praise what learned to "
                    "please them. Judge by other features, such as a second stage 'method: features' with another "
                    "'learn', or leave compare.features out."
                )
        earlier[name] = options
    if judge is not None:
        _check_word("compare.features", judge, stages)


def _check_word(where: str, word: str, stages: Mapping[str, Options]) -> None:
    """A word for features: a stage that makes them, LPIPS, or something that is there."""
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


def find_outside(stages: Mapping[str, Options], judge: str | None, data: DataSet) -> None:
    """Find every feature network from outside the recipe once, before the first stage trains."""
    words = [*map(named_features, stages.values()), judge]
    for word in dict.fromkeys(words):
        if word is not None and word not in stages:
            find_features(word, data.shape, scaling=data.scaling.as_dict())


def find_judge(word: str | None, data: DataSet, device: str) -> FeatureDistance | None:
    """The features of a comparison, None where the values themselves are looked at."""
    return None if word is None else find_features(word, data.shape, device, data.scaling.as_dict())


def check_judge(models: Sequence[Generator], judge: FeatureDistance) -> None:
    """Refuse to judge a model by the features its loss looked through."""
    for model in models:
        if model.config.features == judge.digest:
            raise UserError(
                f"the features {judge.name} were in the loss of {model.name!r}, and would praise what learned to "
                "please them. Judge by other features, or leave features out."
            )


def cached_features(judge: FeatureDistance) -> Callable[[Tensor], Tensor]:
    """The judge's pooled features; a batch that was seen before, as the reference is, is not computed again."""
    seen: dict[bytes, Tensor] = {}

    def features(x: Tensor) -> Tensor:
        key = hashlib.sha256(x.cpu().contiguous().numpy().tobytes()).digest()
        if key not in seen:
            seen[key] = judge.pooled(x)
        return seen[key]

    return features


def models_among(folders: Sequence[Path]) -> list[Path]:
    """The folders that hold models, without those of feature networks."""
    return [folder for folder in folders if read_config(folder).rule.kind != "features"]
