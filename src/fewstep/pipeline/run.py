"""Run a recipe: its stages in order, resuming whatever was begun, then the comparison and the report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.flow.noise import isolated_rng, mix
from fewstep.generator import BaseRows, Config, load, save_model
from fewstep.methods.contract.objective import Collapse
from fewstep.methods.contract.options import Options
from fewstep.methods.contract.stage import Plan, Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.registry import find_method
from fewstep.networks.two_time import take_weights
from fewstep.pipeline.environment import environment
from fewstep.pipeline.feature_checks import features_config, find_outside
from fewstep.pipeline.opening import Run, network_of, open_run
from fewstep.pipeline.recipe import Recipe
from fewstep.pipeline.stage_networks import build_network, same_weights
from fewstep.pipeline.statistics import Statistics
from fewstep.pipeline.teachers import as_teacher, load_initial, load_teacher
from fewstep.store.files import clean_temporaries, json_round_trip, make_folder, read_json, write_json, write_text
from fewstep.training.checkpoint import Checkpoints
from fewstep.training.trainer import Trainer
from fewstep.training.world import LocalWorld


def run_recipe(recipe: Recipe, out: Path, world: LocalWorld | None = None) -> list[Path]:
    """Run every stage that is not finished; return the stages' folders.

    The same call again resumes: finished stages are left alone, an unfinished one goes on from its last checkpoint.
    """
    world = world or LocalWorld()
    run = open_run(recipe, Path(out), world)
    check_networks(run)
    check_models(run)
    if world.rank == 0:
        check_begun(run)
        make_folder(run.out)
        write_text(run.out / "recipe.yaml", yaml.safe_dump(recipe.as_dict(), sort_keys=False))
        write_json(run.out / "run.json", environment(recipe.header.seed))
    world.barrier()
    for name, options in recipe.stages.items():
        run_stage(run, name, options)
    return [run.out / name for name in recipe.stages]


@contextlib.contextmanager
def naming_stage(name: str) -> Iterator[None]:
    """Say of a mistake which stage made it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"stage {name!r}: {error}") from error


def check_networks(run: Run) -> None:
    """Resolve every stage's network before the first one trains."""
    for name, options in run.recipe.stages.items():
        with naming_stage(name):
            network_of(run, options)


def check_models(run: Run) -> None:
    """Load every teacher and all features from outside the recipe once, before the first stage trains."""
    find_outside(run.recipe.stages, run.recipe.header.compare.features, run.data)
    for name, options in run.recipe.stages.items():
        with naming_stage(name):
            if options.teacher is not None and options.teacher not in run.recipe.stages:
                load_teacher(run, options.teacher)
            if options.init is not None and options.init not in run.recipe.stages:
                load_initial(run, options.init, options)


def check_begun(run: Run) -> None:
    """Check the stages begun in this folder against the recipe, before ``recipe.yaml`` is written over."""
    for name, options in run.recipe.stages.items():
        if (run.out / name / "stage.json").exists():
            inputs = stage_inputs(run, options, network_of(run, options))
            begun = read_json(run.out / name / "stage.json").get("inputs", {})
            # the weights of a teacher that is still to be trained are checked when the stage begins
            later = {key: value for key, value in begun.items() if key.endswith("_weights")}
            check_inputs(run.out / name, inputs | later)


def run_stage(run: Run, name: str, options: Options) -> None:
    """Run one stage to its end, or leave it alone when it is finished."""
    folder = run.out / name
    teacher = load_teacher(run, options.teacher) if options.teacher else None
    initial = load_initial(run, options.init, options) if options.init else teacher
    network = network_of(run, options)
    weights = {
        "teacher_weights": teacher.digest if teacher else None,
        "initial_weights": initial.digest if initial else None,
    }
    inputs = stage_inputs(run, options, network) | weights
    if run.world.rank == 0:
        make_folder(folder)
        for below in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            clean_temporaries(below)  # a killed run's, in checkpoints, pairs and rounds
        check_inputs(folder, inputs)
    run.world.barrier()
    if stage_done(folder):
        run.world.say(f"{name}: finished before, in {folder}")
        return
    run.world.say(f"{name}: {options.method}")
    stage = Stage(
        name=name,
        folder=folder,
        data=run.data,
        source=run.source,
        seed=run.recipe.header.seed,
        conditional=run.recipe.conditional,
        network=network,
        build=lambda: build_student(run, name, network, initial),
        teacher=teacher,
        dequantise=run.dequantise,
        world=run.world,
        find=lambda chosen: str(run.out / chosen) if chosen in run.recipe.stages else chosen,
    )
    plan = find_method(options.method).plan(options, stage)
    config = stage_config(run, name, options, network, plan, teacher)
    train_stage(run, stage, options, plan, config)
    if run.world.rank == 0:
        write_json(folder / "stage.json", {"inputs": inputs, "done": True})
    run.world.barrier()


