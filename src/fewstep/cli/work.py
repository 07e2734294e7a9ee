"""The functions of the verbs.

Each takes the options of its verb, prints its results, returns the exit code 0, and raises a
:class:`~fewstep.errors.UserError` for a user's mistake.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fewstep.cli import arguments
from fewstep.errors import UserError
from fewstep.store.files import atomic_file, make_folder, write_array, write_json
from fewstep.training.world import LocalWorld, default_device, set_threads

if TYPE_CHECKING:
    from fewstep.generator import Generator
    from fewstep.pipeline.run import Outcome


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to, without making it.

    Raises:
        UserError: the folder or its nearest existing parent cannot be written to.
    """
    make_folder(next(part for part in (folder, *folder.parents) if os.path.lexists(part)))


def demo(options: arguments.Demo) -> int:
    """Run the digits recipe, from data to report."""
    return run(arguments.Run("digits", out=options.out, set=(f"seed={options.seed}",)))


def run(options: arguments.Run) -> int:
    """Run the stages of a recipe, compare their models and write the report; 1 when a stage has collapsed."""
    from fewstep.cli.open_models import foreign_network
    from fewstep.pipeline.dry import show_plan
    from fewstep.pipeline.finish import finish_run
    from fewstep.pipeline.opening import open_run
    from fewstep.pipeline.recipe import load_recipe
    from fewstep.pipeline.run import run_stages

    set_threads()
    recipe = load_recipe(options.recipe, options.set)
    out = options.out or Path("runs") / Path(options.recipe).stem
    check_writable(out)
    foreign = foreign_network(options.module)
    if options.dry:
        print(show_plan(recipe, out, foreign))
        print("next:   the same command without --dry")
        return 0
    world = LocalWorld()
    opened = open_run(recipe, out, world, foreign)
    outcome = run_stages(opened)
    if world.rank == 0:
        report = finish_run(opened, outcome)
        print("\n" + "\n".join(closing_lines(out, outcome, report)))
    world.barrier()
    return 1 if outcome.failures else 0


def closing_lines(out: Path, outcome: Outcome, report: Path | None) -> Sequence[str]:
    """What a run says at its end: what it wrote, which stages failed, and what to do next."""
    from fewstep.pipeline.feature_checks import models_among

    names, models = ", ".join(folder.name for folder in outcome.finished), models_among(outcome.finished)
    models += [failure.best for failure in outcome.failures.values() if failure.best is not None]
    lines = []
    if report is not None:
        lines += [f"wrote   {out}: {names or 'no finished stage'} (a model each), compare.json", f"report  {report}"]
    elif names:
        lines.append(f"wrote   {out}: {names} (features)")
    lines += [f"failed  {name}: {failure.reason}" for name, failure in outcome.failures.items()]
    if outcome.failures:
        lines.append("        Delete a failed stage's folder to train it again, with other options if you like.")
    if models:
        lines.append(f"next    fewstep sample {models[-1]} --num 64 --out samples.png")
    elif names:
        lines.append(f"next    fewstep compare MODEL --data DATA --features {outcome.finished[-1]}")
    return lines


def sample(options: arguments.Sample) -> int:
    """Draw samples and write them to a file."""
    from fewstep.cli import diagnosis_text as diagnosis
    from fewstep.cli.estimates import find_sampler
    from fewstep.cli.open_models import open_model
    from fewstep.cli.rows_of_conditions import model_conditions, read_rows
    from fewstep.diagnostics.tune import KINDS
    from fewstep.generator.choose import TUNED_CALLS, choose

    set_threads()
    write = writer(options.out)
    cond = None if options.cond is None else read_rows(options.cond)
    model = open_model(options.model, options.module)
    if options.solver in KINDS:
        choose(model.config, model.name, options.solver, options.grid, options.steps)  # refuses before it costs time
        find_sampler(model, options.steps or TUNED_CALLS, options.solver, options.guidance, options.minutes)
    elif options.minutes is not None:
        raise UserError("--minutes limits the search for a sampler: give it with --solver auto or --solver fitted.")
    draw = model.draw(
        options.num,
        steps=options.steps,
        solver=options.solver,
        grid=options.grid,
        label=options.label,
        guidance=options.guidance,
        seed=options.seed,
        cond=cond,
        batch_size=options.batch_size,
    )
    x = model.to_data(draw.x)
    write(x, model, model_conditions(model, draw.cond))
    print(f"wrote {options.out}: {len(x)} samples of shape {tuple(x.shape[1:])}, in the data's units")
    if options.solver in KINDS:
        choice = model.known_sampler(options.steps or TUNED_CALLS, options.solver, options.guidance)
        assert choice is not None, "it was just used"
        print(f"{options.solver}, {diagnosis.advice(choice)}")
    print(f"next  fewstep compare {options.model} --data {data_word(model)}")
    return 0


def writer(path: Path) -> Callable[[torch.Tensor, Generator, Mapping[str, Any]], None]:
    """Check a file's name before sampling and return the function that writes samples to it.

    A ``.npz`` file also holds the conditions of the samples, by name.

    Raises:
        UserError: the path is a folder, cannot be written to, or does not end in .npy, .npz or .png.
    """
    if path.is_dir():
        raise UserError(f"--out {path} is a folder: give the name of a file, such as {path / 'samples.npy'}.")
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".npz", ".png"):
        raise UserError(
            f"--out {path}: samples are written as .npy, .npz or .png: give a name with one of these endings."
        )
    check_writable(path.parent)

    def write(x: torch.Tensor, model: Generator, cond: Mapping[str, Any]) -> None:
        if suffix == ".npy":
            write_array(path, x.numpy())
        elif suffix == ".npz":
            with atomic_file(path) as temporary, temporary.open("wb") as file:
                np.savez(file, x=x.numpy(), **cond)
        else:
            from fewstep.report import write_sheet

            # black and white are the ends of the range of the data, not of these samples
            clip = (model.config.scaling or {}).get("clip")
            write_sheet(x, path, limits=tuple(clip) if clip and x.ndim > 2 else None)

    return write


