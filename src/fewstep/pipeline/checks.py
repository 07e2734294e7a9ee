"""What is checked before a stage trains: its network, its models, its precision, and what its folder was begun with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep.errors import UserError
from fewstep.generator import weights_digest
from fewstep.methods.contract.options import Options
from fewstep.networks.foreign import FOREIGN, whole_state
from fewstep.pipeline.bf16_speed import bf16_is_slow, bf16_note
from fewstep.pipeline.feature_checks import named_features
from fewstep.pipeline.opening import Run
from fewstep.pipeline.teachers import load_initial, load_teacher
from fewstep.store.files import json_round_trip, read_json, write_json

OUTPUTS = ("checkpoints", "pairs", "best", "config.json")  # what a stage leaves in its folder when it has begun
STAGE_FILE = "stage.json"


@contextlib.contextmanager
def naming_stage(name: str) -> Iterator[None]:
    """Put the stage's name in front of a mistake's message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"stage {name!r}: {error}") from error


def check_run(run: Run) -> None:
    """Check every stage's network and everything from outside the recipe, before the first stage trains."""
    check_networks(run)
    check_models(run)


def check_networks(run: Run) -> None:
    """Resolve every stage's network before the first one trains, and compare the processes' own networks."""
    check_equal_weights(run)
    networks = []
    for name in run.recipe.stages:
        with naming_stage(name):
            networks.append(run.network(name))
            check_mask(run, networks[-1])
    if run.foreign and not run.given and not any(network.get("name") == FOREIGN for network in networks):
        raise UserError(
            "a network was passed, --module, and no stage of the recipe trains it or learns from it, because the "
            "recipe names its network: set network to foreign, --set network=foreign, or leave --module out."
        )


def check_mask(run: Run, network: Mapping[str, Any]) -> None:
    """Refuse a network from outside whose mask is not that of the data: padding would count in one of them only."""
    mask = network.get("mask")
    if network.get("name") == FOREIGN and mask != run.data.mask:
        raise UserError(
            f"the mask of the network {network['module']} is {mask!r}, and that of the data {run.data.name!r} is "
            f"{run.data.mask!r}: name it in both, fs.adapt(net, …, mask='mask') and fs.as_data(…, mask='mask')."
        )


def check_equal_weights(run: Run) -> None:
    """Refuse processes that were given different weights of a network from outside.

    Raises:
        UserError: in all processes.
    """
    if run.world.size == 1:
        return
    modules = [*run.foreign.values(), *(model.module for model in run.given.values())]
    digests = [weights_digest(whole_state(module)) for module in modules]
    own = torch.tensor([[int(digest[:8], 16) for digest in digests]], device=run.world.device)
    if not bool((run.world.gather(own) == own).all()):
        raise UserError(
            "the processes have different weights of a network that was passed, so each would learn something else: "
            "load them from a file, or call torch.manual_seed(0) before the network is built."
        )


def check_models(run: Run) -> None:
    """Load every teacher, init and feature network from outside the recipe, before the first stage trains."""
    stages = run.recipe.stages
    words = [*map(named_features, stages.values()), run.recipe.header.compare.features]
    for word in words:
        if word is not None and word not in stages:
            run.features(word)
    for name, options in stages.items():
        with naming_stage(name):
            if options.teacher is not None and options.teacher not in stages:
                load_teacher(run, options.teacher)
            if options.init is not None and options.init not in stages:
                load_initial(run, name, options.init)


def slow_in_bf16(run: Run) -> list[str]:
    """The unfinished stages that ask for bf16 where it is slower than fp32."""
    asked = [name for name, options in run.recipe.stages.items() if options.precision == "bf16"]
    unfinished = [name for name in asked if not stage_done(run.out / name)]
    return unfinished if unfinished and bf16_is_slow(run.world.device) else []


def check_precision(run: Run) -> None:
    """Tell the user once when stages ask for bf16 where it is slower than fp32."""
    if slow := slow_in_bf16(run):
        run.world.say(bf16_note(run.world.device, slow))


def check_begun(run: Run) -> None:
    """Check the stages begun in this folder against the recipe, before ``recipe.yaml`` is written over."""
    for name in run.recipe.stages:
        if (run.out / name / STAGE_FILE).exists():
            begun = read_stage(run.out / name).get("inputs", {})
            # the weights of a teacher that is not trained yet are checked when the stage begins
            later = {key: value for key, value in begun.items() if key.endswith("_weights")}
            check_inputs(run.out / name, stage_inputs(run, name) | later, run.recipe.stages[name])


def stage_inputs(run: Run, name: str) -> dict[str, Any]:
    """What a stage's weights depend on, beside its teacher's; a folder begun with other inputs is refused."""
    header = run.recipe.header
    return {
        "options": run.recipe.stages[name].model_dump(mode="json"),
        "network": run.network(name),
        "data": (run.stream or run.data).fingerprint,
        "scaling": run.data.scaling.as_dict(),
        "base": header.base,
        "seed": header.seed,
        "conditional": run.recipe.conditional,
        "dequantise": run.dequantise,
        **({"conditions": list(run.conditions)} if run.data.conditions else {}),
    }


def read_stage(folder: Path) -> dict[str, Any]:
    """What ``stage.json`` of a stage says; nothing before the stage has begun."""
    path = folder / STAGE_FILE
    return dict(read_json(path)) if path.exists() else {}


def stage_done(folder: Path) -> bool:
    """Whether the stage's model is finished."""
    return bool(read_stage(folder).get("done"))


def check_inputs(folder: Path, inputs: Mapping[str, Any], options: Options) -> None:
    """Begin a stage, or check that the one begun here has the same inputs.

    An option that the recorded inputs do not have was added since: its default is compared. One with a former name
    counts under its present name.

    Raises:
        UserError: the stage was begun with other inputs, or with an option that there is no more.
    """
    recorded, wanted = read_stage(folder).get("inputs"), json_round_trip(inputs)
    # a stage whose inputs were refused has left nothing but its stage.json, and may begin again with others
    if recorded is None or not any((folder / part).exists() for part in OUTPUTS):
        if recorded != wanted:
            write_json(folder / STAGE_FILE, {"inputs": inputs, "done": False})
        return
    renamed = type(options).old_names
    begun = {renamed.get(key, key): value for key, value in recorded.get("options", {}).items()}
    gone = sorted(begun.keys() - wanted["options"].keys())
    if gone:
        raise UserError(
            f"{folder} was begun with options.{gone[0]} = {begun[gone[0]]!r}, an option that method {options.method!r} "
            "of this version of fewstep does not have: use another --out, or delete that folder to begin the stage "
            "again."
        )
    found, wanted = _flat({**recorded, "options": _defaults(options) | begun}), _flat(wanted)
    differs = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if differs:
        key = differs[0]
        raise UserError(
            f"{folder} was begun with {key} = {found.get(key)!r}, and the recipe now says {wanted.get(key)!r}: "
            "use another --out, or delete that folder to begin the stage again."
        )


def _defaults(options: Options) -> dict[str, Any]:
    """The default of every option that has one, as it looks in ``stage.json``."""
    fields = {name: entry for name, entry in type(options).model_fields.items() if not entry.is_required()}
    defaults = {name: entry.get_default(call_default_factory=True) for name, entry in fields.items()}
    plain = type(options).model_construct(**defaults).model_dump(mode="json", include=set(defaults), warnings=False)
    return dict(json_round_trip(plain))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= _flat(item, f"{prefix}{key}.")
    return out
