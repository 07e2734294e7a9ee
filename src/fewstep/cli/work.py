"""What the verbs do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fewstep.cli import arguments
from fewstep.errors import UserError, unknown
from fewstep.store.files import atomic_file, make_folder, write_array, write_json
from fewstep.training.world import LocalWorld, default_device, set_threads

if TYPE_CHECKING:
    from fewstep.generator import Generator


def check_place(folder: Path) -> None:
    """Refuse a folder that could not be made or written to, and make nothing yet."""
    make_folder(next(part for part in (folder, *folder.parents) if os.path.lexists(part)))


def demo(options: arguments.Demo) -> int:
    """The digits recipe, from data to report."""
    changed = arguments.Run("digits", out=options.out, set=(f"seed={options.seed}",))
    return run(changed)


def run(options: arguments.Run) -> int:
    """Run a recipe and compare its stages."""
    from fewstep.pipeline.dry import show_plan
    from fewstep.pipeline.feature_checks import models_among
    from fewstep.pipeline.finish import finish_run
    from fewstep.pipeline.recipe import load_recipe
    from fewstep.pipeline.run import run_recipe

    set_threads()
    recipe = load_recipe(options.recipe, options.set)
    out = options.out or Path("runs") / Path(options.recipe).stem
    check_place(out)
    if options.dry:
        print(show_plan(recipe, out))
        print("next:   the same command without --dry")
        return 0
    world = LocalWorld()
    folders = run_recipe(recipe, out, world)
    if world.rank == 0:
        report = finish_run(recipe, out, folders)
        models, names = models_among(folders), ", ".join(folder.name for folder in folders)
        if report is None:
            print(f"\nwrote   {out}: {names} (features)")
            print(f"next    fewstep compare MODEL --data DATA --features {folders[-1]}")
        else:
            print(f"\nwrote   {out}: {names} (a model each), compare.json\nreport  {report}")
            print(f"next    fewstep sample {models[-1]} --num 64 --out samples.png")
    world.barrier()
    return 0


def sample(options: arguments.Sample) -> int:
    """Draw samples into a file."""
    from fewstep.cli import diagnosis_text as diagnosis
    from fewstep.diagnostics.tune import KINDS
    from fewstep.generator import load
    from fewstep.generator.choose import TUNED_CALLS

    set_threads()
    write = writer(options.out)
    model = load(options.model, device=default_device())
    x = model.sample(
        options.num,
        steps=options.steps,
        solver=options.solver,
        grid=options.grid,
        label=options.label,
        guidance=options.guidance,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    write(x, model)
    print(f"wrote {options.out}: {len(x)} samples of shape {tuple(x.shape[1:])}, in the data's units")
    if options.solver in KINDS:
        choice = model.tune(options.steps or TUNED_CALLS, options.solver, options.guidance)  # the one just used
        print(f"{options.solver}, {diagnosis.advice(choice)}")
    print(f"next  fewstep compare {options.model} --data {model.config.data.get('name') or 'DATA'}")
    return 0


def writer(path: Path) -> Callable[[torch.Tensor, Generator], None]:
    """How samples are written to a file of this name; checked before anything is sampled."""
    if path.is_dir():
        raise UserError(f"--out {path} is a folder: give a file's name, such as {path / 'samples.npy'}.")
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".npz", ".png"):
        raise UserError(f"--out {path}: samples are written as .npy, .npz or .png, by the file's ending.")
    check_place(path.parent)

    def write(x: torch.Tensor, model: Generator) -> None:
        if suffix == ".npy":
            write_array(path, x.numpy())
        elif suffix == ".npz":
            with atomic_file(path) as temporary, temporary.open("wb") as file:
                np.savez(file, x=x.numpy())
        else:
            from fewstep.report import write_sheet

            # black and white are the ends of the data's range, not of these samples'
            clip = (model.config.scaling or {}).get("clip")
            write_sheet(x, path, limits=tuple(clip) if clip and x.ndim > 2 else None)

    return write


def diagnose(options: arguments.Diagnose) -> int:
    """Measure a velocity model along its trajectories, and find its best samplers."""
    from fewstep.cli import diagnosis_text as diagnosis
    from fewstep.diagnostics.diagnose import diagnose as measure
    from fewstep.generator import load

    set_threads()
    if options.num < 2:
        raise UserError(f"--num must be at least 2, got {options.num}.")
    calls = [] if options.calls == "none" else number_list("--calls", options.calls)
    model = load(options.model, device=default_device())
    if model.config.rule.kind != "velocity":
        raise UserError(
            f"{options.model} is a one-step map, and has no velocity along t: diagnose the flow it was distilled from."
        )
    if options.out is not None:
        check_place(options.out)
    draw = model.draw(options.num, steps=1, solver="euler", grid="uniform", seed=options.seed)
    d = measure(model.module, draw.x0.to(model.device), cond=draw.conditions(model.device))
    print(f"model            {options.model}")
    print("\n".join(diagnosis.measures(d)), flush=True)
    lines, values = diagnosis.likelihood(model, options.data, options.seed) if options.data else ([], None)
    for line in lines:
        print(line, flush=True)
    found = diagnosis.choices(model, calls)
    for choice in found:
        print(f"best at          {diagnosis.advice(choice)}")
    words = diagnosis.conclusions(model, d, found)
    print("\n" + "\n".join(f"- {line}" for line in words) + "\n")
    if options.out is not None:
        fields = {"verdict": words, "choices": [choice.as_dict() for choice in found], "likelihood": values}
        write_json(options.out / "diagnosis.json", d.as_dict() | fields)
        print(f"wrote {options.out / 'diagnosis.json'}")
    print(f"next  fewstep sample {options.model} --num 64 --steps 8 --solver auto --out samples.npy")
    return 0


def compare(options: arguments.Compare) -> int:
    """Compare models on data."""
    from fewstep.data.load import load_data
    from fewstep.generator import load
    from fewstep.pipeline.compare import compare as measure
    from fewstep.pipeline.compare import name_apart, table
    from fewstep.pipeline.feature_checks import find_judge, models_among
    from fewstep.pipeline.finish import write_comparison

    set_threads()
    steps = number_list("--steps", options.steps)
    if options.samples is not None and options.samples < 1:
        raise UserError(f"--samples must be at least 1, got {options.samples}.")
    if options.out is not None:
        check_place(options.out)
    folders = models_among(options.models)
    for folder in options.models:
        if folder not in folders:
            print(f"  {folder} holds features, nothing to compare: --features {folder} judges by them")
    models = [load(folder, device=default_device()) for folder in folders]
    name_apart(models, folders)
    data = load_data(options.data)
    result = measure(
        models,
        data,
        steps=steps,
        solver=options.solver,
        grid=options.grid,
        samples=options.samples,
        seed=options.seed,
        features=find_judge(options.features, data, default_device()),
    )
    print("\n" + table(result))
    if options.out is None:
        print("\nnext  the same with --out DIR writes compare.json and an HTML report")
        return 0
    report = write_comparison(make_folder(options.out), result, models, data)
    print(f"\nwrote   {options.out}: compare.json, compare.md\nreport  {report}")
    print(f"next    fewstep sample {folders[-1]} --num 64 --out samples.png")
    return 0


def number_list(option: str, words: str) -> Sequence[int]:
    """``1,2,4`` as numbers."""
    try:
        numbers = [int(word) for word in words.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {words!r} is not a list of whole numbers: write for example 1,2,4,8.") from error
    if min(numbers) < 1:
        raise UserError(f"{option} {words!r}: every number must be at least 1.")
    return numbers


def list(options: arguments.List) -> int:
    """List what there is."""
    if options.what not in arguments.LISTS:
        raise unknown("list", options.what, arguments.LISTS)
    if options.table is not None:
        return show_table(options)
    if (options.steps, options.grid, options.path) != (None, None, None):
        raise UserError("--steps, --grid and --path belong to --table: fewstep list solvers --table heun --steps 4.")
    for name, text in catalogue(options.what):
        first, *more = text.splitlines() or [""]
        print("\n".join([f"{name:20} {first}".rstrip(), *(f"    {line}" for line in more)]))
    if options.what == "solvers":
        from fewstep.solvers.show import NOTATION

        print(f"\n{NOTATION}")
    print(f"\nnext  {NEXT[options.what]}")
    return 0


def show_table(options: arguments.List) -> int:
    """Print a solver's rows on a grid."""
    from fewstep.flow.grids import explicit_times, make_grid
    from fewstep.flow.paths import make_path
    from fewstep.solvers.show import rows
    from fewstep.solvers.tables import table

    if options.what != "solvers":
        raise UserError(f"--table belongs to solvers: write fewstep list solvers --table {options.table}.")
    assert options.table is not None
    spec = options.grid or "uniform"
    steps = options.steps if options.steps is not None or explicit_times(spec) is not None else 4
    path = options.path or "linear"
    made = table(options.table, make_grid(spec, steps), make_path(path))
    print(f"{options.table} on {spec}, {len(made.grid) - 1} steps, {path} path: {len(made.times)} network calls\n")
    print("\n".join(rows(made)))
    print(f"\nnext  {NEXT['solvers']}")
    return 0