def diagnose(options: arguments.Diagnose) -> int:
    """Measure a velocity model along its trajectories, and choose its best solvers and grids."""
    from fewstep.cli import diagnosis_text as diagnosis
    from fewstep.cli.estimates import find_samplers, of_diagnosis
    from fewstep.cli.named_data import named_data
    from fewstep.cli.open_models import open_model
    from fewstep.diagnostics.diagnose import diagnose as measure

    set_threads()
    if options.num < 2:
        raise UserError(f"--num must be at least 2, got {options.num}.")
    calls = [] if options.calls == "none" else number_list("--calls", options.calls)
    data = None if options.data is None else named_data(options.data)
    model = open_model(options.model, options.module, data)
    if model.config.rule.kind != "velocity":
        raise UserError(
            f"{options.model} is a one-step map and has no velocity along t: diagnose the flow it was distilled from."
        )
    if options.out is not None:
        check_writable(options.out)
    draw = model.draw(options.num, steps=1, solver="euler", grid="uniform", seed=options.seed)
    x0, cond = draw.x0.to(model.device), draw.conditions(model.device)
    print(f"model            {options.model}")
    estimates = of_diagnosis(model, x0, cond, calls, options.minutes)
    print(f"cost             {estimates}", flush=True)
    with estimates.next() as limits:
        d = measure(model.module, x0, cond=cond, **limits)
    print("\n".join(diagnosis.measures(d)), flush=True)
    lines, values = diagnosis.likelihood(model, data, options.seed) if data else ([], None)
    for line in lines:
        print(line, flush=True)
    found = find_samplers(model, calls, estimates)
    for choice in found:
        print(f"best at          {diagnosis.advice(choice)}")
    conclusions = diagnosis.conclusions(model, d, found)
    print("\n" + "\n".join(f"- {line}" for line in conclusions) + "\n")
    if options.out is not None:
        fields = {"verdict": conclusions, "choices": [choice.as_dict() for choice in found], "likelihood": values}
        write_json(options.out / "diagnosis.json", d.as_dict() | fields)
        print(f"wrote {options.out / 'diagnosis.json'}")
    print(f"next  fewstep sample {options.model} --num 64 --steps 8 --solver auto --out samples.npy")
    return 0


def data_word(model: Generator) -> str:
    """The data of a model as a command names it; DATA where they were no built-in data and no file of this folder."""
    from fewstep.data.builtin import DATA

    name = str(model.config.data.get("name") or "")
    return name if name in DATA or Path(name).is_file() else "DATA"


def compare(options: arguments.Compare) -> int:
    """Compare models on data."""
    from fewstep.cli.named_data import named_data
    from fewstep.cli.open_models import open_models
    from fewstep.cli.user_module import is_code
    from fewstep.pipeline.compare import compare as measure
    from fewstep.pipeline.compare import name_apart
    from fewstep.pipeline.feature_checks import find_judge, models_among
    from fewstep.pipeline.finish import write_comparison

    set_threads()
    steps = number_list("--steps", options.steps)
    if options.samples is not None and options.samples < 1:
        raise UserError(f"--samples must be at least 1, got {options.samples}.")
    if options.out is not None:
        check_writable(options.out)
    folders = [place for place in options.models if is_code(place) or models_among([place])]
    for folder in options.models:
        if folder not in folders:
            print(f"  {folder} holds features, not a model to compare: use it with --features {folder}")
    data = named_data(options.data)
    models = open_models(folders, options.module, data)
    name_apart(models, folders)
    found = measure(
        models,
        data,
        steps=steps,
        solver=options.solver,
        grid=options.grid,
        samples=options.samples,
        seed=options.seed,
        features=find_judge(options.features, data, default_device()),
    )
    print("\n" + found.table)
    if options.out is None:
        print("\nnext  the same command with --out DIR also writes compare.json and an HTML report")
        return 0
    report = write_comparison(make_folder(options.out), found.result, models, data)
    print(f"\nwrote   {options.out}: compare.json, compare.md\nreport  {report}")
    print(f"next    fewstep sample {folders[-1]} --num 64 --out samples.png")
    return 0


def number_list(option: str, text: str) -> Sequence[int]:
    """Parse ``1,2,4``.

    Raises:
        UserError: the text is not a list of whole numbers of at least 1.

    >>> number_list("--steps", "1,2,4")
    [1, 2, 4]
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {text!r} is not a list of whole numbers: write for example 1,2,4,8.") from error
    if min(numbers) < 1:
        raise UserError(f"{option} {text!r}: every number must be at least 1.")
    return numbers


def doctor(options: arguments.Doctor) -> int:
    """Print versions, device, threads and whether bf16 is fast."""
    import platform

    from fewstep.pipeline.bf16_speed import bf16_is_slow

    threads = set_threads()
    device = "cuda: " + torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"python      {platform.python_version()}")
    print(f"torch       {torch.__version__}")
    print(f"device      {device}")
    print(f"cores       {os.cpu_count()}, {threads} thread(s) used; set FEWSTEP_THREADS to change")
    print(f"bf16        {'slower than fp32 here' if bf16_is_slow(torch.device(default_device())) else 'yes'}")
    print("\nnext        fewstep demo")
    return 0