def train_stage(run: Run, stage: Stage, options: Options, plan: Plan, config: Config) -> None:
    """Train the plan's phases and write the model folder."""
    checkpoints = Checkpoints(stage.folder / "checkpoints")
    statistics = Statistics(run.out / "stats.jsonl", stage.name, run.world.rank == 0)
    trainer = Trainer(
        plan.student,
        options,
        (run.recipe.header.seed, stage.name),
        run.world,
        checkpoints,
        statistics.write,
    )
    if trainer.resume():
        run.world.say(f"  resumed at {trainer.position.total_samples:,} samples")
    statistics.keep_until(trainer.position.total_samples)
    previous: Teacher | None = None
    for number, phase in enumerate(plan.phases):
        last = number == len(plan.phases) - 1
        kept = stage.folder / "rounds" / phase.name
        if number < trainer.position.phase:
            previous = as_teacher(load(kept, device=run.world.device), f"{stage.name}, {phase.name}")
            continue
        objective, batches = phase.prepare(previous)
        label = stage.name if len(plan.phases) == 1 else f"{stage.name}, {phase.name}"
        try:
            trainer.train(number, phase.samples, objective, batches, label)
        except Collapse as collapse:
            raise keep_best(run, stage, config, collapse, objective.best()) from collapse
        if run.world.rank == 0:
            trainer.save(keep=1 if last else 2)
            save_model(stage.folder if last else kept, trainer.ema.state, config, kept_base(run, plan))
        run.world.barrier()
        if not last:
            previous = as_teacher(load(kept, device=run.world.device), f"{stage.name}, {phase.name}")


def kept_base(run: Run, plan: Plan | None = None) -> BaseRows | None:
    """The rows kept with a model: the plan's examples, or the recipe's base; None where that is Gaussian."""
    if plan is not None and plan.examples is not None:
        return BaseRows.of_examples(plan.examples)
    return None if run.base_rows is None else BaseRows(run.base_rows)


def keep_best(
    run: Run, stage: Stage, config: Config, collapse: Collapse, best: Mapping[str, Tensor] | None
) -> UserError:
    """Write the model that a collapsing training had at its best; the error that says where it is."""
    if best is None:
        return UserError(str(collapse))
    folder = stage.folder / "best"
    if run.world.rank == 0:
        save_model(folder, dict(best), config, kept_base(run))
    return UserError(f"{collapse} What it was at its best is in {folder}.")


def build_student(run: Run, name: str, network: dict[str, Any], initial: Teacher | None) -> nn.Module:
    """The student: its own seed's weights, or the initial model's EMA when they fit its network."""
    with isolated_rng():
        torch.default_generator.manual_seed(mix(run.recipe.header.seed, name, "init"))
        student = build_network(network)
    if initial is not None and same_weights(initial.network, network):
        take_weights(student, initial.state)
    elif initial is not None:
        run.world.say(f"  {name} starts from scratch: its network differs from {initial.name}'s")
    return student


def stage_config(
    run: Run, name: str, options: Options, network: dict[str, Any], plan: Plan, teacher: Teacher | None
) -> Config:
    """What ``config.json`` of the stage says."""
    if plan.rule.kind == "features":
        return features_config(run.data, name, options, network)
    weights: tuple[float, ...] = ()
    if run.recipe.conditional:
        labels = run.data.label_rows(run.data.train)
        assert labels is not None
        counts = torch.bincount(labels, minlength=run.data.classes)
        weights = tuple((counts.double() / counts.sum()).tolist())
    guidance = plan.facts.guidance
    if guidance is None and teacher is not None:
        guidance = teacher.guidance
    return Config(
        shape=run.data.shape,
        rule=plan.rule,
        network=network,
        scaling=run.data.scaling.as_dict(),
        class_weights=weights,
        label_names=run.data.label_names if run.recipe.conditional else None,
        guidance=guidance,
        guidable=plan.null_trained,
        path=plan.path,
        base="examples" if plan.examples else "gaussian" if run.base_rows is None else "empirical",
        coupling=plan.facts,
        features=plan.features,
        method=options.method,
        stage=name,
        data={"name": run.data.name, "fingerprint": run.data.fingerprint},
    )


def stage_inputs(run: Run, options: Options, network: dict[str, Any]) -> dict[str, Any]:
    """What decides a stage's weights, beside its teacher's; a folder begun with other inputs is refused."""
    header = run.recipe.header
    return {
        "options": options.model_dump(mode="json"),
        "network": network,
        "data": run.data.fingerprint,
        "scaling": run.data.scaling.as_dict(),
        "base": header.base,
        "seed": header.seed,
        "conditional": run.recipe.conditional,
        "dequantise": run.dequantise,
    }


def stage_done(folder: Path) -> bool:
    """Whether the stage's model is finished."""
    return (folder / "stage.json").exists() and bool(read_json(folder / "stage.json").get("done"))


def check_inputs(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Begin a stage, or check that the one begun here is the same."""
    path = folder / "stage.json"
    # a stage that was refused at the door has left nothing but its inputs, and may begin again with others
    if not path.exists() or not any((folder / part).exists() for part in ("checkpoints", "pairs", "config.json")):
        write_json(path, {"inputs": inputs, "done": False})
        return
    found = _flat(read_json(path).get("inputs", {}))
    wanted = _flat(json_round_trip(inputs))
    differs = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if differs:
        key = differs[0]
        raise UserError(
            f"{folder} was begun with {key} = {found.get(key)!r}, and the recipe now says {wanted.get(key)!r}: "
            "use another --out, or delete that folder to begin the stage again."
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= _flat(item, f"{prefix}{key}.")
    return out
