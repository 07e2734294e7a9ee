"""The house rules of the design, kept by reading the source: floors, cycles, import cost, sizes."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fewstep
from fewstep.methods.registry import METHODS

SOURCE = Path(fewstep.__file__).parent
FLOORS = {
    "__init__": 0, "errors": 0, "citations": 0,
    "flow": 1, "networks": 1, "data": 1, "store": 1,
    "solvers": 2, "metrics": 2,
    "diagnostics": 3, "methods": 3,
    "training": 4, "generator": 4,
    "interop": 5, "report": 5,
    "pipeline": 6,
    "cli": 7,
    "__main__": 8,
}  # fmt: skip
LIGHT = {
    "torch",
    "numpy",
    "fewstep",
}  # what the lower floors import at module top, beside the standard library
LIGHT_PACKAGES = ("flow", "networks", "store", "solvers", "metrics", "data")
MAX_FILE, MAX_FUNCTION = 400, 60
MEDIAN_FUNCTION, USUAL_FUNCTION = 8, 25  # lines of the median function, and of nine in ten
TESTS_PER_SOURCE = 0.65  # lines of tests per line of source

METHOD_FLOORS = {"contract": 0, "training_pairs": 1, "families": 2, "guards": 2, "paper": 3, "registry": 4}
ACROSS = {  # imports between families and guards, which share a floor
    ("families", "guards"),
    ("guards", "families"),
}
GUARDS_MAY_IMPORT = {"fewstep.methods.families.straight_line"}  # how a one-step student is called
SHARED_STEMS = {
    "__init__": "every package has one",
    "registry": "the table of a package's names; networks and methods have one each",
}
PROBING = ("getattr(options", "hasattr(options", "isinstance(options", "model_dump().get(")


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
    assert last <= MAX_FILE, f"{module} has {last} lines: split it"


def test_functions_are_short() -> None:
    sizes = dict(functions())
    long = {name: size for name, size in sizes.items() if size > MAX_FUNCTION}
    assert not long, f"longer than {MAX_FUNCTION} lines: {long}"
    assert statistics.median(sizes.values()) <= MEDIAN_FUNCTION
    assert sum(size <= USUAL_FUNCTION for size in sizes.values()) >= 0.9 * len(sizes)


def test_there_are_enough_tests() -> None:
    def lines(folder: Path) -> int:
        return sum(len(path.read_text("utf-8").splitlines()) for path in folder.rglob("*.py"))

    assert lines(Path(__file__).parent) >= TESTS_PER_SOURCE * lines(SOURCE)


def papers() -> list[str]:
    """The method files: the modules at the top of ``methods``, without the registry."""
    tops = [name for name in modules() if name.startswith("fewstep.methods.") and name.count(".") == 2]
    packages = {path.parent.name for path in (SOURCE / "methods").glob("*/__init__.py")}
    return [name for name in tops if name.split(".")[-1] not in {*packages, "registry"}]


def method_floor(module: str) -> str:
    """The floor of a module of ``methods``: its folder, or ``paper`` or ``registry``."""
    parts = module.split(".")[2:]
    return parts[0] if parts[0] in METHOD_FLOORS else "paper"


def test_every_file_at_the_top_of_methods_is_a_registered_method() -> None:
    registered = {id(spec) for spec in METHODS.values()}
    assert len(papers()) == len(METHODS) > 0
    for name in papers():
        spec = importlib.import_module(name).SPEC
        assert id(spec) in registered, f"{name} has a SPEC that is not in METHODS"
    for name in METHODS:
        assert f"fewstep.methods.{name}" in papers(), f"method {name!r} has no file of its name"


@pytest.mark.parametrize("module", [m for m in modules() if m.startswith("fewstep.methods.")])
def test_methods_have_floors_of_their_own(module: str) -> None:
    """contract < training_pairs < families, guards < papers < registry; no paper imports a paper."""
    here, wrong = method_floor(module), []
    for name, line in own_imports(module):
        if not name.startswith("fewstep.methods."):
            continue
        there = method_floor(name)
        inside = there == here != "paper" or (here, there) in ACROSS
        if METHOD_FLOORS[there] >= METHOD_FLOORS[here] and not inside:
            wrong.append(f"line {line}: {module} ({here}) imports {name} ({there})")
        if (here, there) == ("guards", "families") and name not in GUARDS_MAY_IMPORT:
            wrong.append(f"line {line}: {module} imports {name}: families call guards, not the reverse")
    assert not wrong, "\n".join(wrong)


def test_no_two_modules_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        places.setdefault(path.stem, []).append(str(path.relative_to(SOURCE)))
    twice = {stem: found for stem, found in places.items() if len(found) > 1 and stem not in SHARED_STEMS}
    assert not twice, f"modules of one name: {twice}: rename one, or give the reason in SHARED_STEMS"


def test_options_are_not_probed() -> None:
    """What an option means is decided by its class; nobody asks an options object whether it has a field."""
    found = [
        f"{path.relative_to(SOURCE)}, line {number}: {line.strip()}"
        for path in sorted(SOURCE.rglob("*.py"))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if any(words in line for words in PROBING)
    ]
    assert not found, "\n".join(found)


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


PLANT = """
import contextlib, io, json, sys
from pathlib import Path
import numpy as np, torch
import fewstep
from fewstep.cli.main import main