NEXT = {
    "methods": "name one in a recipe's stage, as in 'fewstep list recipes'",
    "solvers": "fewstep sample MODEL --num 64 --solver NAME --steps 8 --out x.npy",
    "data": "name one, or a path, under 'data' in a recipe",
    "networks": "name one under 'network' in a recipe: {name: NAME, preset: PRESET}",
    "grids": "fewstep sample MODEL --num 64 --grid NAME --steps 8 --out x.npy",
    "recipes": "fewstep run NAME --dry shows what it would do",
}


def catalogue(what: str) -> Sequence[tuple[str, str]]:
    """Names and one line each."""
    if what == "methods":
        from fewstep.methods.registry import METHODS

        return [(name, f"{spec.summary} (needs {spec.learns_from})") for name, spec in METHODS.items()]
    if what == "solvers":
        return solver_entries()
    if what == "grids":
        from fewstep.flow.grids import FROM_MODEL, GRIDS

        named = [(name, (f.__doc__ or "").splitlines()[0].replace("``", "")) for name, f in GRIDS.items()]
        return [*named, *FROM_MODEL.items()]
    if what == "networks":
        from fewstep.networks import NETWORKS

        return [(name, "presets " + ", ".join(n.presets)) for name, n in NETWORKS.items()]
    if what == "recipes":
        from fewstep.pipeline.recipe import shipped_recipes

        return [(name, str(path)) for name, path in shipped_recipes().items()]
    from fewstep.data.builtin import DATA

    return [
        *((name, entry.description) for name, entry in DATA.items()),
        ("PATH", ".npy, .npz, idx (.gz) or a folder of images"),
    ]


