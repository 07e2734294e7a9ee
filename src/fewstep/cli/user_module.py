"""The user's own code, named on the command line: ``--module file.py:make``.

It runs only when the user names it there. A mistake in the user's file is shown with its file, line and message.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fewstep.errors import UserError, suggestion
from fewstep.flow.noise import isolated_rng
from fewstep.generator import Generator
from fewstep.networks.adapter import Adapter
from fewstep.networks.foreign import Foreign

PRIVATE = "_fewstep_user_"  # prefix of the name under which the file is imported
CODE = re.compile(r"(?P<file>.+\.py)(:(?P<name>\w*))?")  # what a place that is code looks like

Made = nn.Module | Generator


def is_code(place: str | Path) -> bool:
    """Whether a place names Python code, ``file.py`` or ``file.py:make``, and no folder.

    >>> is_code("mine.py:make"), is_code("runs/teacher")
    (True, False)
    """
    return CODE.fullmatch(str(place)) is not None and not Path(place).is_dir()


def call_made(place: str) -> Made:
    """What the user's function returns: a network or a generator.

    Args:
        place: ``file.py:make``.

    Raises:
        UserError: no such file or function; a mistake in the user's code; another result.
    """
    path, name = _split(place)
    with isolated_rng(), _importable(path.resolve().parent), _mistakes_of(place, path):
        torch.default_generator.manual_seed(0)  # random weights are the same ones at every call, and a run resumes
        function = _function(_import(path), path, name)
        made = function()
    if not isinstance(made, nn.Module | Generator):
        raise UserError(
            f"--module {place}: {name}() returned {_what(made)}, and it must return a network v(x, t, **cond) (a "
            "torch.nn.Module, or fs.adapt(module, call)) or an fs.Generator. Does it end with 'return net'?"
        )
    _name_plainly(network_of(made))
    return made


def network_of(made: Made) -> nn.Module:
    """The network of what the user's function returned."""
    return made.module if isinstance(made, Generator) else made


def foreign_of(made: Made) -> Foreign:
    """The network as one from outside; one that is called by this library's convention is wrapped."""
    network = network_of(made)
    if isinstance(network, Foreign):
        return network
    wrapped = Adapter(network)
    _name_plainly(wrapped)
    return wrapped


def _split(place: str) -> tuple[Path, str]:
    """File and function of ``file.py:make``."""
    found = CODE.fullmatch(place)
    if found is None:
        raise UserError(f"--module {place!r} must be a file and a function in it: --module file.py:make.")
    path, name = Path(found["file"]).expanduser(), found["name"]
    if not path.is_file():
        near = suggestion(path.name, [other.name for other in path.parent.glob("*.py")])
        raise UserError(f"--module {place}: there is no file {str(path)!r}: {near}give --module file.py:make.")
    if not name:
        known = _functions(path)
        fix = f"--module {path}:{known[0]}" if known else f"def make(): return net, and --module {path}:make"
        raise UserError(
            f"--module {place} names a file and no function: add the name of the function that makes your network, "
            f"{fix}."
        )
    return path, name


def _functions(path: Path) -> list[str]:
    """The functions that a file defines, read without running it; those whose name begins with ``make`` first."""
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError):
        return []
    names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return sorted(names, key=lambda name: not name.startswith("make"))


def _import(path: Path) -> ModuleType:
    name = PRIVATE + re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "a file that ends in .py has a loader"
    assert spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # classes of the module look themselves up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _function(module: ModuleType, path: Path, name: str) -> Callable[[], Any]:
    known = _functions(path)
    found = vars(module).get(name)
    if found is None:
        near = suggestion(name, known)
        defined = f"it defines {', '.join(known)}" if known else "it defines no function"
        raise UserError(f"{path} has no function {name!r}: {near}{defined[0].upper()}{defined[1:]}.")
    if not callable(found):
        raise UserError(
            f"{path}: {name!r} is {_what(found)}, and --module needs a function that returns the network: "
            f"def make(): return {name}, and --module {path}:make."
        )
    function: Callable[[], Any] = found
    return function


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Files beside the user's can be imported, as where Python runs it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def _mistakes_of(place: str, path: Path) -> Iterator[None]:
    """Turn an error in the user's code into a message with its file, line and text."""
    try:
        yield
    except UserError as error:
        where = _line_in(error, path)
        raise UserError(f"--module {place}: {error}{f' ({where})' if where else ''}") from error
    except SyntaxError as error:
        raise UserError(
            f"--module {place}: {Path(error.filename or path).name}, line {error.lineno}: {type(error).__name__}: "
            f"{error.msg}. Correct that line."
        ) from error
    except (Exception, SystemExit) as error:
        message = " ".join(str(error).split()) or "no message"
        where = _line_in(error, path) or str(path)
        raise UserError(
            f"--module {place} failed at {where}: {type(error).__name__}: {message}. It is called without arguments, "
            "and returns the network; correct that line."
        ) from error


def _line_in(error: BaseException, path: Path) -> str:
    """The last line of the user's file on the way to an error; empty where there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == path.name]
    return f"{path}, line {frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _name_plainly(network: nn.Module) -> None:
    """Record the class as one of the user's file, not of the private name under which that was imported."""
    if isinstance(network, Adapter):
        network.name = network.name.removeprefix(PRIVATE)


def _what(value: Any) -> str:
    return "nothing (None)" if value is None else f"a {type(value).__name__}"
