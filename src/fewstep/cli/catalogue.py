"""The verb ``list``: the names of one kind, and the coefficients of a solver."""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.cli import arguments
from fewstep.errors import UserError, unknown


def list(options: arguments.List) -> int:
    """Print the names of one kind, each with one line."""
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
    "recipes": "fewstep run NAME --dry shows its stages, network calls and estimated minutes",
}


def catalogue(what: str) -> Sequence[tuple[str, str]]:
    """The names of a kind, each with one line."""
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