def solver_entries() -> Sequence[tuple[str, str]]:
    """Every name that ``--solver`` takes: order, network calls, source and formula."""
    from fewstep.solvers.adaptive import ADAPTIVE
    from fewstep.solvers.show import entries, text

    pair, order = ADAPTIVE["rk45"], "adaptive, order 5(4)"
    linear = "y_j = a_j x_0 + sum_(k<j) b_jk v(y_k, t_k); t_j, a_j, b_jk minimise the error of the end points"
    return [
        *entries(),
        ("rk45", text(order, f"{pair.formula}; a step size per sample; rk45:1e-4 sets the tolerance", pair.source)),
        ("dopri5", text(order, "as rk45, one step size per batch, by torchdiffeq (extra 'adaptive')", pair.source)),
        ("fitted", text("fitted to the model", linear, "arXiv:2403.01329")),
        ("auto", "the most accurate of these solvers on the model, with its grid"),
    ]


def doctor(options: arguments.Doctor) -> int:
    """Say what this machine can do."""
    import platform

    threads = set_threads()
    device = "cuda: " + torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"python      {platform.python_version()}")
    print(f"torch       {torch.__version__}")
    print(f"device      {device}")
    print(f"cores       {os.cpu_count()}, {threads} thread(s) used; set FEWSTEP_THREADS to change")
    print(f"bf16        {'yes' if bf16_is_fast() else 'slower than fp32 here'}")
    print("\nnext        fewstep demo")
    return 0


def bf16_is_fast() -> bool:
    """Whether a bf16 matrix product is quicker than a float32 one."""
    import time

    def seconds(dtype: torch.dtype) -> float:
        device: Any = "cuda" if torch.cuda.is_available() else "cpu"
        a = torch.ones(512, 512, dtype=dtype, device=device)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            (a @ a).sum().item()
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < seconds(torch.float32)
