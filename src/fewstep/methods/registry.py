"""The methods by name. A new method is a new file beside this one, and its name in one line here.

Its file holds a ``SPEC`` (:class:`~fewstep.methods.contract.stage.Spec`), and its name is the file's.
"""

from __future__ import annotations

from importlib import import_module

from fewstep.errors import unknown
from fewstep.methods.contract.stage import Spec

NAMES = (  # in the order in which they are listed
    "flow_matching",
    "reflow",
    "distill",
    "instaflow",
    "slimflow",
    "features",
    "piecewise",
    "consistency_fm",
    "consistency",
    "meanflow",
    "lagrangian",
    "shortcut",
    "imm",
    "fgm",
    "sid",
    "dmd",
    "realuid",
)

METHODS: dict[str, Spec] = {name: import_module(f"fewstep.methods.{name}").SPEC for name in NAMES}


def find_method(name: object) -> Spec:
    """Look a method up by name.

    Args:
        name: a key of :data:`METHODS`, as a recipe gives it.

    Raises:
        UserError: there is no method of that name.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
