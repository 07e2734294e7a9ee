"""The documents stay true: tables name what exists, links lead somewhere, Python examples run."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fewstep as fs
from fewstep.citations import CITATIONS
from fewstep.methods.registry import METHODS
from fewstep.pipeline.recipe import make_recipe
from fewstep.pipeline.run import run_recipe
from fewstep.training.world import LocalWorld

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
ROWS = [
    line.split("|")
    for line in (ROOT / "docs" / "equations.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and "::" in line
]


def find(dotted: str) -> object:
    """The object of a dotted name, module first."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AttributeError(dotted)


@pytest.mark.parametrize("row", ROWS, ids=[row[1].strip()[:30] for row in ROWS])
def test_every_equation_has_its_function_and_its_test(row: list[str]) -> None:
    assert callable(find(row[3].strip().strip("`")))
    file, name = row[4].strip().strip("`").split("::")
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE)


# what runs any solver: a row that names one of these does not say where its own formula is
GENERIC = ("fewstep.solvers.tables.table", "fewstep.solvers.solve.solve", "fewstep.solvers.loop.run")


def test_a_solvers_row_names_the_function_that_holds_its_formula() -> None:
    named = [row[3].strip().strip("`") for row in ROWS]
    assert sum(name.startswith("fewstep.solvers.") for name in named) >= 12
    assert [row[1] for row, name in zip(ROWS, named, strict=True) if name in GENERIC] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_examples_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "example"}  # the blocks of a document run one after the other
    for block in re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(document), "exec"), names)


def method_example() -> str:
    """The method file in CONTRIBUTING.md."""
    (source,) = re.findall(r"```py\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL)
    return str(source)


def unannotated(source: str) -> list[str]:
    """What mypy's ``disallow_untyped_defs`` refuses: functions without a return type, arguments without a type.

    (mypy itself takes eleven seconds of CPU time without its cache.)
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            own = node.args
            arguments = [*own.posonlyargs, *own.args, *own.kwonlyargs, own.vararg, own.kwarg]
            bare = [a.arg for a in arguments if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
            found += [f"{node.name}({name})" for name in bare]
            found += [] if node.returns is not None else [f"{node.name} -> ?"]
    return found


def test_the_example_of_a_method_is_annotated_and_fits_the_line_length() -> None:
    assert unannotated("def f(self, x, *y, z=1, **w: int): ...") == ["f(x)", "f(z)", "f(y)", "f -> ?"]
    source = method_example()
    assert sum(isinstance(node, ast.FunctionDef) for node in ast.walk(ast.parse(source))) >= 4
    assert unannotated(source) == []
    assert max(len(line) for line in source.splitlines()) <= 120


def test_the_example_of_a_method_trains_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The method file in CONTRIBUTING.md, registered as it says there, learns two narrow modes at -1 and 1."""
    source = method_example()
    assert len(source.splitlines()) < 60
    (tmp_path / "averaged.py").write_text(source, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "averaged", importlib.import_module("averaged").SPEC)
    random = np.random.default_rng(0)
    rows = random.choice([-1.0, 1.0], (500, 1)) + 0.05 * random.normal(size=(500, 1))
    np.save(tmp_path / "rows.npy", rows.astype(np.float32))
    stage = {"method": "averaged", "samples": 60_000}
    network = {"name": "mlp", "preset": "tiny"}
    recipe = {"data": str(tmp_path / "rows.npy"), "network": network, "stages": {"student": stage}}
    (folder,) = run_recipe(make_recipe(recipe, "recipe"), tmp_path / "out", LocalWorld())
    x = fs.load(folder).sample(400, steps=20, seed=0)
    near = ((x.abs() - 1.0).abs() < 0.3).float().mean()
    assert near > 0.8  # of the noise itself: 0.29


FAMILIES = re.findall(
    r"^\| `(\w+)` \| (.*`.*) \|$",
    (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("### What the families offer")[2].partition("###")[0],
    re.MULTILINE,
)


def test_contributing_names_every_family() -> None:
    families = ROOT / "src" / "fewstep" / "methods" / "families"
    assert sorted(name for name, _ in FAMILIES) == sorted({path.stem for path in families.glob("*.py")} - {"__init__"})


@pytest.mark.parametrize(("module", "text"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_the_functions_of_a_family_exist(module: str, text: str) -> None:
    names = re.findall(r"`([A-Za-z_]\w+)`", text)
    assert names
    for name in names:
        assert find(f"fewstep.methods.families.{module}.{name}") is not None


def test_every_file_named_in_contributing_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = set(re.findall(r"`((?:src|tests|methods|flow|solvers|contract)/[\w/]+\.py)`", text))
    assert len(named) >= 8
    package = ROOT / "src" / "fewstep"
    missing = {name for name in named if not any((at / name).exists() for at in (ROOT, package))}
    assert missing == {"src/fewstep/methods/averaged.py"}  # the example


def test_every_method_is_chosen_somewhere() -> None:
    """Above the table of methods, the table of choices names each; a feature network makes no samples."""
    choices = (ROOT / "docs" / "which-method.md").read_text("utf-8").split("| method | file |")[0]
    assert [name for name in METHODS if f"`{name}`" not in choices and name != "features"] == []


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "fewstep", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, fs.__version__), done.stderr
    wrong = subprocess.run([sys.executable, "-m", "fewstep", "smaple"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "sample" in wrong.stderr


def test_documents_hold_no_unfilled_place() -> None:
    for document in DOCUMENTS:
        assert not re.search(r"TODO|FIXME|_TABLE\b", document.read_text(encoding="utf-8")), document.name


def test_methods_table_names_every_method() -> None:
    text = (ROOT / "docs" / "which-method.md").read_text(encoding="utf-8")
    assert [name for name in METHODS if f"| `{name}` |" not in text] == []


# the bibliography


def cited() -> dict[str, list[str]]:
    """Every arXiv number in the package and the documents, with the files that name it."""
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "recipes").rglob("*.yaml"), *DOCUMENTS]
    found: dict[str, list[str]] = {}
    for file in files:
        # a month from 07 (2007, when these numbers began) to 26, two digits of month, then four or five digits
        for number in re.findall(
            r"(?<![\d.])(?:0[7-9]|1\d|2[0-6])(?:0[1-9]|1[0-2])\.\d{4,5}(?!\d)", file.read_text("utf-8")
        ):
            found.setdefault(number, []).append(file.name)
    return found


def test_the_bibliography_has_no_key_and_no_paper_twice() -> None:
    text = (ROOT / "src" / "fewstep" / "references.bib").read_text("utf-8")
    keys = re.findall(r"^@\w+\{(\w+),$", text, re.MULTILINE)
    papers = re.findall(r"^  eprint = \{(.*)\}", text, re.MULTILINE)
    assert len(keys) == len(CITATIONS) > 70
    assert keys == sorted(set(keys))
    assert sorted(papers) == sorted(set(papers))


def test_every_arxiv_number_has_an_entry() -> None:
    papers = {entry.fields["eprint"] for entry in CITATIONS.values() if "eprint" in entry.fields}
    numbers = cited()
    assert len(numbers) > 60
    assert {number: files for number, files in numbers.items() if number not in papers} == {}


def test_every_key_that_a_method_cites_is_an_entry() -> None:
    assert {key for spec in METHODS.values() for key in spec.cite} <= CITATIONS.keys()
