"""The house rules of the design, kept by reading the source: floors, cycles, import cost, sizes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fewstep

SOURCE = Path(fewstep.__file__).parent
FLOORS = {
    "__init__": 0, "errors": 0, "citations": 0,
    "flow": 1, "networks": 1, "data": 1, "store": 1,
    "solvers": 2, "metrics": 2,
    "diagnostics": 3, "methods": 3,
    "training": 4, "generator": 4,
    "interop": 5, "report": 5,
    "pipeline": 6,
    "cli": 7, "__main__": 7,
}  # fmt: skip
LIGHT = {
    "torch",
    "numpy",
    "fewstep",
}  # what the lower floors import at module top, beside the standard library
LIGHT_PACKAGES = ("flow", "networks", "store", "solvers", "metrics", "data")
MAX_FILE, MAX_FUNCTION, USUAL_FUNCTION = 400, 60, 40


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, ast.Module]:
    return {module_name(path): ast.parse(path.read_text("utf-8")) for path in sorted(SOURCE.rglob("*.py"))}


def house(module: str) -> str:
    """The package or top-level module of fewstep that a module belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(node: ast.AST) -> Iterator[str]:
    """The modules that an import names; ``from a import b`` names ``a.b`` where that is a module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute"
        assert node.module is not None
        submodules = [f"{node.module}.{alias.name}" for alias in node.names]
        found = [name for name in submodules if name in modules()]
        yield from found
        if len(found) < len(submodules):
            yield node.module


def dynamic(node: ast.AST) -> Iterator[str]:
    """Modules named in ``import_module("…")``."""
    if (
        isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
        and node.args
        and isinstance(node.args[0], ast.Constant)
    ):
        yield str(node.args[0].value)


def own_imports(module: str) -> list[tuple[str, int]]:
    """Every import of fewstep's own modules, wherever it stands: (module, line)."""
    return [
        (name, node.lineno)
        for node in ast.walk(modules()[module])
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Call))
        for name in [*imported(node), *dynamic(node)]
        if name.split(".")[0] == "fewstep"
    ]


def top_imports(module: str) -> list[tuple[str, int]]:
    """What runs on import: statements outside functions and outside ``if TYPE_CHECKING``."""
    found: list[tuple[str, int]] = []
    waiting: list[ast.AST] = [modules()[module]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        found.extend((name, node.lineno) for name in imported(node) if isinstance(node, ast.stmt))
        waiting.extend(ast.iter_child_nodes(node))
    return found


def functions() -> Iterator[tuple[str, int]]:
    """Every function and its number of lines, docstrings not counted."""
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[0]
                words = first.end_lineno - first.lineno + 1 if ast.get_docstring(node, clean=False) else 0
                size = node.end_lineno - node.lineno + 1 - words
                yield f"{module}.{node.name}, line {node.lineno}", size


def test_every_module_has_a_floor() -> None:
    assert {house(module) for module in modules()} <= FLOORS.keys()


@pytest.mark.parametrize("module", [m for m in modules() if m != "fewstep"])
def test_imports_go_down_the_floors(module: str) -> None:
    """Also inside functions and under TYPE_CHECKING; on the same floor only inside one package."""
    here = house(module)
    wrong = [
        f"line {line}: {module} (floor {FLOORS[here]}) imports {name} (floor {FLOORS[house(name)]})"
        for name, line in own_imports(module)
        if house(name) != here and FLOORS[house(name)] >= FLOORS[here] > 0
    ]
    assert not wrong, "\n".join(wrong)


def test_the_lowest_floor_imports_nothing_of_the_house() -> None:
    assert not own_imports("fewstep.errors")
    assert all(house(name) == "errors" for name, _ in own_imports("fewstep.citations"))
    assert not [name for name, _ in top_imports("fewstep") if name.startswith("fewstep")], "names are loaded lazily"


def test_there_are_no_circles() -> None:
    graph = {m: {name for name, _ in own_imports(m) if name != m} for m in modules() if m != "fewstep"}
    state: dict[str, str] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert state.get(module) != "open", f"circle: {' -> '.join((*trail[trail.index(module) :], module))}"
        if module in state:
            return
        state[module] = "open"
        for name in sorted(graph.get(module, ())):
            visit(name, (*trail, module))
        state[module] = "done"

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", [m for m in modules() if house(m) in LIGHT_PACKAGES])
def test_lower_floors_import_torch_and_numpy_only(module: str) -> None:
    allowed = LIGHT | sys.stdlib_module_names
    heavy = [f"line {line}: {name}" for name, line in top_imports(module) if name.split(".")[0] not in allowed]
    assert not heavy, f"{module} imports at module top what belongs into the function that uses it: {heavy}"


def test_the_lazy_table_names_what_exists() -> None:
    for name in fewstep.__all__:
        assert getattr(fewstep, name) is not None
    for attribute, module in fewstep._PUBLIC.items():
        assert module in modules(), attribute


@pytest.mark.parametrize("module", modules())
def test_files_are_short(module: str) -> None:
    tree = modules()[module]
    last = max((getattr(node, "end_lineno", 0) or 0 for node in ast.walk(tree)), default=0)
    assert last < MAX_FILE, f"{module} has {last} lines: split it"


def test_functions_are_short() -> None:
    sizes = dict(functions())
    long = {name: size for name, size in sizes.items() if size > MAX_FUNCTION}
    assert not long, f"longer than {MAX_FUNCTION} lines: {long}"
    assert sum(size < USUAL_FUNCTION for size in sizes.values()) >= 0.9 * len(sizes)


def test_nothing_inherits_from_a_final_class() -> None:
    classes = {
        node.name: node for tree in modules().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    }
    finals = {
        name
        for name, node in classes.items()
        if any(ast.unparse(d).split(".")[-1] == "final" for d in node.decorator_list)
    }
    for name, node in classes.items():
        parents = {ast.unparse(base).split(".")[-1] for base in node.bases} & finals
        assert not parents, f"{name} inherits from {parents}, which is final"


def python(*arguments: str) -> tuple[float, str]:
    """Seconds of CPU time and standard output of a Python process."""
    before = os.times()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.returncode == 0, done.stderr
    return seconds, done.stdout


HELP = """
import contextlib, io, sys
from fewstep.cli.main import main
for words in [["--help"], *([verb, "--help"] for verb in sys.argv[1:])]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    assert not code, words
    assert "usage" in out.getvalue().lower(), words
    loaded = {"torch", "numpy", "scipy", "matplotlib"} & set(sys.modules)
    assert not loaded, f"fewstep {' '.join(words)} loads {loaded}"
"""


def test_help_loads_neither_torch_nor_numpy() -> None:
    from fewstep.cli.verbs import VERBS

    python("-c", HELP, *VERBS)


@pytest.mark.parametrize("arguments", [("--help",), ("sample", "--help")])
def test_help_takes_less_work_than_importing_torch(arguments: tuple[str, ...]) -> None:
    """In seconds of CPU time, which other processes on the machine hardly change."""
    seconds, said = python("-m", "fewstep.cli.main", *arguments)
    assert "usage" in said.lower()
    assert seconds < importing_torch()


@cache
def importing_torch() -> float:
    """Seconds of CPU time that importing torch takes here."""
    return python("-c", "import torch")[0]


def test_importing_fewstep_does_not_import_torch() -> None:
    python("-c", "import sys, fewstep; assert not {'torch', 'numpy'} & set(sys.modules), 'heavy'")
