"""Finished models as frozen teachers and as initialisations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.data.dataset import LABEL
from fewstep.errors import UserError
from fewstep.generator import Config, Generator, weights_digest
from fewstep.interop.diffusers_folders import is_diffusers_folder
from fewstep.interop.open_model import folder_kind
from fewstep.methods.contract.teacher import Teacher
from fewstep.networks.foreign import Foreign, whole_state
from fewstep.pipeline.opening import Run
from fewstep.pipeline.stage_networks import same_weights
from fewstep.store.files import json_round_trip


def frozen(generator: Generator, name: str) -> Teacher:
    """A generator as a teacher."""
    if generator.config.rule.kind != "velocity":
        raise UserError(f"{name!r} is a one-step map, not a velocity field: learn from the flow it was distilled from.")
    if generator.config.base == "examples":
        raise UserError(
            f"{name!r} starts from damaged data (in-painting, super-resolution), and pairs need a base that can be "
            "drawn: learn from a model with a Gaussian base, or sample this one in a few steps."
        )
    return as_teacher(generator, name)


def as_teacher(generator: Generator, name: str) -> Teacher:
    """A generator's network, frozen, whether it is a velocity or a map: the student of an earlier phase, or an init."""
    state, coupling = generator.module.state_dict(), generator.config.coupling
    module = generator.module
    nulls: dict[str, Any] = {LABEL: None} if generator.conditional else {}
    foreign = module if isinstance(module, Foreign) else None
    return Teacher(
        velocity=module,
        digest=weights_digest(whole_state(module)),
        guidance=generator.config.guidance,
        guidable=generator.config.guidable,
        path=generator.config.path,
        name=name,
        state=state,
        network=generator.config.network or {},
        independent=coupling is None or coupling.independent,
        nulls=nulls if foreign is None else foreign.null,
        combine=None if foreign is None else foreign.combine,
    )


def load_initial(run: Run, name: str, chosen: str) -> Teacher:
    """What the student of stage ``name`` starts from: a teacher, or a one-step map where its method takes one.

    Raises:
        UserError: as :func:`load_teacher`; a map of another network, or of more steps than one.
    """
    if not run.method(name).starts_from_maps:
        return load_teacher(run, chosen)
    generator = load_model(run, chosen)
    if generator.config.rule.kind == "velocity":
        return frozen(generator, chosen)
    network, made_for = run.network(name), generator.config.rule.steps
    if not same_weights(generator.config.network or {}, network):
        raise UserError(
            f"the init {chosen!r} is a map of another network ({generator.config.network}) than the student's "
            f"({network}): give the stage that 'network', or start from another model."
        )
    if made_for and 1 not in made_for:
        raise UserError(
            f"the init {chosen!r} is made for {made_for} steps, and init must be a one-step map: name a model that "
            "samples in one step, or a velocity."
        )
    return as_teacher(generator, chosen)


def load_teacher(run: Run, chosen: str) -> Teacher:
    """A stage of this run, or a model's folder, frozen."""
    return frozen(load_model(run, chosen), chosen)


def load_model(run: Run, chosen: str) -> Generator:
    """A stage of this run, or a model's folder, which fits the data."""
    if chosen in run.given:
        generator = run.given[chosen]
    else:
        generator = run.model(run.out / chosen if chosen in run.recipe.stages else Path(chosen))
    if generator.config.shape != run.data.shape:
        raise UserError(
            f"the model {chosen} has samples of shape {generator.config.shape}, and the data {run.data.shape}."
        )
    if chosen not in run.recipe.stages:
        check_outside(run, chosen, generator.config)
    return generator


def check_outside(run: Run, chosen: str, config: Config) -> None:
    """Refuse a model from outside the recipe whose units, classes or base are not this run's."""
    if config.scaling is not None and config.scaling != json_round_trip(run.data.scaling.as_dict()):
        raise UserError(
            f"the model {chosen} was trained on data scaled otherwise than {run.data.name!r} is here: use the same "
            "data with the same 'scale', so that both are in the same units."
        )
    classes = run.data.classes if run.recipe.conditional else 0
    unknown_classes = chosen in run.given and not config.class_weights  # a network of the user's own
    if chosen not in run.given and is_diffusers_folder(chosen):
        takes, unknown_classes = folder_kind(chosen).labels, True  # it may embed more classes than the data have
        if takes != bool(classes):
            raise UserError(
                f"the network of diffusers in {chosen} takes {'labels' if takes else 'no labels'}, and this recipe "
                f"trains {'without: set conditional: true' if takes else 'with labels: set conditional: false'}."
            )
    if len(config.class_weights) != classes and not unknown_classes and (classes or not config.class_weights):
        raise UserError(
            f"the model {chosen} has {len(config.class_weights)} classes, and this recipe {classes}: set "
            "'conditional' and the labels as they were when it was trained."
        )
    base = "gaussian" if run.base_rows is None else "empirical"
    if config.base not in (base, "examples"):  # examples are refused as teachers, with their own reason
        raise UserError(f"the model {chosen} has a base of kind {config.base!r}, and this recipe {base!r}: set 'base'.")
