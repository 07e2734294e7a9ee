"""Every public name has a docstring, and every name in ``fewstep.__all__`` an example that runs as a doctest."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import pytest

import fewstep

# Modules that have public names without a docstring. The list only gets shorter: no module may be added.
UNDOCUMENTED: set[str] = set()
# Public names without an example. The list only gets shorter: no name may be added.
WITHOUT_EXAMPLE = {
    "Choice", "Generator", "UserError", "load",
}  # fmt: skip


@cache
def modules() -> list[ModuleType]:
    found = [info.name for info in pkgutil.walk_packages(fewstep.__path__, "fewstep.")]
    return [fewstep, *(importlib.import_module(name) for name in found if not name.endswith("__main__"))]


def own(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The public functions and classes that a module defines."""
    for name, value in vars(module).items():
        if name.startswith("_") or not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        if value.__module__ == module.__name__ and value.__qualname__ == name:
            yield name, value


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties of a class that no documented base class has."""
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__wrapped__", value)
        function = function.__func__ if isinstance(function, (classmethod, staticmethod)) else function
        function = getattr(function, "func", function)  # a cached property
        if name.startswith("_") or not inspect.isfunction(function) or function.__name__ == "<lambda>":
            continue  # a lambda is the default of a dataclass field
        bases = [vars(base)[name] for base in cls.__mro__[1:] if name in vars(base)]
        if not any(inspect.getdoc(base) for base in bases):
            yield name, function


def documented(value: Any) -> bool:
    """Whether it has a docstring of its own; what ``dataclass`` writes by itself does not count."""
    text = (value.__doc__ or "").strip()
    return bool(text) and not text.startswith(f"{value.__name__}(")


def undocumented(module: ModuleType) -> list[str]:
    names = [] if documented(module) else [module.__name__]
    for name, value in own(module):
        names += [] if documented(value) else [name]
        if inspect.isclass(value):
            names += [f"{name}.{method}" for method, function in methods(value) if not documented(function)]
    return names


def test_every_public_name_has_a_docstring() -> None:
    missing = {module.__name__: undocumented(module) for module in modules()}
    assert sum(len(list(own(module))) for module in modules()) > 400
    assert {name: names for name, names in missing.items() if names and name not in UNDOCUMENTED} == {}


def test_a_name_without_a_docstring_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself, on a module made for it."""
    source = '''
from abc import ABC, abstractmethod
from dataclasses import dataclass

class Base(ABC):
    """Documented."""

    @abstractmethod
    def told(self):
        """Documented."""

@dataclass
class Child(Base):
    field: int = 0

    def told(self): ...
    def untold(self): ...
    @property
    def bare(self): ...
    def _private(self): ...

def loose(): ...
'''
    module = ModuleType("made")
    monkeypatch.setitem(sys.modules, "made", module)
    exec(source, module.__dict__)
    assert undocumented(module) == ["made", "Child", "Child.untold", "Child.bare", "loose"]


@pytest.mark.parametrize("name", [name for name in fewstep.__all__ if name != "__version__"])
def test_every_exported_name_has_an_example(name: str) -> None:
    has_example = ">>> " in (getattr(fewstep, name).__doc__ or "")
    assert has_example or name in WITHOUT_EXAMPLE, f"fewstep.{name} has no example in its docstring"
