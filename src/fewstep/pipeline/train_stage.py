"""One stage: its teacher, its student, its phases, and the model folder that is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.data.dataset import LABEL
from fewstep.flow.noise import isolated_rng, mix
from fewstep.generator import BaseRows, Config, save_model, weights_digest
from fewstep.generator.conditions import kept_conditions
from fewstep.methods.contract.objective import Collapse, Objective
from fewstep.methods.contract.options import Options
from fewstep.methods.contract.stage import Plan, Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.networks.foreign import FOREIGN, in_own_dtypes, trainable_copy
from fewstep.networks.two_time import take_weights
from fewstep.pipeline.checks import STAGE_FILE, check_inputs, read_stage, stage_inputs
from fewstep.pipeline.feature_checks import features_config
from fewstep.pipeline.opening import Run
from fewstep.pipeline.stage_networks import build_network, same_weights
from fewstep.pipeline.statistics import Statistics
from fewstep.pipeline.teachers import as_teacher, load_initial, load_teacher
from fewstep.store.files import clean_temporaries, make_folder, write_json
from fewstep.training.checkpoint import Checkpoints
from fewstep.training.trainer import Trainer


@final
@dataclass(frozen=True)
class Failure:
    """A stage without a finished model.

    Attributes:
        stage: its name.
        reason: what happened, in a sentence or two.
        best: the model as it was at its best, where a collapsing training kept one.
    """

    stage: str
    reason: str
    best: Path | None = None


def run_stage(run: Run, name: str, options: Options) -> Failure | None:
    """Run one stage to its end; leave it alone when it is finished, or when it has collapsed before."""
    folder = run.out / name
    teacher = load_teacher(run, options.teacher) if options.teacher else None
    initial = load_initial(run, name, options.init) if options.init else teacher
    weights = {
        "teacher_weights": teacher.digest if teacher else None,
        "initial_weights": initial.digest if initial else None,
        **own_weights(run, name, initial),
    }
    inputs = stage_inputs(run, name) | weights
    if run.world.rank == 0:
        make_folder(folder)
        for below in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            clean_temporaries(below)  # a killed run's, in checkpoints, pairs and rounds
        check_inputs(folder, inputs, options)
    run.world.barrier()
    recorded = read_stage(folder)
    if recorded.get("done"):
        run.world.say(f"{name}: finished before, in {folder}")
        return None
    if recorded.get("collapsed"):
        run.world.say(f"{name}: collapsed before, and is not trained again; delete {folder} to train it again")
        return Failure(name, recorded["collapsed"], best_of(folder))
    run.world.say(f"{name}: {options.method}")
    stage = make_stage(run, name, teacher, initial)
    plan = run.method(name).plan(options, stage)
    failure = None
    try:
        train_stage(run, stage, options, plan, stage_config(run, name, options, stage.network, plan, teacher))
    except Collapse as collapse:
        failure = Failure(name, str(collapse), best_of(folder))
    if run.world.rank == 0:
        outcome = {"done": True} if failure is None else {"done": False, "collapsed": failure.reason}
        write_json(folder / STAGE_FILE, {"inputs": inputs, **outcome})
    run.world.barrier()
    return failure


def own_weights(run: Run, name: str, initial: Teacher | None) -> dict[str, str]:
    """The digest of a foreign network's own weights, where the student starts from those."""
    network = run.network(name)
    if initial is not None or network.get("name") != FOREIGN:
        return {}
    return {"network_weights": weights_digest(run.prototype(network).whole_state())}


def best_of(folder: Path) -> Path | None:
    """The folder of the model that a collapsed stage was at its best, where it kept one."""
    return folder / "best" if (folder / "best" / "config.json").exists() else None


def make_stage(run: Run, name: str, teacher: Teacher | None, initial: Teacher | None) -> Stage:
    """What the method is given to plan the stage."""
    network = run.network(name)
    return Stage(
        name=name,
        folder=run.out / name,
        data=run.data,
        source=run.source,
        seed=run.recipe.header.seed,
        conditions=run.conditions,
        network=network,
        build=lambda: build_student(run, name, network, initial),
        teacher=teacher,
        dequantise=run.dequantise,
        world=run.world,
        find=lambda chosen: str(run.out / chosen) if chosen in run.recipe.stages else chosen,
        nulls=nulls_of(run, network),
        stream=run.stream,
    )


def nulls_of(run: Run, network: dict[str, Any]) -> Mapping[str, Any]:
    """What replaces a condition: what a foreign network declares; the number of classes for fewstep's own."""
    if network.get("name") == FOREIGN:
        return run.prototype(network).null
    return {LABEL: run.data.classes} if LABEL in run.conditions else {}


