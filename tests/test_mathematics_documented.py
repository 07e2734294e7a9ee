"""Every public function, class and method of the mathematics and the diagnostics says what it computes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fewstep

SOURCE = Path(fewstep.__file__).parent
FILES = sorted(path for folder in ("flow", "diagnostics") for path in (SOURCE / folder).glob("*.py"))


def undocumented(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[str]:
    """Public definitions without a docstring; what is inside a function is not public."""
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.ClassDef):
            continue
        if child.name.startswith("_") and child.name != "__call__":
            continue
        if ast.get_docstring(child) is None:
            yield prefix + child.name
        if isinstance(child, ast.ClassDef):
            yield from undocumented(child, f"{child.name}.")


def test_missing_docstrings_are_found() -> None:
    text = 'class A:\n    "a"\n    def f(self): ...\n    def _g(self): ...\n    def __call__(self): ...\ndef h(): ...\n'
    assert list(undocumented(ast.parse(text))) == ["A.f", "A.__call__", "h"]
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_public_definition_has_a_docstring(path: Path) -> None:
    assert list(undocumented(ast.parse(path.read_text("utf-8")))) == []