out = Path(sys.argv[1])
assert out in Path(fewstep.__file__).parents, "the copy is what is tested"

def quietly(*words):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main([str(word) for word in words])
    assert code == 0, (words, said.getvalue())
    return said.getvalue()

torch.set_num_threads(1)
assert "quadratic_flow" in quietly("list", "methods")
dry = quietly("run", out / "recipe.yaml", "--out", out / "run", "--dry")
assert "quadratic_flow" in dry and not (out / "run").exists(), dry
quietly("run", out / "recipe.yaml", "--out", out / "run")
quietly("sample", out / "run/early", "--num", 300, "--steps", 8, "--out", out / "samples.npy")
models = out / "run/early", out / "run/fast"
quietly("compare", *models, "--data", "moons", "--steps", "1,8", "--samples", 100, "--out", out / "compared")
assert np.load(out / "samples.npy").shape == (300, 2)
assert len(json.loads((out / "compared/compare.json").read_text())["rows"]) >= 3
"""
PLANT_RECIPE = """
data: {name: moons, samples: 500}
network: {name: mlp, width: 16, blocks: 1, embedding: 8}
stages:
  early: {method: quadratic_flow, power: 1.0, samples: 12_000, batch_size: 128}
  fast: {method: distill, teacher: early, pairs: 300, nfe: 8, tolerance: 1e6, samples: 2_000, batch_size: 128}
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with one more file, and one more method in its registry."""
    folder = tmp_path_factory.mktemp("planted")
    shutil.copytree(SOURCE, folder / "fewstep", ignore=shutil.ignore_patterns("__pycache__"))
    here = folder / "fewstep/methods"
    shutil.copy(Path(__file__).with_name("planted_method.py.txt"), here / "quadratic_flow.py")
    registry = (here / "registry.py").read_text("utf-8")
    line = '    "realuid",\n'
    assert registry.count(line) == 1
    registry = registry.replace(line, line + '    "quadratic_flow",\n')
    (here / "registry.py").write_text(registry, "utf-8")
    (folder / "recipe.yaml").write_text(PLANT_RECIPE, "utf-8")
    return folder


def in_copy(planted: Path, *arguments: str) -> str:
    """Run Python with the copy in the package's place."""
    paths = os.pathsep.join([str(planted), *(path for path in sys.path if path and Path(path) != SOURCE.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_new_method_is_one_file_and_one_line_in_the_registry(planted: Path) -> None:
    """Its recipe is shown, run, sampled, compared and learned from, and it is listed: nothing else is changed."""
    before = {path.relative_to(SOURCE): path.read_bytes() for path in SOURCE.rglob("*.py")}
    copy = planted / "fewstep"
    after = {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*.py")}
    changed = {str(path) for path in after if after[path] != before.get(path)}
    assert changed == {"methods/quadratic_flow.py", "methods/registry.py"}
    in_copy(planted, "-c", PLANT, str(planted))


def test_a_new_method_is_held_to_the_contract_without_a_word(planted: Path) -> None:
    """tests/test_contract.py finds it in the registry."""
    chosen = "quadratic_flow and not two_processes and not labels and not image"
    test = str(Path(__file__).with_name("test_contract.py"))
    said = in_copy(
        planted, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(planted), "-k", chosen, test
    )
    assert re.search(r"\b7 passed", said), said  # three settings, precision, stopping, training, its options
