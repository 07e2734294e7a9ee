"""Errors that a user can cause; each message says what is wrong, why, and what to do.

The command line turns every :class:`UserError` into one message and exit code 2. Any other exception is a
defect of the library and keeps its traceback.
"""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave: an argument, a file, a recipe key, a combination."""


class MissingExtra(UserError):
    """An optional dependency is needed and not installed."""


def suggestion(given: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? "`` for the known word most like ``given``, or an empty string.

    >>> suggestion("hein", ["euler", "heun"]), suggestion("zzz", ["euler", "heun"])
    ("did you mean 'heun'? ", '')
    """
    near = difflib.get_close_matches(str(given), list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""


def with_present_names(kind: str, fields: Mapping[str, Any], former: Mapping[str, str]) -> dict[str, Any]:
    """The fields with former names replaced by the present ones, and a ``FutureWarning`` for each.

    A former name beside its present one is left for the caller to refuse.

    Args:
        kind: what the names are, for the message ("option").
        fields: values by name.
        former: former name: present name.
    """
    present = dict(fields)
    for old, new in former.items():
        if old in present and new not in present:
            message = f"{kind} {old!r} is now called {new!r}; the next version refuses the old name: rename it"
            warnings.warn_explicit(message, FutureWarning, filename="recipe", lineno=1, module="recipe")
            present[new] = present.pop(old)
    return present


def unknown(kind: str, given: object, known: Iterable[str]) -> UserError:
    """Build the error for a name that is not in a list, with the most similar known name.

    Args:
        kind: what the name is, for the message ("solver").
        given: the name that was given.
        known: the names that exist.

    Returns:
        The error, to be raised by the caller.

    >>> str(unknown("solver", "eulr", ["euler", "heun"]))
    "unknown solver 'eulr': did you mean 'euler'? Known: euler, heun."
    """
    words = sorted(known)
    return UserError(f"unknown {kind} {given!r}: {suggestion(str(given), words)}Known: {', '.join(words)}.")


def require_extra(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: the package's import name.
        extra: the extra of fewstep that installs it.

    Raises:
        MissingExtra: the package is not installed; the message gives the pip command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{module!r} is not installed, and this needs it: pip install 'fewstep[{extra}]'."
        ) from error