def train_stage(run: Run, stage: Stage, options: Options, plan: Plan, config: Config) -> None:
    """Train the plan's phases and write the model folder.

    Raises:
        Collapse: training goes so badly that it stopped; what was best is kept in ``best``.
    """
    checkpoints = Checkpoints(stage.folder / "checkpoints")
    statistics = Statistics(run.out / "stats.jsonl", stage.name, run.world.rank == 0)
    trainer = Trainer(
        plan.student,
        options,
        (run.recipe.header.seed, stage.name),
        run.world,
        checkpoints,
        statistics.write,
        run.data.mask,
        run.stream,
    )
    if run.stream is not None:
        run.world.say(f"  {run.stream.promise}")
    if trainer.resume():
        run.world.say(f"  resumed at {trainer.position.total_samples:,} samples")
    statistics.keep_until(trainer.position.total_samples)
    previous: Teacher | None = None
    for number, phase in enumerate(plan.phases):
        last = number == len(plan.phases) - 1
        kept = stage.folder / "rounds" / phase.name
        if number < trainer.position.phase:
            previous = as_teacher(run.open_model(kept, full=True), f"{stage.name}, {phase.name}")
            continue
        with isolated_rng(run.world.device):  # copies of networks may draw initial weights
            torch.default_generator.manual_seed(mix(stage.seed, stage.name, phase.name, "prepare"))
            objective, batches = phase.prepare(previous)
        label = stage.name if len(plan.phases) == 1 else f"{stage.name}, {phase.name}"
        try:
            trainer.train(number, phase.samples, objective, batches, label)
            trainer.save(keep=1 if last else 2)
        except Collapse as collapse:
            raise keep_best(run, stage, plan, config, collapse, objective) from collapse
        weights = own_form(run, trainer.ema.weights(), config) if last else trainer.ema.weights()
        save_student(run, stage.folder if last else kept, weights, plan, config)
        run.world.barrier()
        if not last:
            previous = as_teacher(run.open_model(kept, full=True), f"{stage.name}, {phase.name}")


def own_form(run: Run, weights: Mapping[str, Tensor], config: Config) -> Mapping[str, Tensor]:
    """Weights in the dtypes of the user's own module, for a network from outside; they are trained in float32."""
    network = config.network or {}
    return in_own_dtypes(weights, run.prototype(network)) if network.get("name") == FOREIGN else weights


def save_student(run: Run, folder: Path, weights: Mapping[str, Tensor], plan: Plan, config: Config) -> None:
    """Write a model folder with these weights and the base it starts from; the first process does."""
    if run.world.rank == 0:
        kept = kept_conditions(run.data, run.conditions)
        save_model(folder, dict(weights), config, kept_base(run, plan), kept)


def kept_base(run: Run, plan: Plan) -> BaseRows | None:
    """The rows kept with a model: the plan's examples, or the recipe's base; None where that is Gaussian."""
    if plan.examples is not None:
        return BaseRows.of_examples(plan.examples)
    return None if run.base_rows is None else BaseRows(run.base_rows)


def keep_best(run: Run, stage: Stage, plan: Plan, config: Config, collapse: Collapse, objective: Objective) -> Collapse:
    """Write the model that a collapsing training had at its best; the same collapse, saying where that model is."""
    best = objective.best()
    if best is None:
        return collapse
    folder = stage.folder / "best"
    save_student(run, folder, own_form(run, best, config), plan, config)
    return Collapse(f"{collapse} What it was at its best is in {folder}.")


def build_student(run: Run, name: str, network: dict[str, Any], initial: Teacher | None) -> nn.Module:
    """The student: its own seed's weights, or the initial model's EMA when they fit its network."""
    fits = initial is not None and same_weights(initial.network, network)
    with isolated_rng():
        torch.default_generator.manual_seed(mix(run.recipe.header.seed, name, "init"))
        if network.get("name") == FOREIGN:
            start = initial.velocity if initial is not None and fits else run.prototype(network)
            assert isinstance(start, nn.Module), "a model's velocity is its network"
            student = trainable_copy(start, bool(network.get("two_time")))
        else:
            student = build_network(network)
    if network.get("name") == FOREIGN and fits:
        return student
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
    if LABEL in run.conditions:
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
        label_names=run.data.label_names if LABEL in run.conditions else None,
        conditions={name: tuple(map(int, run.data.conditions[name].shape[1:])) for name in run.data.conditions},
        mask=run.data.mask,
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
